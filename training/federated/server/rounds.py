"""The server's rounds: request training, check the replies, average, measure, save.

A round counts once its state is on the disk. No update reaches the global model unchecked: it must have exactly the
requested tensors, finite values, and the number of images that its client announced (`messages.replies`). Refused updates,
clients that did not reply, and all numbers are in the record (`record`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from dermis.errors import DermisError, TrainingError, escape
from training.checkpoint import locked
from training.federated.config import FederationConfig, classifier_config, gan_config
from training.federated.messages.replies import (
    ARRAYS,
    CONFIG,
    WEIGHT,
    CheckedUpdate,
    read_description,
    read_numbers,
    read_update,
    versions,
)
from training.federated.messages.secure_aggregation import secure_mean
from training.federated.messages.serialization import RefusedError, Tensors, check_finite, encode
from training.federated.messages.traffic import CountingGrid
from training.federated.server.curves import curves, logged_options
from training.federated.server.global_state import FederatedClient, GlobalState, load_global, save_global
from training.federated.server.privacy import cancel_accounting, privacy_spent, with_privacy
from training.federated.server.record import (
    ROUNDS,
    append_round,
    drop_rounds_after,
    is_finished,
    record_of,
    replace_round,
    summary,
    write_status,
)
from training.federated.server.strategies import (
    aggregate,
    computed_by_strategy,
    instructions,
    new_strategy,
    restore_strategy,
    strategy_state,
)
from training.federated.tasks import task_of
from training.federated.tasks.task import FederatedTask
from training.loggers import Loggers, open_loggers

_REFUSAL_SECONDS = 60.0  # until a refused node is requested to describe itself again
_DESCRIBE_SECONDS = 900.0  # in which a client must have read and decoded its images
OnRound = Callable[[GlobalState], Mapping[str, Any]]


@dataclass
class _Server:
    """One federation while it runs.

    Attributes:
        accepted_nodes: Nodes whose description was accepted since this program started.
        refusal_times: When a node was refused, in monotonic seconds.
    """

    federation: FederationConfig
    task: FederatedTask
    grid: CountingGrid
    out: Path
    state: GlobalState
    strategy: Strategy
    on_progress: Callable[[str], None]
    loggers: Loggers
    accepted_nodes: set[int] = field(default_factory=set)
    refusal_times: dict[int, float] = field(default_factory=dict)

    def status(self, phase: str, **more: Any) -> None:
        """Write the status file."""
        clients = {client.name: client.images for client in self.state.clients.values()}
        write_status(self.out, phase, self.state.round, self.federation.rounds, members=clients, **more)

    @property
    def strategy_tensor_names(self) -> list[str]:
        """Names of the tensors that the strategy computes."""
        return [name for name in self.state.tensors if self.task.is_averaged(name) and self.computed_by_strategy(name)]

    def computed_by_strategy(self, name: str) -> bool:
        """Return whether the strategy computes this tensor; the others are weighted means."""
        return computed_by_strategy(self.federation, self.task.is_optimised, name)

    @property
    def averaged_tensors(self) -> Tensors:
        """The global tensors that clients send back."""
        return {name: value for name, value in self.state.tensors.items() if self.task.is_averaged(name)}

    def name(self, node: int) -> str:
        """Return the client's name in the record; "Flower" if the node is not a client."""
        client = self.state.clients.get(str(node))
        return client.name if client else "Flower"


def check_options(federation: FederationConfig) -> None:
    """Raise TrainingError with the first option of the training or of the strategy that does not fit."""
    if federation.task == "gan":
        gan_config(federation, torch.device("cpu"))
    else:
        classifier_config(federation)
    new_strategy(federation)


def run_federation(
    grid: Grid,
    federation: FederationConfig,
    out: Path,
    *,
    on_progress: Callable[[str], None] = lambda text: None,
    on_round: OnRound | None = None,
    loggers: Sequence[str] = (),
) -> GlobalState:
    """Run a federation until its last round, or continue the one in `out`.

    Args:
        grid: The connection to the clients.
        federation: Options.
        out: Folder of the state, the record and the result.
        on_progress: Called with each line of progress.
        on_round: Returns further entries for the record of a round that is measured.
        loggers: Where curves and pictures go besides the record (`training.loggers`).

    Returns:
        The state after the last round, which is also in `out`.

    Raises:
        TrainingError: Too few clients connect, or a round fails `attempts` times. The last complete round is kept, and the
            same call continues after it.
    """
    check_options(federation)
    task = task_of(federation)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        state = load_global(out, federation) or GlobalState(uuid.uuid4().hex, 0, task.begin(federation))
        accountant_state = (state.privacy or {}).get("accountant")
        strategy = with_privacy(new_strategy(federation), federation, accountant_state)
        with open_loggers(loggers, out, state.round, logged_options(federation)) as logged:
            server = _Server(federation, task, CountingGrid(grid), out, state, strategy, on_progress, logged)
            restore_strategy(getattr(strategy, "strategy", strategy), state.strategy, server.strategy_tensor_names)
            drop_rounds_after(out, state.round)
            try:
                _run_rounds(server, on_round)
            except BaseException as error:
                text = str(error) if isinstance(error, DermisError) else escape(f"{type(error).__name__}: {error}")
                with suppress(DermisError):  # the disk can be full; the first error is the one to report
                    server.status("stopped", error=text)
                raise
    return state


def _run_rounds(server: _Server, on_round: OnRound | None) -> None:
    federation, state = server.federation, server.state
    count = federation.clients
    if state.round and not is_finished(server.out, state.round):
        # The program may have ended after the round was saved, and before it was measured or its result was complete.
        line = record_of(server.out, state.round)
        if _measurement_is_due(server, line) or _result_is_due(server, line):
            _finish_round(server, _connected_clients(server, count), line, on_round)
    if state.round == 0 and federation.evaluate_rounds and not (server.out / ROUNDS).exists():
        nodes = _connected_clients(server, count)
        _record(server, {"round": 0} | _all_measurements(server, nodes, on_round))
    while state.round < federation.rounds:
        start = time.monotonic()
        nodes = _connected_clients(server, count)
        count = federation.min_updates
        line = _run_round(server, nodes)
        state.round += 1
        state.seconds += time.monotonic() - start
        state.privacy = privacy_spent(server.strategy)
        unwrapped = getattr(server.strategy, "strategy", server.strategy)
        state.strategy = strategy_state(unwrapped, server.strategy_tensor_names)
        save_global(server.out, state, federation)
        line = {"round": state.round, "seconds": round(time.monotonic() - start, 2), **line}
        if state.privacy:
            line["epsilon"] = state.privacy["epsilon"]
        _record(server, line)  # now, since measuring takes long and can be interrupted
        _finish_round(server, nodes, line, on_round)
    server.status("finished")


def _finish_round(server: _Server, nodes: Sequence[int], line: dict[str, Any], on_round: OnRound | None) -> None:
    """Measure the global model and write the result, each if it is due and not done yet, and add it to the round's record."""
    if _measurement_is_due(server, line):
        measured = _all_measurements(server, nodes, on_round)
        line |= measured
        replace_round(server.out, line)
        if server.loggers:
            server.loggers.scalars(curves(measured), line["round"])
    server.on_progress(summary(line, server.federation.rounds))
    if _result_is_due(server, line):
        server.status("writing")
        line["result"] = _write_result(server, nodes).name
        replace_round(server.out, line)


def _measurement_is_due(server: _Server, line: Mapping[str, Any]) -> bool:
    return server.federation.evaluates(line["round"]) and "measured" not in line


def _result_is_due(server: _Server, line: Mapping[str, Any]) -> bool:
    federation, number = server.federation, int(line["round"])
    if "result" in line and (server.out / line["result"]).exists():
        return False
    return number % federation.snapshot_rounds == 0 or number >= federation.rounds


def _record(server: _Server, line: Mapping[str, Any]) -> None:
    """Append the record of a round, and add a point to each curve."""
    append_round(server.out, line)
    if server.loggers:
        server.loggers.scalars(curves(line), line["round"])


def _run_round(server: _Server, nodes: Sequence[int]) -> dict[str, Any]:
    """Replace the global tensors by those of the next round.

    Returns:
        The record of the round.

    Raises:
        TrainingError: All attempts failed.
    """
    federation, state = server.federation, server.state
    for attempt in range(1, federation.attempts + 1):
        server.status("training", attempt=attempt, asked=[server.name(node) for node in nodes])
        server.grid.take()
        tensors, line = (_train_secure if federation.secure_aggregation else _train)(server, nodes)
        traffic = server.grid.take()
        state.bytes_down, state.bytes_up = state.bytes_down + traffic.down, state.bytes_up + traffic.up
        line |= {"bytes_down": traffic.down, "bytes_up": traffic.up}
        if tensors is not None:
            try:
                check_finite(tensors)
            except RefusedError as error:
                raise TrainingError(
                    f"round {state.round + 1}: the mean of valid updates is not valid: {error}; round {state.round} is kept"
                ) from None
            state.tensors |= tensors
            for node, client in state.clients.items():
                state.clients[node] = replace(client, rounds=client.rounds + (client.name in line["members"]))
            return line
        refusals = "; ".join(f"{name}: {reason}" for name, reason in line["refused"].items())
        no_reply = f"no reply from {', '.join(line['silent'])}" if line["silent"] else ""
        reason = refusals or no_reply or "no client replied"
        server.on_progress(f"round {state.round + 1}, attempt {attempt}: too few valid updates ({reason})")
        nodes = _connected_clients(server, federation.min_updates)
    raise TrainingError(
        f"round {state.round + 1}: failed {federation.attempts} times ({reason}); at least {federation.min_updates} clients "
        f"must reply. Round {state.round} is kept: run the same command again to continue"
    )


def _train(server: _Server, nodes: Sequence[int]) -> tuple[Tensors | None, dict[str, Any]]:
    """Let the nodes train, and aggregate their updates.

    Returns:
        The next global tensors, or None if there are too few valid updates; and the record of the round.
    """
    federation, state = server.federation, server.state
    arrays = encode(state.tensors, federation.wire_dtype)
    weights = {name: state.tensors[name] for name in server.strategy_tensor_names}
    requests = {}
    for instruction in instructions(server.strategy, state.round + 1, weights, nodes, _run_record(server)):
        config = cast(ConfigRecord, instruction.content["config"])
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        node, group = instruction.metadata.dst_node_id, str(state.round + 1)
        requests[node] = Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=group)
    expected = server.averaged_tensors
    replies = list(server.grid.send_and_receive(requests.values(), timeout=federation.round_timeout))
    updates: list[CheckedUpdate] = []
    refused, numbers = dict[str, str](), dict[str, Any]()
    for reply in replies:
        name = server.name(reply.metadata.src_node_id)
        if reply.has_error():
            refused[name] = escape(reply.error.reason)
            continue
        images = state.clients[str(reply.metadata.src_node_id)].images
        try:
            update = read_update(reply, name, images, expected, sends_changes=federation.sends_changes)
        except RefusedError as error:
            refused[name] = escape(error)
            continue
        metrics = read_numbers(next(iter(reply.content.metric_records.values())))
        numbers[name] = {key: value for key, value in metrics.items() if key != WEIGHT}
        updates.append(update)
    no_reply = sorted(server.name(node) for node in requests.keys() - {reply.metadata.src_node_id for reply in replies})
    line = {"members": dict(sorted(numbers.items())), "refused": refused, "silent": no_reply}
    if len(updates) < federation.min_updates:
        cancel_accounting(server.strategy, state.round + 1)
        return None, line
    uniform = bool(federation.dp_noise)
    return aggregate(server.strategy, state.round + 1, updates, server.computed_by_strategy, uniform=uniform), line


def _train_secure(server: _Server, nodes: Sequence[int]) -> tuple[Tensors | None, dict[str, Any]]:
    """Do the same as `_train` with secure aggregation."""
    federation, state = server.federation, server.state
    arrays = encode(state.tensors)
    weights = {name: state.tensors[name] for name in server.strategy_tensor_names}
    first = instructions(server.strategy, state.round + 1, weights, nodes, _run_record(server))[0]
    records: dict[str, ArrayRecord | ConfigRecord] = {ARRAYS: arrays}
    records[CONFIG] = cast(ConfigRecord, first.content["config"])
    expected = server.averaged_tensors
    max_images = max(client.images for node, client in state.clients.items() if int(node) in nodes)
    mean = secure_mean(cast(Grid, server.grid), federation, state.round + 1, nodes, records, expected, max_images)
    no_reply = sorted(server.name(node) for node in set(nodes) - mean.images.keys())
    clients: dict[str, Any] = {server.name(node): {} for node in mean.images}
    failed = {"some client": escape("; ".join(sorted(set(mean.failures))))} if mean.failures else {}
    line = {"members": clients, "refused": failed, "silent": no_reply}
    if mean.changes is None:
        return None, line
    tensors = {name: expected[name] + change for name, change in mean.changes.items()}
    reply = Message(RecordDict(), dst_node_id=nodes[0], message_type=MessageType.TRAIN)
    together = [CheckedUpdate("all", reply, tensors, sum(mean.images.values()))]
    return aggregate(server.strategy, state.round + 1, together, server.computed_by_strategy), line


def _connected_clients(server: _Server, count: int) -> list[int]:
    """Wait for `count` clients that can take part.

    After `wait_timeout` seconds the minimum number of clients for a round is enough.

    Returns:
        Their nodes, in the order of the clients' names.

    Raises:
        TrainingError: There are too few.
    """
    federation, deadline = server.federation, time.monotonic() + server.federation.wait_timeout
    while True:
        connected = set(server.grid.get_node_ids())
        _add_clients(server, connected)
        present = [node for node in connected if node in server.accepted_nodes]
        if len(present) >= count:
            break
        if time.monotonic() >= deadline:
            if len(present) >= federation.min_updates:
                break
            raise TrainingError(
                f"only {len(present)} of the required {federation.min_updates} clients connected within "
                f"{federation.wait_timeout:g} seconds; run the command again when more are online. "
                f"Round {server.state.round} is kept"
            )
        server.status("waiting", present=[server.name(node) for node in present])
        time.sleep(1)
    ordered = sorted(present, key=server.name)
    return ordered[: federation.clients] if federation.dp_noise else ordered


def _add_clients(server: _Server, connected: set[int]) -> None:
    """Request descriptions of new nodes. Those that do not fit are refused, and may try again after `_REFUSAL_SECONDS`."""
    federation, now, clients = server.federation, time.monotonic(), server.state.clients
    not_accepted = connected - server.accepted_nodes
    new = [node for node in not_accepted if now - server.refusal_times.get(node, -_REFUSAL_SECONDS) >= _REFUSAL_SECONDS]
    if not new:
        return
    messages = [Message(RecordDict({}), dst_node_id=node, message_type="query.describe") for node in sorted(new)]
    descriptions = []
    for reply in server.grid.send_and_receive(messages, timeout=min(federation.round_timeout, _DESCRIBE_SECONDS)):
        node = reply.metadata.src_node_id
        try:
            counts = read_description(
                reply, versions(), federation.class_names, secure_aggregation=federation.secure_aggregation
            )
            descriptions.append((node, counts))
        except RefusedError as error:
            server.refusal_times[node] = time.monotonic()
            server.on_progress(f"a client was refused: {escape(error)}")
    for node, counts in sorted(descriptions, key=lambda each: (each[1]["images"], each[0])):
        classes = {name: counts[f"images-{name}"] for name in federation.class_names}
        previous = clients.get(str(node), FederatedClient(f"client-{len(clients) + 1}", 0, 0, {}))
        client = replace(previous, images=counts["images"], validation=counts["validation"], classes=classes)
        clients[str(node)] = client
        server.accepted_nodes.add(node)
        server.on_progress(f"{client.name}: {client.images:,} training and {client.validation:,} validation images")


def _all_measurements(server: _Server, nodes: Sequence[int], on_round: OnRound | None) -> dict[str, Any]:
    """Return the clients' measurements and the entries of `on_round`, for the record."""
    return _measurements(server, nodes) | (dict(on_round(server.state)) if on_round is not None else {})


def _measurements(server: _Server, nodes: Sequence[int]) -> dict[str, Any]:
    """Return the clients' own measurements of the global model, for the record."""
    server.status("measuring")
    federation, state = server.federation, server.state
    content = RecordDict({ARRAYS: encode(state.tensors, federation.wire_dtype)})
    messages = [Message(content, dst_node_id=node, message_type=MessageType.EVALUATE) for node in nodes]
    measured = {}
    for reply in server.grid.send_and_receive(messages, timeout=federation.round_timeout):
        name = server.name(reply.metadata.src_node_id)
        if reply.has_error():
            server.on_progress(f"{name} did not measure the model: {escape(reply.error.reason)}")
            continue
        numbers = read_numbers(next(iter(reply.content.metric_records.values()), {}))
        if numbers:
            measured[name] = numbers
    return {"measured": dict(sorted(measured.items()))}


def _write_result(server: _Server, nodes: Sequence[int]) -> Path:
    """Write the bundle, or the classifier from the clients' counts, and return its folder."""
    federation, state = server.federation, server.state
    if server.task.count is None:
        from training.federated.server import gan_result

        path = gan_result.write_result(federation, state, server.out)
        if server.loggers:
            server.loggers.image("samples", gan_result.read_samples(server.out, state.round), state.round)
    else:
        from training.federated.server import classifier_result

        path = classifier_result.write_result(federation, state, server.out, _counts(server, nodes))
    server.on_progress(f"round {state.round}: {path}")
    return path


def _counts(server: _Server, nodes: Sequence[int]) -> Tensors:
    """Return the clients' counts that passed their check, under "CLIENT/NAME"."""
    from training.federated.server.classifier_result import read_counts

    content = RecordDict({ARRAYS: encode(server.state.tensors)})
    messages = [Message(content, dst_node_id=node, message_type="query.count") for node in nodes]
    counts: Tensors = {}
    for reply in server.grid.send_and_receive(messages, timeout=server.federation.round_timeout):
        node = reply.metadata.src_node_id
        name = server.name(node)
        if reply.has_error():
            server.on_progress(f"{name} did not send counts: {escape(reply.error.reason)}")
            continue
        try:
            received = read_counts(reply, server.state.clients[str(node)].validation)
        except RefusedError as error:
            server.on_progress(f"{name} did not send counts: {escape(error)}")
            continue
        counts |= {f"{name}/{key}": value for key, value in received.items()}
    return counts


def _run_record(server: _Server) -> ConfigRecord:
    return ConfigRecord({"run": server.state.run})
