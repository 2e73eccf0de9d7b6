"""Generate images from a bundle, fast. Each image is a function of its own seed, index, label and options.

with Synthesizer(open_bundle("bundles/demo")) as synthesizer:
    pixels = synthesizer.images(seeds=[7, 7], indices=[0, 1], labels=[0, 1])  # uint8 [2, H, W, 3]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self, get_args

import numpy as np
import numpy.typing as npt

from dermis.cpus import available_cpus
from dermis.errors import DermisError, RequestError
from dermis.latents import noise_vectors, z_for
from dermis.network_config import NoiseMode
from dermis.synthesizer.backend import Backend, Bytes, Float
from dermis.synthesizer.choice import load_backend
from dermis.synthesizer.model_cache import package_version

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.networks import Generator

__all__ = ["Synthesizer"]


class Synthesizer:
    """Generates images with the generator of a bundle. Safe to call from several threads.

    The network always runs at one batch size, `micro_batch`, and its rows are independent. So on one kind of machine (see
    `identity`) an image has the same bytes whatever other images are in the call. A call with a multiple of
    `preferred_batch` images keeps the whole device busy.

    Args:
        bundle: The bundle.
        device: "auto", "cpu" or a CUDA device.
        backend: "auto", "openvino" or "torch".
        dtype: "auto", "bfloat16" or "float32", for the convolutions.
        threads: CPU cores to use; None for all that this process can use.
        generator: The generator of the bundle, if it is loaded already.
        cache: Folder for the converted network. With it, the next start on a CPU takes a second or two and no torch.

    Raises:
        DermisError: Device, backend or dtype is unknown or not available here, or the bundle's images are neither grey
            nor RGB.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        backend: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
        generator: Generator | None = None,
        cache: Path | None = None,
    ) -> None:
        channels = bundle.generator.img_channels
        if channels not in (1, 3):
            raise DermisError(
                f"{bundle.location}: generates images with {channels} channels; only grey (1) and RGB (3) are supported"
            )
        self.bundle = bundle

        def load() -> Generator:
            from dermis.bundle import load_generator

            return load_generator(bundle) if generator is None else generator

        usable_cache = cache if generator is None else None  # the caller's network can differ from that of the bundle
        loaded = load_backend(load, bundle.digest, device, backend, dtype, threads, usable_cache)
        self._config, self._w_avg = loaded.config, loaded.w_avg
        self._noise_size = sum(resolution**2 for resolution in loaded.resolutions)
        self._backend: Backend = loaded.backend
        constant: Float = np.tile(loaded.constant_noise, (self._backend.micro_batch, 1))
        self._fixed_noise = {"const": constant, "none": np.zeros_like(constant)}
        self._pool = ThreadPoolExecutor(
            self._backend.workers, thread_name_prefix="synthesizer", initializer=self._backend.start_worker
        )
        # A GPU generates a batch in less time than one core needs for its noise, so all cores share the rows of a batch.
        # If a batch is one image, the workers draw noise in parallel already.
        cores = min(self._backend.micro_batch, available_cpus() if threads is None else threads)
        self._noise_pool = ThreadPoolExecutor(cores, thread_name_prefix="noise") if cores > 1 else None

    def close(self) -> None:
        """Wait for the running calls, stop the workers and free their memory. No images can be generated afterwards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._noise_pool is not None:
            self._noise_pool.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def micro_batch(self) -> int:
        """Rows of one run of the network. Smaller calls are padded."""
        return self._backend.micro_batch

    @property
    def preferred_batch(self) -> int:
        """Number of images that keeps the whole device busy."""
        return self._backend.micro_batch * self._backend.workers

    @property
    def identity(self) -> Mapping[str, str]:
        """Device, arithmetic and versions: the bytes of images depend on these, the bundle and the request."""
        return {
            **self._backend.identity,
            "backend": self._backend.name,
            "dtype": self._backend.dtype,
            "torch": package_version("torch"),
            "numpy": np.__version__,
        }

    def images(
        self,
        seeds: Sequence[int],
        indices: Sequence[int],
        labels: Sequence[int],
        *,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: NoiseMode = "random",
        offset: Float | None = None,
    ) -> Bytes:
        """Generate the images of N samples.

        Args:
            seeds: Seed of each sample. z is drawn from (seed, index).
            indices: Index of each sample.
            labels: Class number of each sample; 0 for an unconditional generator.
            truncation_psi: Factor of the distance of w from its mean.
            truncation_cutoff: Number of style vectors that are truncated, from the coarsest; None for all.
            noise_mode: "random" draws the noise of each sample from (seed, index), "const" uses the noise maps of the
                generator for all images, "none" adds no noise.
            offset: float32 [num_ws, w_dim], added to the truncated latents: the sum of edits
                (`dermis.directions.edit.offset_of`).

        Returns:
            uint8 [N, H, W, channels].

        Raises:
            RequestError: The lists differ in length, a label is not a class of the bundle, truncation_cutoff is negative,
                or `offset` has another shape.
        """
        self._check(seeds, indices, labels, truncation_cutoff)
        added = None if offset is None else np.asarray(offset, np.float32)
        if added is not None and added.shape != (self._config.num_ws, self._config.w_dim):
            raise RequestError("offset", f"{added.shape} is not [{self._config.num_ws}, {self._config.w_dim}]")

        def render(rows: range) -> Bytes:
            ws = self._ws(rows, seeds, indices, labels, truncation_psi, truncation_cutoff)
            if added is not None:
                ws += added
            return self._backend.images(ws, self._noise(noise_mode, rows, seeds, indices))[: len(rows)]

        return self._map(render, len(seeds))

    def ws(
        self,
        seeds: Sequence[int],
        indices: Sequence[int],
        labels: Sequence[int],
        *,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Float:
        """Compute the style vectors of N samples, from which `images` generates. Arguments are those of `images`.

        Returns:
            float32 [N, num_ws, w_dim].

        Raises:
            RequestError: As `images`.
        """
        self._check(seeds, indices, labels, truncation_cutoff)
        parts = [
            self._ws(rows, seeds, indices, labels, truncation_psi, truncation_cutoff)[: len(rows)]
            for start in range(0, len(seeds), self.micro_batch)
            for rows in (range(start, min(start + self.micro_batch, len(seeds))),)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self._config.num_ws, self._config.w_dim), np.float32)

    def ws_of(
        self,
        z: Float,
        labels: Sequence[int],
        *,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Float:
        """Compute the style vectors of latents.

        Args:
            z: float32 [N, z_dim].
            labels: Class number of each latent.
            truncation_psi: As for `images`.
            truncation_cutoff: As for `images`.

        Returns:
            float32 [N, num_ws, w_dim].

        Raises:
            RequestError: `z` has another shape, or as `images`.
        """
        if z.ndim != 2 or z.shape[1] != self._config.z_dim:
            raise RequestError("z", f"shape {z.shape} is not [N, {self._config.z_dim}]")
        numbers = range(len(z))
        self._check(numbers, numbers, labels, truncation_cutoff)
        parts = [
            self._mapped(
                z[start : start + self.micro_batch],
                labels[start : start + self.micro_batch],
                truncation_psi,
                truncation_cutoff,
            )[: len(z) - start]
            for start in range(0, len(z), self.micro_batch)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self._config.num_ws, self._config.w_dim), np.float32)

    def _check(
        self, seeds: Sequence[int], indices: Sequence[int], labels: Sequence[int], truncation_cutoff: int | None
    ) -> None:
        if not len(seeds) == len(indices) == len(labels):
            raise RequestError(
                "labels",
                f"{len(seeds)} seeds, {len(indices)} indices and {len(labels)} labels; give one of each a sample",
            )
        if truncation_cutoff is not None and truncation_cutoff < 0:
            raise RequestError("truncation_cutoff", f"must be at least 0; got {truncation_cutoff}")
        classes = max(self._config.c_dim, 1)
        for label in labels:
            if not 0 <= label < classes:
                raise RequestError("labels", f"class number {label} is outside 0 to {classes - 1}")

    def _ws(
        self,
        rows: range,
        seeds: Sequence[int],
        indices: Sequence[int],
        labels: Sequence[int],
        truncation_psi: float,
        truncation_cutoff: int | None,
    ) -> Float:
        """Compute the style vectors [micro_batch, num_ws, w_dim] of a micro-batch."""
        z = np.concatenate([z_for(seeds[i], [indices[i]], self._config.z_dim) for i in rows])
        return self._mapped(z, [labels[i] for i in rows], truncation_psi, truncation_cutoff)

    def _mapped(self, z: Float, labels: Sequence[int], truncation_psi: float, truncation_cutoff: int | None) -> Float:
        """Compute the style vectors [micro_batch, num_ws, w_dim] of at most micro_batch latents."""
        c = np.zeros((len(z), self._config.c_dim), dtype=np.float32)
        if self._config.c_dim > 0:
            c[range(len(z)), list(labels)] = 1.0
        w = self._backend.mapping(self._padded(z), self._padded(c))
        ws = np.repeat(w[:, None], self._config.num_ws, axis=1)
        if truncation_psi != 1.0:
            low = ws[:, :truncation_cutoff]
            low[:] = self._w_avg + np.float32(truncation_psi) * (low - self._w_avg)
        return ws

    def images_from_ws(
        self,
        ws: Float,
        noise_mode: NoiseMode = "const",
        *,
        seeds: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
    ) -> Bytes:
        """Generate images of style vectors.

        Args:
            ws: float32 [N, num_ws, w_dim].
            noise_mode: As for `images`. "random" needs `seeds` and `indices`. It is not the default, because style vectors
                alone, such as those of a projection, have no noise.
            seeds: Seed of each image's noise.
            indices: Index of each image's noise.

        Returns:
            uint8 [N, H, W, channels].

        Raises:
            RequestError: `ws` has another shape, or random noise has no seeds and indices.
        """
        ws = np.asarray(ws, dtype=np.float32)
        expected = (self._config.num_ws, self._config.w_dim)
        if ws.ndim != 3 or ws.shape[1:] != expected:
            raise RequestError("ws", f"shape {ws.shape} is not [N, {expected[0]}, {expected[1]}]")
        if noise_mode == "random" and (seeds is None or indices is None):
            raise RequestError("noise_mode", "random noise of given style vectors needs seeds and indices")

        def render(rows: range) -> Bytes:
            noise = self._noise(noise_mode, rows, seeds or (), indices or ())
            return self._backend.images(self._padded(ws[rows.start : rows.stop]), noise)[: len(rows)]

        return self._map(render, len(ws))

    def _noise(self, mode: NoiseMode, rows: range, seeds: Sequence[int], indices: Sequence[int]) -> Float:
        """Return the noise vectors [micro_batch, sum of R^2] of a micro-batch."""
        if mode not in get_args(NoiseMode):
            raise RequestError("noise_mode", f'"{mode}" is none of {", ".join(get_args(NoiseMode))}')
        if mode != "random":
            return self._fixed_noise[mode]
        noise = np.zeros((self.micro_batch, self._noise_size), np.float32)

        def draw(place: int) -> None:
            i = rows[place]
            noise_vectors([seeds[i]], [indices[i]], self._noise_size, out=noise[place : place + 1])

        if self._noise_pool is None:
            for place in range(len(rows)):
                draw(place)
        else:
            list(self._noise_pool.map(draw, range(len(rows))))
        return noise

    def _padded(self, rows: npt.NDArray[np.float32]) -> Float:
        """Pad rows [n, ...] with zeros to [micro_batch, ...]."""
        padding = [(0, self.micro_batch - len(rows))] + [(0, 0)] * (rows.ndim - 1)
        return np.ascontiguousarray(np.pad(rows, padding) if padding[0][1] else rows)

    def _map(self, render: Callable[[range], Bytes], count: int) -> Bytes:
        """Generate `count` images in micro-batches on the backend's workers."""
        size = self._config.img_resolution
        starts = range(0, count, self.micro_batch)
        parts = list(self._pool.map(render, (range(i, min(i + self.micro_batch, count)) for i in starts)))
        return np.concatenate(parts) if parts else np.empty((0, size, size, self._config.img_channels), np.uint8)
