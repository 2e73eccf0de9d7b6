"""Secure aggregation with Flower's SecAgg+ (Bell et al., ACM CCS 2020): the server learns the weighted mean alone.

Members mask their weighted changes with secrets that they share pairwise; the masks cancel in the sum. If one dies in the
middle, the others reveal its secrets, and only its. Flower 1.41 speaks the protocol in its older message formats: this
module translates on both sides. It protects from a server that follows the protocol and looks at what it gets; a member
refuses to take part with fewer than two others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common import recorddict_compat
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp import Grid

from training.federated.config import FederationConfig
from training.federated.messages.serialization import RefusedError, Tensors, unpack

FEWEST = 3
_THRESHOLD = 2 / 3  # of the members, who must answer to the end
_LEVELS = 2**22  # to which a change is rounded (at random, and so without bias)


def asks_for_masking(message: Message) -> bool:
    """Whether a message is one of the protocol's."""
    return RECORD_KEY_CONFIGS in message.content.config_records


def secure_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """At a member: the protocol around the training, for messages that ask for it. RefusedError if it would hide nothing."""
    if not asks_for_masking(message):
        return call_next(message, context)
    asked = message.content.config_records[RECORD_KEY_CONFIGS]
    if asked.get(Key.STAGE) == Stage.SETUP and (
        cast(int, asked.get(Key.SAMPLE_NUMBER, 0)) < FEWEST or cast(int, asked.get(Key.THRESHOLD, 0)) < 2
    ):
        raise RefusedError("secure aggregation of fewer than 3 members, or with a threshold below 2, hides nothing")
    return secaggplus_mod(message, context, lambda m, c: _in_older_format(call_next(m, c)))


SECURE_MODS: list[Mod] = [secure_mod]


def _in_older_format(reply: Message) -> Message:
    if reply.has_error():
        raise RefusedError(reply.error.reason)
    tensors = unpack(next(iter(reply.content.array_records.values())))
    numbers = next(iter(reply.content.metric_records.values()))
    # At least one dimension: Flower's arithmetic in place does nothing to arrays without any.
    parameters = ndarrays_to_parameters([np.atleast_1d(tensors[name].numpy()) for name in sorted(tensors)])
    result = FitRes(Status(Code.OK, ""), parameters, cast(int, numbers["num-examples"]), {})
    reply.content = recorddict_compat.fitres_to_recorddict(result, keep_input=False)
    return reply


@dataclass(frozen=True)
class SecureMean:
    """changes: the mean weighted by images, None if too few answered to the end; images of each node that was heard."""

    changes: Tensors | None
    images: Mapping[int, int]
    failures: Sequence[str]


def secure_mean(
    grid: Grid,
    federation: FederationConfig,
    round_number: int,
    nodes: Sequence[int],
    records: Mapping[str, ArrayRecord | ConfigRecord],
    shapes: Mapping[str, torch.Tensor],
    most_images: int,
) -> SecureMean:
    """At the server: one round of the protocol with these nodes, each of which is sent `records`.

    `shapes` are tensors of the names and shapes that are averaged.
    """
    strategy = _Collector(nodes)
    context = LegacyContext(
        Context(0, 0, {}, RecordDict(), {}),
        strategy=cast(Any, strategy),
        client_manager=cast(Any, SimpleNamespace(num_available=lambda: len(nodes))),
    )
    context.state.config_records["config"] = ConfigRecord({"current_round": round_number})
    context.state.array_records["parameters"] = ArrayRecord()
    workflow = _Workflow(
        records,
        num_shares=1.0,
        reconstruction_threshold=_THRESHOLD,
        max_weight=float(most_images),
        clipping_range=federation.secure_clip,
        quantization_range=_LEVELS,
        timeout=federation.round_timeout,
    )
    workflow(grid, context)
    failures = [str(failure) for failure in workflow.failures]
    if strategy.mean is None:
        return SecureMean(None, {}, failures)
    arrays = parameters_to_ndarrays(strategy.mean)
    found = {
        name: torch.from_numpy(array).to(shapes[name].dtype).reshape(shapes[name].shape)
        for name, array in zip(sorted(shapes), arrays, strict=True)
    }
    return SecureMean(found, strategy.images, failures)


class _Workflow(SecAggPlusWorkflow):
    """The protocol with our own records in the message that asks for training. `failures` says what went wrong."""

    def __init__(self, records: Mapping[str, ArrayRecord | ConfigRecord], **options: Any) -> None:
        super().__init__(**options)
        self.records = records
        self.failures: list[Exception] = []

    def setup_stage(self, grid: Grid, context: LegacyContext, state: Any) -> bool:
        self.failures = state.failures
        ready = super().setup_stage(grid, context, state)
        state.nid_to_fitins = {node: RecordDict(dict(self.records)) for node in state.nid_to_fitins}
        return ready


class _Collector:
    """In the place of an older strategy: names the nodes, and keeps what the protocol found."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self.nodes = nodes
        self.mean: Parameters | None = None
        self.images: dict[int, int] = {}

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: object) -> list[Any]:
        empty = Parameters([], "numpy.ndarray")
        return [(SimpleNamespace(node_id=node), FitIns(empty, {})) for node in self.nodes]

    def aggregate_fit(self, server_round: int, results: list[Any], failures: list[Any]) -> tuple[None, dict[str, Any]]:
        for proxy, result in results:
            self.mean = result.parameters
            self.images[proxy.node_id] = result.num_examples
        return None, {}
