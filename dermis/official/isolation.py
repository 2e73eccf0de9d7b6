"""Read an untrusted checkpoint in a separate process, with limits of time and memory.

Nothing of the file is executed there either (`pickled.py`). The limits are for files that are made to take long or to
need much memory; what comes back is JSON and safetensors in a temporary folder.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dermis.errors import BundleError, escape

FAILURE = "failure.json"
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from dermis.official.isolation import main; "
    "main(json.loads(sys.argv[2]))"
)


@dataclass(frozen=True)
class ReadLimits:
    """Limits for reading one checkpoint. The largest official ones (1024 px, 380 MB) need a small part of it."""

    cpu_seconds: int = 120
    wall_seconds: int = 600
    memory_bytes: int = 4 << 30
    """Of address space. The file itself counts, as it is mapped."""


def store_isolated(path: Path, generator: str, folder: Path, limits: ReadLimits) -> None:
    """`stored.write_stored` in a child process.

    Raises:
        BundleError: As `write_stored` does, or a limit was reached. The message does not name the file.
    """
    _check_regular(path)
    arguments = {
        "path": str(path.absolute()),
        "generator": generator,
        "folder": str(folder),
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
    }
    search_path = [str(Path(entry).absolute()) for entry in sys.path]
    # Isolated mode ignores PYTHONHASHSEED, so that nobody can choose keys that collide, and adds no folder to the path.
    command = [sys.executable, "-I", "-c", _START, json.dumps(search_path), json.dumps(arguments)]
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # each reserves memory
    log = folder / "stderr"
    try:
        with log.open("wb") as stderr:
            ended = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=folder,
                env={**os.environ, **threads},
                timeout=limits.wall_seconds,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise _limit_error(f"{limits.wall_seconds:,} seconds", "--max-seconds") from None
    failure = folder / FAILURE
    if failure.is_file():
        reason = json.loads(failure.read_text())
        if reason["kind"] == "memory":
            raise _limit_error(f"{limits.memory_bytes / (1 << 30):,.3g} GiB of memory", "--max-memory-gib")
        raise BundleError(escape(reason["message"], 2000))
    if sys.platform != "win32" and ended.returncode == -signal.SIGXCPU:
        raise _limit_error(f"{limits.cpu_seconds:,} seconds of processor time", "--max-seconds")
    if ended.returncode != 0:
        with log.open("rb") as stderr:
            stderr.seek(max(0, log.stat().st_size - 200))
            last = escape(stderr.read().decode("utf-8", "replace").strip())
        raise BundleError(
            f"the process that reads it ended with status {ended.returncode} ({last or 'without a message'}); the machine "
            "may be short of memory, or the file changed meanwhile: try it again"
        )


def _limit_error(limit: str, option: str) -> BundleError:
    return BundleError(
        f"reading it takes more than {limit}, which no StyleGAN2-ADA checkpoint needs; do not use it, or if you trust it "
        f"and it is very large, import it by `dermis bundle import {option}` with a higher limit"
    )


def _check_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot be read: {_reason(error)}") from None
    if stat.S_ISDIR(mode):
        if (path / "bundle.json").is_file():
            raise BundleError("is a bundle already, not an official checkpoint (.pkl); use it as it is")
        pickles = sorted(entry.name for entry in path.glob("*.pkl"))
        inside = f", such as {escape(pickles[-1])}" if pickles else "; this one holds no .pkl"
        raise BundleError(f"is a folder; give the .pkl file of the checkpoint{inside}")
    if not stat.S_ISREG(mode):
        raise BundleError("is no ordinary file (a device, pipe or socket); give the .pkl file of the checkpoint")


def _reason(error: Exception) -> str:
    return escape(error.strerror if isinstance(error, OSError) and error.strerror else error)


# -- the child process


def main(arguments: dict[str, str | int]) -> None:
    """Read a checkpoint within limits. The folder then holds what `write_stored` writes, or why it cannot."""
    folder = Path(str(arguments["folder"]))
    _limit(int(arguments["cpu_seconds"]), int(arguments["memory_bytes"]))
    from dermis.official.stored import write_stored

    failure: dict[str, str]
    try:
        write_stored(Path(str(arguments["path"])), str(arguments["generator"]), folder)
        return
    except MemoryError:
        failure = {"kind": "memory"}
    except BundleError as error:
        failure = {"kind": "refused", "message": str(error)}
    except OSError as error:
        memory = error.errno == 12  # ENOMEM: the file could not be mapped
        failure = {"kind": "memory"} if memory else {"kind": "refused", "message": f"cannot be read: {_reason(error)}"}
    except (RecursionError, ValueError, OverflowError, TypeError, LookupError) as error:
        message = f"is damaged or tampered with ({type(error).__name__}); download it again"
        failure = {"kind": "refused", "message": message}
    (folder / FAILURE).write_text(json.dumps(failure))


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Set limits for this process, as far as the system has them; the parent keeps that of wall time everywhere."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {
        resource.RLIMIT_CPU: (cpu_seconds, cpu_seconds + 5),
        resource.RLIMIT_AS: (memory_bytes, memory_bytes),
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, pair in limits.items():
        try:
            _, most = resource.getrlimit(kind)
            if most != resource.RLIM_INFINITY:
                pair = (min(pair[0], most), min(pair[1], most))  # noqa: PLW2901
            resource.setrlimit(kind, pair)
        except (ValueError, OSError):  # macOS has no RLIMIT_AS
            continue
