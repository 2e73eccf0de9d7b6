"""Projection: find the latents whose images are perceptually nearest to real ones, for many images at once.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958), appendix D: Adam on w and on the
noise maps, from the mean latent, with ramps of the learning rate, noise on w that decreases to zero, and noise maps that are
kept white. Here a batch of images is projected at once, each at its own step. Losses are summed, not averaged, and all noise
of an image is drawn from its own pixels, so that images do not influence each other. The next image takes the slot of a
finished one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dermis.classifier.preprocess import batch as squares
from dermis.devices import fast_dtype, resolve_device, to_float64
from dermis.errors import DermisError, RequestError
from dermis.imaging import Images
from dermis.latents import z_for
from dermis.networks import Generator, one_hot
from dermis.projection.perceptual import DEFAULT, Perceptual, perceptual
from dermis.projection.result import Projection
from dermis.projection.schedule import OFFICIAL, Schedule
from dermis.synthesizer.network import to_uint8

if TYPE_CHECKING:
    from dermis.bundle import Bundle

Encode = Callable[[Images, Sequence[int | None]], NDArray[np.float32]]
"""Images uint8 [N, R, R, 3] and labels [N] -> ws [N, num_ws, w_dim] to start from."""

_MEAN_SAMPLES = 10_000  # as in appendix D
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # the defaults of Adam
_BETTER = 0.999  # an image has improved if its loss is below this share of the least so far
_CPU_BATCH, _GPU_BATCH = 8, 32


@dataclass(frozen=True)
class Target:
    """An image to project.

    Attributes:
        image: uint8 [H, W, 3] of any size.
        label: Class number; None if it is unknown or the generator has no classes.
    """

    image: Images
    label: int | None = None


@dataclass(frozen=True)
class ProjectionState:
    """The images that are being projected, after a step.

    Attributes:
        numbers: Positions in the targets.
        steps: Steps that each of them has done.
        distances: Distance of the last image of each; early steps have noise on w.
        images: Returns these images, uint8 [N, R, R, 3].
    """

    numbers: Sequence[int]
    steps: Sequence[int]
    distances: Sequence[float]
    images: Callable[[], Images]


class ImageProjector:
    """Projects images with one generator and one distance.

    Args:
        bundle: The bundle of the generator.
        distance: A name of `dermis.projection.perceptual`.
        device: "auto", "cpu" or a CUDA device.
        batch_size: Images that are projected at once; None for 8 on a CPU and 32 on a GPU. It changes only speed and the
            last bits of results.
        dtype: Arithmetic of the convolutions: "auto" (bfloat16 if it is fast), "float32" or "bfloat16".
        generator: The generator of the bundle, if it is loaded already.
        encode: Gives the latents to start from, for schedules that start from an encoder.

    Raises:
        DermisError: An option is not valid or not available on this machine, or the generator is not RGB.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        distance: str = DEFAULT,
        device: str = "auto",
        batch_size: int | None = None,
        dtype: str = "auto",
        generator: Generator | None = None,
        encode: Encode | None = None,
    ) -> None:
        from dermis.bundle import load_generator

        if bundle.generator.img_channels != 3:
            raise DermisError(f"{bundle.location}: generates grey images; projection needs an RGB generator")
        if dtype not in ("auto", "float32", "bfloat16"):
            raise DermisError(f'dtype: "{dtype}" is none of auto, float32, bfloat16')
        self._device = resolve_device(device)
        self.batch_size = batch_size or (_CPU_BATCH if self._device.type == "cpu" else _GPU_BATCH)
        if self.batch_size < 1:
            raise DermisError(f"batch_size: must be at least 1; got {self.batch_size}")
        arithmetic = fast_dtype(self._device) if dtype == "auto" else getattr(torch, dtype)
        self._dtype: torch.dtype | None = None if arithmetic == torch.float32 else arithmetic
        self.bundle = bundle
        self._generator = (generator or load_generator(bundle)).to(self._device)
        self._perceptual: Perceptual = perceptual(distance, self._device, self._dtype)
        self._encode = encode
        self._means, self._sigma, self._deviation = _statistics(self._generator)
        self._mean_embeddings: Tensor | None = None

    @property
    def distance(self) -> str:
        """The name of the distance that is minimised."""
        return self._perceptual.name

    def project(
        self,
        targets: Iterable[Target],
        schedule: Schedule = OFFICIAL,
        *,
        on_step: Callable[[Sequence[tuple[int, int]]], None] | None = None,
        on_state: Callable[[ProjectionState], None] | None = None,
        frame_every: int | None = None,
        at_once: int | None = None,
    ) -> Iterator[tuple[int, Projection]]:
        """Project images.

        Args:
            targets: The images. They are read when they are needed.
            schedule: Steps, rates and the space that is searched.
            on_step: Called after every step with (position in `targets`, steps done) of the current images. An exception
                from it ends the work.
            on_state: Called after every step with the current images.
            frame_every: Number of steps between two images in `frames` of a projection; None for no frames.
            at_once: Images that are projected at once if there are fewer than `batch_size`: each step computes as many. It
                changes only speed and the last bits of results; None for `batch_size`.

        Yields:
            Position in `targets` and projection of each image, in the order in which they finish.

        Raises:
            RequestError: A label is not a class of the generator, or the schedule needs an encoder and there is none.
        """
        if schedule.start == "encoder" and self._encode is None:
            raise RequestError("start", "there is no encoder for this bundle; start from the mean, or train an encoder")
        waiting = enumerate(targets)
        slots = _Slots(self, schedule, frame_every, min(at_once or self.batch_size, self.batch_size))
        while slots.fill(waiting):
            slots.step()
            if on_step is not None:
                on_step(slots.progress)
            if on_state is not None:
                on_state(slots.state)
            yield from slots.finished()

    def _draw(self, ws: Tensor, maps: Sequence[Tensor] | None) -> Tensor:
        """Generate images float [N, 3, R, R] in 0..255, not clamped."""
        image: Tensor = self._generator.synthesis(ws, noise_mode="const", dtype=self._dtype, noise=maps)
        return (image + 1.0) * 127.5

    def _class_of(self, embedding: Tensor) -> list[int]:
        """Return for each row the class whose mean image is nearest."""
        if self._mean_embeddings is None:
            ws = self._means[:, None].expand(-1, self._generator.num_ws, -1)
            with torch.no_grad():
                self._mean_embeddings = self._perceptual.embed(self._draw(ws, None))
        labels: list[int] = torch.cdist(embedding, self._mean_embeddings).argmin(dim=1).tolist()
        return labels


class _Slots:
    """The images that are being projected. The first dimension of every tensor is the batch; empty slots are computed too."""

    def __init__(self, projector: ImageProjector, schedule: Schedule, frame_every: int | None, count: int) -> None:
        self._p, self._schedule, self._frame_every = projector, schedule, frame_every
        self._config = projector._generator.config
        device = projector._device
        self._numbers: list[int | None] = [None] * count
        self._keys = [0] * count
        self._steps, self._step_counts = [0] * count, [0] * count
        self._best_loss, self._steps_without_improvement = [float("inf")] * count, [0] * count
        self._frames: list[list[Images]] = [[] for _ in range(count)]
        self._pixels = torch.zeros(count, 3, self._config.img_resolution, self._config.img_resolution, device=device)
        self._target = projector._perceptual.embed(self._pixels)
        self._mean = torch.zeros(count, 1, self._config.w_dim, device=device)
        styles = 1 if schedule.space == "w" else projector._generator.num_ws
        self._values = [torch.zeros(count, styles, self._config.w_dim, device=device)]
        if schedule.noise_maps:
            sizes = [layer.resolution for block in projector._generator.synthesis.blocks for layer in block.layers]
            self._values += [torch.zeros(count, 1, size, size, device=device) for size in sizes]
        self._drawn, self._distances = self._pixels, self._pixels[:, 0, 0, 0]  # of the last step
        self._first = [torch.zeros_like(value) for value in self._values]
        self._second = [torch.zeros_like(value) for value in self._values]

    @property
    def progress(self) -> list[tuple[int, int]]:
        """(number of the image, step of the schedule) of each current image."""
        return [(number, step) for number, step in zip(self._numbers, self._steps, strict=True) if number is not None]

    @property
    def state(self) -> ProjectionState:
        """The current images as the last step has drawn them."""
        slots = [slot for slot, number in enumerate(self._numbers) if number is not None]
        drawn = self._drawn
        return ProjectionState(
            numbers=[number for number in self._numbers if number is not None],
            steps=[self._step_counts[slot] for slot in slots],
            distances=self._distances[slots].tolist(),
            images=lambda: to_uint8(drawn[slots] / 127.5 - 1).cpu().numpy(),
        )

    def fill(self, waiting: Iterator[tuple[int, Target]]) -> bool:
        """Put waiting images into empty slots. Returns whether any slot has an image."""
        fresh: dict[int, Target] = {}
        for slot, number in enumerate(self._numbers):
            if number is None:
                following = next(waiting, None)
                if following is None:
                    break
                self._numbers[slot], fresh[slot] = following
        if fresh:
            self._begin(fresh)
        return any(number is not None for number in self._numbers)

    @torch.no_grad()
    def _begin(self, fresh: dict[int, Target]) -> None:
        size, classes = self._config.img_resolution, self._config.c_dim
        for target in fresh.values():
            if target.label is not None and not 0 <= target.label < max(classes, 1):
                raise RequestError("label", f"class number {target.label} is outside 0 to {max(classes, 1) - 1}")
        images = {slot: squares([target.image], size)[0] for slot, target in fresh.items()}
        for slot, image in images.items():
            self._pixels[slot] = torch.tensor(image, device=self._pixels.device).permute(2, 0, 1)
        embedded = self._p._perceptual.embed(self._pixels)
        guessed = self._p._class_of(embedded) if classes else [0] * len(self._numbers)
        labels = {slot: guessed[slot] if target.label is None else target.label for slot, target in fresh.items()}
        start = None
        if self._schedule.start == "encoder" and self._p._encode is not None:
            stacked = np.stack([images.get(slot, np.zeros((size, size, 3), np.uint8)) for slot in range(len(guessed))])
            start = torch.from_numpy(self._p._encode(stacked, [labels.get(slot) for slot in range(len(guessed))]))
        for slot, image in images.items():
            self._target[slot] = embedded[slot]
            self._mean[slot] = self._p._means[labels[slot]]
            self._keys[slot] = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:7], "little")
            self._steps[slot] = self._step_counts[slot] = self._steps_without_improvement[slot] = 0
            self._best_loss[slot] = float("inf")
            self._frames[slot] = []
            for each in (*self._values, *self._first, *self._second):
                each[slot] = 0
            w = self._mean[slot] if start is None else start[slot].to(self._mean.device)
            self._values[0][slot] = w.mean(dim=0, keepdim=True) if self._schedule.space == "w" else w
            for number, noise in enumerate(self._values[1:]):
                values = z_for(self._keys[slot], [number], noise[slot].numel())
                noise[slot] = torch.from_numpy(values).to(noise.device).view_as(noise[slot])

    def step(self) -> None:
        """Do one step of Adam for every image."""
        values = [value.requires_grad_() for value in self._values]
        w, maps = values[0], values[1:]
        ws = (w + self._latent_noise()).expand(-1, self._p._generator.num_ws, -1)
        image = self._p._draw(ws, maps or None)
        loss = (self._p._perceptual.embed(image) - self._target).square().sum(dim=1)
        self._drawn, self._distances = image.detach(), loss.detach()
        if self._schedule.pixels:
            error = (image - self._pixels).div(127.5).square().mean(dim=(1, 2, 3))
            loss = loss + self._schedule.pixels * error
        fit = loss.detach()
        if self._schedule.prior:
            deviation = (w - self._mean) / self._p._deviation
            loss = loss + self._schedule.prior * deviation.square().mean(dim=(1, 2))
        if maps and self._schedule.noise_regularisation:
            loss = loss + self._schedule.noise_regularisation * sum(map(_autocorrelation, maps))
        gradients = torch.autograd.grad(loss.sum(), values)
        for value in values:
            value.requires_grad_(False)
        self._record_frames(image)
        self._adam(gradients)
        for noise in maps:
            noise.sub_(noise.mean(dim=(1, 2, 3), keepdim=True))
            noise.mul_((noise.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-12).rsqrt())
        self._count(fit.tolist())

    @torch.no_grad()
    def _record_frames(self, image: Tensor) -> None:
        """Append a frame for every image whose number of steps is a multiple of `frame_every`."""
        if self._frame_every is None:
            return
        slots = [
            slot
            for slot, number in enumerate(self._numbers)
            if number is not None and self._step_counts[slot] % self._frame_every == 0
        ]
        for slot, frame in zip(slots, to_uint8(image[slots] / 127.5 - 1).cpu().numpy(), strict=True):
            self._frames[slot].append(frame)

    def _latent_noise(self) -> Tensor:
        """Draw noise for w [N, 1 or num_ws, w_dim], a function of the image and its step alone."""
        values = self._values[0]
        noise = np.zeros(values.shape, np.float32)  # one copy to the device for all images
        for slot, number in enumerate(self._numbers):
            level = self._schedule.latent_noise_at(self._steps[slot])
            if number is not None and level > 0:
                values_of_slot = z_for(self._keys[slot], [1000 + self._step_counts[slot]], noise[slot].size)
                noise[slot] = values_of_slot.reshape(noise[slot].shape) * np.float32(level * self._p._sigma)
        return torch.from_numpy(noise).to(values.device)

    @torch.no_grad()
    def _adam(self, gradients: Sequence[Tensor]) -> None:
        """Apply Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1). Each image has its own rate and number of steps."""
        counts = torch.tensor(self._step_counts, dtype=torch.float64) + 1
        rates = torch.tensor([self._schedule.rate_at(step) for step in self._steps], dtype=torch.float64)
        device = self._values[0].device
        size = (rates / (1 - _BETAS[0] ** counts)).float().to(device)
        scale = (1 - _BETAS[1] ** counts).sqrt().reciprocal().float().to(device)
        for value, gradient, first, second in zip(self._values, gradients, self._first, self._second, strict=True):
            shape = (-1, *[1] * (value.ndim - 1))
            first.lerp_(gradient, 1 - _BETAS[0])
            second.lerp_(gradient.square(), 1 - _BETAS[1])
            root = second.sqrt() * scale.view(shape) + _EPSILON
            value.sub_(size.view(shape) * first / root)

    def _count(self, losses: Sequence[float]) -> None:
        """Count a step for each image. One that no longer improves continues at the ramp down."""
        patience, ramp = self._schedule.patience, self._schedule.last_ramp
        for slot, loss in enumerate(losses):
            self._steps[slot] += 1
            self._step_counts[slot] += 1
            if loss < self._best_loss[slot] * _BETTER:
                self._best_loss[slot], self._steps_without_improvement[slot] = loss, 0
            else:
                self._steps_without_improvement[slot] += 1
            if patience is not None and self._steps_without_improvement[slot] >= patience and self._steps[slot] < ramp:
                self._steps[slot] = ramp

    @torch.no_grad()
    def finished(self) -> list[tuple[int, Projection]]:
        """Return the finished images and free their slots."""
        done = [
            slot
            for slot, number in enumerate(self._numbers)
            if number is not None and self._steps[slot] >= self._schedule.steps
        ]
        if not done:
            return []
        w, maps = self._values[0], self._values[1:]
        ws = w.expand(-1, self._p._generator.num_ws, -1)
        images = self._p._draw(ws, maps or None)
        distances = (self._p._perceptual.embed(images) - self._target).square().sum(dim=1).tolist()
        pixels = to_uint8(images / 127.5 - 1).cpu().numpy()
        errors = (images.clamp(0, 255) - self._pixels).square().mean(dim=(1, 2, 3)).sqrt().tolist()
        projections = []
        for slot in done:
            number = self._numbers[slot]
            assert number is not None
            self._numbers[slot] = None
            projection = Projection(
                ws=ws[slot].cpu().numpy().copy(),
                noise=tuple(noise[slot, 0].cpu().numpy().copy() for noise in maps) if maps else None,
                image=pixels[slot],
                distance=distances[slot],
                distance_name=self._p.distance,
                pixel_error=errors[slot],
                steps=self._step_counts[slot],
                start=self._schedule.start,
                space=self._schedule.space,
                frames=None if self._frame_every is None else np.stack([*self._frames[slot], pixels[slot]]),
            )
            projections.append((number, projection))
        return projections


def _autocorrelation(noise: Tensor) -> Tensor:
    """Return the regularisation of noise maps [N, 1, R, R] of appendix D, for each image [N].

    It is the sum of the squared mean products with the neighbours to the right and below, at every resolution down to 8 px.
    """
    total = torch.zeros(len(noise), device=noise.device)
    while True:
        for axis in (2, 3):
            total = total + (noise * noise.roll(1, axis)).mean(dim=(1, 2, 3)).square()
        if noise.shape[2] <= 8:
            return total
        noise = torch.nn.functional.avg_pool2d(noise, 2) * 2  # keeps the variance of white noise at 1


def _statistics(generator: Generator) -> tuple[Tensor, float, Tensor]:
    """Measure w on 10,000 latents of each class.

    Returns:
        Means [classes, w_dim], sigma_w (the root of the mean squared distance to them), and the standard deviation of each
        coordinate [w_dim].
    """
    device = generator.mapping.w_avg.device
    classes = generator.config.c_dim
    parts: list[list[Tensor]] = [[] for _ in range(max(classes, 1))]
    with torch.inference_mode():
        for start in range(0, _MEAN_SAMPLES, 1000):
            z = torch.from_numpy(z_for(0, range(start, start + 1000), generator.config.z_dim)).to(device)
            for label, part in enumerate(parts):
                c = one_hot([label] * 1000, classes, device) if classes else None
                part.append(generator.mapping(z, c)[:, 0])
    gathered = [to_float64(torch.cat(part)) for part in parts]
    means = torch.stack([part.mean(dim=0) for part in gathered])
    centred = torch.cat([part - mean for part, mean in zip(gathered, means, strict=True)])
    deviation = centred.square().mean(dim=0).sqrt()
    sigma = float(centred.square().sum(dim=1).mean().sqrt())
    return means.float().clone().to(device), sigma, deviation.float().clone().to(device)
