"""The CPU backend: OpenVINO compiles the stages in about a second and fuses everything around the convolutions.

One image and one core a stream: images need no synchronisation with one another, batch 1 keeps the activations in the
cache, and since no sum is ever split over cores, the bytes do not depend on how many there are. Nothing is cached on
disk: tracing and compiling takes about two seconds (docs/benchmarks.md), and so no stale or foreign code can be loaded.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dermis.networks import Generator
from dermis.synthesizer.backend import Backend, Bytes, Float, cpu_identity
from dermis.synthesizer.network import ImageStage, MappingStage, StyleStage, constant_noise


def _import_openvino() -> Any:
    """openvino without its usage reports: it would send events to an analytics host, at its import and later.

    A module of None makes the import of openvino_telemetry fail, for which openvino has a stub that sends nothing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def openvino_backend(generator: Generator, dtype: torch.dtype, threads: int) -> Backend:
    """Compile for `threads` cores. ImportError if openvino is not installed."""
    ov = _import_openvino()
    core = ov.Core()
    if dtype == torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        dtype = torch.float32
    config = generator.config
    z, c = torch.zeros(1, config.z_dim), torch.zeros(1, config.c_dim)
    ws = torch.zeros(1, config.num_ws, config.w_dim)

    def compiled(stage: nn.Module, inputs: tuple[Tensor, ...], precision: str) -> Any:
        with torch.no_grad():
            model = ov.convert_model(stage.eval(), example_input=inputs, input=[list(x.shape) for x in inputs])
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,  # several worker processes would pin themselves to the same cores
        }
        return core.compile_model(model, "CPU", options)

    style_stage = StyleStage(generator)
    with torch.no_grad():
        scales = style_stage(ws)
    precision = "bf16" if dtype == torch.bfloat16 else "f32"
    models = {
        "mapping": compiled(MappingStage(generator), (z, c), "f32"),
        "styles": compiled(style_stage, (ws,), "f32"),
        "images": compiled(ImageStage(generator), (scales, constant_noise(generator)), precision),
    }
    requests = threading.local()  # an inference request serves one call at a time, so every thread has its own

    def infer(name: str, *inputs: Float) -> Any:
        request = getattr(requests, name, None)
        if request is None:
            request = models[name].create_infer_request()
            setattr(requests, name, request)
        return request.infer(inputs, share_inputs=True, share_outputs=True)[0]

    def mapping(z: Float, c: Float) -> Float:
        w: Float = infer("mapping", z, c).copy()
        return w

    def images(ws: Float, noise: Float) -> Bytes:
        pixels: Bytes = infer("images", infer("styles", np.ascontiguousarray(ws)), noise).copy()
        return pixels

    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    identity = {**cpu_identity(), "openvino": ov.__version__}
    return Backend("openvino", name, 1, threads, mapping, images, identity)
