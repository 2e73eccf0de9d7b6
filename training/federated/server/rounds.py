"""The server's rounds: ask, check, average, measure, save; a round counts when its state is on the disk.

Nothing reaches the global model unchecked: an update must have exactly the tensors that were asked for, finite, and the
number of images that its member told of. What is refused, who did not answer, and all numbers stand in `rounds.jsonl`, one
line a round; `status.json` tells what is going on now. Members are numbers there: no names, no addresses.
"""

from __future__ import annotations

import json
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

from dermis.errors import TrainingError, escape, quote
from dermis.files import write_file
from training.federated.client.app import ARRAYS, CONFIG, versions
from training.federated.config import FederationConfig, classifier_config, gan_config
from training.federated.messages.secure_aggregation import secure_mean
from training.federated.messages.serialization import RefusedError, Tensors, check_finite, decode, encode, unpack
from training.federated.messages.traffic import CountingGrid
from training.federated.server.global_state import GlobalState, Member, load_global, save_global
from training.federated.server.privacy import privacy_spent, with_privacy, withdraw_release
from training.federated.server.strategies import (
    WEIGHT,
    Sound,
    aggregate,
    instructions,
    new_strategy,
    remembered,
    remind,
    through_strategy,
)
from training.federated.tasks.task import Task, task_of
from training.gan.loop import locked

ROUNDS = "rounds.jsonl"
STATUS = "status.json"
RESULT = "result"
_ASK_AGAIN = 60.0  # seconds until a refused node is asked again
_TO_DESCRIBE = 900.0  # seconds in which a member must have read and decoded its images
_MOST_COUNTS = 64 * 2**20  # bytes
OnRound = Callable[[GlobalState], Mapping[str, Any]]


@dataclass
class _Server:
    federation: FederationConfig
    task: Task
    grid: CountingGrid
    out: Path
    state: GlobalState
    strategy: Strategy
    tell: Callable[[str], None]
    known: set[int] = field(default_factory=set)  # nodes that have told what they are since this program began
    refused: dict[int, float] = field(default_factory=dict)

    def status(self, phase: str, **more: Any) -> None:
        known = {member.name: member.images for member in self.state.members.values()}
        now = {"phase": phase, "round": self.state.round, "rounds": self.federation.rounds, "time": time.time()}
        write_file(self.out / STATUS, json.dumps({**now, "members": known, **more}).encode())

    @property
    def decided(self) -> list[str]:
        """Tensors that the strategy decides on."""
        return [name for name in self.state.tensors if self.task.averaged(name) and self.chosen(name)]

    def chosen(self, name: str) -> bool:
        return through_strategy(self.federation, self.task.optimised, name)


def check_options(federation: FederationConfig) -> None:
    """TrainingError names the first option of the training or of the strategy that does not fit."""
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
    """Run until `rounds`, or go on with what `out` holds. Returns the state, and leaves it and its result in `out`.

    `on_round` may add to a round's record. TrainingError if too few members come, or a round fails as often as
    `attempts` allows; the last good round is kept, and the same call goes on with it.
    """
    check_options(federation)
    task = task_of(federation)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        state = load_global(out, federation) or GlobalState(uuid.uuid4().hex, 0, task.begin(federation))
        spent = (state.privacy or {}).get("accountant")
        strategy = with_privacy(new_strategy(federation), federation, spent)
        server = _Server(federation, task, CountingGrid(grid), out, state, strategy, tell)
        remind(getattr(strategy, "strategy", strategy), state.strategy, server.decided)
        _drop_after(out / ROUNDS, state.round)
        try:
            _all_rounds(server, on_round)
        except TrainingError as error:
            server.status("stopped", error=str(error))
            raise
    return state


def _all_rounds(server: _Server, on_round: OnRound | None) -> None:
    federation, state = server.federation, server.state
    wanted = federation.clients
    if state.round >= federation.rounds and not _finished(server):  # it died between its last round and its end
        _finish(server, _members(server, wanted))
    if state.round == 0 and federation.evaluate_rounds and not (server.out / ROUNDS).exists():
        nodes = _members(server, wanted)
        _record(server, {"round": 0, **_measured(server, nodes), **(on_round(state) if on_round else {})})
    while state.round < federation.rounds:
        start = time.monotonic()
        nodes = _members(server, wanted)
        wanted = federation.fewest
        line = _one_round(server, nodes)
        state.round += 1
        state.seconds += time.monotonic() - start
        state.privacy = privacy_spent(server.strategy)
        inner = getattr(server.strategy, "strategy", server.strategy)
        state.strategy = remembered(inner, server.decided)
        save_global(server.out, state, federation)
        line = {"round": state.round, "seconds": round(time.monotonic() - start, 2), **line}
        if state.privacy:
            line["epsilon"] = state.privacy["epsilon"]
        if federation.evaluates(state.round):
            line |= _measured(server, nodes)
        if on_round is not None and federation.evaluates(state.round):
            line |= on_round(state)
        _record(server, line)
        server.tell(summary(line, federation.rounds))
        if state.round % federation.snapshot_rounds == 0 or state.round >= federation.rounds:
            server.status("writing")
            _finish(server, nodes)
    server.status("finished")


def _one_round(server: _Server, nodes: Sequence[int]) -> dict[str, Any]:
    """Move the global tensors by one round; the round's record. TrainingError after the last attempt."""
    federation, state = server.federation, server.state
    for attempt in range(1, federation.attempts + 1):
        server.status("training", attempt=attempt, asked=[_name(server, node) for node in nodes])
        server.grid.take()
        found, line = (_secure if federation.secure_aggregation else _open_round)(server, nodes)
        traffic = server.grid.take()
        state.bytes_down, state.bytes_up = state.bytes_down + traffic.down, state.bytes_up + traffic.up
        line |= {"bytes_down": traffic.down, "bytes_up": traffic.up}
        if found is not None:
            try:
                check_finite(found)
            except RefusedError as error:
                raise TrainingError(
                    f"round {state.round + 1}: the mean of sound updates is not: {error}; round {state.round} is kept"
                ) from None
            state.tensors |= found
            for node, member in state.members.items():
                state.members[node] = replace(member, rounds=member.rounds + (member.name in line["members"]))
            return line
        why = "; ".join(f"{name}: {reason}" for name, reason in line["refused"].items())
        silent = f"no answer of {', '.join(line['silent'])}" if line["silent"] else ""
        server.tell(f"round {state.round + 1}, attempt {attempt}: too few sound updates ({why or silent or 'none'})")
        nodes = _members(server, federation.fewest)
    raise TrainingError(
        f"round {state.round + 1}: failed {federation.attempts} times ({why or silent or 'no answer'}); at least "
        f"{federation.fewest} members must answer. Round {state.round} is kept: start again to go on with it"
    )


def _open_round(server: _Server, nodes: Sequence[int]) -> tuple[Tensors | None, dict[str, Any]]:
    federation, state = server.federation, server.state
    arrays = encode(state.tensors, federation.wire_dtype)
    weights = {name: state.tensors[name] for name in server.decided}
    asked = {}
    for instruction in instructions(server.strategy, state.round + 1, weights, nodes, _config(server)):
        config = cast(ConfigRecord, instruction.content["config"])
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        node = instruction.metadata.dst_node_id
        asked[node] = Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(state.round + 1))
    expected = {name: value for name, value in state.tensors.items() if server.task.averaged(name)}
    replies = list(server.grid.send_and_receive(asked.values(), timeout=federation.round_timeout))
    sound: list[Sound] = []
    refused, numbers = dict[str, str](), dict[str, Any]()
    for reply in replies:
        name = _name(server, reply.metadata.src_node_id)
        try:
            update = _read(server, reply, expected)
        except RefusedError as error:
            refused[name] = str(error)
            continue
        metrics = next(iter(reply.content.metric_records.values()))
        numbers[name] = {key: value for key, value in metrics.items() if key != WEIGHT}
        sound.append(update)
    answered = {reply.metadata.src_node_id for reply in replies}
    silent = sorted(_name(server, node) for node in asked.keys() - answered)
    line = {"members": dict(sorted(numbers.items())), "refused": refused, "silent": silent}
    if len(sound) < federation.fewest:
        withdraw_release(server.strategy, state.round + 1)
        return None, line
    return aggregate(server.strategy, state.round + 1, sound, server.chosen, uniform=bool(federation.dp_noise)), line


def _secure(server: _Server, nodes: Sequence[int]) -> tuple[Tensors | None, dict[str, Any]]:
    federation, state = server.federation, server.state
    arrays = encode(state.tensors)
    weights = {name: state.tensors[name] for name in server.decided}
    first = instructions(server.strategy, state.round + 1, weights, nodes, _config(server))[0]
    records: dict[str, ArrayRecord | ConfigRecord] = {ARRAYS: arrays}
    records[CONFIG] = cast(ConfigRecord, first.content["config"])
    expected = {name: value for name, value in state.tensors.items() if server.task.averaged(name)}
    most = max(member.images for node, member in state.members.items() if int(node) in nodes)
    mean = secure_mean(cast(Grid, server.grid), federation, state.round + 1, nodes, records, expected, most)
    silent = sorted(_name(server, node) for node in set(nodes) - mean.images.keys())
    heard: dict[str, Any] = {_name(server, node): {} for node in mean.images}
    failed = {"some member": "; ".join(sorted(set(mean.failures)))} if mean.failures else {}
    line = {"members": heard, "refused": failed, "silent": silent}
    if mean.changes is None:
        return None, line
    tensors = {name: expected[name] + change for name, change in mean.changes.items()}
    reply = Message(RecordDict(), dst_node_id=nodes[0], message_type=MessageType.TRAIN)
    together = [Sound("all", reply, tensors, sum(mean.images.values()))]
    found = aggregate(server.strategy, state.round + 1, together, server.chosen)
    return found, line


def _read(server: _Server, reply: Message, expected: Tensors) -> Sound:
    """A training reply as an update. RefusedError says what is wrong with it."""
    if reply.has_error():
        raise RefusedError(reply.error.reason)
    arrays, metrics = reply.content.array_records, reply.content.metric_records
    if len(arrays) != 1 or len(metrics) != 1:
        raise RefusedError("must hold one record of arrays and one of numbers")
    images = next(iter(metrics.values())).get(WEIGHT)
    member = server.state.members[str(reply.metadata.src_node_id)]
    if images != member.images:
        raise RefusedError(f"claims {quote(images)} images, and announced {member.images}")
    tensors = decode(next(iter(arrays.values())), expected)
    check_finite(tensors)
    if server.federation.sends_changes:
        tensors = {name: expected[name] + change for name, change in tensors.items()}
    return Sound(member.name, reply, tensors, member.images)


def _members(server: _Server, wanted: int) -> list[int]:
    """Connected nodes that may take part, in the order of their names. Waits for `wanted` of them.

    After `wait_timeout` it goes on with `min_clients` of them. TrainingError if there are fewer.
    """
    federation, deadline = server.federation, time.monotonic() + server.federation.wait_timeout
    while True:
        connected = set(server.grid.get_node_ids())
        _get_to_know(server, connected)
        present = [node for node in connected if node in server.known]
        if len(present) >= wanted:
            break
        if time.monotonic() >= deadline:
            if len(present) >= federation.fewest:
                break
            raise TrainingError(
                f"only {len(present)} of at least {federation.fewest} members are there after "
                f"{federation.wait_timeout:g} seconds; start again when they are. Round {server.state.round} is kept"
            )
        server.status("waiting", present=[_name(server, node) for node in present])
        time.sleep(1)
    ordered = sorted(present, key=lambda node: _name(server, node))
    return ordered[: federation.clients] if federation.dp_noise else ordered


def _get_to_know(server: _Server, connected: set[int]) -> None:
    """Ask new nodes what they are; those that do not fit are refused, and asked again after a while."""
    now, members = time.monotonic(), server.state.members
    asked = connected - server.known
    new = [node for node in asked if now - server.refused.get(node, -_ASK_AGAIN) >= _ASK_AGAIN]
    if not new:
        return
    messages = [Message(RecordDict({}), dst_node_id=node, message_type="query.describe") for node in sorted(new)]
    found = []
    for reply in server.grid.send_and_receive(messages, timeout=min(server.federation.round_timeout, _TO_DESCRIBE)):
        node = reply.metadata.src_node_id
        try:
            found.append((node, _described(server, reply)))
        except RefusedError as error:
            server.refused[node] = time.monotonic()
            server.tell(f"a member is refused: {escape(error)}")
    for node, counts in sorted(found, key=lambda each: (each[1]["images"], each[0])):
        classes = {name: counts[f"images-{name}"] for name in server.federation.class_names}
        before = members.get(str(node), Member(f"member-{len(members) + 1}", 0, 0, {}))
        member = replace(before, images=counts["images"], validation=counts["validation"], classes=classes)
        members[str(node)] = member
        server.known.add(node)
        server.tell(f"{member.name}: {member.images:,} training and {member.validation:,} validation images")


def _described(server: _Server, reply: Message) -> dict[str, int]:
    if reply.has_error():
        raise RefusedError(reply.error.reason)
    told = cast(dict[str, Any], reply.content.get(CONFIG, {}))
    for package, version in versions().items():
        if told.get(package) != version:
            raise RefusedError(f"it has {package} {told.get(package)}, and must have {version}")
    if told.get("require-secure-aggregation") and not server.federation.secure_aggregation:
        raise RefusedError("it takes part in secure aggregation only, and this federation has none")
    counts = dict(next(iter(reply.content.metric_records.values()), MetricRecord()))
    wanted = ("images", "validation", *(f"images-{name}" for name in server.federation.class_names))
    if any(type(counts.get(name)) is not int or cast(int, counts[name]) < 0 for name in wanted):
        raise RefusedError("it does not tell its numbers of images")
    if cast(int, counts["images"]) < 1:
        raise RefusedError("it has no training images")
    return cast(dict[str, int], counts)


def _measured(server: _Server, nodes: Sequence[int]) -> dict[str, Any]:
    """Every member's own measurement of the global model."""
    server.status("measuring")
    federation, state = server.federation, server.state
    content = RecordDict({ARRAYS: encode(state.tensors, federation.wire_dtype)})
    messages = [Message(content, dst_node_id=node, message_type=MessageType.EVALUATE) for node in nodes]
    found = {}
    for reply in server.grid.send_and_receive(messages, timeout=federation.round_timeout):
        name = _name(server, reply.metadata.src_node_id)
        if reply.has_error():
            server.tell(f"{name} did not measure: {reply.error.reason}")
            continue
        metrics = next(iter(reply.content.metric_records.values()), MetricRecord())
        if metrics:
            found[name] = dict(metrics)
    return {"measured": dict(sorted(found.items()))}


def _finished(server: _Server) -> bool:
    try:
        status = json.loads((server.out / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(status["phase"] == "finished" and status["round"] == server.state.round)


def _finish(server: _Server, nodes: Sequence[int]) -> None:
    """Write the result; a classifier's from the members' counts, which are added up here."""
    counted: Tensors | None = None
    if server.task.count is not None:
        content = RecordDict({ARRAYS: encode(server.state.tensors)})
        messages = [Message(content, dst_node_id=node, message_type="query.count") for node in nodes]
        counted = {}
        for reply in server.grid.send_and_receive(messages, timeout=server.federation.round_timeout):
            name = _name(server, reply.metadata.src_node_id)
            if reply.has_error():
                server.tell(f"{name} did not count: {reply.error.reason}")
                continue
            try:
                counts = unpack(cast(ArrayRecord, reply.content[ARRAYS]), _MOST_COUNTS)
            except RefusedError as error:
                server.tell(f"{name} did not count: {escape(error)}")
                continue
            counted |= {f"{name}/{key}": value for key, value in counts.items()}
    path = server.task.finish(server.federation, server.state, server.out, counted)
    server.tell(f"round {server.state.round}: {path}")


def _config(server: _Server) -> ConfigRecord:
    return ConfigRecord({"run": server.state.run})


def _name(server: _Server, node: int) -> str:
    member = server.state.members.get(str(node))
    return member.name if member else "Flower"


def summary(line: Mapping[str, Any], rounds: int) -> str:
    """A round's record as one line of text."""
    parts = [f"round {line['round']}/{rounds}"]
    members = line.get("members", {})
    parts.append(f"{len(members)} members")
    for loss in ("G", "D", "loss"):
        values = [numbers[loss] for numbers in members.values() if loss in numbers]
        if values:
            parts.append(f"{loss} {sum(values) / len(values):.2f}")
    for name, numbers in line.get("measured", {}).items():
        metric = "fid" if "fid" in numbers else "auc"
        if metric in numbers:
            parts.append(f"{metric} of {name} {numbers[metric]:.4g}")
    parts += [f"{name} refused ({reason})" for name, reason in line.get("refused", {}).items()]
    parts += [f"{name} silent" for name in line.get("silent", ())]
    if "seconds" in line:
        parts.append(f"{line['seconds']:.0f} s")
    return ", ".join(parts)


def _record(server: _Server, line: Mapping[str, Any]) -> None:
    with (server.out / ROUNDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_rounds(out: Path) -> list[dict[str, Any]]:
    """The record of all rounds; a line that was cut off is left out."""
    if not (out / ROUNDS).exists():
        return []
    found = []
    for text in (out / ROUNDS).read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def _drop_after(path: Path, round_number: int) -> None:
    """Remove records of rounds whose state was not saved."""
    lines = [line for line in read_rounds(path.parent) if line["round"] <= round_number]
    if path.exists():
        write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
