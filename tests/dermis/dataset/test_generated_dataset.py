"""Tests of the stream of a local bundle for PyTorch: its samples are those of the service."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dermis_client import DermisClient
from dermis_client.pixels import PixelsResult, read_pixels
from dermis_client.torch import SyntheticIterable
from torch.utils.data import DataLoader

from benchmarks.components import free_port
from dermis.authenticity.checker import Checker
from dermis.bundle import Bundle, amend_bundle, open_bundle
from dermis.bundle.directions import Direction
from dermis.dataset.privacy import pass_gate
from dermis.dataset.torch import GeneratedDataset
from dermis.directions.fit import oriented
from dermis.errors import BundleError, RequestError
from dermis.synthesizer import Synthesizer
from launched_service import Launched
from services.gateway.routes.images import class_of_each, pixels_response, rows_of
from services.gateway.schemas.images import ImagesRequest
from services.inference.samples import generate_rows
from tiny import make_bundle
from tiny_index import make_complete_bundle

SHARES = {"malignant": 1.0, "benign": 3.0}  # not in the order of the bundle
OPTIONS: dict[str, Any] = {"samples": 40, "seed": 5, "chunk": 16, "truncation_psi": 0.8, "edits": {"axis": 0.5}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = make_bundle(tmp_path_factory.mktemp("generated") / "tiny", noise_strength=0.1)
    direction = Direction("axis", oriented(np.eye(16, dtype=np.float32)[0]), (0, 6), 1.0, "sefa")
    return amend_bundle(made, directions=[direction]).location


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(image, other) and label == number
        for (image, label), (other, number) in zip(ours, theirs, strict=True)
    )


class ServiceCode:
    """A client that answers with the images of the service's own code, without its processes."""

    def __init__(self, location: str) -> None:
        self.bundle, self.images = open_bundle(location), self
        self._synthesizer = Synthesizer(self.bundle, threads=1)
        self._checker: Checker | None = None

    def __enter__(self) -> ServiceCode:
        return self

    def __exit__(self, *_: object) -> None:
        self._synthesizer.close()
        if self._checker is not None:
            self._checker.close()

    def generate_pixels(self, classes: dict[str, int], **options: Any) -> PixelsResult:
        if "edits" in options:
            options["edits"] = [{"direction": name, "strength": value} for name, value in options["edits"].items()]
        body = ImagesRequest.model_validate({"classes": classes, **options})
        names = class_of_each(body, self.bundle, 64)
        rows = rows_of(body, self.bundle, names)
        images: list[Any] = list(generate_rows({self.bundle.digest: self._synthesizer}, rows))
        results: list[bool | None] = [None] * len(names)
        if body.privacy is not None:
            self._checker = self._checker or Checker(self.bundle, device="cpu", threads=1)
            results = pass_gate(self._checker, np.stack(images), body.privacy).tolist()
        return read_pixels(pixels_response(body, self.bundle, names, images, results))


@pytest.mark.full
def test_samples_are_those_of_the_code_of_the_service_bit_for_bit(bundle: str) -> None:
    local = GeneratedDataset(bundle, SHARES, **OPTIONS)
    client: Any = partial(ServiceCode, bundle)
    remote = SyntheticIterable(SHARES, **OPTIONS, client=client, prefetch=1)
    for epoch in (0, 1):
        local.set_epoch(epoch)
        remote.set_epoch(epoch)
        samples = list(local)
        assert same(samples, list(remote))
    assert len(samples) == len(local) == 40 and abs(sum(label for _, label in samples) - 30) <= 2
    assert samples[0][0].shape == (3, 16, 16) and samples[0][0].dtype == torch.float32


@pytest.mark.full
def test_samples_are_those_of_a_real_service(bundle: str, launch: Callable[..., Launched]) -> None:
    port = free_port()
    service = launch(bundle, port)
    service.wait_until(service.ready)
    client = partial(DermisClient, f"http://127.0.0.1:{port}")
    assert same(
        list(GeneratedDataset(bundle, SHARES, **OPTIONS)), list(SyntheticIterable(SHARES, **OPTIONS, client=client))
    )


def test_process_forked_after_the_generator_was_used_is_refused(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = GeneratedDataset(bundle, SHARES, samples=4)
    next(iter(data))
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(RequestError, match='num_workers: .*multiprocessing_context="spawn"'):
        next(iter(data))


@pytest.mark.full
def test_ranks_share_the_samples_and_a_copy_has_the_same(bundle: str) -> None:
    alone = list(GeneratedDataset(bundle, SHARES, **OPTIONS))
    parts = [GeneratedDataset(bundle, SHARES, **OPTIONS, rank=rank, world_size=2) for rank in range(2)]
    ranks = [list(part) for part in parts]
    assert [len(each) for each in ranks] == [len(part) for part in parts] == [24, 16]
    assert same(ranks[0][:16] + ranks[1] + ranks[0][16:], alone)
    assert same(list(pickle.loads(pickle.dumps(parts[1]))), ranks[1])


@pytest.mark.full
def test_interrupted_stream_continues_also_with_a_state_of_the_client(
    bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = GeneratedDataset(bundle, SHARES, **OPTIONS)
    whole = list(data)
    samples = iter(data)
    begun = [next(samples) for _ in range(19)]
    state = data.state_dict()
    assert state["chunks"] == 1 and state["offset"] == 3
    data.load_state_dict(state)
    assert same(begun + list(data), whole) and same(list(data), whole), "the iteration after it begins again"
    client: Any = partial(ServiceCode, bundle)
    remote = SyntheticIterable(SHARES, **OPTIONS, client=client, prefetch=1)
    remote.load_state_dict(state)
    assert same(begun + list(remote), whole)
    assert remote.state_dict() == data.state_dict()
    with pytest.raises(RequestError, match="state: is of another bundle"):
        data.load_state_dict({**state, "digest": state["digest"] + 1})
    with pytest.raises(RequestError, match="state: is not a state"):
        data.load_state_dict({"epoch": 0})

    with monkeypatch.context() as worker:
        worker.setattr("dermis.dataset.torch.get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))
        next(iter(data))
        assert data.state_dict()["offset"] == 1
    with pytest.raises(RequestError, match="num_workers: .*StatefulDataLoader"):
        data.state_dict()
    next(iter(data))
    assert data.state_dict()["offset"] == 1


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose training images are near to every fourth sample of the stream."""
    root = tmp_path_factory.mktemp("indexed")
    with Synthesizer(make_bundle(root / "plain" / "tiny"), threads=1) as synthesizer:
        generated = synthesizer.images([0] * 24, list(range(24)), [0] * 24)
    others = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    return make_complete_bundle(root, np.concatenate([generated[::4], others]))


def test_gate_leaves_out_copies_of_training_images(indexed: Bundle) -> None:
    options: dict[str, Any] = {"samples": 24, "chunk": 8}
    everything = list(GeneratedDataset(indexed.location, {"benign": 1}, **options))
    gated = GeneratedDataset(indexed.location, {"benign": 1}, **options, gate="min_distance", percentile=0)
    kept = list(gated)
    with Checker(indexed, device="cpu", threads=1) as checker:
        images = [image.permute(1, 2, 0).mul(255).round().byte().numpy() for image, _ in everything]
        distances = checker.check(images).distances
    assert indexed.authenticity is not None
    assert len(kept) == int((distances >= indexed.authenticity.radii[0]).sum()) and 0 < len(kept) <= 18
    assert all(any(torch.equal(image, other) for other, _ in everything) for image, _ in kept)
    with pytest.raises(TypeError, match="gate"):
        len(gated)
    samples = iter(gated)
    begun = [next(samples) for _ in range(3)]
    gated.load_state_dict(gated.state_dict())
    assert same(begun + list(gated), kept)


@pytest.mark.full
def test_refused_samples_are_replaced_as_by_the_code_of_the_service(indexed: Bundle) -> None:
    gate: dict[str, Any] = {"samples": 24, "chunk": 8, "gate": "min_distance", "percentile": 0.0}
    dropped = list(GeneratedDataset(indexed.location, {"benign": 1.0}, **gate))
    resampled = GeneratedDataset(indexed.location, {"benign": 1.0}, **gate, on_reject="resample")
    samples = list(resampled)
    assert len(dropped) < len(samples) <= 24
    assert all(any(torch.equal(image, other) for other, _ in samples) for image, _ in dropped), "accepted samples stay"
    client: Any = partial(ServiceCode, indexed.location)
    remote = SyntheticIterable({"benign": 1.0}, **gate, on_reject="resample", client=client, prefetch=1)
    stream = iter(remote)
    begun = [next(stream) for _ in range(11)]
    resampled.load_state_dict(remote.state_dict())
    stream.close()  # type: ignore[attr-defined]
    assert same(begun, samples[:11]) and same(list(resampled), samples[11:])


@pytest.mark.full
def test_gate_of_a_real_service_is_that_of_the_bundle(indexed: Bundle, launch: Callable[..., Launched]) -> None:
    port = free_port()
    service = launch(indexed.location, port)
    service.wait_until(service.ready)
    client = partial(DermisClient, f"http://127.0.0.1:{port}")
    gates: list[dict[str, Any]] = [
        {"gate": "authentic", "on_reject": "resample"},
        {"gate": "min_distance", "percentile": 5.0, "detect_copies": False},
    ]
    for gate in gates:
        options: dict[str, Any] = {"samples": 24, "chunk": 8, **gate}
        ours = list(GeneratedDataset(indexed.location, {"benign": 1.0}, **options))
        assert same(ours, list(SyntheticIterable({"benign": 1.0}, **options, client=client))) and ours


@pytest.mark.full
def test_spawned_workers_generate_each_sample_once_also_after_this_process_has(bundle: str) -> None:
    data = GeneratedDataset(bundle, SHARES, **OPTIONS)
    alone = list(data)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="spawn", persistent_workers=True)

    def in_order(samples: list[Any]) -> list[Any]:
        return sorted(samples, key=lambda sample: (sample[1], sample[0].numpy().tobytes()))

    first, again = list(loader), list(loader)
    assert same(in_order(first), in_order(alone)) and same(first, again)
    data.set_epoch(1)
    following = list(loader)
    assert same(in_order(following), in_order(list(data))) and not same(in_order(following), in_order(alone))


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ({"melanoma": 1}, {}, r"classes\.melanoma: is none of the bundle's classes: benign, malignant"),
        ({"benign": 0}, {}, "classes: give the share"),
        ({"benign": 1}, {"samples": 0}, "samples: must be at least 1"),
        ({"benign": 1}, {"seed": -1}, "seed: must be 0 to"),
        ({"benign": 1}, {"edits": {"nose": 1}}, "nose"),
        ({"benign": 1}, {"gate": "authentic"}, "gate: the bundle has no index"),
        ({"benign": 1}, {"gate": "near"}, 'gate: "near" is none of'),
        ({"benign": 1}, {"percentile": 101}, "percentile: must be 0 to 100"),
        ({"benign": 1}, {"on_reject": "flag"}, 'on_reject: "flag" is none of drop, resample'),
        ({"benign": 1}, {"tries": 17}, "tries: must be 1 to 16"),
        ({"benign": 1}, {"noise_mode": "loud"}, '"loud" is none of const, random, none'),
    ],
)
def test_wrong_arguments_are_named(
    bundle: str, classes: dict[str, float], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        GeneratedDataset(bundle, classes, **options)


def test_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        GeneratedDataset(tmp_path / "nowhere", SHARES)
