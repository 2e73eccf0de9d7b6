"""The network of a classifier: its first weights, which of them are trained, and its finished form for export."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from dermis.classifier.torch_network import TorchClassifier, new_backbone, normalisation
from dermis.errors import TrainingError
from dermis.features import channels_last, fold_batch_norms, lite0_state, load_safetensors, published_weights
from training.classifier.config import ClassifierConfig, WeightsDtype

LITE0 = "tf_efficientnet_lite0"


def new_network(config: ClassifierConfig, weights: str = "imagenet") -> TorchClassifier:
    """Make the network of a new run, with a new last layer that follows from the seed and the model's normalisation.

    Args:
        config: Hyper-parameters.
        weights: "imagenet" (downloaded once; those of tf_efficientnet_lite0 come with a Python package), "none", or a
            .safetensors file with the model's weights.

    Raises:
        DermisError: The weights cannot be read.
        TrainingError: The architecture cannot be exported.
    """
    architecture = config.architecture
    torch.manual_seed(config.seed)
    if weights == "imagenet" and architecture != LITE0:
        with published_weights(
            f"the weights of {architecture}",
            f"give --weights FILE.safetensors, or --architecture {LITE0}, whose weights need no download",
        ):
            backbone = new_backbone(architecture, pretrained=True, outputs=0)
    else:
        backbone = new_backbone(architecture, outputs=0)
        if weights == "imagenet":
            backbone.load_state_dict(lite0_state())
        elif weights != "none":
            load_safetensors(backbone, Path(weights))
    torch.manual_seed(config.seed)
    backbone.reset_classifier(1)  # type: ignore[operator]
    network = TorchClassifier(backbone, *normalisation(architecture, backbone))
    _check_exportable(network, config)
    return channels_last(network)


def freeze(network: TorchClassifier, config: ClassifierConfig) -> list[nn.Module]:
    """Exclude the weights that the configuration does not train from the gradient, and return their modules.

    Their batch norms must stay in eval mode, so call `set_train_mode` with them.
    """
    backbone = network.backbone
    if config.head_only:
        network.requires_grad_(False)
        network.head.requires_grad_(True)
        return [backbone]
    frozen: list[nn.Module] = []
    stages = 0
    for module, is_stage in _in_order(backbone):
        stages += is_stage
        if stages > config.freeze_stages:
            break
        frozen.append(module)
    if not config.freeze_stages:
        return []
    total = sum(is_stage for _, is_stage in _in_order(backbone))
    if config.freeze_stages > total:
        raise TrainingError(f"freeze_stages: {config.architecture} has {total}; give at most that, or --head-only")
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def set_train_mode(network: TorchClassifier, frozen: list[nn.Module]) -> None:
    """Set the network to train mode, except the frozen modules."""
    network.train()
    for module in frozen:
        module.eval()


def prior_shift(seen_share: float, real_share: float) -> float:
    """The number to add to a logit when the share of positives changes from `seen_share` in training to `real_share`.

    Bayes' rule for a change of class frequencies alone (Elkan 2001; Saerens et al. 2002). The order of images does not change.
    """
    return math.log(real_share / (1 - real_share)) - math.log(seen_share / (1 - seen_share))


def finished_network(network: TorchClassifier, shift: float, weights_dtype: WeightsDtype = "fp16") -> TorchClassifier:
    """A copy for export: batch norms folded, `shift` added to the logit, weights rounded as they will be stored.

    Weights are rounded to float16; with "int8", large ones (`is_large`) to 8-bit integers times a scale of each output
    channel.
    """
    finished = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    fold_batch_norms(finished.backbone)
    finished.head.bias.add_(shift)
    for parameter in finished.parameters():
        if weights_dtype == "int8" and is_large(parameter):
            parameter.copy_(eight_bit(parameter)[0])
        else:
            parameter.copy_(as_stored(parameter).float())
    return finished


def as_stored(weights: Tensor) -> Tensor:
    """Weights as float16; unchanged if float16 cannot represent one of them."""
    half = weights.half()
    return half if bool(torch.isfinite(half).all()) else weights


def is_large(weights: Tensor) -> bool:
    """Whether a weight is a matrix or a dense convolution: these are nearly all of a network."""
    return weights.ndim >= 2 and weights.numel() >= 4096


def eight_bit(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, integers int8, scales float32 [O, 1, ...]) with values = integers * scales, for O output channels.

    The scale is the largest weight of the channel over 127, rounded up to 11 bits, so that the products are exact in float32
    and rounding a second time changes nothing.
    """
    wide = weights.detach().float()
    largest = wide.abs().amax(dim=tuple(range(1, wide.ndim)), keepdim=True) / 127
    mantissa, exponent = torch.frexp(largest.clamp(min=1e-30))
    scales = torch.ldexp((mantissa * 2048).ceil() / 2048, exponent)
    integers = (wide / scales).round().clamp(-127, 127).to(torch.int8)
    return integers.float() * scales, integers, scales


def _in_order(backbone: nn.Module) -> list[tuple[nn.Module, bool]]:
    """The modules of the backbone in the order of the computation, each with whether it is a stage, up to the last stage."""
    modules: list[tuple[nn.Module, bool]] = []
    for name, child in backbone.named_children():
        if name in ("blocks", "stages"):
            modules += [(stage, True) for stage in child.children()]
        else:
            modules.append((child, bool(re.fullmatch(r"(layer|inception)\d\w*", name))))
    last = max((i for i, (_, is_stage) in enumerate(modules) if is_stage), default=-1)
    return modules[: last + 1]


@torch.no_grad()
def _check_exportable(network: TorchClassifier, config: ClassifierConfig) -> None:
    """Raise TrainingError, before hours of training, if folding batch norms would change the output of the network."""
    trial = copy.deepcopy(network).eval()
    draws = torch.Generator().manual_seed(0)
    for name, buffer in trial.named_buffers():  # new batch norms do nothing, and would hide a difference
        if name.endswith("running_mean"):
            buffer.add_(torch.rand(buffer.shape, generator=draws) / 10)
        elif name.endswith("running_var"):
            buffer.mul_(torch.rand(buffer.shape, generator=draws) / 2 + 0.75)
    images = torch.rand(2, 3, config.size, config.size, generator=draws) * 255
    reason = ""
    try:
        maps = trial.maps(images)
        before = trial(images)[1]
        fold_batch_norms(trial.backbone)
        after = trial(images)[1]
    except (RuntimeError, AttributeError, TypeError, ValueError, AssertionError) as error:  # each network has its own
        reason = str(error).partition("\n")[0]
    else:
        left = [module for module in trial.modules() if isinstance(module, nn.BatchNorm2d)]
        if maps.ndim != 4 or not isinstance(trial.head, nn.Linear):
            reason = "it is not a convolutional network with one last linear layer"
        elif left or not torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max())):
            reason = "its batch norms do not follow its convolutions"
    if reason:
        raise TrainingError(f"architecture: {config.architecture} cannot be trained here at {config.size} px: {reason}")
