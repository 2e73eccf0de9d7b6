"""The interface of a training that a federation can run, and the implementation for each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from training.federated.config import FederationConfig
from training.federated.messages.serialization import Tensors
from training.federated.site import Site


@dataclass(frozen=True)
class TrainingOrder:
    """The server's request to a member: train in a round, starting from the global tensors.

    Attributes:
        run: Identifies the federation, for the member's own state.
        round: From 1.
        tensors: The global tensors.
        proximal_mu: Strength of the proximal term (FedProx); 0 for none.
    """

    federation: FederationConfig
    run: str
    round: int
    tensors: Tensors
    proximal_mu: float = 0.0


@dataclass(frozen=True)
class Update:
    """The result of a member's training: all tensors that are averaged, the number of training images, and statistics."""

    tensors: Tensors
    images: int
    stats: Mapping[str, float]


@dataclass(frozen=True)
class FederatedTask:
    """Functions of one kind of training.

    Attributes:
        begin: Returns the first global tensors. Runs on the server.
        shapes: Returns tensors with the names and shapes of the global tensors; their values mean nothing.
        averaged: Whether members send back the tensor of this name; the others keep their first values.
        optimised: Whether a server optimizer can move the tensor of this name: weights, not running averages.
        describe: Returns the numbers of images of a member.
        train: Trains at a member.
        evaluate: Measures the global model at a member.
        count: Returns arrays of integers that the server adds up over the members; None if the task has none.
    """

    begin: Callable[[FederationConfig], Tensors]
    shapes: Callable[[FederationConfig], Tensors]
    averaged: Callable[[str], bool]
    optimised: Callable[[str], bool]
    describe: Callable[[FederationConfig, Site], dict[str, int]]
    train: Callable[[TrainingOrder, Site], Update]
    evaluate: Callable[[FederationConfig, Site, Tensors], dict[str, float]]
    count: Callable[[FederationConfig, Site, Tensors], Tensors] | None = None
