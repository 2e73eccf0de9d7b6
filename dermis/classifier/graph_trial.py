"""Sessions of ONNX Runtime, and the trial of a graph in a separate process with limits of time and memory.

A graph needs as much everywhere as in the trial, because `dermis.classifier.graph_check` has checked that its cost does not
depend on the pixels.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from dermis.errors import BundleError, DermisError, escape, install_command
from dermis.limited import LimitError, ProcessLimits, run_limited

CPU = "CPUExecutionProvider"

_SECONDS, _SECONDS_OF_IMAGE = 30, 2  # computing time on one core
_WALL_FACTOR = 4  # wall time for each second of computing time, as the machine can be busy with other work
_MEMORY_BYTES = 1 << 30
_MEMORY_OF_MODEL = 6  # times its bytes: weights of 8 bits are converted to float32, and exist twice during that
_MEMORY_OF_PIXEL = 1024  # bytes of intermediate results, 256 float maps as large as the image

_passed: set[tuple[str, int, int, int]] = set()
"""Graphs that passed the trial in this process, by SHA-256. One that failed is tried again: the machine may have been busy."""


def import_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        DermisError: It is not installed. The message says how to get it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DermisError(f"the classifier needs ONNX Runtime ({error}); {install_command('cpu')}") from error
    return onnxruntime


def new_session(model: bytes, providers: list[Any]) -> Any:
    """Make a session whose results do not depend on the number of cores. Exceptions are those of ONNX Runtime."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    # One core for each image: no sum is split over cores, and images do not wait for each other.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # errors are raised as exceptions
    # Otherwise ONNX Runtime would detect its own format, which `graph_check` does not read, by its first bytes.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return ort.InferenceSession(model, options, providers=providers)


def problem_of(session: Any, size: int, feature_dim: int, rows: int) -> str:
    """Run a session on black images and return in what it differs from the interface of `classifier.onnx`, or ""."""
    inputs = {value.name: (value.type, value.shape[1:]) for value in session.get_inputs()}
    if inputs != {"images": ("tensor(uint8)", [size, size, 3])}:
        return f"must have the one input images, uint8 [N, {size}, {size}, 3]"
    try:
        results = session.run(["logit", "features"], {"images": np.zeros((rows, size, size, 3), np.uint8)})
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        return f"does not run: {first_line(error)}"
    shapes = [value.shape for value in results]
    if shapes != [(rows,), (rows, feature_dim)]:
        return f"must have the outputs logit [N] and features [N, {feature_dim}]; they are {shapes}"
    return ""


def try_graph(model: bytes, where: str, *, size: int, feature_dim: int, rows: int) -> None:
    """Try a checked graph with `rows` images in a process with limits.

    Raises:
        BundleError: The graph has another interface or exceeds a limit. The message begins with `where`.
    """
    key = (hashlib.sha256(model).hexdigest(), size, feature_dim, rows)
    if key in _passed:
        return
    memory = _MEMORY_BYTES + _MEMORY_OF_MODEL * len(model) + rows * size**2 * _MEMORY_OF_PIXEL
    seconds = _SECONDS + _SECONDS_OF_IMAGE * rows
    limits = ProcessLimits(seconds, seconds * _WALL_FACTOR, memory)
    trial = f"{__name__}:run_once"
    cause = None
    try:
        problem = run_limited(trial, model, size, feature_dim, rows, limits=limits, imports=["onnxruntime"])
    except LimitError as error:
        problem = f"is not used: loading it and scoring {rows} image(s) {error}"
        cause = error
    if problem:
        raise BundleError(f"{where}: {problem}") from cause
    _passed.add(key)


def run_once(model: bytes, size: int, feature_dim: int, rows: int) -> str:
    """Return what is wrong with a graph, or "". It runs in the process with limits."""
    try:
        session = new_session(model, [CPU])
    except Exception as error:  # as in problem_of
        return f"ONNX Runtime cannot load it: {first_line(error)}"
    return problem_of(session, size, feature_dim, rows)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, escaped for messages."""
    if "Failed to allocate memory" in str(error):  # at the end of a long path of ONNX Runtime's source
        return "it needs more memory than allowed"
    return escape((str(error).splitlines() or [type(error).__name__])[0])
