"""Tests of inference services and their clients: loaded models, reported problems, and how calls are divided."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from bentoml.exceptions import BentoMLException

from dermis.bundle import Bundle, open_bundle
from dermis.bundle.folder import exists
from dermis.classifier import onnx_session
from dermis.classifier.graph_trial import try_graph
from dermis.errors import BundleError, DermisError, StorageError
from dermis.projection.schedule import Schedule
from flaky_storage import EndpointConnectionError, failing
from services.errors import InferenceFailedError, InferenceUnavailableError, LoadPostponedError
from services.inference.client import ClassifierClient, GeneratorClient, InferenceClients
from services.inference.projections import ProjectionTask
from services.inference.samples import Options, Samples, from_bytes, pack_rows, to_bytes
from services.jobs import context
from services.models import ServedModels

BUNDLE: Any = SimpleNamespace(name="tiny", digest="d" * 64, classifier=None, authenticity=None)
MODELS: Any = SimpleNamespace(bundles=[BUNDLE])


class FakeService:
    """BentoML's client of a service. Image number i is an array with the index of its sample."""

    def __init__(self, description: Mapping[str, Any] | None = None) -> None:
        self.description = description or {"identities": {BUNDLE.digest: {"device": "here"}}, "problems": []}
        self.describe_calls = 0
        self.sizes: list[int] = []
        self.lost = 0
        self.reason: str | None = None

    async def describe(self) -> Mapping[str, Any]:
        self.describe_calls += 1
        return self.description

    async def generate(self, data: Any) -> list[Any]:
        rows = from_bytes(data)
        self.sizes.append(len(rows))
        images: list[Any] = [np.full((1, 1, 3), row["index"], np.uint8) for row in rows]
        if self.reason is not None:
            images[-1] = self.reason
        return images[self.lost :]


def rows_of(count: int) -> Samples:
    return pack_rows(Options(BUNDLE.digest), 0, range(count), [0] * count)


def test_rows_are_divided_into_limited_calls_in_order() -> None:
    service = FakeService()
    images = asyncio.run(GeneratorClient(service, MODELS).images(rows_of(70)))
    assert [int(image[0, 0, 0]) for image in images] == list(range(70))
    assert sorted(service.sizes) == [6, 32, 32]


def test_missing_inference_results_become_errors() -> None:
    service = FakeService()
    service.lost = 1
    with pytest.raises(InferenceFailedError, match="the generator gave 2 images for 3 samples"):
        asyncio.run(GeneratorClient(service, MODELS).images(rows_of(3)))
    service.lost, service.reason = 0, "restart the service"
    with pytest.raises(InferenceUnavailableError, match="restart the service"):
        asyncio.run(GeneratorClient(service, MODELS).images(rows_of(3)))


def test_model_that_was_not_loaded_is_reported_with_its_reason() -> None:
    service = FakeService({"identities": {}, "problems": ["generator.safetensors is damaged"]})
    client = GeneratorClient(service, MODELS)
    reason = asyncio.run(client.not_ready())
    assert reason == "the generator did not load tiny: generator.safetensors is damaged"
    assert asyncio.run(client.not_ready({"tiny": "its files were changed"})) is None  # no restart of the service helps
    assert asyncio.run(client.not_alive()) is None
    with pytest.raises(
        InferenceUnavailableError, match="no model with digest dddddddddddd: generator.safetensors is damaged"
    ):
        asyncio.run(client.identity(BUNDLE))


def test_service_that_no_model_needs_is_not_called() -> None:
    service = FakeService({"identities": {}, "problems": []})
    assert asyncio.run(ClassifierClient(service, MODELS).not_ready()) is None
    assert service.describe_calls == 0


def test_readiness_names_every_service_that_is_missing() -> None:
    services = {"generator": FakeService({"identities": {}, "problems": []})}
    clients = InferenceClients.connect(lambda name: services.get(name, FakeService()), MODELS)
    assert asyncio.run(clients.not_ready()) == "the generator did not load tiny: restart the service to load them"
    services["projector"] = services["generator"]
    clients = InferenceClients.connect(lambda name: services.get(name, FakeService()), MODELS)
    assert "the projector did not load tiny" in str(asyncio.run(clients.not_ready()))


@pytest.mark.parametrize(
    ("device", "gpus", "used"),
    [
        ("auto", 2, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", 2, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", 1, ["cuda"] * 3),
        ("auto", 0, ["auto"] * 3),
        ("cuda:1", 2, ["cuda:1"] * 3),
    ],
)
def test_generator_processes_use_several_gpus_in_turn(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, used: list[str]
) -> None:
    from services.inference import generator

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(generator, "_settings", SimpleNamespace(device=device, generator_workers=3))
    devices = []
    for number in (1, 2, 3):
        monkeypatch.setattr(generator, "bentoml", SimpleNamespace(server_context=SimpleNamespace(worker_index=number)))
        devices.append(generator._device())
    assert devices == used


def run_here(monkeypatch: pytest.MonkeyPatch, *locations: str) -> None:
    """Let inference services of these bundles be made in this process, and change nothing else in it."""
    from services.inference import base

    for name in ("exit_with_parent", "restrict_new_files"):
        monkeypatch.setattr(base, name, lambda: None)
    monkeypatch.setattr(base.logs, "configure", lambda *_: None)
    monkeypatch.setattr(base, "locate", lambda _: list(locations))


def test_bundle_that_cannot_be_loaded_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.inference import base

    run_here(monkeypatch, "/models/broken", "/models/none", "/models/good")

    class Service(base.InferenceService[str]):
        logger = logging.getLogger("test")
        failure = "model not loaded"

        def has_model(self, location: str) -> bool:
            return not location.endswith("none")

        def load(self, source: Bundle | str) -> tuple[str, str]:
            if str(source).endswith("broken"):
                raise DermisError(f"{source}/bundle.json: is damaged")
            return "digest", str(source)

        def identity(self, model: str) -> Mapping[str, str]:
            return {"device": model}

    description = asyncio.run(Service.describe.func(Service()))  # type: ignore[attr-defined]
    assert description == {
        "identities": {"digest": {"device": "/models/good"}},
        "problems": ["broken/bundle.json: is damaged"],
    }


def test_process_ends_while_the_remote_storage_of_its_bundle_cannot_be_reached(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor starts it again. A process that ran without the bundle would fail every job."""
    from services.inference import base

    location = "flaky://bundles/tiny"
    for path in Path(tiny_bundle.location).rglob("*"):
        if path.is_file():
            name = path.relative_to(tiny_bundle.location).as_posix()
            fsspec.filesystem("flaky").pipe_file(f"/bundles/tiny/{name}", path.read_bytes())
    run_here(monkeypatch, location)

    class Service(base.InferenceService[str]):
        logger = logging.getLogger("test")
        failure = "model not loaded"

        def has_model(self, location: str) -> bool:
            return exists(location, "bundle.json")

        def load(self, source: Bundle | str) -> tuple[str, str]:
            return open_bundle(str(source)).digest, ""

    def loaded() -> list[str]:
        return list(asyncio.run(Service.describe.func(Service()))["identities"])  # type: ignore[attr-defined]

    def served() -> list[Bundle]:
        return ServedModels([location]).bundles

    for error in (EndpointConnectionError("no route"), ConnectionRefusedError(111, "refused")):
        for call, starts in (("read", [loaded, served]), ("info", [loaded])):
            with failing(lambda this, _path, call=call, error=error: error if this == call else None):
                for start in starts:
                    with pytest.raises(StorageError, match="flaky://bundles/tiny.* cannot be reached") as caught:
                        start()
                    assert caught.value.kind == "storage-unavailable"
    with failing(lambda *_: PermissionError(13, "refused")):  # no restart repairs this
        assert (loaded(), served()) == ([], [])
    assert loaded() == [tiny_bundle.digest] == [bundle.digest for bundle in served()]


def _read_error(error: Exception) -> Exception:
    """An error of reading the file of a bundle, as the bundle reports it."""
    problem = BundleError("/models/tiny/generator.safetensors: cannot be read")
    problem.__cause__ = error
    return problem


def _trial_error() -> Exception:
    """The error of a bundle whose graph cannot be tried, because no process can be started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", _fail_to_fork)
        with pytest.raises(BundleError, match="could not be created") as caught:
            try_graph(b"never tried", "/models/tiny/classifier.onnx", size=8, feature_dim=4, rows=1)
    return caught.value


def _fail_to_fork(*_: object, **__: object) -> None:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes"), True),
        (RuntimeError("can't start new thread"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (_read_error(OSError(errno.ESTALE, "Stale file handle")), True),
        (_read_error(OSError(errno.EIO, "Input/output error")), True),
        (_read_error(MemoryError()), True),
        (_trial_error(), True),
        (_read_error(PermissionError(errno.EACCES, "Permission denied")), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (BundleError("/models/tiny/bundle.json: says out of memory"), False),
    ],
    ids=str,
)
def test_process_ends_only_if_it_cannot_load_a_model_for_a_reason_that_can_pass(
    error: Exception, passes: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from services.inference import base

    run_here(monkeypatch, "/models/tiny")

    class Service(base.InferenceService[str]):
        logger = logging.getLogger("test")
        failure = "model not loaded"

        def load(self, source: Bundle | str) -> tuple[str, str]:
            raise error

    if passes:
        with pytest.raises((StorageError, LoadPostponedError), match="/models/tiny.* at the moment"):
            Service()
        assert "at the moment" in caplog.records[-1].error  # type: ignore[attr-defined]
    else:
        assert asyncio.run(Service.describe.func(Service()))["problems"]  # type: ignore[attr-defined]
    assert caplog.records[-1].location == "/models/tiny"  # type: ignore[attr-defined]


def test_process_that_lacks_memory_for_one_of_two_models_serves_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.inference import base

    run_here(monkeypatch, "/models/large", "/models/small")

    class Service(base.InferenceService[str]):
        logger = logging.getLogger("test")
        failure = "model not loaded"

        def load(self, source: Bundle | str) -> tuple[str, str]:
            if source == "/models/large":
                raise MemoryError
            return "digest", "model"

        def identity(self, model: str) -> dict[str, str]:
            return {}

    described = asyncio.run(Service.describe.func(Service()))  # type: ignore[attr-defined]
    assert list(described["identities"]) == ["digest"] and len(described["problems"]) == 1


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
DEVICE_LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access was encountered"),
]


@pytest.mark.parametrize(
    ("error", "answered", "ends"),
    [(OUT_OF_MEMORY, BentoMLException, False), (RuntimeError("CUDA error: out of memory"), BentoMLException, False)]
    + [(error, type(error), True) for error in DEVICE_LOST]
    + [(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError, False)],
    ids=str,
)
def test_call_that_lacks_memory_can_be_repeated_and_lost_device_ends_the_process(
    error: Exception, answered: type[Exception], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.inference import base
    from services.inference.generator import GeneratorService
    from services.inference.projector import ProjectorService

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    timers: list[Any] = []
    monkeypatch.setattr(
        base.threading, "Timer", lambda *arguments: timers.append(arguments) or SimpleNamespace(start=int)
    )
    service: Any = SimpleNamespace(
        logger=logging.getLogger("test"), _models={BUNDLE.digest: SimpleNamespace(images=fail, bundle=BUNDLE)}
    )
    with pytest.raises(answered) as caught:
        GeneratorService.inner.generate.func(service, to_bytes(rows_of(2)))  # type: ignore[attr-defined]
    bundle = SimpleNamespace(name="tiny", location="/models/tiny")
    service = SimpleNamespace(
        logger=service.logger, _models={"d": bundle}, _projector=fail, _cancelled={}, _steps={}, _previews={}
    )
    task = ProjectionTask(Schedule(steps=1)).to_dict()
    project = ProjectorService.inner.project.func  # type: ignore[attr-defined]
    if answered is RuntimeError and not ends:
        assert "mat1" in project(service, "d", np.zeros((1, 8, 8, 3), np.uint8), [0], task, "t")["problem"]
    else:
        with pytest.raises(answered) as caught:
            project(service, "d", np.zeros((1, 8, 8, 3), np.uint8), [0], task, "t")
        assert getattr(caught.value, "error_code", 507) == 507, "503 would be repeated forever"
    assert timers == [(base._END_SECONDS, os._exit, (1,))] * (2 if ends else 0)
    assert base._END_SECONDS < context._FIRST_PAUSE_SECONDS


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryError(), 507), (_read_error(OSError(errno.ESTALE, "Stale file handle")), 503)], ids=str
)
def test_only_lack_of_memory_at_the_first_call_of_a_model_can_last(error: Exception, status: int) -> None:
    from services.inference import base

    with pytest.raises(BentoMLException) as caught:
        base.raise_passing(error, "/models/tiny")
    assert caught.value.error_code == status


class OnnxRuntimeError(Exception):
    """The class of ONNX Runtime, which is no RuntimeError."""


@pytest.mark.parametrize("device_failed", [True, False])
def test_process_does_not_start_if_the_device_fails_while_a_classifier_is_loaded(
    device_failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new process is started after a pause. Without a classifier only a person could start one."""
    from services.inference import base

    def fail(*_: Any) -> Any:
        text = "CUDA failure 700: an illegal memory access was encountered" if device_failed else "wrong graph"
        raise OnnxRuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {text}")

    run_here(monkeypatch, "/models/tiny")
    monkeypatch.setattr(onnx_session, "new_session", fail)

    class Service(base.InferenceService[str]):
        logger = logging.getLogger("test")
        failure = "classifier not loaded"

        def load(self, source: Bundle | str) -> tuple[str, str]:
            return "digest", onnx_session._session(b"", "cpu", "/models/tiny/classifier")

    if device_failed:
        with pytest.raises(BundleError, match="CUDA failure 700"):
            Service()
    else:
        assert asyncio.run(Service.describe.func(Service()))["problems"]  # type: ignore[attr-defined]


def test_every_method_that_computes_handles_errors_of_the_machine() -> None:
    from services.inference import authenticity, classifier, explainer, generator, projector

    modules = (authenticity, classifier, explainer, generator, projector)
    services = [
        each for module in modules for each in vars(module).values() if isinstance(getattr(each, "apis", None), dict)
    ]
    methods = [method for each in services for method in each.apis.values()]
    assert len(services) == 5 and len(methods) >= 10
    for method in methods:
        assert asyncio.iscoroutinefunction(method.func) or hasattr(method.func, "__wrapped__"), method.name


def test_gateway_ends_if_it_cannot_open_a_bundle_for_too_little_memory(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("dermis.bundle.folder.open_regular", fail)
        with pytest.raises(LoadPostponedError, match="cannot be loaded at the moment"):
            ServedModels([tiny_bundle.location])
    assert ServedModels([tiny_bundle.location]).bundles


@pytest.mark.full
def test_every_inference_client_has_a_service_with_process_count(tmp_path: Path) -> None:
    program = (
        "import dataclasses, json, sys, services.service as service\n"
        "from services.inference import worker_counts\n"
        "from services.inference.client import InferenceClients\n"
        "names = [field.name for field in dataclasses.fields(InferenceClients)]\n"
        "services = [getattr(service.Gateway.inner, name).on for name in names]\n"
        "apis = [sorted(item.apis) for item in services]\n"
        "print(json.dumps([sorted(service.Gateway.dependencies), sorted(names), [item.name for item in services],\n"
        "      list(worker_counts(service._settings)), apis, 'torch' in sys.modules]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"DERMIS_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    dependencies, names, services, counted, apis, torch = json.loads(run.stdout.splitlines()[-1])
    assert dependencies == names
    assert services == counted
    assert all("describe" in methods for methods in apis)
    assert not torch


@pytest.mark.full
def test_gateway_without_inference_depends_on_no_service(tmp_path: Path) -> None:
    """BentoML would otherwise load the models in the process of the gateway."""
    settings = {
        "DERMIS_ROLE": "gateway",
        "DERMIS_INFERENCE": "false",
        "DERMIS_DATABASE_URL": "postgresql://localhost/dermis",
        "DERMIS_STORAGE_URL": str(tmp_path / "storage"),
        "DERMIS_DATA_DIR": str(tmp_path),
    }
    run = subprocess.run(
        [sys.executable, "-c", "import services.service as service; print(list(service.Gateway.all_services()))"],
        cwd=Path(__file__).parents[3],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == "['gateway']"
