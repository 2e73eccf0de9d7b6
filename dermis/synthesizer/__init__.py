"""A bundle made ready to draw images fast, each a function of its own seed, index, label and options.

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
from dermis.synthesizer.choice import make_ready
from dermis.synthesizer.model_cache import package_version

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.networks import Generator

__all__ = ["Synthesizer"]


class Synthesizer:
    """Draws images from a bundle's generator.

    The network always runs at the same batch, `micro_batch`, on rows that do not touch one another: an image is the
    same, byte for byte, whatever it was asked together with, on one kind of machine (see `identity`). Safe to call
    from several threads. A call with `preferred_batch` images, or a multiple, keeps the whole device busy.

    device: "auto", "cpu" or a CUDA device. backend: "auto", "openvino" or "torch". dtype: "auto", "bfloat16" or
    "float32" for the convolutions. threads: CPU cores to use, all that this process may if None. generator: the
    bundle's own network, where the caller has it loaded. cache: folder for the converted network, with which the next
    start on a CPU takes a second or two and no torch. DermisError where one of them cannot be had.
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
                f"{bundle.location}: draws images of {channels} channels; only grey (1) and RGB (3) are served"
            )
        self.bundle = bundle

        def load() -> Generator:
            from dermis.bundle import load_generator

            return load_generator(bundle) if generator is None else generator

        kept = cache if generator is None else None  # the caller's network may not be that of the bundle
        ready = make_ready(load, bundle.digest, device, backend, dtype, threads, kept)
        self._config, self._w_avg = ready.config, ready.w_avg
        self._noise_size = sum(resolution**2 for resolution in ready.resolutions)
        self._backend: Backend = ready.backend
        constant: Float = np.tile(ready.constant_noise, (self._backend.micro_batch, 1))
        self._fixed_noise = {"const": constant, "none": np.zeros_like(constant)}
        self._pool = ThreadPoolExecutor(
            self._backend.workers, thread_name_prefix="synthesizer", initializer=self._backend.start_worker
        )
        # A GPU draws a batch in less time than one core needs for its noise, so all cores share the rows of a batch.
        # Where a batch is one image, the workers draw noise beside one another already.
        cores = min(self._backend.micro_batch, available_cpus() if threads is None else threads)
        self._noise_pool = ThreadPoolExecutor(cores, thread_name_prefix="noise") if cores > 1 else None

    def close(self) -> None:
        """Let the running calls finish, stop the workers and give their memory back. Images cannot be drawn after."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._noise_pool is not None:
            self._noise_pool.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def micro_batch(self) -> int:
        """Rows the compiled network runs at a time; smaller calls are padded."""
        return self._backend.micro_batch

    @property
    def preferred_batch(self) -> int:
        """Images in flight that keep the whole device busy."""
        return self._backend.micro_batch * self._backend.workers

    @property
    def identity(self) -> Mapping[str, str]:
        """What, besides the bundle and the request, decides the images' bytes: device, arithmetic, versions."""
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
        """Images uint8 [N, H, W, channels] of N samples: z from (seed, index), class number label (0 if unconditional).

        Truncation as in `MappingNetwork`. noise_mode: "random" draws the noise of each sample from (seed, index), "const"
        gives all images the noise maps that the generator has, "none" gives none. offset [num_ws, w_dim] is added to the
        truncated latents: the sum of edits (`dermis.directions.edit.offset_of`). RequestError if the lists differ in
        length, a label is no class of the bundle or truncation_cutoff is negative.
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
        """Style vectors float32 [N, num_ws, w_dim] of N samples, as `images` has them. RequestError as there."""
        self._check(seeds, indices, labels, truncation_cutoff)
        parts = [
            self._ws(rows, seeds, indices, labels, truncation_psi, truncation_cutoff)[: len(rows)]
            for start in range(0, len(seeds), self.micro_batch)
            for rows in (range(start, min(start + self.micro_batch, len(seeds))),)
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
        """Style vectors [micro_batch, num_ws, w_dim] of a micro-batch."""
        z = np.concatenate([z_for(seeds[i], [indices[i]], self._config.z_dim) for i in rows])
        c = np.zeros((len(rows), self._config.c_dim), dtype=np.float32)
        if self._config.c_dim > 0:
            c[range(len(rows)), [labels[i] for i in rows]] = 1.0
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
        """Images uint8 [N, H, W, channels] of style vectors ws [N, num_ws, w_dim].

        noise_mode "random" needs the seeds and indices that name the samples' noise. It is not the default, since style
        vectors alone, those of a projection for instance, name none.
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
        """The noise vectors [micro_batch, sum of R^2] of a micro-batch."""
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
        """Rows [n, ...] continued with zeros to [micro_batch, ...]."""
        padding = [(0, self.micro_batch - len(rows))] + [(0, 0)] * (rows.ndim - 1)
        return np.ascontiguousarray(np.pad(rows, padding) if padding[0][1] else rows)

    def _map(self, render: Callable[[range], Bytes], count: int) -> Bytes:
        """All images, micro-batch by micro-batch, on the backend's workers."""
        size = self._config.img_resolution
        starts = range(0, count, self.micro_batch)
        parts = list(self._pool.map(render, (range(i, min(i + self.micro_batch, count)) for i in starts)))
        return np.concatenate(parts) if parts else np.empty((0, size, size, self._config.img_channels), np.uint8)
