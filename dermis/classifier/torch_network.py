"""A classifier as a torch network: for training, and for explanations, which need gradients and inner layers.

timm's networks by their names, and torchvision's GoogLeNet as `googlenet`, have one interface. The weights of a finished
classifier are read from its ONNX file, which has them under the names of the network's state_dict after its batch norms were
folded into the convolutions.
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
SCALE = ".scale"  # suffix of the name of a weight that is stored as int8: its scale for each output channel
Colour = tuple[float, float, float]


class TorchClassifier(nn.Module):
    """A network with one logit for each image. Images are float [N, 3, S, S] in 0..255; the network normalises them.

    Args:
        backbone: A network of `new_backbone`.
        mean: Mean of each channel, of values in 0..1.
        std: Standard deviation of each channel, of values in 0..1.
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
        """Compute logits [N] and pooled features [N, D]."""
        features = self.pooled(self.maps(images))
        return self.logit(features), features

    def maps(self, images: Tensor) -> Tensor:
        """Compute the activations of the last convolutional layer, [N, D, h, w]."""
        result: Tensor = self.backbone.forward_features(images * self.scale - self.offset)
        return result

    def pooled(self, maps: Tensor) -> Tensor:
        """Pool maps [N, D, h, w] to features [N, D]."""
        features: Tensor = self.backbone.forward_head(maps, pre_logits=True)
        return features

    def logit(self, features: Tensor) -> Tensor:
        """Compute logits [N] from features [N, D]."""
        logits: Tensor = self.head(features)[:, 0]
        return logits

    @property
    def head(self) -> nn.Linear:
        """The last layer, from features to the logit."""
        layer: nn.Linear = self.backbone.get_classifier()
        return layer


def new_backbone(architecture: str, *, pretrained: bool = False, outputs: int = 1) -> nn.Module:
    """Make a network.

    Args:
        architecture: Name of a convolutional network in timm, or `googlenet`.
        pretrained: Whether it gets the published weights, which are downloaded once, instead of random ones.
        outputs: Number of outputs; 0 for none, that is without the last layer.

    Raises:
        DermisError: There is no such convolutional network.
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
    """Return mean and standard deviation (RGB, of values in 0..1) with which the network was trained."""
    if architecture == GOOGLENET:  # torchvision's `transform_input` converts ImageNet's values to these
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    config = import_vision("timm").data.resolve_data_config({}, model=backbone)
    return tuple(map(float, config["mean"])), tuple(map(float, config["std"]))  # type: ignore[return-value]


def load_torch_classifier(source: Bundle | str | Path) -> TorchClassifier:
    """Load a classifier as a torch network in float32 and eval mode, without gradients of its weights.

    Its results on images of the classifier's size are those of `onnx_session.Classifier`, but for rounding.

    Args:
        source: A bundle, or the folder or fsspec URL of a classifier or of a bundle.

    Raises:
        BundleError: There is no classifier, or its graph does not have the weights of its architecture.
    """
    description, location = find_classifier(source)
    where = f"{location}/{MODEL}"
    weights = read_weights(read_model(location, description), where)
    # Shapes are compared without memory first, because the file can name a network of any size.
    with torch.device("meta"):
        own = fold_batch_norms(new_backbone(description.architecture).eval()).state_dict()
    odd = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
    if odd:
        raise BundleError(f"{where}: lacks {len(odd)} weights of {description.architecture}, the first is {odd[0]}")
    backbone = fold_batch_norms(new_backbone(description.architecture).eval())
    backbone.load_state_dict({name: weights[name] for name in own})
    return TorchClassifier(backbone, description.input.mean, description.input.std).eval().requires_grad_(False)


def read_weights(model: bytes, where: str) -> dict[str, Tensor]:
    """Read the initializers of an ONNX file as float32 tensors by name, 8-bit ones multiplied by their scales.

    Raises:
        BundleError: The file cannot be read. The message begins with `where`.
    """
    try:
        import onnx
    except ImportError as error:
        raise DermisError(f"reading weights needs the package onnx ({error}): pip install onnx") from error
    check_graph(model, where)
    try:
        initializers = onnx.load_model_from_string(model).graph.initializer
        arrays = {value.name: onnx.numpy_helper.to_array(value) for value in initializers}
    except Exception as error:  # exceptions of protobuf and numpy have no common class
        raise BundleError(f"{where}: is not an ONNX graph: {escape(error)}") from None
    weights = {name: torch.from_numpy(value.astype("float32")) for name, value in arrays.items()}
    for name in [name for name in weights if name + SCALE in weights]:
        scale = weights[name + SCALE]
        if scale.ndim != weights[name].ndim or scale.numel() != scale.shape[0] or len(scale) != len(weights[name]):
            raise BundleError(f"{where}: the scales of {name} do not fit it")
        weights[name] = weights[name] * scale
    return weights


def _googlenet(pretrained: bool, outputs: int) -> nn.Module:
    """Make torchvision's GoogLeNet (Szegedy et al., arXiv 1409.4842) without its auxiliary classifiers."""
    models = import_vision("torchvision.models")
    if pretrained:
        network = models.googlenet(weights="IMAGENET1K_V1")  # refuses aux_logits=False, but removes them itself
    else:
        network = models.googlenet(weights=None, aux_logits=False, transform_input=False, init_weights=True)
    network.fc = nn.Linear(network.fc.in_features, outputs) if outputs else nn.Identity()
    return _PooledGoogLeNet(network)


class _PooledGoogLeNet(nn.Module):
    """GoogLeNet with timm's interface and torchvision's names of the weights."""

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
        result: Tensor = features if pre_logits else self.get_submodule("fc")(features)
        return result

    def get_classifier(self) -> nn.Module:
        return self.get_submodule("fc")

    def reset_classifier(self, outputs: int) -> None:
        self.fc = nn.Linear(1024, outputs) if outputs else nn.Identity()
