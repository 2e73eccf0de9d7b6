"""Tests of the data sets of PyTorch. They are skipped without torch."""

from __future__ import annotations

import io
import time
import zipfile
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("torch", reason="torch is not installed")

import torch
from dermis_client import DermisClient
from dermis_client.errors import APIConnectionError, IntegrityError, InvalidRequestError, ServerError
from dermis_client.images import ImagesResult
from dermis_client.models import ModelRef, Problem
from dermis_client.pixels import pixels_of
from dermis_client.torch import SyntheticDataset, SyntheticIterable, to_tensor
from fake_gateway import FakeGateway, Fault
from torch.utils.data import DataLoader

SHARES = {"benign": 3.0, "malignant": 1.0}
STRIDE = 1 << 34  # from a sample to its next candidate, as in datasets


def passes(index: int, privacy: Mapping[str, Any]) -> bool:
    """The result of a gate for the image of an index: of candidates after the first, every second one is refused."""
    if index >= STRIDE:
        return bool((index // STRIDE + index) % 2)
    divisor = 5 if privacy["gate"] == "authentic" else round(privacy["percentile"])
    return bool(index % divisor) and not (privacy["detect_copies"] and index % 7 == 0)


class FakeClient:
    """Answers like a service whose image of an index has the index as its colour.

    Args:
        fails_at: The index from which it does not answer.
        digests: The digest of the bundle at each call, the last one for all further calls.
        refusals: The number of times that it refuses each call.
        refusal: With what.
    """

    def __init__(
        self,
        fails_at: int | None = None,
        digests: Sequence[str] = ("a" * 64,),
        refusals: int = 0,
        refusal: Exception | None = None,
    ) -> None:
        self.images, self._fails_at = self, fails_at
        self._digests, self._refusals, self._refusal = deque(digests), refusals, refusal
        self._refused: Counter[int] = Counter()

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _answer(self, start_index: int, data: list[Any]) -> Any:
        if self._refusal is not None and self._refused[start_index] < self._refusals:
            self._refused[start_index] += 1
            raise self._refusal
        digest = self._digests.popleft() if len(self._digests) > 1 else self._digests[0]
        return ImagesResult.model_construct(model=ModelRef(name="demo", digest=digest), data=data)

    def generate(
        self,
        classes: Mapping[str, int],
        *,
        seed: int,
        start_index: int,
        privacy: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Any:
        if self._fails_at is not None and start_index >= self._fails_at:
            raise APIConnectionError("no answer")
        names = [name for name, count in classes.items() for _ in range(count)]
        images = [
            SimpleNamespace(
                class_name=name,
                seed=seed,
                index=index,
                image=Image.new("RGB", (1, 1), (index % 256, index // STRIDE * 16 + index % STRIDE // 256, seed)),
                passed=None if privacy is None else passes(index, privacy),
            )
            for index, name in enumerate(names, start_index)
        ]
        return self._answer(start_index, images)

    def generate_pixels(self, classes: Mapping[str, int], **options: Any) -> Any:
        return pixels_of(self.generate(classes, **options))


def index_of(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))  # type: ignore[misc]
    return int(red + 256 * green)


def latent_index_of(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))  # type: ignore[misc]
    return int(red + 256 * (green % 16) + green // 16 * STRIDE)


def stream(**values: Any) -> SyntheticIterable:
    options = {"samples": 200, "seed": 5, "chunk": 8, "transform": index_of, "client": FakeClient}
    return SyntheticIterable(SHARES, **{**options, **values})


def test_every_sample_comes_once_for_any_division_of_the_work() -> None:
    alone = sorted(stream())
    assert [index for index, _ in alone] == list(range(200))
    counts = Counter(label for _, label in alone)
    assert abs(counts[1] - 50) <= 2  # a random draw of the labels would differ by 6 on average
    ranks = [stream(rank=rank, world_size=3) for rank in range(3)]
    parts = [list(DataLoader(part, batch_size=None, num_workers=2, multiprocessing_context="fork")) for part in ranks]
    assert sorted(tuple(sample) for part in parts for sample in part) == alone
    assert [len(part) for part in ranks] == [len(part) for part in parts] and sum(map(len, parts)) == 200
    assert list(stream()) == list(stream()) and list(stream()) != alone  # shuffled, always alike


def test_epochs_continue_each_other_and_a_position_can_be_restored() -> None:
    one = stream(samples=20, first_index=100)
    first = [index for index, _ in one]
    one.set_epoch(1)
    assert sorted(first + [index for index, _ in one]) == list(range(100, 140))
    whole, interrupted = list(stream()), stream()
    begun = list(islice(interrupted, 43))
    other = stream()
    other.load_state_dict(interrupted.state_dict())
    assert begun + list(other) == whole
    assert list(other) == whole  # the next iteration is a whole one
    assert len(list(islice(stream(samples=None), 1000))) == 1000


def test_samples_that_the_gate_refuses_are_left_out() -> None:
    def kept(**options: Any) -> list[int]:
        return sorted(index for index, _ in stream(**options))

    authentic = [index for index in range(200) if index % 5 and index % 7]
    assert kept(gate="authentic") == authentic
    assert kept(gate="authentic", detect_copies=False) == [index for index in range(200) if index % 5]
    assert kept(gate="min_distance", percentile=3) == [index for index in range(200) if index % 3 and index % 7]
    assert kept(gate="authentic", noise_mode="const", image_format="jpeg") == authentic
    with pytest.raises(TypeError, match="gate"):
        len(stream(gate="authentic"))
    with pytest.warns(DeprecationWarning, match='give gate="authentic"'):
        assert kept(only_authentic=True) == authentic


def test_samples_that_the_gate_refuses_are_replaced() -> None:
    whole = list(stream())
    label_of = dict(whole)
    samples = list(stream(gate="authentic", on_reject="resample", transform=latent_index_of))
    assert len(samples) == 200 and len({index % STRIDE for index, _ in samples}) == 200
    assert all(label == label_of[index % STRIDE] for index, label in samples), (
        "a replacement has the label of its sample"
    )
    attempts = {index % STRIDE: index // STRIDE for index, _ in samples}
    for index, attempt in attempts.items():
        assert attempt == (0 if index % 5 and index % 7 else 1 + index % 2), "the first candidate that passes"
    few = list(stream(gate="authentic", on_reject="resample", tries=2, transform=latent_index_of))
    assert sorted(few) == sorted(sample for sample in samples if sample[0] < 2 * STRIDE)
    interrupted = stream(gate="authentic", on_reject="resample", transform=latent_index_of)
    begun = list(islice(interrupted, 43))
    other = stream(gate="authentic", on_reject="resample", transform=latent_index_of)
    other.load_state_dict(interrupted.state_dict())
    assert begun + list(other) == samples


class FilesClient(FakeClient):
    """A client that must not be asked for pixels."""

    def generate_pixels(self, classes: Mapping[str, int], **options: Any) -> Any:
        raise AssertionError


def test_items_are_tensors_of_the_pixels_or_of_image_files() -> None:
    items = list(stream(samples=8, transform=None))
    image, _ = items[0]
    assert (image.dtype, image.shape, image.is_contiguous()) == (torch.float32, (3, 1, 1), True)
    indices = [round(float(image[0] * 255)) for image, _ in items]
    assert [(index, label) for index, (_, label) in zip(indices, items, strict=True)] == list(stream(samples=8))
    every = Image.frombytes("RGB", (128, 2), bytes(value for value in range(256) for _ in range(3)))
    expected = torch.arange(256, dtype=torch.uint8).reshape(2, 128).float().div_(255)
    assert torch.equal(to_tensor(every), expected.expand(3, 2, 128))  # the values of ToTensor, bit for bit
    for option in ({"image_format": "jpeg"}, {"image_quality": 80}, {"provenance": {"c2pa": True}}):
        files = list(stream(samples=8, transform=None, client=FilesClient, **option))
        assert all(torch.equal(one, other) for (one, _), (other, _) in zip(files, items, strict=True))
    with pytest.raises(AssertionError):
        list(stream(samples=8, client=FilesClient, image_format=None))


def test_errors_reach_the_training() -> None:
    with pytest.raises(APIConnectionError, match="no answer"):
        list(stream(client=partial(FakeClient, 80)))
    for values in ({"samples": 0}, {"chunk": 0}, {"prefetch": 0}, {"rank": 2, "world_size": 2}):
        with pytest.raises(InvalidRequestError, match=next(iter(values))):
            stream(**values)
    with pytest.raises(InvalidRequestError, match="classes"):
        SyntheticIterable({"benign": -1.0})
    for message, values in (
        ("gate: 'near' is none of authentic, min_distance", {"gate": "near"}),
        ("percentile: must be 0 to 100", {"gate": "min_distance", "percentile": float("nan")}),
        ("on_reject: 'flag' is none of drop, resample", {"gate": "authentic", "on_reject": "flag"}),
        ("tries: must be 1 to 16", {"gate": "authentic", "on_reject": "resample", "tries": 0}),
        ("privacy: give gate", {"privacy": {"gate": "authentic"}}),
        ("only_authentic: contradicts", {"only_authentic": True, "gate": "min_distance"}),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            stream(**values)
    with pytest.raises(IntegrityError, match="without the results of the gate"):
        list(stream(gate="authentic", client=SilentClient))


def busy(status: int = 503, retry_after: float | None = 0.0) -> ServerError:
    problem = Problem(title="The service is busy", status=status)
    return ServerError("busy", problem=problem, status_code=status, retry_after=retry_after)


def test_calls_are_repeated_while_the_service_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dermis_client.torch._LEAST_WAIT", 1e-3)
    alone = list(stream(gate="authentic"))
    for status in (503, 429):
        refusing = partial(FakeClient, refusals=8, refusal=busy(status))
        assert list(stream(client=refusing, gate="authentic")) == alone
    for refusal, timeout in (
        (busy(), 0.0),  # no time left
        (busy(retry_after=7200.0), 600.0),  # such as a quota of a day: it would be free after the time only
        (busy(retry_after=None), 600.0),
        (busy(status=507), 600.0),
    ):
        with pytest.raises(ServerError, match="busy"):
            list(stream(client=partial(FakeClient, refusals=1, refusal=refusal), busy_timeout=timeout))
    with pytest.raises(InvalidRequestError, match="busy_timeout"):
        stream(busy_timeout=float("nan"))
    # Leaving the loop early does not wait for calls that are to be repeated.
    begun = iter(stream(client=partial(RefusesLater, refusals=1, refusal=busy(retry_after=300.0))))
    next(begun)
    begun.close()  # type: ignore[attr-defined]


class SilentClient(FakeClient):
    """Answers without the results of a gate."""

    def generate(self, classes: Mapping[str, int], **options: Any) -> Any:
        return super().generate(classes, **{**options, "privacy": None})


class RefusesLater(FakeClient):
    """Refuses all chunks but the first."""

    def _answer(self, start_index: int, data: list[Any]) -> Any:
        if start_index == 0:
            self._refused[0] = self._refusals
        return super()._answer(start_index, data)


class CountingClient(FakeClient):
    """Keeps the first indices of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[int] = []

    def generate(self, classes: Mapping[str, int], *, seed: int, start_index: int, **options: Any) -> Any:
        self.starts.append(start_index)
        return super().generate(classes, seed=seed, start_index=start_index, **options)


def test_calls_run_ahead_while_a_chunk_is_consumed() -> None:
    client = CountingClient()
    begun = iter(stream(client=lambda: client, prefetch=2))
    next(begun)
    deadline = time.monotonic() + 30
    while len(client.starts) < 3 and time.monotonic() < deadline:
        time.sleep(1e-3)
    begun.close()  # type: ignore[attr-defined]
    assert sorted(client.starts) == [0, 8, 16]


def test_leaving_the_loop_ends_the_pauses_between_attempts(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dermis_client._retry.FIRST_DELAY", 100.0)
    monkeypatch.setattr("dermis_client._retry.MAX_DELAY", 100.0)

    def sent(number: int) -> None:
        deadline = time.monotonic() + 60
        while len(gateway.requests("POST /v1/images")) < number and time.monotonic() < deadline:
            time.sleep(1e-3)

    data = SyntheticIterable(SHARES, chunk=8, prefetch=1, client=partial(DermisClient, gateway.url))
    begun = iter(data)
    next(begun)
    sent(2)
    gateway.faults = [Fault("POST /v1/images", times=9, status=503)]
    assert len(list(islice(begun, 8))) == 8
    sent(3)
    began = time.monotonic()
    begun.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 45  # a pause is 50 s at least
    assert len(gateway.requests("POST /v1/images")) == 3


def test_errors_of_workers_have_their_class_in_the_training() -> None:
    for client, kind in (
        (partial(FakeClient, digests=["a" * 64, "b" * 64]), IntegrityError),
        (partial(FakeClient, refusals=1, refusal=busy(status=507)), ServerError),
    ):
        loader = DataLoader(stream(client=client), batch_size=None, num_workers=1, multiprocessing_context="fork")
        with pytest.raises(kind, match="Caught .*Error in DataLoader worker process 0"):
            list(loader)


@pytest.mark.full
def test_samples_of_two_bundles_are_not_mixed() -> None:
    a, b = "a" * 64, "b" * 64
    with pytest.raises(IntegrityError, match=r"images 0 to 7: .* from the bundle aaaaaaaaaaaa\.\.\. to bbbbbbbbbbbb"):
        list(stream(client=partial(FakeClient, digests=[a, b]), gate="authentic", on_reject="resample", prefetch=1))
    samples: list[Any] = []
    with pytest.raises(IntegrityError, match="images 16 to 23: the service has changed"):
        samples.extend(stream(client=partial(FakeClient, digests=[a, a, b]), prefetch=1))
    assert len(samples) == 16
    one = stream(client=partial(FakeClient, digests=[a]), prefetch=1)
    begun = list(islice(one, 16))
    other = stream(client=partial(FakeClient, digests=[b]), prefetch=1)
    other.load_state_dict(one.state_dict())
    with pytest.raises(IntegrityError, match="images 8 to 15: the service has changed"):
        list(other)
    earlier = {name: value for name, value in one.state_dict().items() if name != "digest"}
    new = stream(client=partial(FakeClient, digests=[b]), prefetch=1)
    new.load_state_dict(earlier)  # a state of an earlier version
    assert begun + list(new) == list(stream())
    workers = stream(client=partial(FakeClient, digests=[a]))
    loader = DataLoader(workers, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert len(list(loader)) == 200 and workers._digest.item() == int(a[:15], 16)


def test_position_of_workers_is_not_given_as_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stream(chunk=8)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert len(list(loader)) == 200
    with pytest.raises(InvalidRequestError, match="StatefulDataLoader"):
        data.state_dict()
    with monkeypatch.context() as worker:
        worker.setattr("dermis_client.torch.get_worker_info", lambda: SimpleNamespace(id=1, num_workers=2))
        assert len(list(islice(data, 9))) == 9
        assert data.state_dict()["chunks"] == 1, "a worker knows its own position"
    assert len(list(islice(data, 10))) == 10
    assert data.state_dict()["chunks"] == 1


@pytest.mark.parametrize("gate", [{}, {"gate": "authentic", "on_reject": "resample"}])
def test_interrupted_loader_with_workers_continues_where_it_was(gate: dict[str, Any]) -> None:
    """torchdata asks each worker for its position; the state survives being written to a file."""
    loaders: Any = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def loader() -> Any:
        data = stream(samples=100, transform=latent_index_of, **gate)
        return loaders.StatefulDataLoader(data, batch_size=3, num_workers=2, multiprocessing_context="fork")

    def batches(loaded: Any) -> list[Any]:
        return [(images.tolist(), labels.tolist()) for images, labels in loaded]

    whole = batches(loader())
    assert len({index % STRIDE for indices, _ in whole for index in indices}) == 100
    interrupted = loader()
    begun = batches(islice(interrupted, 11))
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    other = loader()
    other.load_state_dict(torch.load(file))
    assert begun + batches(other) == whole


def test_downloaded_dataset(tmp_path: Path) -> None:
    rows, content = ["file_name,target,label"], {}
    for index, name in enumerate(("malignant", "benign", "malignant")):
        file = io.BytesIO()
        Image.new("RGB", (2, 1), (index, 0, 255)).save(file, "PNG")
        content[f"images/{name}/{index}.png"] = file.getvalue()
        rows.append(f"images/{name}/{index}.png,{name},{int(name == 'malignant')}")
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.csv", "\n".join(rows))
        for name, data in content.items():
            archive.writestr(name, data)
    data = SyntheticDataset(tmp_path)
    assert (data.class_names, data.labels, len(data)) == (("benign", "malignant"), [1, 0, 1], 3)
    for number, (image, label) in enumerate(DataLoader(data, batch_size=None, num_workers=1)):
        assert image.shape == (3, 1, 2) and label == data.labels[number]
        assert image[:, 0, 0].tolist() == pytest.approx([number / 255, 0.0, 1.0])
    with pytest.raises(InvalidRequestError, match="malignant"):
        SyntheticDataset(tmp_path, class_names=["benign"])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(IntegrityError, match="images.zip"):
        SyntheticDataset(tmp_path)
