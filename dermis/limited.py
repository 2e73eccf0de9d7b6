"""Run a function on untrusted data in a separate process with limits of time and memory.

The process is isolated: variables such as PYTHONPATH and PYTHONHASHSEED have no effect, so that nobody can choose keys that
collide, and the working folder is not on its import path.
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
    """Limits of a function. Windows supports only the limit of wall time; macOS does not support that of memory."""

    cpu_seconds: int
    """Processor time from the start of the function."""
    wall_seconds: int
    """Time from the start of the process; more than `cpu_seconds`, because the machine can be busy with other work."""
    memory_bytes: int
    """Address space in addition to that of the process when the function starts. Mapped parts of a file count."""


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
        data: The untrusted data: bytes, or a file that the function opens.
        arguments: Further arguments.
        limits: Limits of time and memory.
        imports: Modules to import before the limits apply, because large libraries need address space.

    Raises:
        LimitError: The function did not return.
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
        # Written to files, because the memory of this process is not limited.
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
        raise LimitError(
            "crash", f"needs a separate process and temporary files, which could not be created: {reason}"
        ) from error


def _import_path() -> list[str]:
    """Return the import path of this process without "", the working folder."""
    entries = [entry for entry in sys.path if Path(entry).is_absolute()]
    root = str(Path(__file__).resolve().parents[1])
    return entries if root in entries else [root, *entries]


def _result(status: int, stdout: BinaryIO, stderr: BinaryIO, limits: ProcessLimits) -> str:
    """Return the result of the function, or raise LimitError if the process ended in another way."""
    if status == _OUT_OF_MEMORY:
        limit = f"{limits.memory_bytes / (1 << 30):,.3g} GiB of memory"
        raise LimitError("memory", f"needs more than {limit}", limit)
    if -status == getattr(signal, "SIGXCPU", None):
        limit = f"{limits.cpu_seconds:,} seconds of processor time"
        raise LimitError("time", f"took longer than {limit}", limit)
    if status != 0:
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _STDERR_BYTES))
        text = stderr.read(_STDERR_BYTES).decode("utf-8", "replace").strip()
        last = escape(text, 10 * _STDERR_BYTES)[-QUOTED_CHARACTERS:]  # the end is most informative
        raise LimitError("crash", f"ended with status {status} ({last or 'without a message'})")
    stdout.seek(0)
    result = stdout.read(_MAX_RESULT_BYTES + 1)
    if len(result) > _MAX_RESULT_BYTES:
        raise LimitError("crash", f"returned more than {_MAX_RESULT_BYTES:,} bytes of text")
    return result.decode("utf-8", "replace")


# -- the process


def _serve() -> None:
    """Call the function that the command line names, and write its result to standard output."""
    function, cpu_seconds, memory_bytes, imports, path, *arguments = json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")  # libraries can print to standard output
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
    os._exit(0)  # errors of native libraries when they are unloaded do not matter


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Set limits for this process, if the system has them and no stricter limit is set."""
    try:
        import resource
    except ImportError:  # Windows
        return
    seconds = math.ceil(time.process_time()) + cpu_seconds
    # SIGXCPU at the first number reports the cause; the second one ends a process that continues nevertheless.
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
