"""A separate PostgreSQL server, which can be stopped, killed and started again."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from benchmarks.components import MissingComponentError, free_port


def binaries() -> Path | None:
    """The folder of initdb and pg_ctl, the newest version first."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name, reverse=True):
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            return folder
    there = shutil.which("initdb")
    return Path(there).resolve().parent if there else None


def _user() -> tuple[int, int] | None:
    """User and group to run the server as: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_uid, entry.pw_gid
    return None


@dataclass
class Postgres:
    """A server on a free port of the loopback address. Anybody on this machine may log in as `dermis`, while it runs."""

    binaries: Path
    folder: Path
    user: tuple[int, int]
    port: int

    @property
    def url(self) -> str:
        """SQLAlchemy URL of its database."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        """SQLAlchemy URL of one of its databases."""
        return f"postgresql+psycopg://dermis@127.0.0.1:{self.port}/{database}"

    def main_process(self) -> psutil.Process:
        """The process whose children are all others."""
        return psutil.Process(int((self.folder / "data" / "postmaster.pid").read_text().splitlines()[0]))

    def start(self) -> None:
        """Start it and wait until it answers."""
        log = self.folder / "log"
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-l", str(log), "-w", "-t", "60", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it: `fast` ends all connections in order, `immediate` is a crash."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", mode, "-w", "-t", "60", "stop")

    def kill(self) -> None:
        """End all of its processes at once, as a crash of the machine does."""
        main = self.main_process()
        processes = [main, *main.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=30)

    def _run(self, program: str, *arguments: str) -> None:
        uid, gid = self.user
        root = os.geteuid() == 0
        # Not captured through pipes: the server inherits them, so that reading would never end.
        subprocess.run(
            [str(self.binaries / program), *arguments],
            check=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            user=uid if root else None,
            group=gid if root else None,
            extra_groups=[] if root else None,
        )


@contextmanager
def running_postgres(max_connections: int = 200) -> Iterator[Postgres]:
    """A new server, running.

    Args:
        max_connections: How many connections it accepts.

    Raises:
        MissingComponentError: There is none to run here.
    """
    programs, user = binaries(), _user()
    if programs is None:
        raise MissingComponentError("PostgreSQL's server (initdb, pg_ctl) is not installed")
    if user is None:
        raise MissingComponentError("PostgreSQL does not run as root, and there is no user postgres or nobody")
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="dermis-postgres-"))
    os.chown(folder, *user)
    server = Postgres(programs, folder, user, port)
    data = folder / "data"
    try:
        server._run("initdb", "-D", str(data), "-U", "dermis", "-A", "trust", "-E", "UTF8", "--no-sync")
        with (data / "postgresql.conf").open("a") as file:
            file.write(f"port = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\n")
            file.write(f"fsync = off\nmax_connections = {max_connections}\n")
        server.start()
        try:
            yield server
        finally:
            if (data / "postmaster.pid").exists():
                server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
