"""Score images with a classifier by ONNX Runtime. Imports no torch.

with Classifier("bundles/demo") as classifier:
    scores = classifier.classify(images)  # uint8 [H, W, 3] of any sizes
    scores.calibrated  # float64 [N], of classifier.description.positive_class
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from dermis.bundle import find_part
from dermis.bundle.classifier import CLASSIFIER_PART, MODEL, ClassifierDescription, open_classifier, read_model
from dermis.classifier.graph_check import check_graph
from dermis.classifier.graph_trial import CPU, first_line, import_onnxruntime, new_session, problem_of, try_graph
from dermis.classifier.preprocess import batch
from dermis.classifier.scores import Scores, scores_of
from dermis.cpus import available_cpus, without_torch
from dermis.errors import BundleError, DermisError
from dermis.imaging import Images
from dermis.resources import has_lost_device, lacks_resources

if TYPE_CHECKING:
    from dermis.bundle import Bundle

_CUDA = "CUDAExecutionProvider"
_CUDA_BATCH = 32


class Classifier:
    """Scores images. Safe to call from several threads.

    The result of an image does not depend on other images or on the number of threads. On a CPU each image is computed on
    one core; on CUDA images are computed in batches of a fixed size.

    Args:
        source: A bundle, or the folder or fsspec URL of a classifier or of a bundle.
        device: "auto" (CUDA if it works with ONNX Runtime, otherwise the CPU), "cpu", "cuda" or "cuda:1"; "mps" and "xpu" are
            the CPU here, too.
        threads: Images that are computed at the same time on a CPU; None for the number of cores that this process can
            use.

    Raises:
        BundleError: The source has no classifier, or a damaged one.
        DermisError: The device or ONNX Runtime is not available.
    """

    def __init__(self, source: Bundle | str | Path, *, device: str = "auto", threads: int | None = None) -> None:
        device = without_torch(device)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise DermisError(f'device: "{device}" is none of auto, cpu, cuda, cuda:1, ..., mps, xpu')
        if threads is not None and threads < 1:
            raise DermisError(f"threads: must be at least 1; got {threads}")
        self.description, location = find_classifier(source)
        model, where = read_model(location, self.description), f"{location}/{MODEL}"
        size, wide = self.description.input.size, self.description.feature_dim
        check_graph(model, where)
        for rows in (1, _CUDA_BATCH) if _has_cuda(device) else (1,):
            try_graph(model, where, size=size, feature_dim=wide, rows=rows)
        self._session = _session(model, device, where)
        if problem := problem_of(self._session, size, wide, 1):
            raise BundleError(f"{where}: {problem}")
        self._rows = _CUDA_BATCH if self.device == "cuda" else 1
        workers = 1 if self.device == "cuda" else threads or available_cpus()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="classifier")

    @property
    def device(self) -> str:
        """The device that is used: "cuda" or "cpu"."""
        return "cuda" if self._session.get_providers()[0] == _CUDA else "cpu"

    @property
    def identity(self) -> Mapping[str, str]:
        """Classifier, libraries and device: the last bits of scores depend on these, the images and the kind of machine."""
        import onnxruntime

        return {
            "classifier": self.description.digest,
            "classifier_device": self.device,
            "onnxruntime": onnxruntime.__version__,
        }

    def classify(self, images: Sequence[Images] | Images, *, features: bool = True) -> Scores:
        """Score images.

        Args:
            images: uint8 images [H, W, 3] of any sizes, or one array [N, H, W, 3].
            features: Whether features are returned as well.
        """
        logits, pooled = self._run(batch(images, self.description.input.size), features)
        return scores_of(logits, self.description.temperature, pooled)

    def logits(self, inputs: Images) -> NDArray[np.float32]:
        """Compute logits float32 [N] of uint8 images [N, S, S, 3] of the classifier's size."""
        return self._run(inputs, features=False)[0]

    def close(self) -> None:
        """Wait for the running calls and stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, inputs: Images, features: bool) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        size = self.description.input.size
        if inputs.dtype != np.uint8 or inputs.ndim != 4 or inputs.shape[1:] != (size, size, 3):
            raise ValueError(f"{inputs.dtype} {inputs.shape}; this classifier takes uint8 [N, {size}, {size}, 3]")
        names = ["logit", "features"] if features else ["logit"]

        def run(start: int) -> list[NDArray[np.float32]]:
            rows = inputs[start : start + self._rows]
            padding = self._rows - len(rows)
            if padding:
                rows = np.concatenate([rows, np.zeros((padding, size, size, 3), np.uint8)])
            outputs: list[NDArray[np.float32]] = self._session.run(names, {"images": np.ascontiguousarray(rows)})
            return [part[: len(part) - padding] for part in outputs]

        parts = list(self._pool.map(run, range(0, len(inputs), self._rows)))
        empty = [np.empty(0, np.float32), np.empty((0, self.description.feature_dim), np.float32)]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else empty
        return columns[0], columns[1] if features else None


def find_classifier(source: Bundle | str | Path) -> tuple[ClassifierDescription, str]:
    """Find and verify the classifier of a bundle, or a classifier outside of a bundle.

    Args:
        source: A bundle, or the folder or fsspec URL of a classifier or of a bundle.

    Returns:
        The description, and the folder of the classifier.

    Raises:
        BundleError: There is no classifier, or it is damaged.
    """
    where = find_part(
        source, CLASSIFIER_PART, "has no classifier; add one: dermis bundle attach-classifier BUNDLE FOLDER"
    )
    if not isinstance(source, str | Path) and source.classifier is not None:
        return source.classifier, where
    return open_classifier(where), where


def _has_cuda(device: str) -> bool:
    return device != "cpu" and _CUDA in import_onnxruntime().get_available_providers()


def _session(model: bytes, device: str, where: str) -> Any:
    # An exhaustive search chooses algorithms by time, and so not the same in every process.
    number = device.partition(":")[2] or "0"
    cuda = (_CUDA, {"device_id": number, "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"})
    providers: list[Any] = [CPU]
    if _has_cuda(device):
        providers = [cuda, CPU]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints missing libraries
            import_onnxruntime().preload_dlls()  # CUDA's libraries from pip, which torch has not loaded here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = new_session(model, providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        cause = error if lacks_resources(error) or has_lost_device(error) else None
        raise BundleError(f"{where}: ONNX Runtime cannot load it: {first_line(error)}") from cause
    # Without CUDA's libraries ONNX Runtime falls back to the CPU, although it was built with CUDA.
    if device.startswith("cuda") and session.get_providers()[0] != _CUDA:
        raise DermisError(f"device: {device} was requested, but ONNX Runtime finds no CUDA device; use cpu or auto")
    return session
