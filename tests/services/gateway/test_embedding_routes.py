"""Tests of /v1/embeddings: positions equal those of the library, and no answer shows where one training image is."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss", reason="FAISS is not installed")

from dermis.authenticity.checker import Checker
from dermis.authenticity.training_map import ROUNDING, SMALLEST_COUNT, TrainingMap, training_map
from dermis.bundle import Bundle
from dermis.classifier.preprocess import batch
from dermis.imaging import Images, decode, encode
from service_kit import Service, draw, service
from services.gateway import comparing
from services.gateway.auth.principal import DEFAULT_SCOPES
from services.gateway.routes import embeddings
from services.inference.authenticity import shown_fields
from services.inference.samples import Options, pack_rows
from tiny_index import make_complete_and_plain_bundle, noise

BODY = {"classes": {"benign": 2, "malignant": 1}, "seed": 3}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, str]:
    return make_complete_and_plain_bundle(tmp_path_factory.mktemp("bundles"), training=400)


@pytest.fixture(scope="module")
def bundle(bundles: tuple[Bundle, str]) -> Bundle:
    return bundles[0]


@dataclass
class Caller:
    """Someone with a key.

    Attributes:
        served: The service.
        key: The key.
    """

    served: Service
    key: str

    def send(self, method: str, path: str = "/v1/embeddings", **options: Any) -> Any:
        return self.served.client.request(method, path, headers={"Authorization": f"Bearer {self.key}"}, **options)


@pytest.fixture(scope="module")
def served(bundles: tuple[Bundle, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    values = {"default_model": "tiny", "max_images": 12, "auth": "keys"}
    with service(bundles[1], tmp_path_factory.mktemp("data"), **values) as running:
        yield running


def caller_with(served: Service, *scopes: str) -> Caller:
    keys = served.client.app.state.context.auth.keys  # type: ignore[attr-defined]
    return Caller(served, keys.create(tenant="a", name="n", scopes=scopes, created_by="test")[1])


@pytest.fixture(scope="module")
def everybody(served: Service) -> Caller:
    """Someone with the scopes of new keys."""
    return caller_with(served, *DEFAULT_SCOPES)


@pytest.fixture(scope="module")
def trusted(served: Service) -> Caller:
    """Someone who may also upload images to be compared, but not generate any."""
    return caller_with(served, "authenticity:generated", "authenticity:uploads")


def positions_by_library(bundle: Bundle, images: Images) -> np.ndarray:
    with Checker(bundle, device="cpu", threads=1) as checker:
        return training_map(checker.index).project(checker.nearest(images).embeddings)


def positions_of(answer: Any) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([row["position"] for row in answer.json()["data"]])


def uploads(images: Images) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("files", (f"patient-{i}.png", encode(image), "image/png")) for i, image in enumerate(images)]


def test_generated_images_are_placed_and_compared(everybody: Caller, trusted: Caller, bundle: Bundle) -> None:
    answer = everybody.send("POST", json=BODY | {"images": True})
    options = Options(bundle.digest, 1.0, None, "random")
    images = np.stack(draw(pack_rows(options, 3, range(3), [0, 0, 1])))
    np.testing.assert_allclose(positions_of(answer), positions_by_library(bundle, images), atol=6e-4)
    rows = answer.json()["data"]
    compared = everybody.send("POST", "/v1/authenticity", json=BODY).json()
    assert [row["verdict"] for row in rows] == compared["data"] and answer.json()["model"] == compared["model"]
    for row, image in zip(rows, images, strict=True):
        np.testing.assert_array_equal(decode(base64.b64decode(row["image"]["b64"])), image)
    assert "image" not in trusted.send("POST", json=BODY).json()["data"][0]
    refused = trusted.send("POST", json=BODY | {"images": True})
    assert (refused.status_code, "images" in refused.json()["detail"]) == (403, True)


@pytest.mark.full
def test_images_are_resized_in_threads(everybody: Caller, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the event loop every other call would wait for it."""
    threads: list[str] = []

    def recorded(*arguments: Any) -> Images:
        threads.append(threading.current_thread().name)
        return batch(*arguments)

    async def latents(*_: Any) -> np.ndarray:
        return np.zeros((2, bundle.generator.num_ws, bundle.generator.w_dim), np.float32)

    monkeypatch.setattr(comparing, "batch", recorded)
    monkeypatch.setattr(embeddings, "projected_latents", latents)
    projections = {"projections": [{"id": "pr_" + "0" * 32, "image": image} for image in (0, 1)]}
    calls = [("authenticity", BODY), ("embeddings", BODY), ("embeddings/projections", projections)]
    for path, body in [*calls, ("images", BODY | {"privacy": {"gate": "authentic"}})]:
        answer = everybody.send("POST", f"/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
    assert len(threads) == 4 and all(name.startswith("dermis-images") for name in threads)


def test_training_images_are_counted_and_never_placed(trusted: Caller, bundle: Bundle) -> None:
    document = trusted.send("GET").json()
    with Checker(bundle, device="cpu", threads=1) as checker:
        known = training_map(checker.index)
    training = document["training"]
    assert (training["counted"], training["smallest"], training["positions"]) == (400, SMALLEST_COUNT, None)
    assert [cube["images"] for cube in training["cubes"]] == known.counts.tolist()
    assert document["uploads"] is False and len(document["explained"]) == len(known.explained)
    # A cube says in which cell of the grid its images are, and nothing more of them.
    assert len(training["cubes"]) > 1 and all(cube.keys() == {"centre", "images"} for cube in training["cubes"])
    assert all(cube["images"] >= SMALLEST_COUNT and cube["images"] % ROUNDING == 0 for cube in training["cubes"])
    cells = np.array([cube["centre"] for cube in training["cubes"]]) / training["side"]
    np.testing.assert_allclose(np.mod(cells, 1), 0.5, atol=1e-4)
    assert training.keys() == {"counted", "side", "smallest", "cubes", "positions"}


@pytest.mark.parametrize(
    ("shown", "counts", "positions"), [("none", 0, 0), ("counts", None, 0), ("positions", None, None)]
)
def test_operator_chooses_what_the_map_shows_of_training_images(
    shown: Any, counts: int | None, positions: int | None, bundle: Bundle
) -> None:
    with Checker(bundle, device="cpu", threads=1) as checker:
        known = training_map(checker.index)
    fields = shown_fields(known, shown)
    assert len(fields["cubes"]) == len(fields["counts"]) == (len(known.counts) if counts is None else counts)
    assert len(fields["positions"]) == (len(known.positions) if positions is None else positions)
    assert TrainingMap(**fields).counted == 400


def test_uploads_are_not_placed_unless_operator_and_key_allow_it(everybody: Caller, trusted: Caller) -> None:
    answer = trusted.send("POST", files=uploads(noise(1)))
    assert (answer.status_code, answer.json()["type"]) == (403, "urn:dermis:problem:uploads-disabled")
    answer = everybody.send("POST", files=uploads(noise(1)))
    assert (answer.status_code, answer.json()["type"]) == (403, "urn:dermis:problem:missing-scope")


def test_operator_can_allow_uploads_and_positions(
    everybody: Caller, trusted: Caller, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = trusted.served.client.app.state.context  # type: ignore[attr-defined]
    changes = {"authenticity_uploads": True, "training_map": "positions", "authenticity_distance_step": 0.25}
    allowing = replace(context, settings=context.settings.model_copy(update=changes))
    monkeypatch.setitem(trusted.served.client.app.state._state, "context", allowing)  # type: ignore[attr-defined]
    assert everybody.send("GET").json()["training"]["positions"] is None  # its key has not the scope
    shown = np.array(trusted.send("GET").json()["training"]["positions"])
    with Checker(bundle, device="cpu", threads=1) as checker:
        expected = training_map(checker.index).positions
    np.testing.assert_allclose(shown, np.round(expected * 4) / 4, atol=1e-6)
    images = noise(60)[7:9]
    placed = trusted.send("POST", files=uploads(images))
    np.testing.assert_allclose(positions_of(placed), np.round(positions_by_library(bundle, images) * 4) / 4, atol=1e-6)
    assert all(row.keys() == {"index", "position"} for row in placed.json()["data"])  # no distance, no verdict
    assert everybody.send("POST", files=uploads(images)).status_code == 403


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "plain"}, "no index"),
        ({"classes": {"other": 1}}, "classes.other"),
        ({"classes": {"benign": 13}}, "12"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(everybody: Caller, change: dict[str, Any], field: str) -> None:
    answer = everybody.send("POST", json=BODY | change)
    assert answer.status_code in (413, 422) and field in json.dumps(answer.json())
