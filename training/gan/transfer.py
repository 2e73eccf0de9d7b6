"""Start a run with the weights of another network: of a bundle, or of an official checkpoint.

Tensors are copied if name and shape are the same. Names contain the resolution of a block, so from a network of another
resolution the blocks from 4 px up to the smaller resolution are copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dermis.bundle import load_discriminator, load_generator, open_bundle
from dermis.errors import TrainingError, escape
from dermis.networks import Discriminator, FullyConnectedLayer, Generator, MappingNetwork
from dermis.official.convert import read_official
from training.gan.projected import ProjectedDiscriminator
from training.gan.state import GanState


@dataclass(frozen=True)
class WeightSource:
    """Networks from which weights are copied."""

    path: Path
    name: str
    digest: str  # digest of the bundle, or SHA-256 of the file
    G: Generator
    D: Discriminator | None
    no_discriminator: str  # the reason, if there is none


@dataclass(frozen=True)
class TransferResult:
    """The result for one network. `not_copied` has the tensors that keep their random values, each with the reason."""

    network: str
    share: float  # number of copied weights divided by the number of weights
    not_copied: dict[str, str]

    def __str__(self) -> str:
        text = f"{self.network}: {self.share:.0%} of the weights copied"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.not_copied.items():
            reasons.setdefault(reason, []).append(name)
        return "\n".join([text, *(f"  new, {reason}: {_abridge(names)}" for reason, names in reasons.items())])


def read_source(path: Path) -> WeightSource:
    """Read the folder of a bundle or an official .pkl. Raises BundleError if it is neither."""
    if path.is_file() or path.suffix == ".pkl":
        official = read_official(path)
        return WeightSource(
            path,
            escape(path.name),
            official.sha256,
            official.generator,
            official.discriminator,
            official.no_discriminator,
        )
    bundle = open_bundle(path)
    discriminator = load_discriminator(bundle) if bundle.discriminator else None
    return WeightSource(path, bundle.name, bundle.digest, load_generator(bundle), discriminator, "the bundle has none")


def transfer(source: WeightSource, state: GanState) -> list[TransferResult]:
    """Copy the tensors that fit into G, G_ema and D, and record the source in the state's progress.

    Returns:
        The results for G and for D.

    Raises:
        TrainingError: No weight of G fits.
    """
    G = _copy("G", source.G, state.G)
    if G.share == 0:
        raise TrainingError(
            f"--from: {source.path}: none of its weights fit this generator (the source has {_describe(source.G)}, this "
            f"run {_describe(state.G)}); use the same --channel-base, --channel-max, --z-dim and --w-dim"
        )
    _copy("G_ema", source.G, state.G_ema)
    if source.D is None:
        D = TransferResult("D", 0.0, {"all": source.no_discriminator})
    elif isinstance(state.D, ProjectedDiscriminator):
        D = TransferResult("D", 0.0, {"all": "this run's discriminator is a projected one"})
    else:
        D = _copy("D", source.D, state.D)
    state.progress.started_from = {
        "name": source.name,
        "digest": source.digest,
        "share_of_G": round(G.share, 4),
        "share_of_D": round(D.share, 4),
    }
    return [G, D]


@torch.no_grad()
def _copy(network: str, source: nn.Module, target: nn.Module) -> TransferResult:
    source_state, target_state = source.state_dict(), target.state_dict()
    depths = [_mapping_layers(module) for module in (source, target)]
    option = "--discriminator-mapping-layers" if network == "D" else "--mapping-layers"
    not_copied = {}
    for name, value in target_state.items():
        reason = _misfit(name, source_state.get(name), value, depths, option)
        if reason:
            not_copied[name] = reason
        else:
            value.copy_(source_state[name] * _scale(name, source, target))
    weights = {name: value.numel() for name, value in target.named_parameters() if value.ndim > 1}
    copied = sum(size for name, size in weights.items() if name not in not_copied)
    return TransferResult(network, copied / sum(weights.values()), not_copied)


def _scale(name: str, source: nn.Module, target: nn.Module) -> float:
    """Factor of a tensor that keeps the layer's function: layers store weights divided by their learning-rate multiplier."""
    layers = [network.get_submodule(name.rpartition(".")[0]) for network in (source, target)]
    source_gain, target_gain = [layer.bias_gain if isinstance(layer, FullyConnectedLayer) else 1.0 for layer in layers]
    return source_gain / target_gain


def _misfit(name: str, source_tensor: Tensor | None, target_tensor: Tensor, depths: list[int], option: str) -> str:
    """The reason why a tensor is not copied; empty if it is."""
    if name.startswith("mapping.") and depths[0] != depths[1]:  # a part of the layers of a deeper mapping is useless
        return f"as the source's mapping has {depths[0]} layers and this one {depths[1]} ({option})"
    if source_tensor is None:
        return "not in the source"
    return "" if source_tensor.shape == target_tensor.shape else "of another shape in the source"


def _mapping_layers(network: nn.Module) -> int:
    mapping = getattr(network, "mapping", None)
    return mapping.num_layers if isinstance(mapping, MappingNetwork) else 0


def _describe(G: Generator) -> str:
    config = G.config
    return (
        f"{config.img_resolution} px, channel_base {config.channel_base}, channel_max {config.channel_max}, "
        f"z_dim {config.z_dim}, w_dim {config.w_dim}"
    )


def _abridge(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
