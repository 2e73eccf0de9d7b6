"""Run a function on untrusted bytes in a separate process, with limits of time and memory."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from dermis.errors import DermisError

Reason = Literal["time", "memory", "crash"]

# The child has the parent's import path and nothing else: never the folder that it happens to be started in.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from dermis.limited import _serve; _serve()"
_WALL_FACTOR = 4  # of the seconds of computing: the machine may be busy with other work


class LimitError(DermisError):
    """The function did not return. `reason`: "time", "memory" or "crash"."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def run_limited(
    function: str, data: bytes, *arguments: int | float | str, seconds: int, memory: int, imports: Sequence[str] = ()
) -> str:
    """Call a function in a separate process and return the text that it returns.

    Args:
        function: "module:name" of a function that takes the data and the arguments.
        data: The untrusted bytes.
        arguments: Anything else that it needs.
        seconds: How long it may compute; four times as long may pass on a busy machine.
        memory: Bytes that it may use beside what the process has at its start. Windows and macOS have no such limit.
        imports: Modules to import before the limits apply, as large libraries take address space of their own.

    Raises:
        LimitError: It did not return.
    """
    command = [
        sys.executable,
        "-I",  # adds no folder to the import path, and hashes texts by a secret of its own
        "-c",
        _START,
        json.dumps([str(Path(entry).absolute()) for entry in sys.path]),
        json.dumps([function, seconds, memory, list(imports), *arguments]),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, timeout=seconds * _WALL_FACTOR, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise LimitError("time", f"took longer than {seconds * _WALL_FACTOR} s") from None
    if done.returncode == 0:
        return done.stdout.decode("utf-8", "replace")
    if done.returncode == _MEMORY:
        raise LimitError("memory", f"needs more than {memory >> 20:,} MiB of memory")
    if -done.returncode in (getattr(signal, "SIGXCPU", 0), getattr(signal, "SIGKILL", 0)):
        raise LimitError("time", f"took longer than {seconds} s, or was ended by the system for its memory")
    raise LimitError("crash", f"ended with status {done.returncode}")


_MEMORY = 77


def _serve() -> None:
    """The child: read data from standard input, write what the function returns to standard output."""
    function, seconds, memory, imports, *arguments = json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")  # libraries may print to standard output
    os.dup2(2, 1)
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    for each in imports:
        importlib.import_module(each)
    data = sys.stdin.buffer.read()
    _limit(seconds, memory)
    try:
        answers.write(call(data, *arguments).encode("utf-8", "replace"))
        answers.flush()
    except MemoryError:
        os._exit(_MEMORY)
    os._exit(0)  # skips what native libraries do when they are unloaded


def _limit(seconds: int, memory: int) -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        allowed = pages * resource.getpagesize() + memory
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard == resource.RLIM_INFINITY or allowed < hard:
            resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
