"""Flower's ClientApp: what runs at a hospital when a message of the server arrives.

train             some iterations from the global state; answers with the averaged tensors and the numbers of the training
evaluate          measures the global model on this hospital's own validation images; answers with numbers
query.describe    versions, and how many images there are
query.count       counts of the last measurement (classifiers)

An error is told to the server by its kind alone: its text may name files and images, and stays in this hospital's log.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any, cast

import flwr
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dermis import __version__
from dermis.cpus import keep_freed_memory
from dermis.errors import DermisError
from training.federated.config import FederationConfig, parse_run_config
from training.federated.messages.secure_aggregation import SECURE_MODS, asks_for_masking
from training.federated.messages.serialization import RefusedError, changes, check_finite, decode, encode, pack
from training.federated.site import Site, parse_node_config
from training.federated.tasks.task import Order, Task, task_of

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
FAILED = 1001  # the code of our own errors; Flower's end at 999
_LOG = logging.getLogger("dermis.federated")

Handler = Callable[[Message, Context], Message]

app = ClientApp()
keep_freed_memory()  # each message is handled in a short-lived process, and training is most of what they do


def versions() -> dict[str, str]:
    """What must be the same at all members."""
    return {"dermis": __version__, "flwr": flwr.__version__, "torch": torch.__version__.partition("+")[0]}


def _answering(handler: Handler) -> Handler:
    """Answer with an error in place of raising one, so that the server need not wait for its timeout."""

    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except RefusedError as error:
            reason = str(error)
        except DermisError as error:
            _LOG.error("%s", error)
            reason = f"{type(error).__name__} at the member, whose own log says more"
        except Exception as error:
            _LOG.exception("unexpected error")
            reason = f"{type(error).__name__} at the member, whose own log says more"
        return Message(Error(FAILED, reason), reply_to=message)

    return answer


@app.query("describe")
@_answering
def describe(message: Message, context: Context) -> Message:
    """Versions and counts."""
    federation, task, site = _open(context)
    counts = MetricRecord(dict(task.describe(federation, site)))
    own = ConfigRecord({**versions(), "require-secure-aggregation": site.require_secure_aggregation})
    return Message(RecordDict({METRICS: counts, CONFIG: own}), reply_to=message)


@app.train(mods=SECURE_MODS)
@_answering
def train(message: Message, context: Context) -> Message:
    """One round."""
    federation, task, site = _open(context)
    if (federation.secure_aggregation or site.require_secure_aggregation) and not asks_for_masking(message):
        raise RefusedError("an update was asked for in the clear; this member or federation wants secure aggregation")
    config = _config(message)
    order = Order(
        federation,
        run=_name(str(config["run"])),
        round=int(cast(int, config["server-round"])),
        tensors=decode(cast(ArrayRecord, message.content[ARRAYS]), task.shapes(federation)),
        proximal_mu=float(cast(float, config.get("proximal-mu", 0.0))),
    )
    update = task.train(order, site)
    check_finite(update.tensors)
    tensors = changes(update.tensors, order.tensors) if federation.sends_changes else update.tensors
    # What secure aggregation hides in the weights is not to be told by the losses.
    stats = {} if federation.secure_aggregation else {k: v for k, v in update.stats.items() if math.isfinite(v)}
    numbers = MetricRecord({"num-examples": update.images, **stats})
    arrays = encode(tensors, "fp32" if federation.secure_aggregation else federation.wire_dtype)
    return Message(RecordDict({ARRAYS: arrays, METRICS: numbers}), reply_to=message)


@app.evaluate()
@_answering
def evaluate(message: Message, context: Context) -> Message:
    """Numbers of this hospital's validation images."""
    federation, task, site = _open(context)
    tensors = decode(cast(ArrayRecord, message.content[ARRAYS]), task.shapes(federation))
    return Message(
        RecordDict({METRICS: MetricRecord(dict(task.evaluate(federation, site, tensors)))}), reply_to=message
    )


@app.query("count")
@_answering
def count(message: Message, context: Context) -> Message:
    """Counts that the server adds up."""
    federation, task, site = _open(context)
    if task.count is None:
        raise RefusedError(f"a federation of the task {federation.task} counts nothing")
    tensors = decode(cast(ArrayRecord, message.content[ARRAYS]), task.shapes(federation))
    return Message(RecordDict({ARRAYS: pack(task.count(federation, site, tensors))}), reply_to=message)


def _open(context: Context) -> tuple[FederationConfig, Task, Site]:
    federation = parse_run_config(context.run_config)
    return federation, task_of(federation), parse_node_config(context.node_config)


def _config(message: Message) -> dict[str, Any]:
    return dict(cast(ConfigRecord, message.content[CONFIG]))


def _name(run: str) -> str:
    """A name of a run, which becomes a folder's: nothing else may come from the network."""
    if not (0 < len(run) <= 64 and run.isalnum()):
        raise RefusedError(f"the run has no name of letters and digits: {json.dumps(run)[:80]}")
    return run
