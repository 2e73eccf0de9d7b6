"""Secure aggregation with Flower's SecAgg+ (Bell et al., ACM CCS 2020): the server learns only the weighted mean.

Clients mask their weighted changes with secrets that they share in pairs, and the masks cancel in the sum. If a client
disconnects during the protocol, the others reveal the secrets of that client only. Flower 1.41 implements the protocol with
its older message formats; this module converts on both sides. The protocol protects against a server that follows it but reads
what it receives. A client refuses to take part with fewer than two others.
"""

from __future__ import annotations

import math
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
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage
from flwr.compat.common import recorddict_compat
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp import Grid

from training.federated.config import FederationConfig
from training.federated.messages.replies import WEIGHT
from training.federated.messages.serialization import RefusedError, Tensors, unpack

MIN_CLIENTS = 3
_THRESHOLD = 2 / 3  # share of the clients that must reply in all stages
_LEVELS = 2**22  # values to which a change is rounded; at random, so without bias


def is_secure_message(message: Message) -> bool:
    """Return whether a message belongs to the protocol."""
    return RECORD_KEY_CONFIGS in message.content.config_records


def secure_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Run the protocol around the training of a client, for messages that belong to it.

    Raises:
        RefusedError: Fewer than 3 clients take part, or the threshold is below 2: the server could compute a single client's
            update.
    """
    if not is_secure_message(message):
        return call_next(message, context)
    request = message.content.config_records[RECORD_KEY_CONFIGS]
    if request.get(Key.STAGE) == Stage.SETUP and (
        cast(int, request.get(Key.SAMPLE_NUMBER, 0)) < MIN_CLIENTS or cast(int, request.get(Key.THRESHOLD, 0)) < 2
    ):
        raise RefusedError("secure aggregation needs at least 3 clients and a threshold of at least 2")
    return secaggplus_mod(message, context, lambda m, c: _checked_in_older_format(call_next(m, c), c))


SECURE_MODS: list[Mod] = [secure_mod]


def check_range(changes: Mapping[str, torch.Tensor], images: int, max_images: float, clip: float) -> None:
    """Check that the protocol can represent changes as it encodes them: it would clip larger ones without a word.

    It encodes each change times images / max_images.

    Args:
        changes: The client's changes by name of the tensor.
        images: Its number of training images.
        max_images: That of the client with the most images.
        clip: Largest value that can be encoded.

    Raises:
        RefusedError: A value is above `clip`, or the client has more images than `max_images`; the text says which.
    """
    if images > max_images:
        raise RefusedError(
            f"the client has {images:,} training images now, but none announced more than {max_images:,.0f} to the server"
        )
    share = images / max_images
    for name, change in changes.items():
        largest = float(change.abs().max()) if change.numel() else 0.0
        if share * largest > clip:
            raise RefusedError(
                f"{name} changed by {largest:.4g}, times {share:.3g} for the client's share of images, which "
                f"secure_clip={clip:g} cannot represent; continue with --federation "
                f"secure_clip={2 ** math.ceil(math.log2(share * largest) + 1):g} or more"
            )


def _checked_in_older_format(reply: Message, context: Context) -> Message:
    if reply.has_error():
        raise RefusedError(reply.error.reason)
    tensors = unpack(next(iter(reply.content.array_records.values())))
    images = cast(int, next(iter(reply.content.metric_records.values()))[WEIGHT])
    setup = context.state.config_records[RECORD_KEY_STATE]  # what the server sent in the first stage
    check_range(tensors, images, cast(float, setup[Key.MAX_WEIGHT]), cast(float, setup[Key.CLIPPING_RANGE]))
    # At least one dimension: Flower's in-place arithmetic does not change arrays without dimensions.
    parameters = ndarrays_to_parameters([np.atleast_1d(tensors[name].numpy()) for name in sorted(tensors)])
    result = FitRes(Status(Code.OK, ""), parameters, images, {})
    reply.content = recorddict_compat.fitres_to_recorddict(result, keep_input=False)
    return reply


@dataclass(frozen=True)
class SecureMean:
    """The result of one round of the protocol.

    Attributes:
        changes: Mean of the clients' changes, weighted by their images; None if too few replied in all stages.
        images: Number of training images by node, of the nodes that replied.
        failures: Error texts.
    """

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
    max_images: int,
) -> SecureMean:
    """Run one round of the protocol on the server.

    Args:
        grid: The connection to the clients.
        federation: Options: the range of a change, the timeout.
        round_number: From 1.
        nodes: The clients that take part.
        records: Sent to each of them with the request to train.
        shapes: Tensors with the names and shapes that are averaged.
        max_images: Largest number of training images of a client.
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
        max_weight=float(max_images),
        clipping_range=federation.secure_clip,
        quantization_range=_LEVELS,
        timeout=federation.round_timeout,
    )
    workflow(grid, context)
    failures = [str(failure) for failure in workflow.failures]
    if strategy.mean is None:
        return SecureMean(None, {}, failures)
    arrays = parameters_to_ndarrays(strategy.mean)
    mean = {
        name: torch.from_numpy(array).to(shapes[name].dtype).reshape(shapes[name].shape)
        for name, array in zip(sorted(shapes), arrays, strict=True)
    }
    return SecureMean(mean, strategy.images, failures)


class _Workflow(SecAggPlusWorkflow):
    """The protocol with the records of dermis in the message that requests training. `failures` are its errors."""

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
    """A strategy of the older interface that names the nodes and keeps the result of the protocol."""

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
