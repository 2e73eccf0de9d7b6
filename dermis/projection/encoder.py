"""An encoder: images to latents in one pass, near enough for a short optimisation to go on from.

A convolutional network looks at the image and gives, for every style vector, coordinates in the principal components of the
generator's w around its mean: ws[l] = mean + sum_k c[l, k] s_k b_k, with s_k the standard deviation along b_k. So a zero
output is the mean image, and every output is of the size that latents have.
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

    basis [components, w_dim] holds s_k b_k, mean [w_dim] the centre. The last layer begins at zero, so an untrained
    network gives the mean.
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
        """[N, num_ws, components], about standard normal where images are the generator's own."""
        if images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = (images / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        found: Tensor = self.head(self.backbone(x).float()).view(len(images), self.num_ws, -1)
        return found

    def latents(self, coordinates: Tensor) -> Tensor:
        """ws [N, num_ws, w_dim] of coordinates."""
        return self.mean + coordinates @ self.basis

    def forward(self, images: Tensor) -> Tensor:
        return self.latents(self.coordinates(images))


class Encoder:
    """An encoder made ready to run: uint8 images [N, H, W, 3] -> float32 ws [N, num_ws, w_dim]."""

    def __init__(self, network: EncoderNetwork, description: EncoderDescription, device: torch.device) -> None:
        self.description = description
        self._network = network.to(device).eval().requires_grad_(False)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: Images, labels: Sequence[int | None] = ()) -> NDArray[np.float32]:
        """ws of square images of one size. The class of an image is of no account: the encoder sees it."""
        x = torch.tensor(images, device=self._device).permute(0, 3, 1, 2).float()
        found: NDArray[np.float32] = self._network(x).cpu().numpy()
        return found


def load_encoder(bundle: Bundle, folder: str | Path | None = None, *, device: str = "auto") -> Encoder | None:
    """The encoder of a bundle, or one of its own folder for this bundle; None if the bundle has none.

    BundleError if the encoder is damaged, or was trained for another generator.
    """
    if folder is None and bundle.encoder is None:
        return None
    where = f"{bundle.location}/encoder" if folder is None else str(folder)
    opened, described, _ = open_encoder_folder(where)
    if folder is None and bundle.encoder is not None and bundle.encoder.digest != described.digest:
        raise BundleError(f"{where}: was changed since the bundle was opened; try again")
    if described.generator != bundle.files[GENERATOR].sha256:
        raise BundleError(f"{where}: was trained for another generator; train one for this: dermis train encoder")
    network = network_from(opened.read(WEIGHTS, described.files[WEIGHTS]), described, f"{where}/{WEIGHTS}")
    return Encoder(network, described, resolve_device(device))


def network_from(weights: bytes, described: EncoderDescription, where: str) -> EncoderNetwork:
    """The network in float32 of the bytes of encoder.safetensors. BundleError if they do not fit the description."""
    header = read_header(weights, where)
    try:
        # Shapes first: the description may ask for a network of any size.
        with torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in _untrained(described).state_dict().items()}
        if odd := sorted(name for name, _ in expected.items() ^ header.shapes.items()):
            raise BundleError(f"{where}: {len(odd)} tensors do not fit {DESCRIPTOR}, the first is {escape(odd[0])}")
        network = _untrained(described)
        network.load_state_dict({name: value.float() for name, value in read_tensors(weights, where).items()})
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, described.size, described.size))
    except BundleError:
        raise
    except Exception as error:  # each network of timm has requirements of its own
        raise BundleError(
            f"{where}: {described.backbone} of {described.size} px does not run ({escape(error)})"
        ) from None
    return network


def _untrained(described: EncoderDescription) -> EncoderNetwork:
    shapes = torch.zeros(described.components, described.w_dim), torch.zeros(described.w_dim)
    return EncoderNetwork(described.backbone, described.size, described.num_ws, *shapes)


def _small() -> tuple[nn.Module, int]:
    """About half a million weights; halves the image five times."""
    layers: list[nn.Module] = [nn.Conv2d(3, _WIDTHS[0], 3, 2, 1), nn.GroupNorm(8, _WIDTHS[0]), nn.SiLU()]
    for wide, wider in pairwise(_WIDTHS):
        layers += [_Residual(wide), nn.Conv2d(wide, wider, 3, 2, 1), nn.GroupNorm(8, wider), nn.SiLU()]
    last = _WIDTHS[-1]
    layers += [_Residual(last), nn.Conv2d(last, last // 2, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return channels_last(nn.Sequential(*layers)), 4 * (last // 2)


class _Residual(nn.Module):
    """x + its depthwise-separable convolution, expanded twice."""

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
        found: Tensor = x + self.layers(x)
        return found


def _timm(model: str) -> tuple[nn.Module, int]:
    timm = import_vision("timm")
    if not timm.is_model(model):
        raise BundleError(f"backbone: timm has no model {quote(model)}; timm.list_models() lists them")
    network: Any = timm.create_model(model, num_classes=0)
    return channels_last(network), int(network.num_features)
