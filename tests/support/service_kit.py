"""The gateway and the dataset jobs in this process, with a generator that is a pure function of its rows."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Container, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from starlette.testclient import TestClient

from dermis.authenticity.attack import Exposure, exposure
from dermis.authenticity.checker import Checker
from dermis.authenticity.index import Nearest, open_index
from dermis.authenticity.training_map import TrainingMap, training_map
from dermis.bundle import Bundle
from dermis.classifier.onnx_session import Classifier
from dermis.dataset.manifest import finalize
from dermis.dataset.plan import plan_for
from dermis.dataset.request import DatasetRequest
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.imaging import encode
from dermis.projection.projector import ImageProjector
from dermis.synthesizer import Synthesizer
from services.composition import compose
from services.gateway.app import create_app
from services.gateway.dependencies import Context
from services.inference import projections
from services.inference.client import InferenceClients
from services.inference.heat_maps import EncodedHeatMap
from services.inference.pixels import Comparison
from services.inference.projections import ProjectionFiles, ProjectionPreview, ProjectionTask
from services.inference.samples import Image, Options, Samples, pack_rows
from services.jobs.context import JobContext
from services.jobs.service import JobService
from services.models import ServedModels, signers_of
from services.settings import Settings

IDENTITY = {"device": "fake"}
CLASSIFIER_IDENTITY = {"classifier_device": "here"}
INDEX_IDENTITY = {"faiss": "here"}
PATIENCE_SECONDS = 120.0  # for work that takes a second or two: a busy machine must not fail the test


def draw(rows: Samples) -> list[Image]:
    """A 16 px image that differs with everything an image depends on."""
    rows = rows.copy()
    rows["model"] = b""
    keys = [zlib.crc32(row.tobytes()) for row in rows]
    return [np.random.default_rng(key).integers(0, 256, (16, 16, 3), dtype=np.uint8) for key in keys]


class LocalClient:
    """An inference service that is always ready."""

    async def not_ready(self, _unusable: Container[str] = ()) -> str | None:
        return None

    async def not_alive(self) -> str | None:
        return None


@dataclass
class FakeGenerator(LocalClient):
    """The function `draw` as a generator. It can be made to wait or to fail. Style vectors go to the real generator.

    Attributes:
        gate: While it is not set, calls wait.
        failures: Errors of the next calls.
        calls: Number of calls.
        close_after: Number of calls after which the gate closes by itself.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    failures: list[Exception] = field(default_factory=list)
    calls: int = 0
    close_after: int | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    async def images(self, rows: Samples) -> list[Image]:
        while not self.gate.is_set():
            await asyncio.sleep(0.01)
        self.calls += 1
        if self.calls == self.close_after:
            self.gate.clear()
        if self.failures:
            raise self.failures.pop(0)
        return draw(rows)

    async def draw(
        self, bundle: Bundle, ws: NDArray[np.float32], noise_mode: str, noise_of: tuple[int, int] | None = None
    ) -> list[Image]:
        with Synthesizer(bundle, device="cpu", threads=1) as synthesizer:
            if noise_of is None:
                return list(synthesizer.images_from_ws(ws))
            seeds, indices = ([number] * len(ws) for number in noise_of)
            return list(synthesizer.images_from_ws(ws, "random", seeds=seeds, indices=indices))

    async def map(
        self,
        bundle: Bundle,
        z: NDArray[np.float32],
        labels: Sequence[int],
        truncation_psi: float,
        truncation_cutoff: int | None,
    ) -> NDArray[np.float32]:
        with Synthesizer(bundle, device="cpu", threads=1) as synthesizer:
            return synthesizer.ws_of(z, labels, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)

    async def identity(self, _bundle: Bundle) -> Mapping[str, str]:
        return IDENTITY


@dataclass
class LocalClassifier(LocalClient):
    """The classifiers of bundles in this process, that can be made to fail."""

    failures: list[Exception] = field(default_factory=list)

    async def logits(self, bundle: Bundle, inputs: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.failures:
            raise self.failures.pop(0)
        with Classifier(bundle, device="cpu", threads=1) as classifier:
            return classifier.logits(inputs)

    async def identity(self, _bundle: Bundle) -> Mapping[str, str]:
        return CLASSIFIER_IDENTITY


@dataclass
class LocalAuthenticity(LocalClient):
    """The indexes of bundles in this process."""

    async def nearest(self, bundle: Bundle, inputs: NDArray[np.uint8], comparison: Comparison | None = None) -> Nearest:
        with Checker(bundle, device="cpu", threads=1) as checker:
            nearest = checker.nearest(inputs, **asdict(comparison or Comparison()))
            return replace(nearest, neighbours=None)

    async def training_map(self, bundle: Bundle) -> TrainingMap:
        return training_map(open_index(bundle, device="cpu", threads=1))

    async def expose(self, bundle: Bundle, embeddings: NDArray[np.float32]) -> Exposure:
        return exposure(open_index(bundle, device="cpu", threads=1), embeddings)

    async def identity(self, _bundle: Bundle) -> Mapping[str, str]:
        return INDEX_IDENTITY


@dataclass
class LocalProjector(LocalClient):
    """Bundles in this process, projected to with few steps. It can be made to wait or to fail."""

    gate: threading.Event = field(default_factory=threading.Event)
    failures: list[Exception] = field(default_factory=list)
    calls: int = 0
    steps_done: dict[str, int] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    previews: list[ProjectionPreview] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    async def project(
        self, bundle: Bundle, images: NDArray[np.uint8], labels: Sequence[int | None], task: ProjectionTask, ticket: str
    ) -> list[ProjectionFiles]:
        self.calls += 1
        self.steps_done[ticket] = 1
        while not self.gate.is_set():
            await asyncio.sleep(0.01)
        if self.failures:
            raise self.failures.pop(0)
        projector = ImageProjector(bundle, distance="lite0", device="cpu", dtype="float32", batch_size=len(images))
        return projections.project_images(projector, images, labels, task, lambda steps: None)

    async def progress(self, ticket: str) -> tuple[int, list[ProjectionPreview]]:
        return self.steps_done.get(ticket, 0), self.previews

    async def cancel(self, ticket: str) -> None:
        self.cancelled.append(ticket)


@dataclass
class FakeExplainer(LocalClient):
    """A heat map is the image itself. It can be made to wait or to fail."""

    gate: threading.Event = field(default_factory=threading.Event)
    failures: list[Exception] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    async def heat_map(self, _bundle: Bundle, method: str, image: NDArray[np.uint8]) -> EncodedHeatMap:
        self.calls.append(method)
        while not self.gate.is_set():
            await asyncio.sleep(0.01)
        if self.failures:
            raise self.failures.pop(0)
        return EncodedHeatMap(encode(image), 0.5)


@dataclass
class Service:
    """The parts of a running service that tests use."""

    client: TestClient
    generator: FakeGenerator
    classifier: LocalClassifier
    explainer: FakeExplainer
    projector: LocalProjector
    jobs: JobService
    models: ServedModels
    settings: Settings
    ctx: JobContext

    def ask(self, body: Mapping[str, Any], **headers: str) -> dict[str, Any]:
        """Ask for a dataset that is accepted."""
        answer = self.client.post("/v1/datasets", json=body, headers=headers)
        assert answer.status_code == 202, answer.text
        dataset: dict[str, Any] = answer.json()
        return dataset

    def wait(self, dataset: Mapping[str, Any], *states: str, seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """The dataset once it is in one of `states` (default: once it has ended)."""
        ends = states or ("succeeded", "failed", "cancelled")
        status: dict[str, Any] = {}
        wait_for(
            lambda: status.update(self.client.get(dataset["links"]["self"]).json()) or status["state"] in ends,
            seconds,
            pause=0.05,  # each call takes time from the job
        )
        return status

    def wait_for_shards(self, dataset: Mapping[str, Any], shards: int) -> None:
        """Return once that many shards of a dataset are done."""

        def done() -> bool:
            status = self.client.get(dataset["links"]["self"]).json()
            return bool(status["progress"]["shards_done"] >= shards)

        wait_for(done)


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS, pause: float = 0.02) -> None:
    """Return when `condition()` is true; TimeoutError if it does not become so."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(pause)


@dataclass
class Parts:
    """An application that is not running yet, and what it will run on."""

    app: FastAPI
    generator: FakeGenerator
    classifier: LocalClassifier
    explainer: FakeExplainer
    projector: LocalProjector
    models: ServedModels
    settings: Settings
    running: list[tuple[JobService, JobContext]] = field(default_factory=list)


def assemble(bundles: Path | str, data_dir: Path, **settings: Any) -> Parts:
    """The gateway with real jobs and a fake generator. Run one at a time: DBOS is one a process."""
    values = Settings(
        _env_file=None, bundles=tuple(str(bundles).split(",")), data_dir=data_dir, min_free_bytes=0, **settings
    )
    models = ServedModels(values.bundles, values.default_model, values.model_tenants, signers_of(values))
    generator, classifier, explainer, projector = FakeGenerator(), LocalClassifier(), FakeExplainer(), LocalProjector()

    inference = InferenceClients(
        generator=generator,  # type: ignore[arg-type]
        classifier=classifier,  # type: ignore[arg-type]
        authenticity=LocalAuthenticity(),  # type: ignore[arg-type]
        explainer=explainer,  # type: ignore[arg-type]
        projector=projector,  # type: ignore[arg-type]
    )

    @asynccontextmanager
    async def running() -> AsyncIterator[Context]:
        composition = compose(values, models, inference)
        parts.running.append((composition.jobs, composition.job_context))
        async with composition.running() as context:
            yield context

    parts = Parts(create_app(values, running), generator, classifier, explainer, projector, models, values)
    return parts


@contextmanager
def listening(parts: Parts, listener: socket.socket | None = None) -> Iterator[str]:
    """The application on a listening socket of this machine, by default on a free port; its URL."""
    server = uvicorn.Server(uvicorn.Config(parts.app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=(None if listener is None else [listener],))
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        parts.running[0][1].stopping.set()
        server.should_exit = True
        thread.join()


@contextmanager
def service(bundles: Path | str, data_dir: Path, **settings: Any) -> Iterator[Service]:
    """A service in this process, running."""
    parts = assemble(bundles, data_dir, **settings)
    with TestClient(parts.app, base_url="http://localhost", raise_server_exceptions=False) as client:
        jobs, ctx = parts.running[0]
        try:
            yield Service(
                client,
                parts.generator,
                parts.classifier,
                parts.explainer,
                parts.projector,
                jobs,
                parts.models,
                parts.settings,
                ctx,
            )
        finally:
            ctx.stopping.set()  # first: what waits at a gate must not finish now
            parts.generator.gate.set()
            parts.explainer.gate.set()
            parts.projector.gate.set()


def make_directly(bundle: Any, request: Mapping[str, Any], folder: Path) -> dict[str, bytes]:
    """The files that the library makes of a request, without any service, by name."""
    dataset_request = DatasetRequest.model_validate(request)
    planned = plan_for(dataset_request, bundle)
    identity = {
        **IDENTITY,
        **(CLASSIFIER_IDENTITY if planned.scored else {}),
        **(INDEX_IDENTITY if planned.gated else {}),
    }
    options = Options(
        bundle.digest,
        dataset_request.truncation_psi,
        dataset_request.truncation_cutoff,
        dataset_request.noise_mode,
        edits=dataset_request.moves,
        directions=[direction.name for direction in bundle.directions],
    )
    store = Store(folder)

    def score(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        with Classifier(bundle, device="cpu", threads=1) as classifier:
            return classifier.classify(images).calibrated

    def examine(images: NDArray[np.uint8]) -> Nearest:
        with Checker(bundle, device="cpu", threads=1) as checker:
            return checker.nearest(images)

    def expose(embeddings: NDArray[np.float32]) -> Exposure:
        return exposure(open_index(bundle, device="cpu", threads=1), embeddings)

    for shard in range(planned.shards):
        write_shard(
            planned,
            shard,
            lambda indices, labels: np.stack(draw(pack_rows(options, dataset_request.seed, indices, labels))),
            store,
            score=score,
            examine=examine,
            identity=identity,
        )
    finalize(planned, store, bundle, identity, expose)
    return {path.name: path.read_bytes() for path in folder.iterdir()}
