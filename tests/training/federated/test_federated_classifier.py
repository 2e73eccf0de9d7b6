"""Tests of a federated classifier: its weights, its evaluation from summed counts, and the result that services load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from dermis.bundle.classifier import read_classifier_files
from dermis.classifier.torch_network import TorchClassifier
from dermis.errors import TrainingError
from dermis.metrics.classification import auc
from tiny_skin import make_skin
from training.classifier.data import load_real
from training.classifier.loop import logits_of
from training.distributed import ALONE
from training.federated.config import FederationConfig
from training.federated.messages.replies import ARRAYS
from training.federated.messages.serialization import RefusedError, pack
from training.federated.server.classifier_result import read_counts, write_result
from training.federated.server.global_state import FederatedClient, GlobalState
from training.federated.server.record import read_rounds
from training.federated.simulation.simulate import simulate
from training.federated.site import Site
from training.federated.tasks import classifier as classifier_task
from training.federated.tasks import client_state
from training.federated.tasks.classifier import BINS, global_network

OPTIONS = "batch=8 architecture=tf_efficientnet_lite0 learning_rate=0.003"
HEAD = f"{OPTIONS} head_only=true rotation=0 flips=false"


def _federation(**changes: Any) -> FederationConfig:
    small: dict[str, Any] = {
        "task": "classifier",
        "name": "together",
        "rounds": 2,
        "iterations": 4,
        "resolution": 32,
        "options": HEAD,
        "evaluate_rounds": 0,
        "clients": 2,
        "wait_timeout": 0.1,
    }
    return FederationConfig(**(small | changes))


@pytest.fixture(scope="module")
def skin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_skin(tmp_path_factory.mktemp("skin"))


@pytest.fixture
def unexported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting and measuring a result takes longest, and most tests look at weights."""
    monkeypatch.setattr(
        "training.federated.server.classifier_result.write_result", lambda federation, state, out, counts: out
    )


def _sites(data: Path, out: Path, seeds: tuple[int, ...] = (0, 1)) -> list[Site]:
    return [
        Site(data, out / f"m{i}", seed_offset=seed, device="cpu", cache=out.parent / "cache")
        for i, seed in enumerate(seeds)
    ]


def _test_logits(network: TorchClassifier, data: Path) -> tuple[Any, Any]:
    test = load_real(data, 32, progress=False).test
    return test.labels, logits_of(network, test.images, torch.device("cpu"))


@pytest.mark.usefixtures("unexported")
@pytest.mark.full
def test_equal_clients_give_result_of_single_client_on_resume(skin: Path, tmp_path: Path) -> None:
    """With all layers trained, batch norms' averages included, bit for bit."""
    whole = _federation(options=OPTIONS, rounds=2, iterations=2)
    one = simulate(replace(whole, clients=1, min_clients=1), _sites(skin, tmp_path / "a", (0,)), tmp_path / "one")
    sites = _sites(skin, tmp_path / "b", (0, 0))
    simulate(replace(whole, rounds=1), sites, tmp_path / "two")
    two = simulate(whole, sites, tmp_path / "two")
    assert one.tensors.keys() == two.tensors.keys()
    assert [name for name in one.tensors if name.endswith("running_var")]
    assert all(torch.equal(value, two.tensors[name]) for name, value in one.tensors.items())


@pytest.mark.full
def test_federated_metrics_match_metrics_of_pooled_images(skin: Path, tmp_path: Path) -> None:
    federation = _federation(evaluate_rounds=1)
    sites = _sites(skin, tmp_path / "st-elsewhere")
    state = simulate(federation, sites, tmp_path / "out")
    assert set(state.tensors) == {"backbone.classifier.weight", "backbone.classifier.bias"}
    description, _ = read_classifier_files(tmp_path / "out" / "classifier")
    labels, logits = _test_logits(global_network(federation, state.tensors), skin)
    measured = description.metrics["test"]
    assert measured["images"] == 2 * len(labels), "two clients with the same images"
    assert measured["metrics"]["auc"]["value"] == pytest.approx(float(auc(labels, logits)[0]), abs=0.02)
    assert measured["patients"] == 2 * len(set(load_real(skin, 32, progress=False).test.groups))
    assert measured["without_ids"] == 0
    assert sorted(measured["breakdown"]["source"]) == ["client-1", "client-2"]
    card = (tmp_path / "out" / "classifier" / "CLASSIFIER_CARD.md").read_text()
    assert "2, with 62, 62 training images" in card
    assert "by bootstrap over images" in card and "`learning_rate`" in card
    assert "`epochs`" not in card, "a federation has rounds"
    assert "elsewhere" not in card + json.dumps(description.provenance)
    losses = [line["measured"]["client-1"]["loss"] for line in read_rounds(tmp_path / "out")]
    assert losses[-1] < losses[0], "it must learn"


@pytest.mark.full
@pytest.mark.usefixtures("unexported")
def test_proximal_term_keeps_weights_nearer_to_start(skin: Path, tmp_path: Path) -> None:
    from training.federated.tasks.classifier import begin

    def moved(strategy: str, options: str) -> float:
        federation = _federation(rounds=1, strategy=strategy, strategy_options=options)
        state = simulate(federation, _sites(skin, tmp_path / strategy / "m"), tmp_path / strategy / "out")
        start = begin(federation)
        return float(sum((state.tensors[name] - start[name]).square().sum() for name in start))

    assert moved("fedprox", "proximal_mu=1000.0") < 0.9 * moved("fedavg", "")


def test_features_of_a_client_belong_to_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other images, also of as many, are computed anew."""
    network, training = SimpleNamespace(head=torch.nn.Linear(2, 1)), [0]
    site, computed = Site(tmp_path, tmp_path), iter([1.0, 2.0])
    monkeypatch.setattr(
        "training.federated.tasks.classifier.all_features", lambda *_, **__: torch.full((1, 2), next(computed))
    )

    def feature(images: str) -> float:
        file = client_state.features_of(site, "run", images)
        features: Any = classifier_task._features(network, training, file, ALONE)  # type: ignore[arg-type]
        return float(features[0, 0])

    assert [feature("a" * 64), feature("b" * 64), feature("a" * 64)] == [1.0, 2.0, 1.0]


def _reply(counts: dict[str, torch.Tensor] | None) -> Any:
    arrays = None if counts is None else pack({name: values.clone() for name, values in counts.items()})
    return SimpleNamespace(content=RecordDict({} if arrays is None else {ARRAYS: arrays}))


def test_malformed_counts_are_refused(tmp_path: Path) -> None:
    table = torch.ones(2, BINS, dtype=torch.int64)
    good = {
        "validation": table,
        "test": table,
        **{f"{part}-patients": torch.tensor([7]) for part in ("validation", "test")},
        **{f"{part}-without_ids": torch.tensor([2]) for part in ("validation", "test")},
    }
    images = 2 * BINS
    assert read_counts(_reply(good), images).keys() == good.keys()
    for bad in (
        None,
        {"test": table},
        good | {"more/validation": table},
        *(good | {"test": values} for values in (table[:, :-1], -table, table.float(), table * 10**6)),
        good | {"test-patients": torch.tensor([images + 1])},
        good | {"test-without_ids": torch.tensor([8])},
    ):
        with pytest.raises(RefusedError):
            read_counts(_reply(bad), images)
    with pytest.raises(RefusedError, match="announced 3"):
        read_counts(_reply(good), 3)
    state = GlobalState(
        "run", 1, {}, clients={"1": FederatedClient("client-1", 3, 3, {"benign": 2, "malignant": 1}, rounds=1)}
    )
    with pytest.raises(TrainingError, match="validation images of all clients together lack a class"):
        write_result(_federation(), state, tmp_path, {})
