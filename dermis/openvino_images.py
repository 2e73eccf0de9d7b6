"""Run a network of OpenVINO on images, as many groups at the same time as there are cores. Imports no torch.

A group has a fixed number of images, by default one, and is computed on one core. No sum is split over cores, so a result
depends neither on other images nor on the number of cores, and is the same in every run.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dermis.cpus import has_native_bfloat16

Precision = Literal["f32", "bf16"]

# Values of ONEDNN_MAX_CPU_ISA with bfloat16. OpenVINO does not heed the limit, and crashes in oneDNN.
_WITH_BFLOAT16 = ("DEFAULT", "ALL", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16")

_log = logging.getLogger(__name__)


def have_openvino() -> bool:
    """Whether OpenVINO is installed; it belongs to the extra `cpu`."""
    return find_spec("openvino") is not None


def fastest_precision() -> Precision:
    """Return bf16 if the processor multiplies bfloat16 natively, and the environment does not limit oneDNN's instructions."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "DEFAULT")).upper()
    return "bf16" if has_native_bfloat16() and limit in _WITH_BFLOAT16 else "f32"


class EachImage:
    """A compiled network. Safe to call from several threads.

    Args:
        model: A model of OpenVINO. Its first input is a group of images, uint8 [G, H, W, 3]; all sizes of its output are known.
        precision: Precision of the arithmetic.
        threads: Groups that are computed at the same time.
        output: Name or number of the output.

    Raises:
        RuntimeError: OpenVINO cannot compile the model, or a size of its output is not known.
    """

    def __init__(self, model: Any, *, precision: Precision, threads: int, output: str | int = 0) -> None:
        from dermis.synthesizer.openvino_cpu import import_openvino

        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,  # several processes would pin themselves to the same cores
        }
        self._compiled = import_openvino().Core().compile_model(model, "CPU", options)
        self._threads = threads
        self._output = self._compiled.output(output)
        if self._output.partial_shape.is_dynamic:
            raise RuntimeError("the number of features is not known")
        self._queues = threading.local()  # a queue serves one call at a time, so every thread has its own

    def __call__(
        self, images: NDArray[np.uint8], constants: Mapping[int, NDArray[np.float32]] | None = None
    ) -> NDArray[np.float32]:
        """Return the outputs float32 [N, dim] of images uint8 [N, H, W, 3].

        Args:
            images: N at least 1.
            constants: Other inputs by number, which are the same for all images.
        """
        import openvino

        queue = getattr(self._queues, "queue", None)
        if queue is None:
            self._queues.queue = queue = openvino.AsyncInferQueue(self._compiled, self._threads)
        group, *shape = self._output.shape
        results = np.empty((-(-len(images) // group) * group, *shape), np.float32)

        def keep(request: Any, start: int) -> None:
            results[start : start + group] = request.get_tensor(self._output).data

        queue.set_callback(keep)
        for start in range(0, len(images), group):
            rows = images[start : start + group]
            if len(rows) < group:
                rows = np.concatenate([rows, np.zeros((group - len(rows), *rows.shape[1:]), np.uint8)])
            queue.start_async({0: np.ascontiguousarray(rows), **(constants or {})}, start)
        queue.wait_all()
        return results[: len(images)]


def convert_and_compile(
    convert: Callable[[], Any], what: str, *, precision: Precision, threads: int, output: str | int = 0
) -> EachImage | None:
    """Convert a network and compile it as `EachImage` does; None, with a warning, if OpenVINO cannot.

    Args:
        convert: Returns the model of OpenVINO.
        what: What is then computed in another way, for the warning.
        precision: Precision of the arithmetic.
        threads: Groups that are computed at the same time.
        output: Name or number of the output.
    """
    try:
        return EachImage(convert(), precision=precision, threads=threads, output=output)
    except Exception as error:  # OpenVINO has many exceptions for operations that it does not know
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        _log.warning("OpenVINO cannot compile %s (%s), which takes longer without it", what, reason)
        return None
