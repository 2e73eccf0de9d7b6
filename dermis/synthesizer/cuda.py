"""The CUDA backend: channels-last bfloat16, element-wise work fused by torch.compile, launches in one CUDA graph.

Only the image stage is compiled: it has no reductions but the convolutions, so that tuning changes its speed and not
its values, and cuDNN is held to deterministic algorithms. Inductor keeps its compiled kernels on
disk (TORCHINDUCTOR_CACHE_DIR), so only the first start on a machine compiles.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from dermis.networks import Generator
from dermis.synthesizer.backend import Backend, Bytes, Float
from dermis.synthesizer.network import ImageStage, MappingStage, StyleStage, constant_noise

log = logging.getLogger(__name__)


def micro_batch_for(resolution: int) -> int:
    """Images a call: enough to fill a GPU, i.e. about a million pixels, at least 4 and at most 64 images."""
    return max(4, min(64, 2**20 // resolution**2))


def cuda_backend(generator: Generator, device: torch.device, dtype: torch.dtype) -> Backend:
    """Compile and record for `device`; where torch.compile cannot work (no Triton, say) run the stages as they are."""
    generator = copy.deepcopy(generator).to(device)
    mapping_stage = MappingStage(generator).eval()
    style_stage = StyleStage(generator).to(device).eval()
    image_stage = ImageStage(generator, dtype).to(device).eval()
    batch = micro_batch_for(generator.config.img_resolution)

    def exact(run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), torch.cuda.device(device), flags:
            return run(*inputs)

    noise = constant_noise(generator).expand(batch, -1).contiguous()
    scales = exact(style_stage, torch.zeros(batch, generator.num_ws, generator.config.w_dim, device=device))
    with torch.cuda.device(device):
        name, recorded = "torch-compile", _recorded(torch.compile(image_stage, dynamic=False), exact, scales, noise)
        if recorded is None:
            name, recorded = "torch", _recorded(image_stage, exact, scales, noise)
    image_run = image_stage if recorded is None else recorded
    last: tuple[Float | None, Tensor] = (None, noise)  # constant noise is uploaded once, not for every batch

    def mapping(z: Float, c: Float) -> Float:
        w: Float = exact(mapping_stage, torch.from_numpy(z).to(device), torch.from_numpy(c).to(device)).cpu().numpy()
        return w

    def images(ws: Float, noise: Float) -> Bytes:
        nonlocal last
        if last[0] is not noise:
            last = (noise, torch.from_numpy(noise).to(device))
        scales = exact(style_stage, torch.from_numpy(ws).to(device))
        pixels: Bytes = exact(image_run, scales, last[1]).cpu().numpy()
        return pixels

    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    identity = {
        "device": "cuda",
        "processor": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda),
        "cudnn": str(cudnn),
    }
    return Backend(name, str(dtype).removeprefix("torch."), batch, 1, mapping, images, identity)


def _recorded(
    stage: Callable[..., Tensor], exact: Callable[..., Tensor], *examples: Tensor
) -> Callable[..., Tensor] | None:
    """`stage` as a CUDA graph with fixed buffers, replayed from any one thread at a time; None where it fails."""
    inputs = [x.clone() for x in examples]
    try:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile and pick algorithms before recording
            for _ in range(3):
                exact(stage, *inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = exact(stage, *inputs)
    except Exception as error:  # compilers fail in many ways, and serving slowly is better than not at all
        log.warning("could not compile or record the image stage, running it more slowly: %s", error)
        return None

    def replay(*values: Tensor) -> Tensor:
        for buffer, value in zip(inputs, values, strict=True):
            buffer.copy_(value)
        graph.replay()
        return output

    return replay
