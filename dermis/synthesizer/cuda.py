"""The CUDA backend: channels-last bfloat16, element-wise work fused by torch.compile, launches in CUDA graphs.

Only the image stage is compiled: it has no reductions but the convolutions, so that tuning changes its speed and not
its values, and cuDNN uses deterministic algorithms only. Inductor keeps its compiled kernels on
disk (TORCHINDUCTOR_CACHE_DIR), so only the first start on a machine compiles.

A few CUDA streams, each with its own CUDA graphs and buffers (`_StreamSlot`), work concurrently: while one generates images,
others copy theirs to the host or wait for random numbers. The host draws these more slowly than the GPU generates images.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from dermis.networks import Generator
from dermis.synthesizer.backend import Backend, Bytes, Float
from dermis.synthesizer.network import ImageStage, MappingStage, StyleStage, constant_noise

log = logging.getLogger(__name__)

STREAMS = 3
WORKERS = 16  # threads at most: they draw the random numbers and wait for a stream
_WARM_UP = 3  # runs before recording, in which kernels are compiled and algorithms chosen

Run = Callable[[], Tensor]


def micro_batch_for(resolution: int) -> int:
    """Return the images of one call: about a million pixels, which fill a GPU; from 4 to 64 images."""
    return max(4, min(64, 2**20 // resolution**2))


def cuda_backend(generator: Generator, device: torch.device, dtype: torch.dtype, threads: int) -> Backend:
    """Make the backend for a CUDA device.

    The stages are compiled and recorded as CUDA graphs. If torch.compile does not work (for instance without Triton), they run
    without compilation. `threads` is the number of CPU cores to use.
    """
    generator = copy.deepcopy(generator).to(device)
    config = generator.config
    mapping_stage = MappingStage(generator).to(device).eval()
    style_stage = StyleStage(generator).to(device).eval()
    image_stage = ImageStage(generator, dtype).to(device).eval()
    # Python numbers would be constants of the compiled code, so that each bundle would be compiled again, up to eight times.
    image_stage.strengths = [torch.tensor(strength, device=device) for strength in image_stage.strengths]
    batch = micro_batch_for(config.img_resolution)
    noise = constant_noise(generator).to(device).expand(batch, -1).contiguous()

    def slot(stage: Callable[[Tensor, Tensor], Tensor], recorded: bool) -> _StreamSlot:
        return _StreamSlot(
            mapping_stage,
            lambda ws, noise: stage(style_stage(ws), noise),
            [torch.zeros(batch, config.z_dim, device=device), torch.zeros(batch, config.c_dim, device=device)],
            [torch.zeros(batch, config.num_ws, config.w_dim, device=device), noise.clone()],
            recorded,
        )

    name, slots = "torch-compile", _recorded_slots(torch.compile(image_stage, dynamic=False), slot, device)
    if not slots:
        name, slots = "torch", _recorded_slots(image_stage, slot, device)
    if not slots:
        with torch.cuda.device(device):
            slots = [slot(image_stage, False)]
    free: SimpleQueue[_StreamSlot] = SimpleQueue()
    for each in slots:
        free.put(each)

    def mapping(z: Float, c: Float) -> Float:
        used = free.get()
        try:
            with torch.cuda.device(device):
                return used.mapping(z, c)
        finally:
            free.put(used)

    def images(ws: Float, noise: Float) -> Bytes:
        used = free.get()
        try:
            with torch.cuda.device(device):
                return used.images(ws, noise)
        finally:
            free.put(used)

    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    identity = {
        "device": "cuda",
        "processor": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda),
        "cudnn": str(cudnn),
    }
    workers = max(len(slots), min(threads, WORKERS))
    return Backend(name, str(dtype).removeprefix("torch."), batch, workers, mapping, images, identity)


def _recorded_slots(
    stage: Callable[..., Tensor], slot: Callable[[Callable[..., Tensor], bool], _StreamSlot], device: torch.device
) -> list[_StreamSlot]:
    """Return stream slots with this image stage as CUDA graphs; an empty list if recording fails."""
    try:
        with torch.cuda.device(device):
            return [slot(stage, True) for _ in range(STREAMS)]
    except Exception as error:  # any error of a compiler: fall back to the stage that is not compiled
        log.warning("could not compile or record the image stage, running it more slowly: %s", error)
        return []


class _StreamSlot:
    """A stream with fixed buffers for the inputs and outputs of the stages. Used by one thread at a time."""

    def __init__(
        self,
        mapping: Callable[..., Tensor],
        draw: Callable[..., Tensor],
        mapping_inputs: list[Tensor],
        image_inputs: list[Tensor],
        recorded: bool,
    ) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())  # inputs and weights are made on the current stream
        self._mapping_inputs, self._image_inputs = mapping_inputs, image_inputs
        self._last_noise: Float | None = None
        prepare = self._record if recorded else self._plain
        self._mapping = prepare(lambda: mapping(*mapping_inputs))
        self._draw = prepare(lambda: draw(*image_inputs))

    def mapping(self, z: Float, c: Float) -> Float:
        """Compute w of z and c."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for buffer, values in zip(self._mapping_inputs, (z, c), strict=True):
                buffer.copy_(torch.from_numpy(values))
            w: Float = self._mapping()
            return w

    def images(self, ws: Float, noise: Float) -> Bytes:
        """Generate images of style vectors and noise. Constant noise, which is always the same array, is uploaded once."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._image_inputs[0].copy_(torch.from_numpy(ws))
            if noise is not self._last_noise:
                self._image_inputs[1].copy_(torch.from_numpy(noise))
                self._last_noise = noise
            pixels: Bytes = self._draw()
            return pixels

    def _exact(self, run: Run) -> Tensor:
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), flags:
            return run()

    def _record(self, run: Run) -> Callable[[], np.ndarray]:
        """Record `run` and the copy of its output to the host as a CUDA graph."""
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP):
                self._exact(run)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the process can use the GPU at the same time.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            output = self._exact(run)
        host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)

        def replay() -> np.ndarray:
            graph.replay()
            host.copy_(output, non_blocking=True)
            self._stream.synchronize()
            return host.numpy().copy()

        return replay

    def _plain(self, run: Run) -> Callable[[], np.ndarray]:
        return lambda: self._exact(run).cpu().numpy()
