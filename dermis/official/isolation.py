"""Read an untrusted checkpoint in a separate process, with limits of time and memory.

Nothing of the file is executed there either (`pickled.py`). The limits are for files that are made to need much time or
memory. The results are JSON and safetensors in a temporary folder.
"""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from dermis.errors import BundleError, escape
from dermis.limited import LimitError, ProcessLimits, run_limited
from dermis.official.stored import write_stored

# The largest official checkpoints (1024 px, 380 MB) need a small part of this. The file counts, because it is mapped.
DEFAULT_LIMITS = ProcessLimits(cpu_seconds=120, wall_seconds=600, memory_bytes=4 << 30)
_OPTIONS = {"time": "--max-seconds", "memory": "--max-memory-gib"}


def store_isolated(path: Path, generator: str, folder: Path, limits: ProcessLimits) -> None:
    """Run `stored.write_stored` in a separate process with limits.

    Raises:
        BundleError: As `write_stored` does, or a limit was reached. The message does not name the file.
    """
    _check_regular(path)
    try:
        problem = run_limited(
            f"{__name__}:problem_of", path, generator, str(folder), limits=limits, imports=["safetensors.numpy"]
        )
    except LimitError as error:
        if error.reason in _OPTIONS:
            raise BundleError(
                f"reading it needs more than {error.limit}; StyleGAN2-ADA checkpoints need less. Do not use the file. If you "
                f"trust it and it is very large, raise the limit: `dermis bundle import {_OPTIONS[error.reason]}`"
            ) from None
        raise BundleError(
            f"the process that reads it {error}; the machine may not have enough memory, or the file was changed during "
            "reading: try again"
        ) from None
    if problem:
        raise BundleError(escape(problem, 2000))


def problem_of(path: Path, generator: str, folder: str) -> str:
    """Write the content of a checkpoint into a folder. Returns why it failed, or "". It runs in the process with limits."""
    try:
        write_stored(path, generator, Path(folder))
    except BundleError as error:
        return str(error)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        return f"cannot be read: {_reason(error)}"
    except (RecursionError, ValueError, OverflowError, TypeError, LookupError) as error:
        return f"is damaged or tampered with ({type(error).__name__}); download it again"
    return ""


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
        raise BundleError("is not a regular file (a device, pipe or socket); give the .pkl file of the checkpoint")


def _reason(error: Exception) -> str:
    return escape(error.strerror if isinstance(error, OSError) and error.strerror else error)
