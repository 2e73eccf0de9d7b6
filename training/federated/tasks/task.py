"""The interface of a training that a federation can run, and the implementation for each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from training.federated.config import FederationConfig
from training.federated.messages.serialization import Tensors
from training.federated.site import Site


@dataclass(frozen=True)
class TrainingRequest:
    """The server's request to a client: train in a round, starting from the global tensors.

    Attributes:
        run: Identifies the federation, for the client's own state.
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
    """The result of a client's training: all tensors that are averaged, the number of training images, and statistics."""

    tensors: Tensors
    images: int
    stats: Mapping[str, float]


@dataclass(frozen=True)
class FederatedTask:
    """Functions of one kind of training.

    Attributes:
        begin: Returns the first global tensors. Runs on the server.
        shapes: Returns tensors with the names and shapes of the global tensors; their values mean nothing.
        is_averaged: Whether clients send back the tensor of this name. All other tensors keep their initial values.
        is_optimised: Whether a server optimizer can move the tensor of this name: weights, not running averages.
        describe: Returns the numbers of images of a client.
        train: Trains on a client.
        evaluate: Measures the global model on a client.
        count: Returns arrays of integers that the server adds up over the clients; None if the task has none.
    """

    begin: Callable[[FederationConfig], Tensors]
    shapes: Callable[[FederationConfig], Tensors]
    is_averaged: Callable[[str], bool]
    is_optimised: Callable[[str], bool]
    describe: Callable[[FederationConfig, Site], dict[str, int]]
    train: Callable[[TrainingRequest, Site], Update]
    evaluate: Callable[[FederationConfig, Site, Tensors], dict[str, float]]
    count: Callable[[FederationConfig, Site, Tensors], Tensors] | None = None
