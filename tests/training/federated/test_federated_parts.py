"""Tests of parts of a federation: serialization, averages, secure aggregation, privacy, keys, the proxy."""

from __future__ import annotations

import datetime
import stat
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from cryptography import x509
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from starlette.testclient import TestClient
from typer.testing import CliRunner

from commands.main import app as commands_app
from dermis.errors import StorageError, TrainingError
from tiny_federation import local_grid, tiny_federation, tiny_sites
from tiny_skin import make_skin
from training.experiments.hospitals import Point, levels, markdown, reached
from training.federated.client.app import app
from training.federated.config import (
    FederationConfig,
    classifier_config,
    gan_config,
    parse_options,
    parse_run_config,
)
from training.federated.deployment.fleet_proxy import fleet_proxy
from training.federated.deployment.flower_programs import APP, superlink_command, supernode_command
from training.federated.deployment.invitation import read_invitation, write_invitation
from training.federated.deployment.keys import CA, CERTIFICATE, KEY, write_certificates, write_client_key
from training.federated.deployment.server_folder import new_server, open_server
from training.federated.deployment.site_check import check_site
from training.federated.messages.replies import CheckedUpdate
from training.federated.messages.secure_aggregation import SECURE_MODS, SecureMean, secure_mean
from training.federated.messages.serialization import RefusedError, changes, decode, encode, pack
from training.federated.messages.traffic import CountingGrid
from training.federated.server.record import read_rounds, write_status
from training.federated.server.rounds import run_federation
from training.federated.server.strategies import aggregate, instructions, new_strategy
from training.federated.simulation.local_grid import LocalGrid
from training.federated.simulation.simulate import divide, hospital_sizes, simulate
from training.federated.site import Site, parse_node_config, site_classifier_data

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def skin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_skin(tmp_path_factory.mktemp("skin"), count=24, size=16)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    st.sampled_from(["fp32", "fp16", "bf16"]),
)
@settings(deadline=None, max_examples=60)
def test_tensors_round_trip_through_update(values: list[float], dtype: Any) -> None:
    """float32 exactly, 16 bits to their rounding; float64 always exactly."""
    tensors = {"w": torch.tensor(values), "p": torch.tensor([0.1], dtype=torch.float64)}
    decoded = decode(encode(tensors, dtype), tensors)
    assert torch.equal(decoded["p"], tensors["p"])
    tolerance = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8}[dtype]
    assert torch.allclose(decoded["w"], tensors["w"], rtol=tolerance, atol=1e-7 if tolerance else 0.0)


def test_values_beyond_float16_are_sent_exactly() -> None:
    tensors = {"w": torch.tensor([1e6, 1.0])}
    assert torch.equal(decode(encode(tensors, "fp16"), tensors)["w"], tensors["w"])


def test_malformed_update_is_refused_by_name() -> None:
    like = {"w": torch.zeros(2, 2)}
    for record, why in [
        (ArrayRecord(), "not packed"),
        (ArrayRecord({"safetensors": Array(np.zeros(9, np.float32)), "w": Array(np.zeros(4))}), "not packed"),
        (encode({}), "w is missing"),
        (encode({"w": torch.zeros(2, 2), "x": torch.zeros(1)}), "x was not requested"),
        (encode({"w": torch.zeros(4)}), r"must be floating-point \[2, 2\]"),
        (pack({"w": torch.zeros(2, 2, dtype=torch.int32)}), "w is torch.int32"),
        (encode({"w": torch.zeros(1000)}), "bytes are more than"),
        (ArrayRecord({"safetensors": Array("uint8", (8,), "numpy.ndarray", b"no array")}), "cannot be read"),
        (ArrayRecord({"safetensors": Array(np.full(99, 255, np.uint8))}), "cannot be read"),
    ]:
        with pytest.raises(RefusedError, match=why):
            decode(record, like)


def _updates(values: Mapping[str, tuple[float, int]]) -> list[CheckedUpdate]:
    """Each client's weights, all of one value, and its images."""
    return [
        CheckedUpdate(name, Message(RecordDict(), dst_node_id=i, message_type="train"), _tensors(value), images)
        for i, (name, (value, images)) in enumerate(values.items(), 1)
    ]


def _tensors(value: float) -> Tensors:
    return {"G/w": torch.full((2,), value), "G_ema/w": torch.full((2,), 10 * value)}


def _averaged(federation: FederationConfig, values: Mapping[str, tuple[float, int]], start: float = 0.0) -> Tensors:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    strategy = new_strategy(federation)
    list(instructions(strategy, 1, {"G/w": _tensors(start)["G/w"]}, [1, 2, 3], ConfigRecord()))
    from training.federated.server.strategies import computed_by_strategy
    from training.federated.tasks.gan import is_optimised

    averages = aggregate(
        strategy, 1, _updates(values), lambda name: computed_by_strategy(federation, is_optimised, name)
    )
    assert averages is not None
    return averages


HOSPITALS = {"a": (1.0, 100), "b": (2.0, 300), "c": (4.0, 600)}


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_update_means_are_weighted_by_images(strategy: Any) -> None:
    """(1 * 100 + 2 * 300 + 4 * 600) / 1000 = 3.1."""
    averages = _averaged(tiny_federation(strategy=strategy), HOSPITALS)
    assert torch.allclose(averages["G/w"], torch.full((2,), 3.1))
    assert torch.allclose(averages["G_ema/w"], torch.full((2,), 31.0))


def test_robust_strategies_exclude_outlier_from_running_averages() -> None:
    """One client of three sends wrong weights, with the most images: they must enter neither G nor G_ema."""
    attacked = {"a": (1.0, 10), "b": (1.2, 10), "c": (1e6, 10**6)}
    for strategy, options in (("krum", ""), ("fedmedian", ""), ("fedtrimmedavg", "beta=0.34")):
        averages = _averaged(tiny_federation(strategy=strategy, strategy_options=options), attacked)
        assert averages["G/w"].max() <= 1.2, strategy
        assert averages["G_ema/w"].max() <= 12.0, strategy


def test_server_optimizer_moves_weights_but_not_running_averages() -> None:
    averages = _averaged(tiny_federation(strategy="fedadam", strategy_options="eta=0.5 tau=0.001"), HOSPITALS)
    assert 0 < averages["G/w"][0] < 1.0, "Adam's first step is about eta, whatever the gradient"
    assert torch.allclose(averages["G_ema/w"], torch.full((2,), 31.0))


def test_updates_are_averaged_in_float32_for_any_wire_dtype() -> None:
    """The mean of many values that float16 would round away."""
    close = {f"m{i}": (1.0 + i * 2**-13, 1) for i in range(3)}
    averages = _averaged(tiny_federation(wire_dtype="fp16"), close)
    assert averages["G/w"].dtype == torch.float32
    assert averages["G/w"][0].item() == pytest.approx(1.0 + 2**-13, abs=1e-7)


def test_secure_aggregation_gives_weighted_mean_and_hides_update(skin: Path, tmp_path: Path) -> None:
    """Equal to the open mean but for the rounding of 4 million levels; no reply holds the update in the clear."""
    federation = tiny_federation(rounds=1, secure_aggregation=True)
    plain = simulate(tiny_federation(rounds=1), tiny_sites(skin, tmp_path / "a"), tmp_path / "plain")
    grid = local_grid(federation, tiny_sites(skin, tmp_path / "b"))
    seen: list[Any] = []
    send = grid.send_and_receive

    def listening(messages: Any, *, timeout: float | None = None) -> list[Any]:
        replies = list(send(messages, timeout=timeout))
        seen.extend(replies)
        return replies

    grid.send_and_receive = listening  # type: ignore[method-assign]
    state = run_federation(grid, federation, tmp_path / "out")
    for name, value in plain.tensors.items():
        assert torch.allclose(value, state.tensors[name], atol=1e-4), name
    masked = [r.content.config_records["secaggplus_configs"] for r in seen if "secaggplus_configs" in r.content]
    assert [list(record) for record in masked].count(["masked_params"]) == 3
    assert not [r for r in seen for record in r.content.array_records.values() if len(record)]
    numbers = [dict(record) for r in seen for record in r.content.metric_records.values()]
    assert not [each for each in numbers if "G" in each or "loss" in each], "losses would describe single clients"


def test_change_beyond_range_of_secure_aggregation_is_refused_by_name(skin: Path, tmp_path: Path) -> None:
    """The protocol would clip it. Another range can continue."""
    federation = tiny_federation(rounds=1, iterations=1, secure_aggregation=True, secure_clip=1e-9)
    sites = tiny_sites(skin, tmp_path / "m")
    with pytest.raises(
        TrainingError, match=r"round 1: failed.* changed by .*, which secure_clip=1e-09 cannot represent"
    ):
        simulate(federation, sites, tmp_path / "out")
    assert replace(federation, secure_clip=8.0).changed_from(federation.identity | {"secure_clip": 1e-9}) == []


def test_secure_aggregation_checks_changes_as_they_are_encoded() -> None:
    """Times the client's images / those of the largest client. Larger values would be clipped, and the mean would be wrong."""
    client = ClientApp()

    @client.train(mods=SECURE_MODS)
    def train(message: Message, context: Context) -> Message:
        site: Any = context.node_config
        numbers = MetricRecord({"num-examples": site["images"]})
        content = RecordDict({"arrays": encode({"w": torch.tensor([site["change"]])}), "metrics": numbers})
        return Message(content, reply_to=message)

    def run(clip: float, max_images: int) -> SecureMean:
        sites = [{"change": change, "images": images} for change, images in ((20.0, 100), (20.0, 100), (1.0, 400))]
        federation = tiny_federation(secure_aggregation=True, secure_clip=clip)
        grid = LocalGrid(client, sites, {})
        return secure_mean(grid, federation, 1, [1, 2, 3], {}, {"w": torch.zeros(1)}, max_images)

    mean = run(8.0, 400).changes
    assert mean is not None
    assert mean["w"].item() == pytest.approx((2 * 100 * 20 + 400 * 1) / 600, abs=1e-4)
    refused = run(4.0, 400)
    assert refused.changes is None
    assert "w changed by 20, times 0.25 for" in refused.failures[0] and "secure_clip=16 or more" in refused.failures[0]
    assert "has 400 training images now, but none announced more than 300" in run(8.0, 300).failures[0]


def test_client_requiring_secure_aggregation_refuses_open_round(skin: Path, tmp_path: Path) -> None:
    sites = [replace(site, require_secure_aggregation=True) for site in tiny_sites(skin, tmp_path / "m")]
    messages: list[str] = []
    federation = tiny_federation()
    with pytest.raises(TrainingError, match="only 0 of"):
        run_federation(local_grid(federation, sites), federation, tmp_path / "out", on_progress=messages.append)
    assert "the client requires secure aggregation" in messages[0]
    # It also refuses a server that requests an open update without a description first.
    grid = local_grid(federation, sites[:1])
    ask = Message(RecordDict({"config": ConfigRecord({"run": "x"})}), dst_node_id=1, message_type="train")
    (reply,) = grid.send_and_receive([ask])
    assert "unencrypted update" in reply.error.reason


def test_secure_aggregation_completes_without_client_that_dies(skin: Path, tmp_path: Path) -> None:
    federation = tiny_federation(rounds=1, secure_aggregation=True, clients=4)
    grid = local_grid(federation, tiny_sites(skin, tmp_path / "b", (0, 1, 2, 3)))
    send, calls = grid.send_and_receive, [0]

    def dying(messages: Any, *, timeout: float | None = None) -> list[Any]:
        calls[0] += 1
        replies = list(send(messages, timeout=timeout))
        return replies[:-1] if calls[0] == 4 else replies  # in the stage that collects the masked updates

    grid.send_and_receive = dying  # type: ignore[method-assign]
    state = run_federation(grid, federation, tmp_path / "out")
    assert state.round == 1
    assert all(bool(torch.isfinite(value).all()) for value in state.tensors.values())
    assert state.tensors["G/mapping.w_avg"].abs().max() < 1.0, "a mask that was left in would be huge"


class _Silent(LocalGrid):
    """Its third client never answers to training."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
        replies = super().send_and_receive(messages, timeout=timeout)
        return [r for r in replies if r.metadata.message_type != "train" or r.metadata.src_node_id != 3]


@pytest.mark.full
def test_differential_privacy_clips_updates_and_counts_epsilon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "training.federated.server.classifier_result.write_result", lambda federation, state, out, counts: out
    )
    data = make_skin(tmp_path / "skin", count=96)
    options = "batch=8 architecture=tf_efficientnet_lite0 head_only=true rotation=0 flips=false learning_rate=0.1"
    private = FederationConfig(
        task="classifier", rounds=2, iterations=3, resolution=32, options=options, clients=3, evaluate_rounds=0,
        dp_noise=1e-3, dp_clip=0.01, wait_timeout=0.1,
    )  # fmt: skip
    sites = [Site(data, tmp_path / f"m{i}", seed_offset=i, device="cpu", cache=tmp_path / "cache") for i in range(3)]
    from training.federated.tasks.classifier import begin

    state = simulate(replace(private, rounds=1, dp_noise=1.0), sites, tmp_path / "noisy")
    first = read_rounds(tmp_path / "noisy")[0]["epsilon"]
    assert 0 < first < 10
    again = simulate(replace(private, dp_noise=1.0), sites, tmp_path / "noisy")
    assert read_rounds(tmp_path / "noisy")[1]["epsilon"] > first, "what was spent before a restart must count"
    assert again.privacy is not None
    assert again.privacy["releases"] == 2
    # A round that fails releases nothing, and is accounted for once when it is done again.
    silent = _Silent(app, [site.to_node_config() for site in sites], private.to_run_config())
    with pytest.raises(TrainingError, match="round 3: failed 2 times.*at least 3 clients must reply"):
        run_federation(silent, replace(private, dp_noise=1.0, rounds=3, attempts=2), tmp_path / "noisy")
    third = simulate(replace(private, dp_noise=1.0, rounds=3), sites, tmp_path / "noisy").privacy
    assert third is not None
    assert third["releases"] == 3
    quiet = simulate(
        replace(private, rounds=1), [replace(s, state=tmp_path / f"q{i}") for i, s in enumerate(sites)], tmp_path / "q"
    )
    moved = torch.cat([change.flatten() for change in changes(quiet.tensors, begin(private)).values()])
    assert 0.005 < moved.norm() < 0.0101, "an update of a norm above 0.01 must have been clipped to it"
    assert state.tensors.keys() == quiet.tensors.keys()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"strategy": "krum", "secure_aggregation": True}, "must see each update"),
        ({"clients": 2, "secure_aggregation": True}, "needs 3 clients"),
        ({"optimizer": "shared", "secure_aggregation": True}, "optimizer: shared: Adam's step is too large"),
        ({"dp_noise": 1.0}, "last layer of a classifier"),
        ({"min_clients": 4}, "min_clients: 4 is more"),
        ({"strategy": "best"}, "strategy: 'best' is none of"),
        ({"rounds": 0}, "rounds: 0 must be at least 1"),
        ({"classes": "a,,b"}, "classes: must be different names"),
    ],
)
def test_invalid_federation_options_are_refused_by_name(options: dict[str, Any], why: str) -> None:
    with pytest.raises(TrainingError, match=why):
        FederationConfig(**options)


def test_number_of_clients_is_fixed_with_differential_privacy_only() -> None:
    """The accountant has counted the releases for that number."""
    private = FederationConfig(task="classifier", options="head_only=true", dp_noise=1.0)
    assert replace(private, clients=4).changed_from(private.identity) == ["clients"]
    assert FederationConfig(clients=4).changed_from(FederationConfig().identity) == []
    assert replace(private, start="imagenet").changed_from(private.identity) == []
    assert private.changed_from(private.identity | {"binary": False}) == []


def test_options_without_effect_on_classifiers_are_refused_by_name(skin: Path, tmp_path: Path) -> None:
    """`--set epochs=`, options of generators, and the share of validation images of a site; `precision` has its effect."""
    federation = FederationConfig(task="classifier", precision="bf16")
    assert classifier_config(federation).precision == "bf16"
    assert classifier_config(replace(federation, precision="auto")).precision == "fp32"
    assert gan_config(tiny_federation(options="batch=4 precision=bf16"), torch.device("cpu")).precision == "bf16"
    refused = {
        "epochs=3": "epochs: .*give --rounds and --iterations",
        "patience=2": "patience: .*give --rounds",
        "plateau_factor=0.5": "plateau_factor: .*give learning_rate",
        "plateau_patience=2": "plateau_patience: .*give learning_rate",
        "monitor=loss": "monitor: .*the result is that of the last round",
    }
    for option, why in refused.items():
        with pytest.raises(TrainingError, match=f"options: {why}"):
            classifier_config(replace(federation, options=option))
    changes: tuple[dict[str, Any], ...] = ({"share": "generator"}, {"base": "paper256"}, {"conditional": False})
    for change in changes:
        with pytest.raises(TrainingError, match=f"{next(iter(change))}: .*has no effect on a classifier"):
            replace(federation, **change)
    with pytest.raises(TrainingError, match=r"validation: 0.3: has no effect on a classifier, .*15% validation"):
        site_classifier_data(Site(skin, tmp_path, validation=0.3), 16)
    write_invitation(tmp_path / "in.toml", new_server(tmp_path / "server", ["127.0.0.1"], 1), federation, 1)
    join = ["federate", "join", str(tmp_path / "in.toml"), "--data", str(skin), "--key", "key", "--validation", "0.3"]
    joined = CliRunner().invoke(commands_app, join)
    assert isinstance(joined.exception, TrainingError)
    assert str(joined.exception).startswith("--validation: has no effect")


def test_classifier_begun_with_ignored_options_of_epochs_continues_without_them() -> None:
    federation = FederationConfig(task="classifier", options="batch=8")
    begun = federation.identity | {"options": "epochs=3 batch=8 monitor=loss"}
    assert federation.changed_from(begun) == []
    assert replace(federation, options="batch=4").changed_from(begun) == ["options"]


def test_started_generator_has_options_of_ordinary_training() -> None:
    """As in `dermis train gan --from`: trained weights need no short average at the start."""
    cpu, options = torch.device("cpu"), "batch=4"
    assert gan_config(tiny_federation(options=options), cpu).ema_rampup == 0.05
    started = gan_config(tiny_federation(options=options, start="bundle"), cpu)
    assert (started.ema_rampup, started.augment_kimg) == (None, 100.0)
    assert gan_config(tiny_federation(options="ema_rampup=0.1", start="bundle"), cpu).ema_rampup == 0.1


def test_flower_app_config_matches_federation_config() -> None:
    """The app that `flwr run` sends holds the defaults, and no code."""
    assert [path.name for path in APP.iterdir()] == ["pyproject.toml"]
    flower = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert flower["config"] == {"out": "", "log": "", **FederationConfig().to_run_config()}
    config = FederationConfig(strategy="krum", dp_delta=1e-6, rounds=7)
    assert parse_run_config({"out": "x", **config.to_run_config()}) == config
    with pytest.raises(TrainingError, match="rounds: must be a whole number, not 'many'"):
        parse_run_config({"rounds": "many"})
    with pytest.raises(TrainingError, match="--federation round: unknown option"):
        parse_options(["round=3"])


def test_site_options_round_trip_through_node_config() -> None:
    site = Site(Path("/data"), Path("/state"), class_column="dx", seed_offset=3)
    assert parse_node_config(site.to_node_config()) == site
    with pytest.raises(TrainingError, match="secrets: unknown key"):
        parse_node_config({"data": "/d", "state": "/s", "secrets": "x"})


def test_hospitals_share_no_patient(tmp_path: Path) -> None:
    from training.data.sources import read_source

    source = read_source(make_skin(tmp_path / "skin", count=60, size=8))
    tables = divide(source, hospital_sizes(3, [1, 2, 3]), tmp_path / "out")
    assert tables == divide(source, hospital_sizes(3, [1, 2, 3]), tmp_path / "out"), "the division is kept"
    parts = [{r.patient_id for r in read_source(source.path, metadata=table).records} for table in tables.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30
    assert [len(part) for part in parts] == [5, 10, 15]


def test_certificates_name_hosts_and_keys_are_private_to_owner(tmp_path: Path) -> None:
    write_certificates(tmp_path, ["federation.example.org", "10.0.0.7"])
    server, ca = (x509.load_pem_x509_certificate((tmp_path / name).read_bytes()) for name in (CERTIFICATE, CA))
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["federation.example.org"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert server.not_valid_after_utc > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=700)
    write_client_key(tmp_path / "hospital")
    for secret in (KEY, "hospital"):
        assert stat.S_IMODE((tmp_path / secret).stat().st_mode) == 0o600
    with pytest.raises(TrainingError, match="exists already"):
        write_client_key(tmp_path / "hospital")
    with pytest.raises(TrainingError, match="exists already"):
        write_certificates(tmp_path, ["x"])
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="hospital: cannot be written"):
        write_client_key(tmp_path / "file" / "hospital")
    assert not list(tmp_path.rglob("*.partial"))


def test_fleet_proxy_passes_only_client_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches the interface of operators can start programs at hospitals: it must not pass."""
    asked: list[httpx.Request] = []

    def flower(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(401, content=b"who are you", headers={"x-flower": "yes"})

    real = httpx.AsyncClient
    monkeypatch.setattr(
        httpx, "AsyncClient", lambda **kwargs: real(base_url=kwargs["base_url"], transport=httpx.MockTransport(flower))
    )
    write_certificates(tmp_path, ["localhost"])
    with TestClient(fleet_proxy("https://127.0.0.1:1", str(tmp_path / CA))) as client:
        answer = client.post("/v1/fleet/pull-messages", content=b"\x08\x01", headers={"x-signature": "s"})
        assert (answer.status_code, answer.content, answer.headers["x-flower"]) == (401, b"who are you", "yes")
        assert (asked[0].url.path, asked[0].content) == ("/v1/fleet/pull-messages", b"\x08\x01")
        assert asked[0].headers["x-signature"] == "s"
        for path in (
            "/v1/control/start-run",
            "/v1/runtime/x",
            "/v1/fleet/../control/start-run",
            "/docs",
            "/v1/fleet/a/b",
        ):
            assert client.post(path).status_code in (404, 405), path
        assert client.get("/v1/fleet/pull-messages").status_code == 405
        assert client.post("/v1/fleet/push-object", content=b"x" * (65 * 2**20)).status_code == 413
        assert len(asked) == 1


def test_server_folder_and_invitation_round_trip(tmp_path: Path) -> None:
    server = new_server(tmp_path / "server", ["hub.example.org"], 9000)
    assert open_server(tmp_path / "server") == server
    with pytest.raises(TrainingError, match="is a server's folder already"):
        new_server(tmp_path / "server", ["x"], 1)
    federation = FederationConfig(options="batch=8", rounds=5)
    write_invitation(tmp_path / "in.toml", server, federation, 50)
    invitation = read_invitation(tmp_path / "in.toml")
    assert (invitation.address, invitation.config) == ("hub.example.org:9000", federation)
    assert "PRIVATE" not in (tmp_path / "in.toml").read_text()
    superlink = superlink_command(server)
    assert superlink[superlink.index("--host") + 1] == "127.0.0.1"
    assert "--enable-supernode-auth" in superlink
    assert "--insecure" not in superlink
    site = Site(Path("/my images"), tmp_path)
    supernode = supernode_command(invitation, tmp_path / "ca.pem", tmp_path / "key", site, 9094)
    assert 'data="/my images"' in supernode[-1]
    (tmp_path / "broken.toml").write_text("address = 1")
    with pytest.raises(TrainingError, match="is not an invitation"):
        read_invitation(tmp_path / "broken.toml")


def test_federation_that_ends_early_is_not_reported_as_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server(tmp_path / "server", ["127.0.0.1"], 1)
    out = server.run_folder("shared")
    out.mkdir(parents=True)
    write_status(out, "finished", 2, 2, members={})
    monkeypatch.setattr("subprocess.run", lambda *_args, **_options: subprocess.CompletedProcess([], 0))
    run = ["federate", "run", str(server.folder), "--name", "shared", "--rounds"]
    assert CliRunner().invoke(commands_app, [*run, "2"]).exit_code == 0
    longer = CliRunner().invoke(commands_app, [*run, "3"])
    assert isinstance(longer.exception, TrainingError)
    assert "after 2 of 3 rounds" in str(longer.exception)


def test_site_check_reports_all_problems_at_once(skin: Path, tmp_path: Path) -> None:
    """No server, no key, too few images: each is reported with advice, and the trial round is executed nevertheless."""
    server = new_server(tmp_path / "server", ["127.0.0.1"], 1)
    federation = tiny_federation()
    write_invitation(tmp_path / "in.toml", server, federation, 1000)
    invitation = replace(read_invitation(tmp_path / "in.toml"), versions={"dermis": "9.9"})
    checks = {
        result.name: result
        for result in check_site(invitation, Site(skin, tmp_path / "state", device="cpu"), tmp_path / "key")
    }
    assert {name: result.passed for name, result in checks.items()} == {
        "versions": False, "server": False, "key": None, "images": False, "trial round": True, "memory": True, "disk": True,
    }  # fmt: skip
    assert "install 9.9" in checks["versions"].message
    assert "allow outgoing connections from this machine to 127.0.0.1, TCP port 1" in checks["server"].message
    assert "has 24 images; the federation requires at least 1,000" in checks["images"].message
    assert "s per step" in checks["trial round"].message


def test_traffic_is_counted_both_ways() -> None:
    class Echo:
        def get_node_ids(self) -> list[int]:
            return [1]

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
            return [Message(RecordDict({"a": encode({"w": torch.zeros(10)})}), reply_to=m) for m in messages]

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    grid = CountingGrid(Echo())  # type: ignore[arg-type]
    content = RecordDict({"a": encode({"w": torch.zeros(1000)}), "c": ConfigRecord({"k": [b"12345678"]})})
    grid.send_and_receive([Message(content, dst_node_id=1, message_type="train")])
    traffic = grid.take()
    assert 4008 <= traffic.down < 4300
    assert 40 <= traffic.up < 300
    assert grid.take() == (0, 0)


def test_distance_levels_are_reached_at_measured_points() -> None:
    """By hand: alone reaches 80 at 4 kimg, the federation at 2; the level that all reach is the worse best."""
    alone = [Point(0, 0, 200, 0), Point(1, 2, 120, 0), Point(2, 4, 80, 0), Point(3, 6, 79.5, 0)]
    together = [Point(0, 0, 200, 0), Point(1, 2, 78, 0), Point(2, 4, 60, 0)]
    measured = {"h": {"h": alone}, "federated": {"h": together}}
    assert levels(measured, "h") == [159.0, 120.0, 100.0, 88.0, 80.0]
    assert levels({"h": {"h": alone[1:]}}, "h") == [100.0, 88.0, 80.0], "a level above the start says nothing"
    assert reached(alone, 80.0) == alone[2]
    assert reached(together, 80.0) == together[1]
    assert reached(together, 10.0) is None


@pytest.mark.full
def test_hospitals_experiment_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fast(real: NDArray[np.float32], generated: NDArray[np.float32]) -> float:
        """In the place of FID, whose square root of a matrix takes seconds."""
        return float(np.square(real.mean(axis=0) - generated.mean(axis=0)).sum())

    monkeypatch.setattr("training.federated.tasks.gan.frechet_distance", fast)
    from training.data.sources import read_source
    from training.experiments.hospitals import plan, run_arm, write_results

    data = make_skin(tmp_path / "skin", count=96, size=16)
    federation = tiny_federation(clients=3, rounds=1, evaluate_rounds=1, evaluate_images=10)
    sizes = hospital_sizes(3, [2, 2, 2])
    hospitals = plan(read_source(data, binary=True), data, tmp_path / "out", federation, sizes, device="cpu")
    hospitals = replace(hospitals, sites={name: replace(s, validation=0.4) for name, s in hospitals.sites.items()})
    for arm in ("hospital-1", "central", "federated"):
        run_arm(hospitals, arm)
    results = write_results(hospitals)
    assert {arm: sorted(of) for arm, of in results["distances"].items()} == {
        "hospital-1": ["hospital-1"],
        "central": ["hospital-1", "hospital-2", "hospital-3"],
        "federated": ["hospital-1", "hospital-2", "hospital-3"],
    }
    starts = {arm: of["hospital-1"][0]["fid"] for arm, of in results["curves"].items()}
    assert len(set(starts.values())) == 1, f"all arms begin with the same weights and are measured alike: {starts}"
    assert "| federated |" in markdown(results)
    assert "FD@lite0 at the end" in markdown(results | {"extractor": "lite0"})
    assert "FID@inception at the end" in markdown(results | {"extractor": "inception"})
