"""The CPU backend: OpenVINO compiles the stages in about a second and fuses everything around the convolutions.

Each stream computes one image on one core: images need no synchronisation, a batch of 1 keeps the activations in the cache,
and no sum is split over cores, so that the bytes do not depend on the number of cores.

Converting the network needs torch and takes most of the start-up time, so `dermis.synthesizer.model_cache` stores the
result. Compiling needs no torch, so only `convert` imports it.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dermis.cpus import cpu_identity
from dermis.network_config import GeneratorConfig
from dermis.synthesizer.backend import Backend, Bytes, Float

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dermis.networks import Generator

STAGES = ("mapping", "styles", "images")


@dataclass(frozen=True)
class Stages:
    """A generator as models of OpenVINO.

    Attributes:
        config: Configuration of the generator.
        w_avg: Mean of w, float32 [w_dim].
        constant_noise: float32 [1, sum of R^2].
        resolutions: Height of the noise map of each layer.
        models: Models of OpenVINO, by the names in STAGES.
    """

    config: GeneratorConfig
    w_avg: Float
    constant_noise: Float
    resolutions: tuple[int, ...]
    models: Mapping[str, Any]  # an openvino.Model for each of STAGES


_filling_types = threading.Lock()


def import_openvino() -> Any:
    """Import openvino without its usage reports, which it would send to an analytics host.

    A module of None makes the import of openvino_telemetry fail, for which openvino has a stub that sends nothing.

    The first conversion of an element type fills a static table of the binding (OpenVINO 2026.4). Two threads that do this at
    the same time can wait for each other without end: one holds the interpreter's lock and waits for the table, the other
    fills the table and waits for the interpreter's lock. So the table is filled here, by one thread.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    with _filling_types:
        openvino.Type.f32.to_dtype()
    return openvino


@contextmanager
def own_logging() -> Iterator[None]:
    """Restore the root logger, to which OpenVINO's converter adds a handler and whose level it sets to ERROR."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def convert(generator: Generator) -> Stages:
    """Convert a generator, traced by torch.

    Raises:
        ImportError: openvino is not installed.
    """
    import torch

    from dermis.synthesizer.network import ImageStage, MappingStage, StyleStage, constant_noise, noise_resolutions

    ov = import_openvino()
    config = generator.config
    z, c = torch.zeros(1, config.z_dim), torch.zeros(1, config.c_dim)
    ws = torch.zeros(1, config.num_ws, config.w_dim)
    noise = constant_noise(generator)

    def converted(stage: nn.Module, *inputs: Tensor) -> Any:
        with torch.no_grad(), own_logging():
            return ov.convert_model(stage.eval(), example_input=inputs, input=[list(x.shape) for x in inputs])

    style_stage = StyleStage(generator)
    with torch.no_grad():
        scales = style_stage(ws)
    models = {
        "mapping": converted(MappingStage(generator), z, c),
        "styles": converted(style_stage, ws),
        "images": converted(ImageStage(generator), scales, noise),
    }
    w_avg: Float = generator.mapping.w_avg.detach().cpu().numpy().copy()
    return Stages(config, w_avg, noise.cpu().numpy(), tuple(noise_resolutions(generator)), models)


def compile_stages(stages: Stages, *, bfloat16: bool, threads: int) -> Backend:
    """Compile for `threads` cores. `bfloat16` allows this arithmetic in convolutions if the processor has it."""
    ov = import_openvino()
    core = ov.Core()
    bfloat16 = bfloat16 and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    models = {}
    for name in STAGES:
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 and name == "images" else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,  # several worker processes would pin themselves to the same cores
        }
        models[name] = core.compile_model(stages.models[name], "CPU", options)
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

    identity = {**cpu_identity(), "openvino": ov.__version__}
    return Backend("openvino", "bfloat16" if bfloat16 else "float32", 1, threads, mapping, images, identity)
