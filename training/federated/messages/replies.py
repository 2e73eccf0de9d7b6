"""The records of messages, and the checks of the clients' replies.

A reply that does not pass its check raises `RefusedError`; the server leaves that client out and continues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import flwr
import torch
from flwr.app import Message, MetricRecord

from dermis import __version__
from dermis.errors import quote
from training.federated.messages.serialization import RefusedError, Tensors, check_finite, decode

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # names of records
WEIGHT = "num-examples"  # in METRICS: the number of training images of a client
FAILED = 1001  # code of the errors of dermis; Flower's codes end at 999
MAX_IMAGES = 10**7  # of a client: its number of images is the weight of its update, so it must be plausible
_MAX_NUMBERS, _MAX_NAME = 50, 64


@dataclass(frozen=True)
class CheckedUpdate:
    """A client's update that passed all checks.

    Attributes:
        client: Name of the client.
        message: The reply that contains it.
        tensors: The client's tensors, those that are averaged.
        images: Number of training images of the client.
    """

    client: str
    message: Message
    tensors: Tensors
    images: int


def versions() -> dict[str, str]:
    """Versions by package that must be the same on the server and on all clients."""
    return {"dermis": __version__, "flwr": flwr.__version__, "torch": torch.__version__.partition("+")[0]}


def read_update(reply: Message, client: str, images: int, expected: Tensors, *, sends_changes: bool) -> CheckedUpdate:
    """Check the reply to a request for training.

    Args:
        reply: The client's message, which is not an error.
        client: Name of the client.
        images: The number of training images that the client announced.
        expected: The tensors that are averaged, as they were before the round.
        sends_changes: The reply holds changes of `expected` instead of new values.

    Raises:
        RefusedError: The reply must not be averaged; the text says why.
    """
    arrays, metrics = reply.content.array_records, reply.content.metric_records
    if len(arrays) != 1 or len(metrics) != 1:
        raise RefusedError("must hold one record of arrays and one of numbers")
    reported_images = next(iter(metrics.values())).get(WEIGHT)
    if reported_images != images:
        raise RefusedError(f"reports {quote(reported_images)} training images, but announced {images}")
    tensors = decode(next(iter(arrays.values())), expected)
    check_finite(tensors)
    if sends_changes:
        tensors = {name: expected[name] + change for name, change in tensors.items()}
    return CheckedUpdate(client, reply, tensors, images)


def read_numbers(record: Mapping[str, object]) -> dict[str, float]:
    """Return the finite numbers of a client's record: at most 50, with names of at most 64 printable characters.

    Lists, which Flower's records can hold too, are left out.
    """
    numbers = {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and math.isfinite(value) and len(name) <= _MAX_NAME and name.isprintable()
    }
    return dict(islice(numbers.items(), _MAX_NUMBERS))


def read_description(
    reply: Message, required_versions: Mapping[str, str], class_names: Sequence[str], *, secure_aggregation: bool
) -> dict[str, int]:
    """Check a client's description of itself.

    Args:
        reply: The client's message.
        required_versions: Versions by package that the client must have.
        class_names: Classes of the federation.
        secure_aggregation: Whether the federation uses it.

    Returns:
        Numbers of images: "images", "validation", and "images-CLASS" for each class.

    Raises:
        RefusedError: The client cannot take part; the text says why.
    """
    if reply.has_error():
        raise RefusedError(reply.error.reason)
    config = cast(dict[str, Any], reply.content.get(CONFIG, {}))
    for package, version in required_versions.items():
        if config.get(package) != version:
            raise RefusedError(f"the client has {package} {config.get(package)}, and must have {version}")
    if config.get("require-secure-aggregation") and not secure_aggregation:
        raise RefusedError("the client requires secure aggregation, and this federation does not use it")
    counts = dict(next(iter(reply.content.metric_records.values()), MetricRecord()))
    required = ("images", "validation", *(f"images-{name}" for name in class_names))
    if any(type(counts.get(name)) is not int or cast(int, counts[name]) < 0 for name in required):
        raise RefusedError("the client did not report its numbers of images")
    if cast(int, counts["images"]) < 1:
        raise RefusedError("the client has no training images")
    for name in ("images", "validation"):
        if cast(int, counts[name]) > MAX_IMAGES:
            raise RefusedError(f"the client reports {quote(counts[name])} {name}; at most {MAX_IMAGES:,} are accepted")
    if sum(cast(int, counts[f"images-{name}"]) for name in class_names) != counts["images"]:
        raise RefusedError(
            "the client's numbers of images of each class do not add up to its number of training images"
        )
    return cast(dict[str, int], counts)
