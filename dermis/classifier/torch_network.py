"""A classifier as a torch network: for training, and for explanations, which need gradients and inner layers.

timm's networks by their names, and torchvision's GoogLeNet as `googlenet`, behind one interface. The weights of a finished
classifier are read out of its ONNX file, where they stand under the names of the network's own state_dict once its
batch norms are folded into the convolutions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dermis.bundle.classifier import MODEL, read_model
from dermis.classifier.graph_check import check_graph
from dermis.classifier.onnx_session import find_classifier
from dermis.errors import BundleError, DermisError, escape, quote
from dermis.features import fold_batch_norms
from dermis.torchvision_compat import import_vision

if TYPE_CHECKING:
    from dermis.bundle import Bundle

GOOGLENET = "googlenet"
SCALE = ".scale"  # behind the name of a weight that is stored as int8: its scale an output channel
Colour = tuple[float, float, float]


class TorchClassifier(nn.Module):
    """One logit an image. Images are float [N, 3, S, S] with values 0..255; normalisation is inside.

    backbone: what `new_backbone` gives; mean and std of values 0..1.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, backbone: nn.Module, mean: Colour, std: Colour) -> None:
        super().__init__()
        self.backbone: Any = backbone
        deviation = torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * deviation), persistent=False)
        self.register_buffer("offset", torch.tensor(mean).view(1, 3, 1, 1) / deviation, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N] and pooled features [N, D]."""
        features = self.pooled(self.maps(images))
        return self.logit(features), features

    def maps(self, images: Tensor) -> Tensor:
        """What the last convolutional layer gives, with its activation, [N, D, h, w]."""
        found: Tensor = self.backbone.forward_features(images * self.scale - self.offset)
        return found

    def pooled(self, maps: Tensor) -> Tensor:
        """Features [N, D] of maps."""
        found: Tensor = self.backbone.forward_head(maps, pre_logits=True)
        return found

    def logit(self, features: Tensor) -> Tensor:
        """[N] of features [N, D]."""
        found: Tensor = self.head(features)[:, 0]
        return found

    @property
    def head(self) -> nn.Linear:
        """The last layer, from features to the logit."""
        found: nn.Linear = self.backbone.get_classifier()
        return found


def new_backbone(architecture: str, *, pretrained: bool = False, outputs: int = 1) -> nn.Module:
    """A network by timm's name of it, or `googlenet`, with `outputs` outputs (0: without its last layer).

    Random weights, or with `pretrained` the published ones, which are downloaded once. DermisError if there is no such
    convolutional network.
    """
    if architecture == GOOGLENET:
        return _googlenet(pretrained, outputs)
    timm = import_vision("timm")
    if not timm.is_model(architecture):
        raise DermisError(
            f"architecture: timm has no model {quote(architecture)}, and it is not {GOOGLENET}; timm.list_models() lists them"
        )
    backbone: nn.Module = timm.create_model(architecture, pretrained=pretrained, num_classes=outputs)
    if not hasattr(backbone, "forward_head"):
        raise DermisError(f"architecture: {architecture} has no pooled features; take a convolutional network of timm")
    return backbone


def normalisation(architecture: str, backbone: nn.Module) -> tuple[Colour, Colour]:
    """Mean and standard deviation that the network was made for, of values 0..1 (RGB)."""
    if architecture == GOOGLENET:  # torchvision's `transform_input` brings ImageNet's down to these
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    config = import_vision("timm").data.resolve_data_config({}, model=backbone)
    return tuple(map(float, config["mean"])), tuple(map(float, config["std"]))  # type: ignore[return-value]


def load_torch_classifier(source: Bundle | str | Path) -> TorchClassifier:
    """The very weights of a bundle's classifier, or of a classifier's folder, in float32 and eval mode, frozen.

    On images of the classifier's size it gives what `onnx_session.Classifier` gives, but for rounding. BundleError if
    there is none or its graph does not hold the weights of its architecture.
    """
    described, location = find_classifier(source)
    where = f"{location}/{MODEL}"
    weights = read_weights(read_model(location, described), where)
    # Shapes first, where they cost nothing: the file may name the largest network that there is.
    with torch.device("meta"):
        own = fold_batch_norms(new_backbone(described.architecture).eval()).state_dict()
    odd = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
    if odd:
        raise BundleError(f"{where}: lacks {len(odd)} weights of {described.architecture}, the first is {odd[0]}")
    backbone = fold_batch_norms(new_backbone(described.architecture).eval())
    backbone.load_state_dict({name: weights[name] for name in own})
    return TorchClassifier(backbone, described.input.mean, described.input.std).eval().requires_grad_(False)


def read_weights(model: bytes, where: str) -> dict[str, Tensor]:
    """The initializers of an ONNX file as float32 tensors, by name, 8-bit ones times their scales.

    BundleError if it cannot be read.
    """
    try:
        import onnx
    except ImportError as error:
        raise DermisError(f"reading weights needs the package onnx ({error}): pip install onnx") from error
    check_graph(model, where)
    try:
        found = onnx.load_model_from_string(model).graph.initializer
        arrays = {value.name: onnx.numpy_helper.to_array(value) for value in found}
    except Exception as error:  # protobuf's and numpy's errors share no class
        raise BundleError(f"{where}: is no ONNX graph: {escape(error)}") from None
    weights = {name: torch.from_numpy(value.astype("float32")) for name, value in arrays.items()}
    for name in [name for name in weights if name + SCALE in weights]:
        scale = weights[name + SCALE]
        if scale.ndim != weights[name].ndim or scale.numel() != scale.shape[0] or len(scale) != len(weights[name]):
            raise BundleError(f"{where}: the scales of {name} do not fit it")
        weights[name] = weights[name] * scale
    return weights


def _googlenet(pretrained: bool, outputs: int) -> nn.Module:
    """torchvision's GoogLeNet (Szegedy et al., arXiv 1409.4842) without its auxiliary classifiers."""
    models = import_vision("torchvision.models")
    if pretrained:
        network = models.googlenet(weights="IMAGENET1K_V1")  # refuses aux_logits=False, and then leaves them out
    else:
        network = models.googlenet(weights=None, aux_logits=False, transform_input=False, init_weights=True)
    network.fc = nn.Linear(network.fc.in_features, outputs) if outputs else nn.Identity()
    return _PooledGoogLeNet(network)


class _PooledGoogLeNet(nn.Module):
    """timm's interface, under torchvision's names of the weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, child in network.named_children():  # in the order in which they run
            if name not in ("avgpool", "dropout"):
                setattr(self, name, child)

    def forward_features(self, x: Tensor) -> Tensor:
        for name, child in self.named_children():
            if name != "fc":
                x = child(x)
        return x

    def forward_head(self, maps: Tensor, pre_logits: bool = True) -> Tensor:
        features = maps.mean((2, 3))
        found: Tensor = features if pre_logits else self.get_submodule("fc")(features)
        return found

    def get_classifier(self) -> nn.Module:
        return self.get_submodule("fc")

    def reset_classifier(self, outputs: int) -> None:
        self.fc = nn.Linear(1024, outputs) if outputs else nn.Identity()
