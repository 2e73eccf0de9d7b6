"""The backend for Apple and Intel GPUs: torch runs the stages in float32, without compilation.

It was tested on a CPU in place of such a GPU only.
"""

from __future__ import annotations

import copy
from threading import Lock

import torch

from dermis.devices import describe_hardware
from dermis.networks import Generator
from dermis.synthesizer.backend import Backend, Bytes, Float
from dermis.synthesizer.cuda import micro_batch_for
from dermis.synthesizer.network import ImageStage, MappingStage, StyleStage


def device_backend(generator: Generator, device: torch.device, dtype: torch.dtype) -> Backend:
    """Make a backend of one worker for a device of torch."""
    generator = copy.deepcopy(generator).to(device)
    mapping_stage = MappingStage(generator).to(device).eval()
    style_stage = StyleStage(generator).to(device).eval()
    image_stage = ImageStage(generator, dtype).to(device).eval()
    lock = Lock()

    @torch.inference_mode()
    def mapping(z: Float, c: Float) -> Float:
        with lock:
            w: Float = mapping_stage(torch.from_numpy(z).to(device), torch.from_numpy(c).to(device)).cpu().numpy()
            return w

    @torch.inference_mode()
    def images(ws: Float, noise: Float) -> Bytes:
        with lock:
            scales = style_stage(torch.from_numpy(ws).to(device))
            pixels: Bytes = image_stage(scales, torch.from_numpy(noise).to(device)).cpu().numpy()
            return pixels

    identity = {"device": device.type, "processor": describe_hardware(device)}
    name, batch = str(dtype).removeprefix("torch."), micro_batch_for(generator.config.img_resolution)
    return Backend("torch", name, batch, 1, mapping, images, identity)
