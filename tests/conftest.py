"""Fixtures that several test files use.

The tests for a GPU run on machines without the packages of the service and the command line, so these are imported where they
are used.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dermis.bundle import Bundle
from tiny import make_bundle

_TESTS = Path(__file__).parent


def _trace_of(run: str, worker: str) -> Path:
    return Path(tempfile.gettempdir()) / f"dermis-tests-{run}-{worker}.txt"


@pytest.fixture(scope="session", autouse=True)
def _trace_of_a_crash(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a test process that dies leave the stacks of its threads in a file. What it writes to stderr is lost."""
    given = getattr(request.config, "workerinput", None)
    if given is None:
        yield
        return
    path = _trace_of(given["testrunuid"], given["workerid"])
    with path.open("w") as file:
        faulthandler.enable(file)
        yield
        faulthandler.disable()
    path.unlink()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Report how a test process has died: its exit status, which is the negative number of a signal, and its stacks."""
    process = getattr(getattr(node.gateway, "_io", None), "popen", None)
    if error is None or process is None:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    reporter = node.config.pluginmanager.get_plugin("terminalreporter")
    reporter.write_line(f"exit status of {node.gateway.id}: {process.poll()}")
    trace = _trace_of(node.workerinput["testrunuid"], node.gateway.id)
    with contextlib.suppress(FileNotFoundError):
        reporter.write_line(trace.read_text())
        trace.unlink()


_crashed: set[str] = set()


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport, sched: Any) -> None:
    """Repeat a test whose process has died, once.

    The cause can be any native library that an earlier test of the process has used, so it says little of this test. It is
    reported with the stacks above, and a second time is a failure.
    """
    if crashitem not in _crashed:
        _crashed.add(crashitem)
        report.outcome = "rerun"  # type: ignore[assignment]  # the category in the summary
        sched.mark_test_pending(crashitem)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def timm_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript", reason="the export needs onnxscript")
    from timm_classifier import make_timm_classifier

    return make_timm_classifier(tmp_path_factory.mktemp("classifiers") / "timm")


def _priority() -> int | None:
    return os.getpriority(os.PRIO_PROCESS, 0) if hasattr(os, "getpriority") else None


@pytest.fixture(autouse=True)
def _kept_priority(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """No test lowers the priority of this process for the tests after it, as the methods of two services do."""
    if request.path.is_relative_to(_TESTS / "services/inference"):
        for name in ("explainer", "projector"):
            monkeypatch.setattr(f"services.inference.{name}.lower_priority", lambda: None)
    before = _priority()
    yield
    assert _priority() == before, "the priority of the main thread was lowered"


@pytest.fixture(autouse=True)
def _small_reports(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Reports of datasets measure 4 images and not 200, which take 30 ms each, at the usual priority.

    Processes of their own are not affected.
    """
    launches = {"launch", "replica"} & set(request.fixturenames)
    if not launches and any(
        request.path.is_relative_to(_TESTS / part) for part in ("services", "dermis/dataset", "dermis/exports")
    ):
        monkeypatch.setattr("dermis.report.sample.SAMPLE", 4)
        monkeypatch.setattr("dermis.report.appearance.lower_priority", lambda: None)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """launch(bundles, port, ...) -> a service in processes of its own."""
    from launched_service import launching

    yield from launching(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run("generate", ...) -> exit status, stdout, stderr."""
    from commands import main as program

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dermis", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            program.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call
