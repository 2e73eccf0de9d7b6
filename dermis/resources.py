"""Recognise errors whose cause is the machine, whichever library raises them: too little memory, or a GPU that has failed."""

from __future__ import annotations

import errno
import re
import sys

from dermis.errors import DermisError

# Texts of torch ("CUDA error: out of memory", "can't allocate memory"), of CUDA's libraries, ONNX Runtime, FAISS and Python.
_TEXTS = re.compile(
    r"out of memory|not enough memory|(cannot|can't|failed to|unable to) allocate (\w+ )?memory|alloc_failed|bad_alloc|"
    r"bad allocation|can't start new thread",
    re.IGNORECASE,
)
# Texts of torch, ONNX Runtime and FAISS. Errors of cuDNN can be limits of one call; those that last are errors of CUDA next.
_DEVICE_TEXTS = re.compile(r"\b(CUDA|HIP) (error|failure)\b", re.IGNORECASE)


def lacks_resources(error: BaseException) -> bool:
    """Whether an error of another library says that there is too little memory, or that no thread can be started.

    The same call can succeed when other programs have ended. It is False for an error of dermis, whose text can quote a file.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    torch = sys.modules.get("torch")  # not imported here: without it nothing has raised its errors
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return not isinstance(error, DermisError) and _TEXTS.search(str(error)) is not None


def has_lost_device(error: BaseException) -> bool:
    """Whether an error of another library, or such a cause of an error of dermis, says that a GPU has failed.

    After most of these errors every later call of the process fails too, and only a new process can use the GPU again.
    """
    while isinstance(error, DermisError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DermisError) or lacks_resources(error):
        return False
    accelerator_error = getattr(sys.modules.get("torch"), "AcceleratorError", ())
    return isinstance(error, accelerator_error) or _DEVICE_TEXTS.search(str(error)) is not None
