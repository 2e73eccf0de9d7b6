"""What the evaluation page shows: samples, samples beside their nearest training images, walks through w."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dermis.imaging import Images
from dermis.latents import z_for
from dermis.metrics.neighbours import Features, nearest
from dermis.network_config import NoiseMode
from dermis.networks import Generator, one_hot
from dermis.synthesizer import Synthesizer

NEIGHBOURS = 5
STEPS = 9


@dataclass(frozen=True)
class Match:
    """A generated image with the training images nearest to it, nearest first.

    closeness is the distance to the nearest over that to the last of them: near 1 where the sample is one of many, 0
    for a copy. It is told from the last one, not from the second, so that a copy of an image that the training set
    holds twice shows too.
    """

    sample: int
    label: int
    image: Images
    neighbours: Images
    distances: NDArray[np.float64]
    closeness: float


@dataclass(frozen=True)
class Drawing:
    """Draws the pictures of one generator, all from one seed and at one truncation. uint8 [N, H, W, channels]."""

    generator: Generator
    synthesizer: Synthesizer
    seed: int
    truncation_psi: float
    noise_mode: NoiseMode = "random"

    def samples(self, label: int, count: int) -> Images:
        """The first `count` samples of one class, not selected."""
        return self._images(range(count), [label] * count)

    def matches(
        self,
        labels: NDArray[np.int64],
        generated: Features,
        real: Features,
        real_images: NDArray[np.uint8],
        *,
        closest: int,
        even: int,
    ) -> tuple[list[Match], list[Match]]:
        """The `closest` samples that are most like copies, and `even` ones spread evenly over all, not selected.

        generated [M, dim] are the features of samples 0 ... M - 1, of classes labels [M]; real [N, dim] those of
        real_images [N, H, W, 3].
        """
        distances, indices = nearest(generated, real, min(NEIGHBOURS, len(real)))
        closeness = distances[:, 0] / np.maximum(distances[:, -1], np.finfo(float).tiny)

        def match(chosen: list[int]) -> list[Match]:
            images = self._images(chosen, labels[chosen].tolist())
            return [
                Match(i, int(labels[i]), image, real_images[indices[i]], distances[i], float(closeness[i]))
                for i, image in zip(chosen, images, strict=True)
            ]

        spread = np.linspace(0, len(labels) - 1, min(even, len(labels))).round().astype(int)
        return match(np.argsort(closeness)[:closest].tolist()), match(spread.tolist())

    def interpolations(self, label: int, rows: int) -> Images:
        """Straight lines in w from sample 2i to sample 2i + 1 of one class, STEPS images a row."""
        first, last = (self._ws(range(k, 2 * rows, 2), [label] * rows) for k in (0, 1))
        return self._walk(first, last, range(0, 2 * rows, 2))

    def class_interpolations(self, start: int, end: int, rows: int) -> Images:
        """Straight lines in w from class `start` to class `end` with the same z, STEPS images a row."""
        first, last = (self._ws(range(rows), [label] * rows) for label in (start, end))
        return self._walk(first, last, range(rows))

    def _images(self, indices: range | list[int], labels: list[int]) -> Images:
        seeds = [self.seed] * len(labels)
        return self.synthesizer.images(
            seeds, list(indices), labels, truncation_psi=self.truncation_psi, noise_mode=self.noise_mode
        )

    @torch.inference_mode()
    def _ws(self, indices: range, labels: list[int]) -> NDArray[np.float32]:
        mapping, config = self.generator.mapping, self.generator.config
        device = mapping.w_avg.device
        z = torch.from_numpy(z_for(self.seed, indices, config.z_dim)).to(device)
        ws: NDArray[np.float32] = mapping(z, one_hot(labels, config.c_dim, device), self.truncation_psi).cpu().numpy()
        return ws

    def _walk(self, first: NDArray[np.float32], last: NDArray[np.float32], indices: range) -> Images:
        """Images along the lines from first [rows, num_ws, w_dim] to last, row after row.

        Random noise is that of the first sample of a row, whose index `indices` has, in all images of the row: they differ
        by w alone.
        """
        t = np.linspace(0, 1, STEPS, dtype=np.float32)[:, None, None]
        ws = first[:, None] + t * (last - first)[:, None]
        named = [index for index in indices for _ in range(STEPS)]
        return self.synthesizer.images_from_ws(
            ws.reshape(-1, *first.shape[1:]), self.noise_mode, seeds=[self.seed] * len(named), indices=named
        )
