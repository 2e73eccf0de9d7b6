"""Tests of federated generators: the averages, refused updates, and recovery after clients or servers end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dermis.bundle import load_generator, open_bundle
from dermis.errors import TrainingError
from kept_logger import keep_curves
from tiny_federation import local_grid, tiny_federation, tiny_sites
from tiny_skin import make_skin
from training.federated.client.app import app
from training.federated.config import FederationConfig, gan_config
from training.federated.messages.serialization import pack, unpack
from training.federated.server.gan_result import averaged_generator
from training.federated.server.global_state import GlobalState
from training.federated.server.record import read_rounds
from training.federated.server.rounds import run_federation
from training.federated.simulation.local_grid import LocalGrid
from training.federated.simulation.simulate import simulate
from training.federated.site import Site, site_images
from training.gan.loop import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def skin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_skin(tmp_path_factory.mktemp("skin"), count=24, size=16)


def _alone(data: Path, out: Path, federation: FederationConfig) -> dict[str, torch.Tensor]:
    """G_ema after as many steps of an ordinary training."""
    site = tiny_sites(data, out)[0]
    images = site_images(site, federation.class_names, True, federation.resolution)
    config = gan_config(federation, CPU)
    config = replace(config, total_kimg=federation.rounds * federation.iterations * config.batch / 1000)
    generator, _ = train(images.train, config, out / "run", device=CPU, progress_bar=False)
    return generator.state_dict()


def _same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_federation_of_one_client_equals_ordinary_training(skin: Path, tmp_path: Path) -> None:
    """Bit for bit over two rounds: averages, optimizers, augmentation and the order of images go on across them."""
    federation = tiny_federation(clients=1, min_clients=1)
    state = simulate(federation, tiny_sites(skin, tmp_path / "members")[:1], tmp_path / "out")
    assert state.tensors["p"].item() > 0, "the run must have augmented, or p is not tested"
    assert _same(
        averaged_generator(federation, state.tensors).state_dict(), _alone(skin, tmp_path / "alone", federation)
    )


def test_two_equal_clients_give_result_of_single_client_and_log_curves(
    skin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep_curves(monkeypatch, "training.federated.server.rounds")
    one = simulate(tiny_federation(clients=1, min_clients=1), tiny_sites(skin, tmp_path / "a")[:1], tmp_path / "one")
    assert not kept.points, "nothing is logged unless it is requested"
    federation, sites = tiny_federation(clients=2, start=""), tiny_sites(skin, tmp_path / "b", (0, 0))
    two = simulate(federation, sites, tmp_path / "two", loggers=["tensorboard"])
    assert _same(one.tensors, two.tensors)
    records = read_rounds(tmp_path / "two")
    assert [step for _, step in kept.points] == [line["round"] for line in records] == [1, 2]
    points, members = kept.points[1][0], records[1]["members"]
    assert points["loss/G/client-2"] == members["client-2"]["G"]
    assert points["loss/D"] == pytest.approx((members["client-1"]["D"] + members["client-2"]["D"]) / 2)
    assert points["round/clients"] == 2 and points["traffic/MB to clients"] == records[1]["bytes_down"] / 1e6
    assert kept.options["iterations"] == 3 and "start" not in kept.options and kept.closed
    assert kept.pictures == [("samples", 2)]


@pytest.mark.full
def test_clients_with_different_seeds_change_result(skin: Path, tmp_path: Path) -> None:
    one = simulate(tiny_federation(clients=1, min_clients=1), tiny_sites(skin, tmp_path / "a")[:1], tmp_path / "one")
    two = simulate(tiny_federation(clients=2), tiny_sites(skin, tmp_path / "b", (0, 1)), tmp_path / "two")
    assert not torch.equal(one.tensors["G/synthesis.b8.conv1.weight"], two.tensors["G/synthesis.b8.conv1.weight"])


@pytest.mark.full
def test_resumed_federation_equals_uninterrupted_federation(skin: Path, tmp_path: Path) -> None:
    """Also that of a strategy with an optimizer at the server."""
    for strategy in ("fedavg", "fedadam", "fedavgm"):
        options = {"fedadam": "eta=0.01", "fedavgm": "server_momentum=0.5"}.get(strategy, "")
        long = tiny_federation(strategy=strategy, strategy_options=options, rounds=3)
        root = tmp_path / strategy
        whole = simulate(long, tiny_sites(skin, root / "a"), root / "whole")
        simulate(replace(long, rounds=1), tiny_sites(skin, root / "b"), root / "parts")
        parts = simulate(long, tiny_sites(skin, root / "b"), root / "parts")
        assert parts.round == 3
        assert _same(whole.tensors, parts.tensors), strategy
        assert [line["round"] for line in read_rounds(root / "parts")] == [1, 2, 3]


@pytest.mark.full
def test_unsaved_round_is_repeated_with_same_result(skin: Path, tmp_path: Path) -> None:
    """The server ends after its clients have trained: they return to the state before the round."""
    federation = tiny_federation(rounds=2)
    whole = simulate(federation, tiny_sites(skin, tmp_path / "a"), tmp_path / "whole")
    simulate(replace(federation, rounds=1), tiny_sites(skin, tmp_path / "b"), tmp_path / "out")
    kept = (tmp_path / "out" / "federation.safetensors").read_bytes()
    simulate(federation, tiny_sites(skin, tmp_path / "b"), tmp_path / "out")
    (tmp_path / "out" / "federation.safetensors").write_bytes(kept)
    again = simulate(federation, tiny_sites(skin, tmp_path / "b"), tmp_path / "out")
    assert _same(whole.tensors, again.tensors)


class _Sabotaged(LocalGrid):
    """Lets `spoil` change the training replies of one node, or drop them."""

    def __init__(self, *args: Any, node: int, spoil: Callable[[Any], Any]) -> None:
        super().__init__(*args)
        self.node, self.spoil = node, spoil

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Iterable[Any]:
        for reply in super().send_and_receive(messages, timeout=timeout):
            if reply.metadata.src_node_id == self.node and reply.metadata.message_type == "train":
                if (spoilt := self.spoil(reply)) is not None:
                    yield spoilt
            else:
                yield reply


def _repacked(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Any], Any]:
    def spoil(reply: Any) -> Any:
        tensors = unpack(reply.content["arrays"])
        change(tensors)
        reply.content["arrays"] = pack(tensors)
        return reply

    return spoil


def _with_weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = "G/synthesis.b8.conv1.weight"
        tensors[name] = change(tensors[name].clone())

    return _repacked(spoil)


def _nan(weight: torch.Tensor) -> torch.Tensor:
    weight.view(-1)[0] = torch.nan
    return weight


def _boastful(reply: Any) -> Any:
    reply.content["metrics"]["num-examples"] = 10**9
    return reply


def _rubbish(reply: Any) -> Any:
    next(iter(reply.content["arrays"].values())).data = b"\x00" * 100
    return reply


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_with_weight(_nan), "not finite"),
        pytest.param(_with_weight(lambda weight: weight[:1]), "must be", marks=pytest.mark.full),
        pytest.param(_with_weight(lambda weight: weight.to(torch.complex64)), "must be", marks=pytest.mark.full),
        (_repacked(lambda tensors: tensors.pop("pl_mean")), "pl_mean is missing"),
        (_boastful, "reports 1000000000 training images"),
        (_rubbish, "cannot be read"),
    ],
    ids=["nan", "shape", "dtype", "missing", "weight", "rubbish"],
)
def test_invalid_update_is_refused_and_changes_no_weights(
    skin: Path, tmp_path: Path, spoil: Callable[[Any], Any], why: str
) -> None:
    """The round continues without this client."""
    federation = tiny_federation(rounds=1, clients=3, min_clients=2)
    without = simulate(replace(federation, clients=2), tiny_sites(skin, tmp_path / "a")[1:], tmp_path / "without")
    sites = tiny_sites(skin, tmp_path / "b")
    grid = _Sabotaged(app, [s.to_node_config() for s in sites], federation.to_run_config(), node=1, spoil=spoil)
    state = run_federation(grid, federation, tmp_path / "out")
    (line,) = read_rounds(tmp_path / "out")
    assert why in line["refused"]["client-1"]
    assert _same(state.tensors, without.tensors)


@pytest.mark.full
def test_too_few_valid_updates_keep_last_round_for_resume(skin: Path, tmp_path: Path) -> None:
    federation, sites = tiny_federation(clients=2), tiny_sites(skin, tmp_path / "a")[:2]
    simulate(replace(federation, rounds=1), sites, tmp_path / "out")
    kept = (tmp_path / "out" / "federation.safetensors").read_bytes()
    configs = [site.to_node_config() for site in sites]
    grid = _Sabotaged(app, configs, federation.to_run_config(), node=2, spoil=lambda reply: None)
    with pytest.raises(TrainingError, match=r"round 2: failed 1 times \(no reply from client-2\).*Round 1 is kept"):
        run_federation(grid, federation, tmp_path / "out")
    assert (tmp_path / "out" / "federation.safetensors").read_bytes() == kept
    assert json.loads((tmp_path / "out" / "status.json").read_text())["phase"] == "stopped"
    assert simulate(federation, sites, tmp_path / "out").round == 2


def test_client_that_dies_in_round_rejoins_later(skin: Path, tmp_path: Path) -> None:
    """The others continue; afterwards it takes part again, with its own optimizer's old state and the new weights."""
    federation = tiny_federation(rounds=4, clients=3, min_clients=2)
    grid = local_grid(federation, tiny_sites(skin, tmp_path / "members"))
    send = grid.send_and_receive

    def dying(messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        sent = list(messages)
        group = sent[0].metadata.group_id
        grid.connected = {1, 2} if group == "3" else {1, 2, 3}
        replies = list(send(sent, timeout=timeout))
        grid.connected = {1, 2, 3}
        return [r for r in replies if not (group == "2" and r.metadata.src_node_id == 3)]

    grid.send_and_receive = dying  # type: ignore[method-assign]
    state = run_federation(grid, federation, tmp_path / "out")
    lines = read_rounds(tmp_path / "out")
    assert state.round == 4
    assert [client.rounds for client in state.contributors] == [4, 4, 2]
    assert [line["silent"] for line in lines] == [[], ["client-3"], ["client-3"], []]
    assert sorted(lines[3]["members"]) == ["client-1", "client-2", "client-3"]


def test_too_few_clients_is_an_error(skin: Path, tmp_path: Path) -> None:
    federation = tiny_federation(clients=3, min_clients=3)
    with pytest.raises(TrainingError, match="only 2 of the required 3 clients connected"):
        run_federation(local_grid(federation, tiny_sites(skin, tmp_path / "m")[:2]), federation, tmp_path / "out")


def test_resume_with_other_options_is_refused_by_name(skin: Path, tmp_path: Path) -> None:
    sites = tiny_sites(skin, tmp_path / "members")
    simulate(tiny_federation(rounds=1), sites, tmp_path / "out")
    with pytest.raises(TrainingError, match="was started with other values of share, strategy"):
        simulate(tiny_federation(share="generator", strategy="krum"), sites, tmp_path / "out")


def test_continued_federation_keeps_first_weights_of_its_beginning(skin: Path, tmp_path: Path) -> None:
    """Omitted, `start` is the one that the federation began with, since clients depend on it; another one is refused."""
    sites = tiny_sites(skin, tmp_path / "members")[:1]
    one = tiny_federation(clients=1, min_clients=1, rounds=1)
    simulate(one, sites, tmp_path / "first")
    start = str(tmp_path / "first" / "bundle")
    simulate(replace(one, start=start), sites, tmp_path / "out")
    simulate(replace(one, rounds=2), sites, tmp_path / "out")
    assert open_bundle(tmp_path / "out" / "bundle").provenance["federation"]["began_with"] == "bundle"
    with pytest.raises(TrainingError, match="was started with other values of start;"):
        simulate(replace(one, rounds=3, start=str(tmp_path / "other")), sites, tmp_path / "out")
    with pytest.raises(TrainingError, match="was started with other values of start;"):  # as Flower's own command does
        run_federation(local_grid(one, sites), replace(one, rounds=3), tmp_path / "out")
    assert one.changed_from({name: value for name, value in one.identity.items() if name != "start"}) == []


def test_client_continues_with_other_precision(skin: Path, tmp_path: Path) -> None:
    """As on another machine, where `precision=auto` means another one; the server's options are those of the beginning."""
    federation, sites = tiny_federation(clients=1, min_clients=1), tiny_sites(skin, tmp_path / "members")[:1]
    simulate(replace(federation, rounds=1, precision="auto"), sites, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.federated.config.automatic_precision", lambda device: "bf16")
        assert simulate(replace(federation, precision="auto"), sites, tmp_path / "out").round == 2


def test_generator_sharing_keeps_discriminators_at_clients(skin: Path, tmp_path: Path) -> None:
    federation = tiny_federation(share="generator")
    state = simulate(federation, tiny_sites(skin, tmp_path / "members"), tmp_path / "out")
    assert not [name for name in state.tensors if name.startswith("D")]
    kept = sorted((tmp_path / "members" / "client-0").rglob("round-*.safetensors"))
    from safetensors.torch import load_file

    before, after = (load_file(path)["D/b8.conv0.weight"] for path in kept)
    assert not torch.equal(before, after), "the discriminator must learn, or it is not tested that it is kept"


@pytest.mark.full
def test_shared_optimizers_are_averaged(skin: Path, tmp_path: Path) -> None:
    """With equal clients a shared optimizer is their own, and nothing changes."""
    sites = tiny_sites(skin, tmp_path / "a", (0, 0))
    local = simulate(tiny_federation(clients=2), sites, tmp_path / "local")
    shared = simulate(
        tiny_federation(clients=2, optimizer="shared"), tiny_sites(skin, tmp_path / "b", (0, 0)), tmp_path / "shared"
    )
    assert shared.tensors["G_opt/0/step"].item() > 0
    assert all(torch.equal(value, shared.tensors[name]) for name, value in local.tensors.items())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_sixteen_bit_updates_reduce_traffic_and_keep_result(skin: Path, tmp_path: Path, dtype: str) -> None:
    full = simulate(tiny_federation(rounds=1), tiny_sites(skin, tmp_path / "a"), tmp_path / "full")
    half = simulate(tiny_federation(rounds=1, wire_dtype=dtype), tiny_sites(skin, tmp_path / "b"), tmp_path / "half")
    lines = [read_rounds(tmp_path / run)[0] for run in ("full", "half")]
    arrays = [line["bytes_up"] for line in lines]
    assert arrays[1] < 0.8 * arrays[0]  # the headers of such small arrays are a large part
    name = "G_ema/synthesis.b8.conv1.weight"
    assert torch.allclose(full.tensors[name], half.tensors[name], atol=0.02)
    assert torch.equal(
        full.tensors["G/synthesis.b8.conv1.noise_const"], half.tensors["G/synthesis.b8.conv1.noise_const"]
    )


def test_client_error_reveals_no_file_names_to_server(skin: Path, tmp_path: Path) -> None:
    federation = tiny_federation(clients=2, rounds=1)
    lost = Site(tmp_path / "st-elsewhere", tmp_path / "state", device="cpu")
    messages: list[str] = []
    grid = local_grid(federation, [*tiny_sites(skin, tmp_path / "members")[:2], lost])
    run_federation(grid, federation, tmp_path / "out", on_progress=messages.append)
    assert "a client was refused: DataError on the client; the client's log has the details" in messages
    assert "elsewhere" not in " ".join(messages)


def test_client_of_other_version_is_refused(skin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = tiny_federation(clients=2, rounds=1)
    monkeypatch.setattr("training.federated.messages.replies.__version__", "0.0.1")
    monkeypatch.setattr("training.federated.server.rounds.versions", lambda: {"dermis": "0.1.0"})
    messages: list[str] = []
    with pytest.raises(TrainingError, match="only 0 of the required 2"):
        run_federation(
            local_grid(federation, tiny_sites(skin, tmp_path / "m")[:2]),
            federation,
            tmp_path / "out",
            on_progress=messages.append,
        )
    assert messages[0] == "a client was refused: the client has dermis 0.0.1, and must have 0.1.0"


def test_federated_bundle_card_names_sizes_and_no_clients(skin: Path, tmp_path: Path) -> None:
    federation = tiny_federation(rounds=1, name="together", strategy="fedprox", licence="CC0-1.0")
    state = simulate(federation, tiny_sites(skin, tmp_path / "st-elsewhere"), tmp_path / "out")
    bundle = open_bundle(tmp_path / "out" / "bundle")
    assert bundle.provenance["federation"]["rounds"] == 1
    assert [client["images"] for client in bundle.provenance["federation"]["members"]] == [20, 20, 20]
    expected = averaged_generator(federation, state.tensors).state_dict()["mapping.fc0.weight"]
    assert torch.allclose(load_generator(bundle).state_dict()["mapping.fc0.weight"], expected, rtol=1e-3)
    said = bundle.model_card + json.dumps(bundle.provenance)
    assert "fedprox" in said
    assert "3, with 20, 20, 20 training images" in said
    assert not [word for word in ("elsewhere", "client-1", skin.name) if word in said]


@pytest.mark.full
def test_clients_measure_on_their_own_validation_images(skin: Path, tmp_path: Path) -> None:
    federation = tiny_federation(rounds=1, clients=2, evaluate_rounds=1, evaluate_images=12)
    sites = [replace(site, validation=0.5) for site in tiny_sites(skin, tmp_path / "members")[:2]]
    sites[1] = replace(sites[1], validation=0.1)  # too few to measure
    simulate(federation, sites, tmp_path / "out")
    start, end = read_rounds(tmp_path / "out")
    measured = [line["measured"] for line in (start, end)]
    assert [list(each) for each in measured] == [["client-1"], ["client-1"]]
    assert measured[0]["client-1"]["images"] == 12
    assert measured[0]["client-1"]["fid"] > 0
    assert measured[0] != measured[1]


def test_client_without_a_class_keeps_global_class_numbers(tmp_path: Path) -> None:
    data = make_skin(tmp_path / "skin", count=24, size=16)
    lines = (data / "metadata.csv").read_text().splitlines()
    (tmp_path / "malignant.csv").write_text("\n".join([lines[0], *(line for line in lines if ",malignant," in line)]))
    site = Site(data, tmp_path / "state", metadata=tmp_path / "malignant.csv", validation=0.0)
    images = site_images(site, ("benign", "malignant"), True, 8)
    assert set(images.train.labels) == {1}
    assert len(images.train.labels) == 8, "a site reads the images of its own table alone"


def test_interrupted_round_leaves_state_of_last_complete_round(skin: Path, tmp_path: Path) -> None:
    """An exception in the middle of a round leaves neither a new state nor a half-written file."""
    federation = tiny_federation(rounds=2)
    simulate(replace(federation, rounds=1), tiny_sites(skin, tmp_path / "m"), tmp_path / "out")
    grid = local_grid(federation, tiny_sites(skin, tmp_path / "m"))

    def broken(messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        raise KeyboardInterrupt

    grid.send_and_receive = broken  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_federation(grid, federation, tmp_path / "out")
    state: GlobalState = simulate(replace(federation, rounds=1), tiny_sites(skin, tmp_path / "m"), tmp_path / "out")
    assert state.round == 1
    assert not list((tmp_path / "out").glob("*.partial"))


def test_round_that_was_not_measured_is_measured_at_next_start(skin: Path, tmp_path: Path) -> None:
    """The program ends while it measures round 1: its record is kept, and what is missing is made before the next round."""
    federation = tiny_federation(rounds=2, clients=1, min_clients=1, evaluate_rounds=1, snapshot_rounds=1)
    grid = local_grid(federation, tiny_sites(skin, tmp_path / "m")[:1])
    send, measured = grid.send_and_receive, list[int]()

    def interrupted(messages: Iterable[Any], *, timeout: float | None = None) -> Iterable[Any]:
        sent = list(messages)
        if sent[0].metadata.message_type == "evaluate":
            measured.append(1)
            if len(measured) == 2:
                raise KeyboardInterrupt
        return send(sent, timeout=timeout)

    grid.send_and_receive = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_federation(grid, federation, tmp_path / "out")
    assert [line["round"] for line in read_rounds(tmp_path / "out")] == [0, 1]
    messages: list[str] = []
    run_federation(grid, federation, tmp_path / "out", on_progress=messages.append)
    lines = read_rounds(tmp_path / "out")
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert all({"members", "measured", "seconds"} <= line.keys() for line in lines[1:])
    assert [text.partition(":")[0] for text in messages if text.endswith("bundle")] == ["round 1", "round 2"]


def test_missing_result_bundle_is_written_at_next_start(skin: Path, tmp_path: Path) -> None:
    """The server dies after its last round, before the bundle."""
    federation = tiny_federation(rounds=1)
    simulate(federation, tiny_sites(skin, tmp_path / "m"), tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "bundle")
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    (tmp_path / "out" / "status.json").write_text(json.dumps(status | {"phase": "measuring"}))
    simulate(federation, tiny_sites(skin, tmp_path / "m"), tmp_path / "out")
    assert open_bundle(tmp_path / "out" / "bundle").name == "federation"
