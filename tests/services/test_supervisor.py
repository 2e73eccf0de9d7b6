"""Tests of the supervisor: its processes, its private folder, and what it refuses. Workers here are small programs."""

from __future__ import annotations

import ast
import asyncio
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from benchmarks.components import free_port
from service_kit import wait_for
from services import logs, serve, supervisor
from services.settings import Settings, SettingsError
from services.temporary_folders import temporary_folders
from services.worker import TimeLimit

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the service needs Unix sockets")

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); note(); time.sleep(600)"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path / "data", port=free_port(), shutdown_seconds=4)


SUPERVISOR = """
import sys
from pathlib import Path
from services import supervisor
from services.settings import Settings

folder, port, seconds, run, change = sys.argv[1:]
supervisor._command = lambda _service, _number, _listener, options: [sys.executable, "-c", run, *options]
supervisor.worker_counts = lambda _: {"Generator": 2, supervisor.GATEWAY: 1}
exec(change)
supervisor.serve(Settings(_env_file=None, data_dir=Path(folder), port=int(port), shutdown_seconds=int(seconds)))
"""
FOURTH_START_FAILS = """
import errno
starts, start = [], supervisor.subprocess.Popen

def start_or_fail(*arguments, **options):
    starts.append(None)
    if len(starts) == 4:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    return start(*arguments, **options)

supervisor.subprocess.Popen = start_or_fail
"""
LOOP_FAILS_ONCE = """
wait = supervisor._Supervisor._wait

def wait_or_fail(self, seconds):
    request = Path(folder).parent / "fail"
    if request.exists():
        request.unlink()
        raise RuntimeError("unexpected")
    wait(self, seconds)

supervisor._Supervisor._wait = wait_or_fail
"""


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Path]:
    """Workers run the program in this file, which notes their process id beside it by `note()` when it is ready."""
    program, started = tmp_path / "program.py", tmp_path / "started"
    started.mkdir()
    yield program
    for pid in pids(program):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def pids(program: Path) -> list[int]:
    return [int(path.name) for path in (program.parent / "started").iterdir()]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def run_until(
    settings: Settings,
    program: Path,
    ready: Any,
    signals: tuple[signal.Signals, ...] = (signal.SIGTERM,),
    *,
    change: str = "",
    status: int = 0,
) -> float:
    """Run the supervisor in a process of its own, signal it when it is ready; the seconds that it then took to end."""
    started = str(program.parent / "started")
    run = f"import os; note = lambda: open(os.path.join({started!r}, str(os.getpid())), 'w').close(); "
    run += f"exec(open({str(program)!r}).read())"
    arguments = [str(settings.data_dir), str(settings.port), str(settings.shutdown_seconds), run, change]
    command = [sys.executable, "-c", SUPERVISOR, *arguments]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        try:
            wait_for(ready)
            signalled_at = time.monotonic()
            for number in signals:
                process.send_signal(number)
                time.sleep(0.5)
            assert process.wait(timeout=120) == status
            return time.monotonic() - signalled_at
        finally:
            process.kill()


@pytest.mark.full
def test_processes_that_ignore_the_signal_are_killed_in_time(settings: Settings, programs: Path) -> None:
    programs.write_text(STUBBORN)
    options: list[list[str]] = []

    def ready() -> bool:
        options[:] = [Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in pids(programs)]
        return len(options) == 3

    seconds = run_until(settings, programs, ready)
    # Longer than proxies keep idle connections to the gateway (60 to 90 s), and the gateway those to the others (15 s).
    assert sorted(each[each.index("--timeout-keep-alive") + 1] for each in options) == ["120", "60", "60"]
    assert 2 < seconds < settings.shutdown_seconds + 30
    assert all(gone(pid) for pid in pids(programs))
    with socket.socket() as again:
        again.bind((settings.host, settings.port))
    assert not list((settings.data_dir / "run").glob("start-*"))


def test_a_second_signal_ends_the_waiting(settings: Settings, programs: Path) -> None:
    programs.write_text(STUBBORN)
    patient = settings.model_copy(update={"shutdown_seconds": 600})
    assert run_until(patient, programs, lambda: len(pids(programs)) == 3, (signal.SIGTERM, signal.SIGINT)) < 60
    assert all(gone(pid) for pid in pids(programs))


def test_a_key_in_the_terminal_reaches_the_supervisor_only_and_priorities_apply(
    settings: Settings, programs: Path
) -> None:
    programs.write_text("import time; note(); time.sleep(600)")
    places: list[tuple[bool, bool]] = []

    def ready() -> bool:
        # Linux gives sessions equal shares of the processors, whatever the priorities in them.
        places[:] = [(os.getpgid(pid) == pid, os.getsid(pid) == os.getsid(0)) for pid in pids(programs)]
        return len(places) == 3

    run_until(settings, programs, ready)
    assert places == [(True, True)] * 3


def test_a_process_that_dies_is_started_again(settings: Settings, programs: Path) -> None:
    programs.write_text("import time; note(); time.sleep(600)")
    killed: list[int] = []

    def another() -> bool:
        if len(pids(programs)) == 3 and not killed:
            killed.append(pids(programs)[0])
            os.kill(killed[0], signal.SIGKILL)
        return len(pids(programs)) == 4

    run_until(settings, programs, another)
    assert all(gone(pid) for pid in pids(programs))


def test_process_that_cannot_be_started_for_a_moment_is_started_later(settings: Settings, programs: Path) -> None:
    programs.write_text("import time; note(); time.sleep(600)")
    first: list[int] = []

    def another() -> bool:
        if len(pids(programs)) == 3 and not first:
            first.extend(pids(programs))
            os.kill(first[0], signal.SIGKILL)
        return len(pids(programs)) == 4 and not any(gone(pid) for pid in first[1:])

    run_until(settings, programs, another, change=FOURTH_START_FAILS)
    assert all(gone(pid) for pid in pids(programs))


def test_processes_are_stopped_properly_after_an_error_of_the_supervisor(settings: Settings, programs: Path) -> None:
    ended = programs.parent / "ended"
    ended.mkdir()
    programs.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit())\n"
        f"try:\n    note(); time.sleep(600)\nfinally:\n    open({str(ended)!r} + f'/{{os.getpid()}}', 'w').close()"
    )

    def ready() -> bool:
        if len(pids(programs)) < 3:
            return False
        (programs.parent / "fail").touch()
        return True

    run_until(settings, programs, ready, (), change=LOOP_FAILS_ONCE, status=1)
    assert {int(path.name) for path in ended.iterdir()} == set(pids(programs))


def test_pause_before_a_start_grows_to_half_a_minute_however_often_a_process_ends() -> None:
    assert [supervisor._pause(deaths) for deaths in (1, 2, 3, 4, 10, 5000)] == [0, 1, 2, 4, 30, 30]


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name, value", [("MALLOC_ARENA_MAX", "2"), ("ARROW_DEFAULT_MEMORY_POOL", "system")])
@pytest.mark.parametrize("chosen", [None, "chosen"])
def test_gateway_has_few_heaps_unless_the_operator_chose_others(
    name: str, value: str, chosen: str | None, settings: Settings, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(name, chosen)
    programs.write_text(
        f"import os, time; heaps = os.environ.get({name!r})\n"
        f"open({str(programs.parent)!r} + f'/heaps-{{os.getpid()}}', 'w').write(repr(heaps)); note(); time.sleep(600)"
    )
    run_until(settings, programs, lambda: len(pids(programs)) == 3)
    expected = {None, value} if chosen is None else {chosen}
    assert {ast.literal_eval(file.read_text()) for file in programs.parent.glob("heaps-*")} == expected


def test_the_supervised_services_are_those_of_the_gateway() -> None:
    from services.service import Gateway

    counts = supervisor.worker_counts(Settings(_env_file=None))
    services: dict[str, Any] = Gateway.all_services()  # type: ignore[attr-defined]
    assert set(counts) == set(services)
    assert all(counts[name] == services[name].config["workers"] for name in counts)


@pytest.mark.parametrize("name", ["data", "d" * 120], ids=["short", "long"])
def test_scratch_folder_is_private_and_removed_with_its_service(tmp_path: Path, name: str) -> None:
    data_dir = tmp_path / name
    with temporary_folders(data_dir) as folders, temporary_folders(data_dir) as other:
        assert folders.folder != other.folder
        for folder in (data_dir / "run", folders.folder, folders.sockets, folders.temporary):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folders.sockets / "12.sock"))
    assert not folders.folder.exists()
    assert not folders.sockets.exists()
    assert not other.sockets.exists()


@pytest.mark.parametrize("name", ["data", "d" * 120], ids=["short", "long"])
def test_scratch_folder_of_killed_service_is_removed_at_start(tmp_path: Path, name: str) -> None:
    data_dir = tmp_path / name
    program = (
        "import os, signal, sys; from pathlib import Path; from services.temporary_folders import temporary_folders\n"
        "with temporary_folders(Path(sys.argv[1])) as folders:\n"
        "    (folders.temporary / 'upload').touch(); print(folders.sockets, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, str(data_dir)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    left = Path(killed.stdout.strip())
    assert left.exists()
    with temporary_folders(data_dir) as folders:
        assert list((data_dir / "run").glob("start-*")) == [folders.folder]
        assert not left.exists()


def test_services_on_tcp_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENTOML_NO_UDS", "1")
    monkeypatch.setenv("DERMIS_DATA_DIR", str(tmp_path))
    assert serve.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "BENTOML_NO_UDS" in line
    with pytest.raises(SettingsError, match="BENTOML_NO_UDS"):
        supervisor.serve(Settings(_env_file=None, data_dir=tmp_path))
    with pytest.raises(SystemExit):
        supervisor.serve_bento("services.service:Gateway", working_dir=".")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
@pytest.mark.parametrize("environment", [{}, {"DERMIS_AUTH": "none"}, {"DERMIS_ALLOW_ANONYMOUS": "true"}], ids=str)
def test_open_address_without_access_control_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    host: str,
    environment: dict[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"DERMIS_DATA_DIR": "data", "DERMIS_HOST": host, **environment}.items():
        monkeypatch.setenv(name, value)
    assert serve.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "DERMIS_AUTH=keys" in line and "DERMIS_ALLOW_ANONYMOUS=true" in line
    with pytest.raises(SystemExit):  # `bentoml serve`
        supervisor.serve_bento("services.service:Gateway", working_dir=".")
    assert not (tmp_path / "data").exists()


def test_address_may_be_open_with_access_control_or_explicitly_without(tmp_path: Path) -> None:
    def check(**values: Any) -> None:
        supervisor.check_access(Settings(_env_file=None, data_dir=tmp_path, **values))

    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.10"):
        check(host=host)
    check(host="0.0.0.0", auth="keys")
    check(host="0.0.0.0", auth="oidc", oidc_issuer="https://login.example", oidc_audience="dermis")
    check(host="0.0.0.0", auth="none", allow_anonymous=True)
    with pytest.raises(SettingsError, match="DERMIS_BOOTSTRAP_KEY_FILE"):
        check(host="0.0.0.0", auth="keys", bootstrap_key_file=tmp_path / "missing")
    with pytest.raises(SettingsError, match="which may not use lab; set DERMIS_AUTH=keys"):
        check(model_tenants="demo=default,lab=radiology")
    check(model_tenants="demo=default,lab=radiology", auth="keys")
    for name, value in {"oidc_tenant": "A", "oidc_tenants": "x=../a", "oidc_scopes": "boss=admin all"}.items():
        with pytest.raises(SettingsError, match=f"DERMIS_{name.upper()}"):
            check(**{name: value})


@pytest.mark.parametrize(
    ("values", "unencrypted"),
    [
        ({"host": "0.0.0.0", "auth": "keys"}, True),
        ({"host": "127.0.0.1", "auth": "keys"}, False),
        ({"host": "0.0.0.0", "auth": "none"}, False),
        ({"host": "0.0.0.0", "auth": "keys", "trusted_proxies": "10.0.0.0/8"}, False),
        ({"host": "0.0.0.0", "auth": "keys", "tls_certificate": "a.pem", "tls_key": "a.key"}, False),
    ],
    ids=str,
)
def test_credentials_over_plain_http_are_noticed(values: dict[str, str], unencrypted: bool, tmp_path: Path) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path, **values)
    assert supervisor.credentials_unencrypted(settings) is unencrypted


def test_requests_leave_no_callbacks_behind(caplog: pytest.LogCaptureFixture) -> None:
    from services.service import Gateway

    asgi = Gateway.to_asgi(is_main=True)  # type: ignore[attr-defined]

    async def scheduled_after(requests: int) -> int:
        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(_message: Message) -> None:
            pass

        for _ in range(requests):
            scope = {"type": "http", "method": "GET", "path": "/nowhere", "headers": [], "query_string": b""}
            scope |= {"http_version": "1.1", "scheme": "http", "server": ("here", 80), "client": ("here", 1)}
            await asgi(scope, receive, send)
        handles: list[asyncio.TimerHandle] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        return sum(not handle.cancelled() for handle in handles)

    caplog.set_level(logging.WARNING, "dermis.http")
    assert asyncio.run(scheduled_after(5000)) < 100


def test_time_limit_applies_only_until_response_begins() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def silent(_scope: Scope, _receive: Receive, _send: Send) -> None:
        await asyncio.sleep(30)

    async def slow(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.3)
        await send({"type": "http.response.body", "body": b"done"})

    asyncio.run(TimeLimit(silent, 0.1)({"type": "http"}, receive, send))
    assert sent[0]["status"] == 504
    sent.clear()
    asyncio.run(TimeLimit(slow, 0.1)({"type": "http"}, receive, send))
    assert sent[-1]["body"] == b"done"


def test_log_works_after_bentoml_has_disabled_existing_loggers() -> None:
    for name in ("dermis", "dermis.http", "dermis.auth"):
        logging.getLogger(name).disabled = True
    logs.configure("INFO")
    assert not any(logging.getLogger(name).disabled for name in ("dermis", "dermis.http", "dermis.auth"))
