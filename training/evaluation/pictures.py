"""Images for the evaluation page: samples, samples next to their nearest training images, interpolations in w."""

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
    """A generated image with the training images nearest to it."""

    sample: int
    label: int
    image: Images
    neighbours: Images  # nearest first
    distances: NDArray[np.float64]  # distance of each neighbour
    distance_ratio: float
    """Distance to the nearest neighbour divided by the distance to the last one: 0 for a copy, near 1 if no training image is
    much nearer than the others. The last neighbour is used, not the second, to detect copies of images that the training set
    contains twice."""


@dataclass(frozen=True)
class Drawing:
    """Generates images uint8 [N, H, W, channels] with one seed and one truncation."""

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
        """Find samples that are most like copies, and others at equal intervals, not selected.

        Args:
            labels: Classes of samples 0 ... M - 1, [M].
            generated: Their features, [M, dim].
            real: Features of real images, [N, dim].
            real_images: The real images, [N, H, W, 3].
            closest: Number of samples that are most like copies.
            even: Number of others.
        """
        distances, indices = nearest(generated, real, min(NEIGHBOURS, len(real)))
        ratios = distances[:, 0] / np.maximum(distances[:, -1], np.finfo(float).tiny)

        def match(samples: list[int]) -> list[Match]:
            images = self._images(samples, labels[samples].tolist())
            return [
                Match(i, int(labels[i]), image, real_images[indices[i]], distances[i], float(ratios[i]))
                for i, image in zip(samples, images, strict=True)
            ]

        spread = np.linspace(0, len(labels) - 1, min(even, len(labels))).round().astype(int)
        return match(np.argsort(ratios)[:closest].tolist()), match(spread.tolist())

    def interpolations(self, label: int, rows: int) -> Images:
        """Straight lines in w from sample 2i to sample 2i + 1 of one class, with STEPS images in a row."""
        first, last = (self._ws(range(k, 2 * rows, 2), [label] * rows) for k in (0, 1))
        return self._lines(first, last, range(0, 2 * rows, 2))

    def class_interpolations(self, start: int, end: int, rows: int) -> Images:
        """Straight lines in w from class `start` to class `end` with the same z, with STEPS images in a row."""
        first, last = (self._ws(range(rows), [label] * rows) for label in (start, end))
        return self._lines(first, last, range(rows))

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

    def _lines(self, first: NDArray[np.float32], last: NDArray[np.float32], indices: range) -> Images:
        """Images along straight lines, row after row. The images of a row have the same noise, so they differ by w only.

        Args:
            first: Style vectors at the start of each row, [rows, num_ws, w_dim].
            last: Style vectors at the end of each row.
            indices: Samples whose noise the rows have.
        """
        t = np.linspace(0, 1, STEPS, dtype=np.float32)[:, None, None]
        ws = first[:, None] + t * (last - first)[:, None]
        repeated = [index for index in indices for _ in range(STEPS)]
        return self.synthesizer.images_from_ws(
            ws.reshape(-1, *first.shape[1:]), self.noise_mode, seeds=[self.seed] * len(repeated), indices=repeated
        )
