"""Flower's strategies by name, and how the members' updates become the next global model.

FedAvg and FedProx average everything with the members' numbers of images as weights. The strategies that mistrust members
(median, trimmed mean, Krum) choose or rank everything, running averages included: what they keep out of the weights must not
come in through G_ema. Those with an optimizer at the server (FedAdam, FedYogi, FedAdagrad, FedAvgM) move the weights with it,
and take the weighted mean of running averages, which are no weights.

Flower's strategies compute in float32, in the order of the members' names; the weighted mean beside them in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from dermis.errors import TrainingError
from training.experiments.experiment import parse_bare
from training.federated.config import SELECTING, FederationConfig, StrategyName
from training.federated.messages.serialization import Tensors

STRATEGIES: Mapping[StrategyName, Callable[..., Strategy]] = {
    "fedavg": flower.FedAvg,
    "fedprox": flower.FedProx,
    "fedadam": flower.FedAdam,
    "fedadagrad": flower.FedAdagrad,
    "fedyogi": flower.FedYogi,
    "fedavgm": flower.FedAvgM,
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
    "krum": flower.Krum,
    "multikrum": flower.MultiKrum,
}
WEIGHT = "num-examples"
_KEPT = ("m_t", "v_t", "momentum_vector")  # what strategies remember from round to round


@dataclass(frozen=True)
class Sound:
    """A member's update that was checked. `message` is the reply it came in."""

    member: str
    message: Message
    tensors: Tensors
    images: int


@dataclass(frozen=True)
class _Nodes:
    """In the place of a Grid, of which strategies want to know the nodes only."""

    ids: Sequence[int]

    def get_node_ids(self) -> Sequence[int]:
        return self.ids


def new_strategy(federation: FederationConfig) -> Strategy:
    """Flower's strategy with the options given to it. TrainingError names one that it does not have."""
    given = parse_bare(federation.strategy_options.split(), "strategy_options: ")
    if federation.strategy == "fedprox":
        given = {"proximal_mu": 0.01} | given
    ours = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1, "weighted_by_key": WEIGHT}
    try:
        return STRATEGIES[federation.strategy](**given, **ours)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"strategy_options: {federation.strategy}: {error}") from None


def through_strategy(federation: FederationConfig, optimised: Callable[[str], bool], name: str) -> bool:
    """Whether the strategy decides on this tensor, or else the weighted mean."""
    if federation.strategy in SELECTING or federation.dp_noise:
        return True
    return optimised(name)


def instructions(
    strategy: Strategy, round_number: int, weights: Tensors, nodes: Sequence[int], config: ConfigRecord
) -> list[Message]:
    """The strategy's own messages for a round; their contents are its configuration, their arrays are not used."""
    grid = cast(Grid, _Nodes(nodes))
    return list(strategy.configure_train(round_number, _arrays(weights), config, grid))


def aggregate(
    strategy: Strategy,
    round_number: int,
    updates: Sequence[Sound],
    chosen: Callable[[str], bool],
    uniform: bool = False,
) -> Tensors | None:
    """The next global tensors of all names that the updates have. `chosen` tells which ones the strategy decides on.

    None if the strategy found that it cannot. `uniform` gives every member the same weight in the strategy.
    """
    ordered = sorted(updates, key=lambda update: update.member)
    of = ordered[0].tensors
    names = list(of)
    found = _mean(ordered, [name for name in names if not chosen(name)])
    decided = [name for name in names if chosen(name)]
    replies = []
    for update in ordered:
        weight = MetricRecord({WEIGHT: 1 if uniform else update.images})
        arrays = _arrays({name: update.tensors[name] for name in decided})
        update.message.content = RecordDict({"arrays": arrays, "metrics": weight})
        replies.append(update.message)
    result, _ = strategy.aggregate_train(round_number, replies)
    if result is None:
        return None
    return found | {name: torch.from_numpy(result[name].numpy().copy()).to(of[name].dtype) for name in decided}


def _arrays(tensors: Tensors) -> ArrayRecord:
    """As Flower's strategies take them: an array for each weight."""
    return ArrayRecord({name: Array(value.detach().cpu().numpy()) for name, value in tensors.items()})


def _mean(updates: Sequence[Sound], names: Sequence[str]) -> Tensors:
    total = sum(update.images for update in updates)
    found = {}
    for name in names:
        mean = sum(update.tensors[name].double() * (update.images / total) for update in updates)
        found[name] = cast(torch.Tensor, mean).to(updates[0].tensors[name].dtype)
    return found


def remembered(strategy: Strategy, weights: Sequence[str]) -> Tensors:
    """What the strategy must know to go on after a restart, by attribute and weight."""
    found: dict[str, Any] = {}
    for attribute in _KEPT:
        value = getattr(strategy, attribute, None)
        arrays: Mapping[str, NDArray[Any]] = {}
        if isinstance(value, Mapping):
            arrays = value
        elif value is not None:  # FedAvgM keeps a list, in the order of the weights
            arrays = dict(zip(weights, value, strict=True))
        found |= {f"{attribute}/{name}": torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return found


def remind(strategy: Strategy, tensors: Tensors, weights: Sequence[str]) -> None:
    """Undo `remembered`."""
    for attribute in _KEPT:
        under = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{attribute}/")}
        if not under:
            continue
        arrays = {name: under[name].numpy() for name in weights}
        setattr(strategy, attribute, arrays if attribute != "momentum_vector" else list(arrays.values()))
