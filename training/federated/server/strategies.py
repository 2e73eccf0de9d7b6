"""Flower's strategies by name, and the aggregation of the clients' updates into the next global model.

FedAvg and FedProx average all tensors, weighted by the clients' numbers of images. Strategies that tolerate malicious
clients (median, trimmed mean, Krum) select or rank all tensors, running averages included: values that they keep out of the
weights must not enter through G_ema. Strategies with an optimizer on the server (FedAdam, FedYogi, FedAdagrad, FedAvgM) apply
it to the weights only; running averages are averaged.

Flower's strategies compute in float32, in the order of the clients' names; the other weighted means are computed in float64.
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
from training.federated import StrategyName
from training.federated.config import PER_UPDATE_STRATEGIES, FederationConfig
from training.federated.messages.replies import WEIGHT, CheckedUpdate
from training.federated.messages.serialization import Tensors
from training.options import parse_assignments

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
_STATE = ("m_t", "v_t", "momentum_vector")  # attributes of Flower's strategies that last over rounds


@dataclass(frozen=True)
class _Nodes:
    """A substitute for a Grid, of which strategies use only the nodes."""

    ids: Sequence[int]

    def get_node_ids(self) -> Sequence[int]:
        return self.ids


def new_strategy(federation: FederationConfig) -> Strategy:
    """Return Flower's strategy with the federation's options for it.

    Raises:
        TrainingError: The strategy does not have one of the options; the message names it.
    """
    options = parse_assignments(federation.strategy_options.split(), "strategy_options: ")
    if federation.strategy == "fedprox":
        options = {"proximal_mu": 0.01} | options
    fixed = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1, "weighted_by_key": WEIGHT}
    try:
        return STRATEGIES[federation.strategy](**options, **fixed)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"strategy_options: {federation.strategy}: {error}") from None


def computed_by_strategy(federation: FederationConfig, is_optimised: Callable[[str], bool], name: str) -> bool:
    """Return whether the strategy computes the tensor of this name; the others are weighted means.

    Args:
        federation: Options.
        is_optimised: Whether a server optimizer can move the tensor of a name (`FederatedTask.is_optimised`).
        name: Name of the tensor.
    """
    if federation.strategy in PER_UPDATE_STRATEGIES or federation.dp_noise:
        return True
    return is_optimised(name)


def instructions(
    strategy: Strategy, round_number: int, weights: Tensors, nodes: Sequence[int], config: ConfigRecord
) -> list[Message]:
    """Return the strategy's messages for a round. Only their configuration is used, not their arrays."""
    grid = cast(Grid, _Nodes(nodes))
    return list(strategy.configure_train(round_number, _arrays(weights), config, grid))


def aggregate(
    strategy: Strategy,
    round_number: int,
    updates: Sequence[CheckedUpdate],
    by_strategy: Callable[[str], bool],
    uniform: bool = False,
) -> Tensors | None:
    """Aggregate the updates of one round.

    Args:
        strategy: Flower's strategy, after `instructions` of the same round.
        round_number: From 1.
        updates: At least one.
        by_strategy: Whether the strategy computes the tensor of a name; the others are weighted means.
        uniform: Give every client the same weight in the strategy.

    Returns:
        The next global tensors, of all names in the updates; None if the strategy returns nothing.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    first = ordered[0].tensors
    means = _mean(ordered, [name for name in first if not by_strategy(name)])
    strategy_names = [name for name in first if by_strategy(name)]
    replies = []
    for update in ordered:
        weight = MetricRecord({WEIGHT: 1 if uniform else update.images})
        arrays = _arrays({name: update.tensors[name] for name in strategy_names})
        update.message.content = RecordDict({"arrays": arrays, "metrics": weight})
        replies.append(update.message)
    result, _ = strategy.aggregate_train(round_number, replies)
    if result is None:
        return None
    return means | {
        name: torch.from_numpy(result[name].numpy().copy()).to(first[name].dtype) for name in strategy_names
    }


def _arrays(tensors: Tensors) -> ArrayRecord:
    """Convert to the form that Flower's strategies take: one array for each tensor."""
    return ArrayRecord({name: Array(value.detach().cpu().numpy()) for name, value in tensors.items()})


def _mean(updates: Sequence[CheckedUpdate], names: Sequence[str]) -> Tensors:
    total = sum(update.images for update in updates)
    means = {}
    for name in names:
        mean = sum(update.tensors[name].double() * (update.images / total) for update in updates)
        means[name] = cast(torch.Tensor, mean).to(updates[0].tensors[name].dtype)
    return means


def strategy_state(strategy: Strategy, weights: Sequence[str]) -> Tensors:
    """Return what the strategy needs to continue after a restart, under "ATTRIBUTE/WEIGHT"."""
    state: dict[str, Any] = {}
    for attribute in _STATE:
        value = getattr(strategy, attribute, None)
        arrays: Mapping[str, NDArray[Any]] = {}
        if isinstance(value, Mapping):
            arrays = value
        elif value is not None:  # FedAvgM keeps a list, in the order of the weights
            arrays = dict(zip(weights, value, strict=True))
        state |= {f"{attribute}/{name}": torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return state


def restore_strategy(strategy: Strategy, tensors: Tensors, weights: Sequence[str]) -> None:
    """Set the state of a strategy to `tensors`, which `strategy_state` returned."""
    for attribute in _STATE:
        values = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{attribute}/")}
        if not values:
            continue
        arrays = {name: values[name].numpy() for name in weights}
        setattr(strategy, attribute, arrays if attribute != "momentum_vector" else list(arrays.values()))
