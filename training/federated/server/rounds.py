"""The server's rounds: request training, check the replies, average, measure, save.

A round counts once its state is on the disk. No update reaches the global model unchecked: it must have exactly the
requested tensors, finite values, and the number of images that its member announced (`messages.replies`). Refused updates,
members that did not reply, and all numbers are in the record (`record`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from dermis.errors import TrainingError, escape
from training.checkpoint import locked
from training.federated.config import FederationConfig, classifier_config, gan_config
from training.federated.messages.replies import (
    ARRAYS,
    CONFIG,
    WEIGHT,
    CheckedUpdate,
    read_description,
    read_update,
    versions,
)
from training.federated.messages.secure_aggregation import secure_mean
from training.federated.messages.serialization import RefusedError, Tensors, check_finite, encode, unpack
from training.federated.messages.traffic import CountingGrid
from training.federated.server.global_state import GlobalState, Member, load_global, save_global
from training.federated.server.privacy import privacy_spent, with_privacy, withdraw_release
from training.federated.server.record import (
    ROUNDS,
    append_round,
    drop_rounds_after,
    is_finished,
    summary,
    write_status,
)
from training.federated.server.strategies import (
    aggregate,
    instructions,
    new_strategy,
    restore_strategy,
    strategy_decides,
    strategy_state,
)
from training.federated.tasks import task_of
from training.federated.tasks.task import FederatedTask

_REFUSAL_SECONDS = 60.0  # until a refused node is asked again
_DESCRIBE_SECONDS = 900.0  # in which a member must have read and decoded its images
_MOST_COUNTS = 64 * 2**20  # bytes
OnRound = Callable[[GlobalState], Mapping[str, Any]]


@dataclass
class _Server:
    """One federation while it runs.

    Attributes:
        known: Nodes that have described themselves since this program started.
        refused: When a node was refused, in monotonic seconds.
    """

    federation: FederationConfig
    task: FederatedTask
    grid: CountingGrid
    out: Path
    state: GlobalState
    strategy: Strategy
    tell: Callable[[str], None]
    known: set[int] = field(default_factory=set)
    refused: dict[int, float] = field(default_factory=dict)

    def status(self, phase: str, **more: Any) -> None:
        """Write the status file."""
        members = {member.name: member.images for member in self.state.members.values()}
        write_status(self.out, phase, self.state.round, self.federation.rounds, members=members, **more)

    @property
    def decided(self) -> list[str]:
        """Names of the tensors that the strategy computes."""
        return [name for name in self.state.tensors if self.task.averaged(name) and self.decides(name)]

    def decides(self, name: str) -> bool:
        """Return whether the strategy computes this tensor; the others are weighted means."""
        return strategy_decides(self.federation, self.task.optimised, name)

    @property
    def averaged(self) -> Tensors:
        """The global tensors that members send back."""
        return {name: value for name, value in self.state.tensors.items() if self.task.averaged(name)}

    def name(self, node: int) -> str:
        """Return the member's name in the record; "Flower" if the node is no member."""
        member = self.state.members.get(str(node))
        return member.name if member else "Flower"


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
    tell: Callable[[str], None] = lambda text: None,
    on_round: OnRound | None = None,
) -> GlobalState:
    """Run a federation until its last round, or continue the one in `out`.

    Args:
        grid: The connection to the members.
        federation: Options.
        out: Folder of the state, the record and the result.
        tell: Is called with lines of progress.
        on_round: Returns further entries for the record of a round that is measured.

    Returns:
        The state after the last round, which is also in `out`.

    Raises:
        TrainingError: Too few members connect, or a round fails `attempts` times. The last complete round is kept, and the
            same call continues after it.
    """
    check_options(federation)
    task = task_of(federation)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        state = load_global(out, federation) or GlobalState(uuid.uuid4().hex, 0, task.begin(federation))
        spent = (state.privacy or {}).get("accountant")
        strategy = with_privacy(new_strategy(federation), federation, spent)
        server = _Server(federation, task, CountingGrid(grid), out, state, strategy, tell)
        restore_strategy(getattr(strategy, "strategy", strategy), state.strategy, server.decided)
        drop_rounds_after(out, state.round)
        try:
            _run_rounds(server, on_round)
        except TrainingError as error:
            server.status("stopped", error=str(error))
            raise
    return state


def _run_rounds(server: _Server, on_round: OnRound | None) -> None:
    federation, state = server.federation, server.state
    count = federation.clients
    if state.round >= federation.rounds and not is_finished(server.out, state.round):
        # The program ended after the last round and before its result was complete.
        _write_result(server, _connected_members(server, count))
    if state.round == 0 and federation.evaluate_rounds and not (server.out / ROUNDS).exists():
        nodes = _connected_members(server, count)
        append_round(server.out, {"round": 0, **_measurements(server, nodes), **(on_round(state) if on_round else {})})
    while state.round < federation.rounds:
        start = time.monotonic()
        nodes = _connected_members(server, count)
        count = federation.fewest_updates
        line = _run_round(server, nodes)
        state.round += 1
        state.seconds += time.monotonic() - start
        state.privacy = privacy_spent(server.strategy)
        inner = getattr(server.strategy, "strategy", server.strategy)
        state.strategy = strategy_state(inner, server.decided)
        save_global(server.out, state, federation)
        line = {"round": state.round, "seconds": round(time.monotonic() - start, 2), **line}
        if state.privacy:
            line["epsilon"] = state.privacy["epsilon"]
        if federation.evaluates(state.round):
            line |= _measurements(server, nodes)
        if on_round is not None and federation.evaluates(state.round):
            line |= on_round(state)
        append_round(server.out, line)
        server.tell(summary(line, federation.rounds))
        if state.round % federation.snapshot_rounds == 0 or state.round >= federation.rounds:
            server.status("writing")
            _write_result(server, nodes)
    server.status("finished")


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
            for node, member in state.members.items():
                state.members[node] = replace(member, rounds=member.rounds + (member.name in line["members"]))
            return line
        refusals = "; ".join(f"{name}: {reason}" for name, reason in line["refused"].items())
        silent = f"no answer of {', '.join(line['silent'])}" if line["silent"] else ""
        server.tell(
            f"round {state.round + 1}, attempt {attempt}: too few valid updates ({refusals or silent or 'none'})"
        )
        nodes = _connected_members(server, federation.fewest_updates)
    raise TrainingError(
        f"round {state.round + 1}: failed {federation.attempts} times ({refusals or silent or 'no answer'}); at least "
        f"{federation.fewest_updates} members must answer. Round {state.round} is kept: start again to continue after it"
    )


def _train(server: _Server, nodes: Sequence[int]) -> tuple[Tensors | None, dict[str, Any]]:
    """Let the nodes train, and aggregate their updates.

    Returns:
        The next global tensors, or None if there are too few valid updates; and the record of the round.
    """
    federation, state = server.federation, server.state
    arrays = encode(state.tensors, federation.wire_dtype)
    weights = {name: state.tensors[name] for name in server.decided}
    requests = {}
    for instruction in instructions(server.strategy, state.round + 1, weights, nodes, _run_record(server)):
        config = cast(ConfigRecord, instruction.content["config"])
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        node, group = instruction.metadata.dst_node_id, str(state.round + 1)
        requests[node] = Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=group)
    expected = server.averaged
    replies = list(server.grid.send_and_receive(requests.values(), timeout=federation.round_timeout))
    updates: list[CheckedUpdate] = []
    refused, numbers = dict[str, str](), dict[str, Any]()
    for reply in replies:
        name = server.name(reply.metadata.src_node_id)
        if reply.has_error():
            refused[name] = str(reply.error.reason)
            continue
        images = state.members[str(reply.metadata.src_node_id)].images
        try:
            update = read_update(reply, name, images, expected, sends_changes=federation.sends_changes)
        except RefusedError as error:
            refused[name] = str(error)
            continue
        metrics = next(iter(reply.content.metric_records.values()))
        numbers[name] = {key: value for key, value in metrics.items() if key != WEIGHT}
        updates.append(update)
    silent = sorted(server.name(node) for node in requests.keys() - {reply.metadata.src_node_id for reply in replies})
    line = {"members": dict(sorted(numbers.items())), "refused": refused, "silent": silent}
    if len(updates) < federation.fewest_updates:
        withdraw_release(server.strategy, state.round + 1)
        return None, line
    uniform = bool(federation.dp_noise)
    return aggregate(server.strategy, state.round + 1, updates, server.decides, uniform=uniform), line


def _train_secure(server: _Server, nodes: Sequence[int]) -> tuple[Tensors | None, dict[str, Any]]:
    """Do the same as `_train` with secure aggregation."""
    federation, state = server.federation, server.state
    arrays = encode(state.tensors)
    weights = {name: state.tensors[name] for name in server.decided}
    first = instructions(server.strategy, state.round + 1, weights, nodes, _run_record(server))[0]
    records: dict[str, ArrayRecord | ConfigRecord] = {ARRAYS: arrays}
    records[CONFIG] = cast(ConfigRecord, first.content["config"])
    expected = server.averaged
    most = max(member.images for node, member in state.members.items() if int(node) in nodes)
    mean = secure_mean(cast(Grid, server.grid), federation, state.round + 1, nodes, records, expected, most)
    silent = sorted(server.name(node) for node in set(nodes) - mean.images.keys())
    members: dict[str, Any] = {server.name(node): {} for node in mean.images}
    failed = {"some member": "; ".join(sorted(set(mean.failures)))} if mean.failures else {}
    line = {"members": members, "refused": failed, "silent": silent}
    if mean.changes is None:
        return None, line
    tensors = {name: expected[name] + change for name, change in mean.changes.items()}
    reply = Message(RecordDict(), dst_node_id=nodes[0], message_type=MessageType.TRAIN)
    together = [CheckedUpdate("all", reply, tensors, sum(mean.images.values()))]
    return aggregate(server.strategy, state.round + 1, together, server.decides), line


def _connected_members(server: _Server, count: int) -> list[int]:
    """Wait for `count` members that can take part.

    After `wait_timeout` seconds the fewest members that a round needs are enough.

    Returns:
        Their nodes, in the order of the members' names.

    Raises:
        TrainingError: There are too few.
    """
    federation, deadline = server.federation, time.monotonic() + server.federation.wait_timeout
    while True:
        connected = set(server.grid.get_node_ids())
        _add_members(server, connected)
        present = [node for node in connected if node in server.known]
        if len(present) >= count:
            break
        if time.monotonic() >= deadline:
            if len(present) >= federation.fewest_updates:
                break
            raise TrainingError(
                f"only {len(present)} of at least {federation.fewest_updates} members are there after "
                f"{federation.wait_timeout:g} seconds; start again when they are. Round {server.state.round} is kept"
            )
        server.status("waiting", present=[server.name(node) for node in present])
        time.sleep(1)
    ordered = sorted(present, key=server.name)
    return ordered[: federation.clients] if federation.dp_noise else ordered


def _add_members(server: _Server, connected: set[int]) -> None:
    """Ask new nodes to describe themselves. Those that do not fit are refused, and asked again after a while."""
    federation, now, members = server.federation, time.monotonic(), server.state.members
    unknown = connected - server.known
    new = [node for node in unknown if now - server.refused.get(node, -_REFUSAL_SECONDS) >= _REFUSAL_SECONDS]
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
            server.refused[node] = time.monotonic()
            server.tell(f"a member is refused: {escape(error)}")
    for node, counts in sorted(descriptions, key=lambda each: (each[1]["images"], each[0])):
        classes = {name: counts[f"images-{name}"] for name in federation.class_names}
        before = members.get(str(node), Member(f"member-{len(members) + 1}", 0, 0, {}))
        member = replace(before, images=counts["images"], validation=counts["validation"], classes=classes)
        members[str(node)] = member
        server.known.add(node)
        server.tell(f"{member.name}: {member.images:,} training and {member.validation:,} validation images")


def _measurements(server: _Server, nodes: Sequence[int]) -> dict[str, Any]:
    """Return the members' own measurements of the global model, for the record."""
    server.status("measuring")
    federation, state = server.federation, server.state
    content = RecordDict({ARRAYS: encode(state.tensors, federation.wire_dtype)})
    messages = [Message(content, dst_node_id=node, message_type=MessageType.EVALUATE) for node in nodes]
    measured = {}
    for reply in server.grid.send_and_receive(messages, timeout=federation.round_timeout):
        name = server.name(reply.metadata.src_node_id)
        if reply.has_error():
            server.tell(f"{name} did not measure: {reply.error.reason}")
            continue
        metrics = next(iter(reply.content.metric_records.values()), MetricRecord())
        if metrics:
            measured[name] = dict(metrics)
    return {"measured": dict(sorted(measured.items()))}


def _write_result(server: _Server, nodes: Sequence[int]) -> None:
    """Write the bundle, or the classifier from the members' counts."""
    federation, state = server.federation, server.state
    if server.task.count is None:
        from training.federated.server import gan_result

        path = gan_result.write_result(federation, state, server.out)
    else:
        from training.federated.server import classifier_result

        path = classifier_result.write_result(federation, state, server.out, _counts(server, nodes))
    server.tell(f"round {state.round}: {path}")


def _counts(server: _Server, nodes: Sequence[int]) -> Tensors:
    """Return the members' counts, under "MEMBER/NAME"."""
    content = RecordDict({ARRAYS: encode(server.state.tensors)})
    messages = [Message(content, dst_node_id=node, message_type="query.count") for node in nodes]
    counts: Tensors = {}
    for reply in server.grid.send_and_receive(messages, timeout=server.federation.round_timeout):
        name = server.name(reply.metadata.src_node_id)
        if reply.has_error():
            server.tell(f"{name} did not count: {reply.error.reason}")
            continue
        try:
            received = unpack(cast(ArrayRecord, reply.content[ARRAYS]), _MOST_COUNTS)
        except RefusedError as error:
            server.tell(f"{name} did not count: {escape(error)}")
            continue
        counts |= {f"{name}/{key}": value for key, value in received.items()}
    return counts


def _run_record(server: _Server) -> ConfigRecord:
    return ConfigRecord({"run": server.state.run})
