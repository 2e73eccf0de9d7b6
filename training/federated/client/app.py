"""Flower's ClientApp: it runs on a client's machine and handles the messages of the server.

train             trains from the global tensors; replies with the tensors that are averaged, and with losses and times
evaluate          measures the global model on this client's own validation images; replies with numbers
query.describe    replies with versions and numbers of images
query.count       replies with counts of the last measurement (classifiers)

The server receives only the kind of an error: the text can name files and images, and stays in this client's log.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dermis.cpus import keep_freed_memory
from dermis.errors import DermisError
from training.federated.config import FederationConfig, parse_run_config
from training.federated.messages.replies import ARRAYS, CONFIG, FAILED, METRICS, WEIGHT, versions
from training.federated.messages.secure_aggregation import SECURE_MODS, is_secure_message
from training.federated.messages.serialization import RefusedError, changes, check_finite, decode, encode, pack
from training.federated.site import Site, parse_node_config
from training.federated.tasks import task_of
from training.federated.tasks.task import FederatedTask, TrainingRequest

_LOG = logging.getLogger("dermis.federated")

Handler = Callable[[Message, Context], Message]

app = ClientApp()
keep_freed_memory()  # each message is handled in a short-lived process, and training takes most of its time


def _replies_to_errors(handler: Handler) -> Handler:
    """Reply with an error instead of raising it, so that the server does not have to wait for its timeout."""

    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except RefusedError as error:
            reason = str(error)
        except DermisError as error:
            _LOG.error("%s", error)
            reason = f"{type(error).__name__} on the client; the client's log has the details"
        except Exception as error:
            _LOG.exception("unexpected error")
            reason = f"{type(error).__name__} on the client; the client's log has the details"
        return Message(Error(FAILED, reason), reply_to=message)

    return handle


@app.query("describe")
@_replies_to_errors
def describe(message: Message, context: Context) -> Message:
    """Reply with versions and numbers of images."""
    federation, task, site = _open(context)
    counts = MetricRecord(dict(task.describe(federation, site)))
    config = ConfigRecord({**versions(), "require-secure-aggregation": site.require_secure_aggregation})
    return Message(RecordDict({METRICS: counts, CONFIG: config}), reply_to=message)


@app.train(mods=SECURE_MODS)
@_replies_to_errors
def train(message: Message, context: Context) -> Message:
    """Train for one round."""
    federation, task, site = _open(context)
    if (federation.secure_aggregation or site.require_secure_aggregation) and not is_secure_message(message):
        raise RefusedError(
            "the server requested an unencrypted update, but this client or this federation requires secure aggregation"
        )
    config = dict(cast(ConfigRecord, message.content[CONFIG]))
    request = TrainingRequest(
        federation,
        run=_checked_run(str(config["run"])),
        round=int(cast(int, config["server-round"])),
        tensors=decode(cast(ArrayRecord, message.content[ARRAYS]), task.shapes(federation)),
        proximal_mu=float(cast(float, config.get("proximal-mu", 0.0))),
    )
    update = task.train(request, site)
    check_finite(update.tensors)
    tensors = changes(update.tensors, request.tensors) if federation.sends_changes else update.tensors
    # With secure aggregation the losses are not sent: they would reveal information about a single client.
    stats = {} if federation.secure_aggregation else {k: v for k, v in update.stats.items() if math.isfinite(v)}
    numbers = MetricRecord({WEIGHT: update.images, **stats})
    arrays = encode(tensors, "fp32" if federation.secure_aggregation else federation.wire_dtype)
    return Message(RecordDict({ARRAYS: arrays, METRICS: numbers}), reply_to=message)


@app.evaluate()
@_replies_to_errors
def evaluate(message: Message, context: Context) -> Message:
    """Reply with measurements on this client's validation images."""
    federation, task, site = _open(context)
    tensors = decode(cast(ArrayRecord, message.content[ARRAYS]), task.shapes(federation))
    numbers = MetricRecord(dict(task.evaluate(federation, site, tensors)))
    return Message(RecordDict({METRICS: numbers}), reply_to=message)


@app.query("count")
@_replies_to_errors
def count(message: Message, context: Context) -> Message:
    """Reply with counts that the server adds up."""
    federation, task, site = _open(context)
    if task.count is None:
        raise RefusedError(f"a federation of the task {federation.task} has no counts")
    tensors = decode(cast(ArrayRecord, message.content[ARRAYS]), task.shapes(federation))
    return Message(RecordDict({ARRAYS: pack(task.count(federation, site, tensors))}), reply_to=message)


def _open(context: Context) -> tuple[FederationConfig, FederatedTask, Site]:
    federation = parse_run_config(context.run_config)
    return federation, task_of(federation), parse_node_config(context.node_config)


def _checked_run(run: str) -> str:
    """Return the name of a run if it can be the name of a folder; nothing else is accepted from the network."""
    if not (0 < len(run) <= 64 and run.isalnum()):
        raise RefusedError(
            f"the name of the run must consist of 1 to 64 letters and digits, not {json.dumps(run)[:80]}"
        )
    return run
