"""The generator of a bundle as one ONNX file, which needs neither dermis nor torch.

Inputs, for a batch of any size N:

    z               float32 [N, z_dim]   latents, normally distributed
    label           int64 [N]            class of each image, from 0; absent if the generator is unconditional
    truncation_psi  float32 [N]          1 keeps the full variety, 0 gives the mean image
    noise           float32 [N, S]       the noise maps of all layers, one after the other; zeros for no noise

Outputs:

    images          uint8 [N, H, W, C]   RGB
    ws              float32 [N, num_ws, w_dim]  style vectors, after truncation

`part` exports one half: "mapping" has the outputs ws, and "synthesis" takes ws and noise.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dermis import __version__
from dermis.dataset.terms import terms_of
from dermis.errors import BundleError, DermisError, install_command
from dermis.latents import noise_vectors, z_for
from dermis.onnx_export import quiet_exporter, remove_notes
from dermis.synthesizer.network import ImageStage, StyleStage, noise_resolutions, to_uint8

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.networks import Generator

OPSET = 18
MAX_DIFFERENCE = 1
"""Largest difference of a pixel between the file and torch, of 255."""
MAX_STYLE_DIFFERENCE = 1e-3
Part = Literal["all", "mapping", "synthesis"]
_MAX_BYTES = 2**31 - 1  # of one ONNX file, which a Protocol Buffer limits


class _Mapping(nn.Module):
    """z, label, truncation_psi -> ws."""

    classes: Tensor

    def __init__(self, generator: Generator, truncation_cutoff: int | None) -> None:
        super().__init__()
        self.mapping = generator.mapping
        self.c_dim, self.num_ws = generator.config.c_dim, generator.config.num_ws
        self.cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        self.register_buffer("classes", torch.eye(max(self.c_dim, 1)))

    def forward(self, z: Tensor, truncation_psi: Tensor, label: Tensor | None = None) -> Tensor:
        # Rows of a matrix, and not one_hot: a label that does not exist is an error, and not an image of no class.
        c = None if label is None else self.classes[label]
        w = self.mapping(z, c)[:, :1]
        truncated = self.mapping.w_avg + truncation_psi[:, None, None] * (w - self.mapping.w_avg)
        return torch.cat([truncated.repeat(1, self.cutoff, 1), w.repeat(1, self.num_ws - self.cutoff, 1)], dim=1)


class _Synthesis(nn.Module):
    """ws, noise -> uint8 images."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.styles, self.images = StyleStage(generator), ImageStage(generator)

    def forward(self, ws: Tensor, noise: Tensor) -> Tensor:
        images: Tensor = self.images(self.styles(ws), noise)
        return images


class _All(nn.Module):
    def __init__(self, generator: Generator, truncation_cutoff: int | None) -> None:
        super().__init__()
        self.mapping, self.synthesis = _Mapping(generator, truncation_cutoff), _Synthesis(generator)

    def forward(
        self, z: Tensor, truncation_psi: Tensor, noise: Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        ws = self.mapping(z, truncation_psi, label)
        return self.synthesis(ws, noise), ws


def generator_onnx(bundle: Bundle, part: Part = "all", truncation_cutoff: int | None = None) -> bytes:
    """Export the generator of a bundle in float32.

    Args:
        bundle: The bundle.
        part: All of it, or one half.
        truncation_cutoff: Number of style vectors that truncation_psi moves, from the coarsest; None for all.

    Returns:
        The ONNX file. The same bundle, options and library versions give the same bytes.

    Raises:
        DermisError: A package is missing, the network is too large for one file, or an option is not possible.
        BundleError: The weights of the bundle cannot be read.
    """
    from dermis.bundle import load_generator

    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise DermisError(f"the export needs onnx and onnxscript ({error}); {install_command('onnx')}") from error
    config = bundle.generator
    if truncation_cutoff is not None and not 0 <= truncation_cutoff <= config.num_ws:
        raise DermisError(
            f"truncation_cutoff must be from 0 to {config.num_ws}, the style vectors of {bundle.name}, "
            f"not {truncation_cutoff}"
        )
    generator = load_generator(bundle)
    noise_size = sum(resolution**2 for resolution in noise_resolutions(generator))
    examples = {
        "z": torch.zeros(2, config.z_dim),
        "truncation_psi": torch.ones(2),
        "ws": torch.zeros(2, config.num_ws, config.w_dim),
        "noise": torch.zeros(2, noise_size),
    }
    network: nn.Module
    if part == "synthesis":
        network, inputs, outputs = _Synthesis(generator), ["ws", "noise"], ["images"]
    elif part == "mapping":
        network, inputs, outputs = _Mapping(generator, truncation_cutoff), ["z", "truncation_psi"], ["ws"]
    else:
        network = _All(generator, truncation_cutoff)
        inputs, outputs = ["z", "truncation_psi", "noise"], ["images", "ws"]
    if config.c_dim > 0 and part != "synthesis":
        inputs.append("label")
        examples["label"] = torch.zeros(2, dtype=torch.int64)
    if sum(value.numel() * value.element_size() for value in network.state_dict().values()) >= _MAX_BYTES:
        raise DermisError(
            f"{bundle.name} is too large for one ONNX file (2 GB); export mapping and synthesis separately"
        )
    batch = torch.export.Dim("batch", min=1, max=65536)
    with quiet_exporter(), torch.no_grad():
        program: Any = torch.onnx.export(
            network.eval(),
            tuple(examples[name] for name in inputs),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        )
    model = program.model_proto
    remove_notes(model, "generator")
    onnx.helper.set_model_props(model, _properties(bundle, generator, part, truncation_cutoff))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def check_generator_onnx(
    model: bytes, bundle: Bundle, *, samples: int = 4, truncation_psi: float = 0.7, truncation_cutoff: int | None = None
) -> float:
    """Compare the outputs of an exported file in ONNX Runtime with those of the bundle's network in torch.

    Args:
        model: The file of `generator_onnx`.
        bundle: The bundle.
        samples: Number of images.
        truncation_psi: Truncation of the images.
        truncation_cutoff: That of the export.

    Returns:
        The largest difference of a pixel, of 255; for the mapping alone that of a style vector.

    Raises:
        DermisError: ONNX Runtime is not installed.
        BundleError: A pixel differs by more than `MAX_DIFFERENCE`, or a style vector by more than `MAX_STYLE_DIFFERENCE`.
    """
    from dermis.bundle import load_generator

    try:
        import onnxruntime
    except ImportError as error:
        raise DermisError(f"checking the file needs ONNX Runtime ({error}); {install_command('cpu')}") from error
    generator = load_generator(bundle)
    config, sizes = generator.config, [size**2 for size in noise_resolutions(generator)]
    z = z_for(0, range(samples), config.z_dim)
    labels = np.arange(samples, dtype=np.int64) % max(config.c_dim, 1)
    noise = noise_vectors([0] * samples, range(samples), sum(sizes))
    with torch.inference_mode():
        c = torch.eye(config.c_dim)[torch.from_numpy(labels)] if config.c_dim > 0 else None
        ws = generator.mapping(torch.from_numpy(z), c, truncation_psi, truncation_cutoff)
        maps = torch.split(torch.from_numpy(noise), sizes, dim=1)
        shaped = [part.reshape(samples, 1, math.isqrt(size), -1) for part, size in zip(maps, sizes, strict=True)]
        expected = to_uint8(generator.synthesis(ws, dtype=torch.float32, noise=shaped)).numpy()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    values = {
        "z": z,
        "label": labels,
        "truncation_psi": np.full(samples, truncation_psi, np.float32),
        "ws": ws.numpy(),
        "noise": noise,
    }
    names = [output.name for output in session.get_outputs()]
    results = session.run(names, {each.name: values[each.name] for each in session.get_inputs()})
    outputs = dict(zip(names, results, strict=True))
    difference, limit = 0.0, float(MAX_DIFFERENCE)
    if "images" in outputs:
        difference = float(np.abs(outputs["images"].astype(int) - expected.astype(int)).max())
    else:
        difference, limit = float(np.abs(outputs["ws"] - ws.numpy()).max()), MAX_STYLE_DIFFERENCE
    if difference > limit:
        raise BundleError(
            f"{bundle.name}: the results of the exported file differ by {difference:g} from those of torch "
            f"({limit:g} is allowed); please report this, with the versions of torch and onnxruntime"
        )
    return difference


def _properties(bundle: Bundle, generator: Generator, part: Part, truncation_cutoff: int | None) -> dict[str, str]:
    """Return the metadata of the file."""
    terms = terms_of(bundle)
    values: dict[str, Any] = {
        "name": bundle.name,
        "bundle_sha256": bundle.digest,
        "part": part,
        "class_names": list(bundle.class_names),
        "resolution": bundle.generator.img_resolution,
        "noise_resolutions": noise_resolutions(generator),
        "truncation_cutoff": truncation_cutoff,
        "licence": terms.licence,
        "attribution": terms.attribution,
        "dermis": __version__,
        "notice": "Makes synthetic dermoscopy images. None is a photograph of a person. Not for diagnosis.",
    }
    return {f"dermis.{name}": value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
