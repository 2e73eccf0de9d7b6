"""Encoders: networks from images to latents, from which a short optimisation can start.

For every style vector a convolutional network computes coordinates in the principal components of the generator's w around
its mean: ws[l] = mean + sum_k c[l, k] s_k b_k, with s_k the standard deviation along b_k. So an output of zero is the mean
image, and outputs have the scale of latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dermis.bundle.encoder import DESCRIPTOR, WEIGHTS, EncoderDescription, open_encoder_folder
from dermis.devices import resolve_device
from dermis.errors import BundleError, escape, quote
from dermis.features import channels_last
from dermis.imaging import Images
from dermis.tensor_files import read_header, read_tensors
from dermis.torchvision_compat import import_vision

if TYPE_CHECKING:
    from dermis.bundle import Bundle

SMALL = "small"
GENERATOR = "generator.safetensors"
_WIDTHS = (32, 48, 80, 112, 160)


class EncoderNetwork(nn.Module):
    """Float images [N, 3, H, W] in 0..255 -> ws [N, num_ws, w_dim].

    The last layer is zero at first, so that an untrained network gives the mean.

    Args:
        backbone: "small", or "timm:" and the name of a model of timm.
        size: Side in px to which images are resized.
        num_ws: Number of style vectors.
        basis: s_k b_k, float [components, w_dim].
        mean: Mean of w, float [w_dim].
    """

    basis: Tensor
    mean: Tensor

    def __init__(self, backbone: str, size: int, num_ws: int, basis: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.size, self.num_ws = size, num_ws
        self.backbone, features = _small() if backbone == SMALL else _timm(backbone.removeprefix("timm:"))
        self.head = nn.Linear(features, num_ws * len(basis))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("basis", basis)
        self.register_buffer("mean", mean)

    def coordinates(self, images: Tensor) -> Tensor:
        """Compute coordinates [N, num_ws, components], about standard normal for images of the generator."""
        if images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = (images / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        coordinates: Tensor = self.head(self.backbone(x).float()).view(len(images), self.num_ws, -1)
        return coordinates

    def latents(self, coordinates: Tensor) -> Tensor:
        """Return ws [N, num_ws, w_dim] for coordinates [N, num_ws, components]."""
        return self.mean + coordinates @ self.basis

    def forward(self, images: Tensor) -> Tensor:
        return self.latents(self.coordinates(images))


class Encoder:
    """A loaded encoder: uint8 images [N, H, W, 3] -> float32 ws [N, num_ws, w_dim]. `load_encoder` makes one."""

    def __init__(self, network: EncoderNetwork, description: EncoderDescription, device: torch.device) -> None:
        self.description = description
        self._network = network.to(device).eval().requires_grad_(False)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: Images, labels: Sequence[int | None] = ()) -> NDArray[np.float32]:
        """Compute ws [N, num_ws, w_dim] of square images of one size. Labels are ignored: the class is visible."""
        x = torch.tensor(images, device=self._device).permute(0, 3, 1, 2).float()
        ws: NDArray[np.float32] = self._network(x).cpu().numpy()
        return ws


def load_encoder(bundle: Bundle, folder: str | Path | None = None, *, device: str = "auto") -> Encoder | None:
    """Load the encoder of a bundle.

    Args:
        bundle: The bundle.
        folder: Folder or fsspec URL of another encoder for this bundle.
        device: "auto", "cpu" or a CUDA device.

    Returns:
        The encoder; None if the bundle has none and there is no `folder`.

    Raises:
        BundleError: The encoder is damaged, or was trained for another generator.
    """
    if folder is None and bundle.encoder is None:
        return None
    where = f"{bundle.location}/encoder" if folder is None else str(folder)
    opened, description, _ = open_encoder_folder(where)
    if folder is None and bundle.encoder is not None and bundle.encoder.digest != description.digest:
        raise BundleError(f"{where}: was changed since the bundle was opened; try again")
    if description.generator != bundle.files[GENERATOR].sha256:
        raise BundleError(f"{where}: was trained for another generator; train one for this: dermis train encoder")
    network = network_from(opened.read(WEIGHTS, description.files[WEIGHTS]), description, f"{where}/{WEIGHTS}")
    return Encoder(network, description, resolve_device(device))


def network_from(weights: bytes, description: EncoderDescription, where: str) -> EncoderNetwork:
    """Build the network in float32 from the bytes of encoder.safetensors.

    Raises:
        BundleError: They do not fit the description. The message begins with `where`.
    """
    header = read_header(weights, where)
    try:
        # Shapes are compared without memory first, because a description can name a network of any size.
        with torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in _untrained(description).state_dict().items()}
        if odd := sorted(name for name, _ in expected.items() ^ header.shapes.items()):
            raise BundleError(f"{where}: {len(odd)} tensors do not fit {DESCRIPTOR}, the first is {escape(odd[0])}")
        network = _untrained(description)
        network.load_state_dict({name: value.float() for name, value in read_tensors(weights, where).items()})
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, description.size, description.size))
    except BundleError:
        raise
    except Exception as error:  # networks of timm have different requirements
        raise BundleError(
            f"{where}: {description.backbone} of {description.size} px does not run ({escape(error)})"
        ) from None
    return network


def _untrained(description: EncoderDescription) -> EncoderNetwork:
    shapes = torch.zeros(description.components, description.w_dim), torch.zeros(description.w_dim)
    return EncoderNetwork(description.backbone, description.size, description.num_ws, *shapes)


def _small() -> tuple[nn.Module, int]:
    """Make a network of about half a million weights, which halves the image five times."""
    layers: list[nn.Module] = [nn.Conv2d(3, _WIDTHS[0], 3, 2, 1), nn.GroupNorm(8, _WIDTHS[0]), nn.SiLU()]
    for wide, wider in pairwise(_WIDTHS):
        layers += [_Residual(wide), nn.Conv2d(wide, wider, 3, 2, 1), nn.GroupNorm(8, wider), nn.SiLU()]
    last = _WIDTHS[-1]
    layers += [_Residual(last), nn.Conv2d(last, last // 2, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return channels_last(nn.Sequential(*layers)), 4 * (last // 2)


class _Residual(nn.Module):
    """x plus its depthwise-separable convolution, with twice the channels inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, groups=channels),
            nn.GroupNorm(8, channels),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.SiLU(),
            nn.Conv2d(2 * channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.layers(x)
        return result


def _timm(model: str) -> tuple[nn.Module, int]:
    timm = import_vision("timm")
    if not timm.is_model(model):
        raise BundleError(f"backbone: timm has no model {quote(model)}; timm.list_models() lists them")
    network: Any = timm.create_model(model, num_classes=0)
    return channels_last(network), int(network.num_features)
