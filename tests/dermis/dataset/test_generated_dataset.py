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
from dermis_client.images import ImagesResult
from dermis_client.models import ModelRef
from dermis_client.torch import SyntheticIterable
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.components import free_port
from dermis.bundle import amend_bundle, open_bundle
from dermis.bundle.directions import Direction
from dermis.dataset.torch import GeneratedDataset
from dermis.directions.fit import oriented
from dermis.errors import BundleError, RequestError
from dermis.synthesizer import Synthesizer
from launched_service import Launched
from services.gateway.routes.images import class_of_each, rows_of
from services.gateway.schemas.images import ImagesRequest
from services.inference.samples import generate_rows
from tiny import make_bundle

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

    def __enter__(self) -> ServiceCode:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, classes: dict[str, int], **options: Any) -> ImagesResult:
        edits = [{"direction": name, "strength": strength} for name, strength in options.pop("edits").items()]
        body = ImagesRequest.model_validate({"classes": classes, "edits": edits, **options})
        names = class_of_each(body, self.bundle, 64)
        with Synthesizer(self.bundle, threads=1) as synthesizer:
            images = list(generate_rows({self.bundle.digest: synthesizer}, rows_of(body, self.bundle, names)))
        data = [
            SimpleNamespace(class_name=name, image=Image.fromarray(image))
            for name, image in zip(names, images, strict=True)
        ]
        return ImagesResult.model_construct(model=ModelRef(name="tiny", digest=self.bundle.digest), data=data)


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


def test_ranks_share_the_samples_and_a_copy_has_the_same(bundle: str) -> None:
    alone = list(GeneratedDataset(bundle, SHARES, **OPTIONS))
    parts = [GeneratedDataset(bundle, SHARES, **OPTIONS, rank=rank, world_size=2) for rank in range(2)]
    ranks = [list(part) for part in parts]
    assert [len(each) for each in ranks] == [len(part) for part in parts] == [24, 16]
    assert same(ranks[0][:16] + ranks[1] + ranks[0][16:], alone)
    assert same(list(pickle.loads(pickle.dumps(parts[1]))), ranks[1])


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
