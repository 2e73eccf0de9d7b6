"""The CPU backend for machines on which OpenVINO does not work: torch runs the same stages.

Each worker computes one image on one core, as with OpenVINO: torch splits sums over its threads in some convolutions, so
that with several threads the bytes would depend on their number.
"""

from __future__ import annotations

import torch

from dermis.cpus import cpu_identity
from dermis.networks import Generator
from dermis.synthesizer.backend import Backend, Bytes, Float
from dermis.synthesizer.network import ImageStage, MappingStage, StyleStage


def torch_backend(generator: Generator, dtype: torch.dtype, threads: int) -> Backend:
    """Make a backend of `threads` workers with one core each. Nothing is compiled."""
    mapping_stage = MappingStage(generator).eval()
    style_stage = StyleStage(generator).eval()
    image_stage = ImageStage(generator, dtype).eval()

    @torch.inference_mode()
    def mapping(z: Float, c: Float) -> Float:
        w: Float = mapping_stage(torch.from_numpy(z), torch.from_numpy(c)).numpy()
        return w

    @torch.inference_mode()
    def images(ws: Float, noise: Float) -> Bytes:
        pixels: Bytes = image_stage(style_stage(torch.from_numpy(ws)), torch.from_numpy(noise)).numpy()
        return pixels

    name = str(dtype).removeprefix("torch.")
    return Backend("torch", name, 1, threads, mapping, images, cpu_identity(), lambda: torch.set_num_threads(1))
