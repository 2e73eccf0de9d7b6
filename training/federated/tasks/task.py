"""What a federation can train, as the functions that its apps call: a generator or a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.federated.config import FederationConfig, TaskName
from training.federated.messages.serialization import Tensors
from training.federated.site import Site

if TYPE_CHECKING:
    from training.federated.server.global_state import GlobalState


@dataclass(frozen=True)
class Order:
    """What the server asks of a member: train in `round` (from 1), from these tensors."""

    federation: FederationConfig
    run: str  # identifies the federation, for the member's own state
    round: int
    tensors: Tensors
    proximal_mu: float = 0.0


@dataclass(frozen=True)
class Update:
    """A member's answer: all tensors that are averaged, and its numbers."""

    tensors: Tensors
    images: int
    stats: Mapping[str, float]


@dataclass(frozen=True)
class Task:
    """Functions of one kind of training.

    begin      the first global tensors, at the server
    shapes     tensors of the names and shapes of those, whatever is in them, at a member
    averaged   whether a tensor of this name comes back from members; the others stay as they began
    optimised  whether a tensor of this name may be moved by a server optimizer: weights, not running averages
    describe   what a member tells of its data: counts alone
    train, evaluate, count   at a member; `count` returns integer arrays that members' answers are summed of
    finish     write what the federation has come to (a bundle, a classifier) into a folder, and return its path
    """

    begin: Callable[[FederationConfig], Tensors]
    shapes: Callable[[FederationConfig], Tensors]
    averaged: Callable[[str], bool]
    optimised: Callable[[str], bool]
    describe: Callable[[FederationConfig, Site], dict[str, int]]
    train: Callable[[Order, Site], Update]
    evaluate: Callable[[FederationConfig, Site, Tensors], dict[str, float]]
    count: Callable[[FederationConfig, Site, Tensors], Tensors] | None
    finish: Callable[[FederationConfig, GlobalState, Path, Tensors | None], Path]
    metric: str
    """The measurement that curves show: "fid" (less is better) or "auc"."""


def task_of(federation: FederationConfig) -> Task:
    """The functions of the federation's task; imports what they need."""
    return _TASKS[federation.task]()


def _gan() -> Task:
    from training.federated.server import gan_result
    from training.federated.tasks import gan as gan_task

    return Task(
        gan_task.begin,
        gan_task.shapes,
        gan_task.averaged,
        gan_task.optimised,
        gan_task.describe,
        gan_task.train,
        gan_task.evaluate,
        None,
        gan_result.finish,
        "fid",
    )


def _classifier() -> Task:
    from training.federated.server import classifier_result
    from training.federated.tasks import classifier as classifier_task

    return Task(
        classifier_task.begin,
        classifier_task.shapes,
        classifier_task.averaged,
        classifier_task.optimised,
        classifier_task.describe,
        classifier_task.train,
        classifier_task.evaluate,
        classifier_task.count,
        classifier_result.finish,
        "auc",
    )


_TASKS: Mapping[TaskName, Callable[[], Task]] = {"gan": _gan, "classifier": _classifier}
