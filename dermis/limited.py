"""Run a function on data of strangers in a process of its own, with limits of time and memory.

The process starts isolated: variables such as PYTHONPATH and PYTHONHASHSEED have no effect, so that nobody can choose keys that
collide, and the folder that it happens to be started in is not on its import path.
"""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from dermis.errors import QUOTED_CHARACTERS, DermisError, escape

Reason = Literal["time", "memory", "crash"]

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from dermis.limited import _serve; _serve()"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # each thread reserves memory
_MAX_RESULT_BYTES = 1 << 20
_STDERR_BYTES = 200
_OUT_OF_MEMORY = 77  # exit status of the process


@dataclass(frozen=True)
class ProcessLimits:
    """What a function may take. Windows has none of these limits but that of wall time, macOS none of memory."""

    cpu_seconds: int
    """Processor time from the moment at which the function starts."""
    wall_seconds: int
    """Time from the start of the process; more than `cpu_seconds`, as the machine may be busy with other work."""
    memory_bytes: int
    """Address space beside what the process has when the function starts. A file counts as far as it is mapped."""


class LimitError(DermisError):
    """The function did not return.

    Attributes:
        reason: "time", "memory" or "crash".
        limit: The limit that was reached, such as "30 seconds of processor time"; empty for a crash.
    """

    def __init__(self, reason: Reason, message: str, limit: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.limit = limit


def run_limited(
    function: str, data: bytes | Path, *arguments: int | float | str, limits: ProcessLimits, imports: Sequence[str] = ()
) -> str:
    """Call a function in a separate process and return the text that it returns.

    Args:
        function: "module:name" of a function that takes the data and the arguments.
        data: What strangers wrote: bytes, or the file that the function opens itself.
        arguments: Anything else that it needs.
        limits: What it may take.
        imports: Modules to import before the limits apply, as large libraries take address space of their own.

    Raises:
        LimitError: It did not return.
    """
    path = str(data.absolute()) if isinstance(data, Path) else None
    command = [
        sys.executable,
        "-I",
        "-c",
        _START,
        json.dumps(_import_path()),
        json.dumps([function, limits.cpu_seconds, limits.memory_bytes, list(imports), path, *arguments]),
    ]
    try:
        # In files, as the memory of this process is not limited.
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            done = subprocess.run(
                command,
                input=b"" if isinstance(data, Path) else data,
                stdout=stdout,
                stderr=stderr,
                cwd=Path.cwd().anchor,
                env={**os.environ, **dict.fromkeys(_THREADS, "1")},
                timeout=limits.wall_seconds,
                check=False,
            )
            return _result(done.returncode, stdout, stderr, limits)
    except subprocess.TimeoutExpired:
        limit = f"{limits.wall_seconds:,} seconds"
        raise LimitError("time", f"took longer than {limit}", limit) from None
    except OSError as error:
        reason = escape(error.strerror or error)
        raise LimitError("crash", f"needs a process and temporary files of its own, which failed: {reason}") from None


def _import_path() -> list[str]:
    """The import path of this process, without "", which stands for the working folder."""
    entries = [entry for entry in sys.path if Path(entry).is_absolute()]
    root = str(Path(__file__).resolve().parents[1])
    return entries if root in entries else [root, *entries]


def _result(status: int, stdout: BinaryIO, stderr: BinaryIO, limits: ProcessLimits) -> str:
    """What the function returned. LimitError if the process ended otherwise."""
    if status == _OUT_OF_MEMORY:
        limit = f"{limits.memory_bytes / (1 << 30):,.3g} GiB of memory"
        raise LimitError("memory", f"needs more than {limit}", limit)
    if -status == getattr(signal, "SIGXCPU", None):
        limit = f"{limits.cpu_seconds:,} seconds of processor time"
        raise LimitError("time", f"took longer than {limit}", limit)
    if status != 0:
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _STDERR_BYTES))
        text = stderr.read(_STDERR_BYTES).decode("utf-8", "replace").strip()
        last = escape(text, 10 * _STDERR_BYTES)[-QUOTED_CHARACTERS:]  # the end says most
        raise LimitError("crash", f"ended with status {status} ({last or 'without a message'})")
    stdout.seek(0)
    result = stdout.read(_MAX_RESULT_BYTES + 1)
    if len(result) > _MAX_RESULT_BYTES:
        raise LimitError("crash", f"returned more than {_MAX_RESULT_BYTES:,} bytes of text")
    return result.decode("utf-8", "replace")


# -- the process


def _serve() -> None:
    """Call the function that the command line names; what it returns goes to standard output."""
    function, cpu_seconds, memory_bytes, imports, path, *arguments = json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")  # libraries may print to standard output
    os.dup2(2, 1)
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    for each in imports:
        importlib.import_module(each)
    data = Path(path) if path is not None else sys.stdin.buffer.read()
    _limit(cpu_seconds, memory_bytes)
    try:
        answers.write(call(data, *arguments).encode("utf-8", "replace"))
        answers.flush()
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except OSError as error:
        if error.errno == errno.ENOMEM:  # a file could not be mapped
            os._exit(_OUT_OF_MEMORY)
        raise
    os._exit(0)  # what native libraries do as they are unloaded is of no interest


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Set limits for this process, as far as the system has them and no stricter one is set already."""
    try:
        import resource
    except ImportError:  # Windows
        return
    seconds = math.ceil(time.process_time()) + cpu_seconds
    # SIGXCPU at the first number says what happened; the second one ends a process that goes on all the same.
    limits = {resource.RLIMIT_CORE: (0, 0), resource.RLIMIT_CPU: (seconds, seconds + 5)}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # macOS, which has no RLIMIT_AS either
        pass
    else:
        allowed = pages * resource.getpagesize() + memory_bytes
        limits[resource.RLIMIT_AS] = (allowed, allowed)
    for kind, (soft, hard) in limits.items():
        try:
            most = resource.getrlimit(kind)[1]
            if most != resource.RLIM_INFINITY:
                soft, hard = min(soft, most), min(hard, most)  # noqa: PLW2901
            resource.setrlimit(kind, (soft, hard))
        except (ValueError, OSError):
            continue
