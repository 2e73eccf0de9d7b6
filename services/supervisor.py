"""Start the processes of the service, restart those that end, and stop all of them within a time limit.

BentoML uses circus for this. This module replaces it, because circus accepts commands from any account of the machine on TCP
ports of the loopback address, waits for a day before it kills a process, and loses signals that arrive while it is busy. Here
the port of the gateway is the only one; the other services listen on Unix sockets in a folder that only this account can
enter.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dermis.addresses import is_loopback
from dermis.errors import DermisError
from services import inference, logs, tracing
from services.audit.trail import read_key
from services.gateway.auth.keys import read_key_file
from services.gateway.auth.principal import unknown_scopes
from services.settings import REPOSITORY, Settings, SettingsError
from services.temporary_folders import TemporaryFolders, temporary_folders
from services.tenants import DEFAULT_TENANT, is_tenant
from services.tls import check_certificate

logger = logging.getLogger("dermis.supervisor")

GATEWAY = "gateway"
SERVICE = "services.service:Gateway"
_BACKLOG = 2048
_OPEN_FILES = 65_536
_STEADY_SECONDS = 60.0  # a process that has run for so long is restarted without a pause
_LONGEST_PAUSE_SECONDS = 30.0
_WAKE_SECONDS = 1.0
_IDLE_SECONDS = 60
"""Time for which processes with models keep idle connections. The gateway (aiohttp) reuses one that has been idle for up to
15 s: if it were closed sooner, calls would sometimes be lost."""
# The gateway runs every shard in a thread of its own. By default the C library gives threads up to eight heaps a core, and
# Arrow's allocator one to each thread that writes Parquet. Both keep the memory of images that threads have freed.
_GATEWAY_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "ARROW_DEFAULT_MEMORY_POOL": "system"}


def worker_counts(settings: Settings) -> Mapping[str, int]:
    """The number of processes of each service, by its BentoML name."""
    return {**inference.worker_counts(settings), GATEWAY: 1}


@dataclass
class _Worker:
    """One process of a service, running or to be started."""

    service: str
    number: int
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    not_before: float = 0.0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclass
class _Times:
    """The parts of the time limit of a stop, in seconds."""

    total: float
    pause: float
    requests: int = field(init=False)  # for open requests, once the gateway takes no new ones
    gateway: float = field(init=False)  # until the gateway is killed
    services: float = field(init=False)  # until the other services are killed

    def __post_init__(self) -> None:
        self.services = min(2.0, self.total / 4)
        self.gateway = self.total - self.services
        self.requests = max(1, int(self.gateway - self.pause - min(5.0, self.total / 4)))


def stop_pause(settings: Settings) -> float:
    """Seconds for which a service that is stopping still takes requests."""
    return min(settings.stop_pause_seconds, settings.shutdown_seconds / 4)


def serve(settings: Settings, *, gateway_options: Sequence[str] = ()) -> None:
    """Run the service until SIGTERM, SIGINT or SIGHUP, then end every process within `settings.shutdown_seconds`.

    Args:
        settings: The settings; the processes read the same ones from the environment.
        gateway_options: Further options of BentoML's worker for the gateway, such as those of TLS.

    Raises:
        SettingsError: The service cannot listen, or cannot make its sockets.
    """
    refuse_tcp()
    check_access(settings)
    tracing.check_exporters()
    logs.configure(settings.log_level, settings.log_format)
    raise_open_files()
    with (
        _listen_on_port(_numeric(settings.host), settings.port) as listener,
        temporary_folders(settings.data_dir) as folders,
    ):
        supervisor = _Supervisor(settings, listener, folders, gateway_options)
        try:
            supervisor.run()
        finally:
            supervisor.close()


def refuse_tcp() -> None:
    """Refuse to let the services behind the gateway listen on TCP, because they accept pickled bodies.

    Raises:
        SettingsError: BENTOML_NO_UDS is set.
    """
    if "BENTOML_NO_UDS" in os.environ:
        raise SettingsError(
            "BENTOML_NO_UDS: unset it. The services behind the gateway listen on Unix sockets only, because everyone who "
            "can connect to them can run code"
        )


def check_access(settings: Settings) -> None:
    """Refuse to open the service to a network without access control, unless that was asked for twice.

    Raises:
        SettingsError: The service would listen on another address than loopback without access control, or a bundle that it
            serves would be for nobody, or a file with a key or certificate or a mapping of claims cannot be used.
    """
    if settings.bootstrap_key_file is not None:
        read_key_file(settings.bootstrap_key_file)
    read_key(settings.audit_key_file)
    check_certificate(settings)
    for name, tenants in (("TENANT", [settings.oidc_tenant]), ("TENANTS", settings.oidc_tenants.values())):
        if wrong := [tenant for tenant in tenants if not is_tenant(tenant)]:
            raise SettingsError(
                f"DERMIS_OIDC_{name}: {wrong[0][:100]!r} is not a tenant: lower-case letters, digits, hyphens"
            )
    if unknown := unknown_scopes(scope for scopes in settings.oidc_scopes.values() for scope in scopes):
        raise SettingsError(f"DERMIS_OIDC_SCOPES: {unknown[0][:100]!r} is not a scope; docs/security.md lists them")
    hidden = [name for name, tenants in settings.model_tenants.items() if DEFAULT_TENANT not in tenants]
    if settings.auth == "none" and hidden:
        raise SettingsError(
            f"DERMIS_MODEL_TENANTS: without access control everyone belongs to the tenant {DEFAULT_TENANT}, which may not use "
            f"{hidden[0]}; set DERMIS_AUTH=keys"
        )
    anonymous = "auth" in settings.model_fields_set and settings.allow_anonymous
    if settings.auth == "none" and not anonymous and not is_loopback(_numeric(settings.host)):
        raise SettingsError(
            f"DERMIS_AUTH: everyone who reaches {settings.host} could use the service; set DERMIS_AUTH=keys (docs/security.md "
            "shows how), or DERMIS_AUTH=none and DERMIS_ALLOW_ANONYMOUS=true"
        )


def credentials_unencrypted(settings: Settings) -> bool:
    """Whether credentials would cross a network unencrypted, as far as the settings show: a proxy may be in front."""
    encrypted = settings.tls_certificate is not None or bool(settings.trusted_proxies)
    return settings.auth != "none" and not encrypted and not is_loopback(_numeric(settings.host))


def raise_open_files() -> int:
    """Raise the limit of open files as far as this account is allowed to, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _numeric(host: str) -> str:
    """The address of a host name."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise SettingsError(f"DERMIS_HOST: {host}: {error.strerror}") from None


@contextmanager
def _listen_on_port(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            raise SettingsError(f"DERMIS_PORT: cannot listen on {host}:{port}: {error.strerror}") from None
        yield listener


class _Supervisor:
    def __init__(
        self, settings: Settings, listener: socket.socket, folders: TemporaryFolders, gateway_options: Sequence[str]
    ) -> None:
        self._gateway_options = gateway_options
        self._keep_alive_seconds = settings.keep_alive_seconds
        self._times = _Times(settings.shutdown_seconds, stop_pause(settings))
        counts = worker_counts(settings)
        self._workers = [_Worker(name, i + 1) for name, count in counts.items() for i in range(count)]
        self._listeners = {GATEWAY: listener}
        addresses = {GATEWAY: f"http://localhost:{settings.port}"}
        for number, name in enumerate(name for name in counts if name != GATEWAY):
            path = folders.sockets / f"{number}.sock"
            self._listeners[name] = _listen_on_path(path)
            addresses[name] = path.as_uri()
        self._environment = _environment(settings, folders, addresses)
        self._signals: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def run(self) -> None:
        """Keep every process running until a signal to stop."""
        with self._handling_signals():
            try:
                while not self._signals:
                    for worker in self._workers:
                        self._restart_if_ended(worker)
                    self._wait(_WAKE_SECONDS)
            finally:  # also after an error of the loop: otherwise the processes would be killed in the middle of requests
                try:
                    self._stop()
                finally:
                    self._kill(self._workers)

    def close(self) -> None:
        for listener in self._listeners.values():
            listener.close()
        self._selector.close()
        self._woken.close()
        self._waker.close()

    def _restart_if_ended(self, worker: _Worker) -> None:
        now = time.monotonic()
        if worker.process is not None and worker.process.poll() is not None:
            _kill_group(worker.process.pid)  # processes that it started
            worker.deaths = 1 if now - worker.started > _STEADY_SECONDS else worker.deaths + 1
            pause = _pause(worker.deaths)
            logger.error(
                "a process of the service has ended and is restarted",
                extra={"service": worker.service, "status": worker.process.returncode, "pause": pause},
            )
            worker.process, worker.not_before = None, now + pause
        if worker.process is None and now >= worker.not_before and not self._signals:
            try:
                worker.process, worker.started = self._start(worker), now
            except OSError as error:  # such as too little memory or too many processes, for a moment
                worker.deaths = max(2, worker.deaths + 1)
                pause = _pause(worker.deaths)
                logger.error(
                    "a process of the service cannot be started",
                    extra={"service": worker.service, "error": str(error), "pause": pause},
                )
                worker.not_before = now + pause

    def _start(self, worker: _Worker) -> subprocess.Popen[bytes]:
        listener = self._listeners[worker.service].fileno()
        environment = self._environment
        if worker.service == GATEWAY:
            options = ["--timeout-graceful-shutdown", str(self._times.requests)]
            options += ["--timeout-keep-alive", str(self._keep_alive_seconds), *self._gateway_options]
            environment = _GATEWAY_ENVIRONMENT | environment  # the operator's value is kept
        else:
            options = ["--timeout-graceful-shutdown", "1", "--timeout-keep-alive", str(_IDLE_SECONDS)]
        # A group of its own: a Ctrl-C in the terminal reaches the supervisor only, which stops the gateway first. No session
        # of its own: Linux gives sessions equal shares of the processors (autogroups, sched(7)), whatever their priorities.
        return subprocess.Popen(
            _command(worker.service, worker.number, listener, options),
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[listener],
            process_group=0,
        )

    def _stop(self) -> None:
        """Stop the gateway first, because its open requests may need the other processes; then stop those."""
        began = time.monotonic()
        # Without this copy of the socket, new connections are refused as soon as the gateway stops listening.
        self._listeners[GATEWAY].close()
        gateways = [worker for worker in self._workers if worker.service == GATEWAY]
        others = [worker for worker in self._workers if worker.service != GATEWAY]
        self._end(gateways, began + self._times.gateway)
        self._end(others, min(time.monotonic() + self._times.services, began + self._times.total))

    def _end(self, workers: Sequence[_Worker], deadline: float) -> None:
        """Terminate processes, and kill those that are still running at `deadline` or at a second signal."""
        for worker in workers:
            if worker.alive and worker.process is not None:
                worker.process.terminate()
        while any(worker.alive for worker in workers) and len(self._signals) < 2:
            left = deadline - time.monotonic()
            if left <= 0:
                names = sorted({worker.service for worker in workers if worker.alive})
                logger.warning("killed because they did not end in time", extra={"services": ",".join(names)})
                break
            self._wait(min(left, _WAKE_SECONDS))
        self._kill(workers)

    def _kill(self, workers: Sequence[_Worker]) -> None:
        for worker in workers:
            if worker.process is not None:
                _kill_group(worker.process.pid)
                worker.process.wait()

    def _wait(self, seconds: float) -> None:
        """Sleep until the time is over or a signal arrives, such as that of a process that ends."""
        if self._selector.select(seconds):
            with suppress(BlockingIOError):
                while self._woken.recv(4096):
                    pass

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        def note(number: int, _frame: FrameType | None) -> None:
            self._signals.append(number)

        def ignore(_number: int, _frame: FrameType | None) -> None:
            """Do nothing: the signal has ended `_wait`."""

        handlers = {signal.SIGTERM: note, signal.SIGINT: note, signal.SIGCHLD: ignore}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # it is ignored under nohup
            handlers[signal.SIGHUP] = note
        before_wakeup = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before_wakeup)


def _pause(deaths: int) -> float:
    """Seconds until a process is started again that has ended so many times, each time soon after its start."""
    return 0.0 if deaths < 2 else min(_LONGEST_PAUSE_SECONDS, 2.0 ** min(deaths - 2, 10))


def _command(service: str, number: int, listener: int, options: Sequence[str]) -> list[str]:
    """The command line of one process. `listener` is the file descriptor that it listens on."""
    # -P: a folder `services` in the working directory is not imported in place of ours.
    command = [sys.executable, "-P", "-m", "services.worker", str(os.getpid()), SERVICE]
    command += ["--service-name", service, "--fd", str(listener), "--worker-id", str(number)]
    return [*command, "--backlog", str(_BACKLOG), "--args", "{}", *options]


def _listen_on_path(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(_BACKLOG)
    return listener


def _environment(settings: Settings, folders: TemporaryFolders, addresses: Mapping[str, str]) -> dict[str, str]:
    """The environment of every process."""
    metrics = folders.folder / "metrics"
    metrics.mkdir(mode=0o700)
    data_dir = settings.data_dir.absolute()
    environment = {
        # The default is a folder with a known name in /tmp: an account that creates it first can choose the code that is run.
        "TORCHINDUCTOR_CACHE_DIR": str(data_dir / "cache" / "inductor"),
    } | os.environ
    path = environment.get("PYTHONPATH")
    return environment | {
        "BENTOML_DO_NOT_TRACK": "True",
        "DO_NOT_TRACK": "1",
        "BENTOML_HOME": str(folders.folder / "bentoml"),
        "BENTOML_RUNNER_MAP": json.dumps(addresses),
        "DERMIS_DATA_DIR": str(data_dir),
        "DERMIS_HOST": settings.host,
        "DERMIS_PORT": str(settings.port),
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
        "PYTHONPATH": str(REPOSITORY) if path is None else f"{REPOSITORY}{os.pathsep}{path}",
        "TMPDIR": str(folders.temporary),
    }


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def serve_bento(
    _bento: object,
    *,
    host: str | None = None,
    port: int | None = None,
    development_mode: bool = False,
    reload: bool = False,
    **options: object,
) -> None:
    """Run the same processes with the same limits as `python -m services.serve`. `bentoml serve` calls this function.

    Args:
        host: Address of the gateway; by default that of the settings.
        port: Port of the gateway; by default that of the settings.
        development_mode: Not supported.
        reload: Not supported.
        options: BentoML's other options. Those of TLS and `timeout_keep_alive` are passed to the gateway.

    Raises:
        SystemExit: The service cannot start; a line on stderr says why.
    """
    from services.settings import read_settings

    taken = {name: value for name, value in options.items() if name.startswith("ssl_") or name == "timeout_keep_alive"}
    arguments = [
        text
        for name, value in taken.items()
        if value not in (None, "", 0)
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    try:
        if development_mode or reload or options.get("threaded") or options.get("service_name"):
            raise SettingsError("development mode, --reload and single services are not supported")
        changed: dict[str, object] = {"host": host, "port": port}
        settings = read_settings(**{name: value for name, value in changed.items() if value is not None})
        if settings.tls_certificate is not None and any(name.startswith("--ssl-") for name in arguments):
            raise SettingsError(
                "DERMIS_TLS_CERTIFICATE: leave out the options --ssl-..., which name another certificate"
            )
        serve(settings, gateway_options=arguments)
    except DermisError as error:
        print(f"dermis: {error}", file=sys.stderr)
        raise SystemExit(2) from None
