"""Search for nearest training images with FAISS.

Embeddings are scaled to length 1 (cosine), projected on their principal components, and stored with 8 bits for each number.
The index transforms queries in the same way. All distances and radii are in the stored space, so they can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index_check import check_index, max_bytes, read, reason_of
from dermis.bundle import find_part
from dermis.bundle.index import HELD_OUT, INDEX, INDEX_PART, RADII, IndexDescription, open_index_folder
from dermis.cpus import available_cpus, without_torch
from dermis.errors import BundleError, DermisError, install_command
from dermis.resources import lacks_resources
from dermis.tensor_files import MAX_HEADER_BYTES, read_array

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.bundle.folder import Folder

Floats = NDArray[np.float32]

_NEVER, _BUILDING = 1 << 30, 20  # number of queries from which FAISS multiplies matrices; 20 is its default
_MAPPED_BYTES = 512 << 20  # a larger index in a local folder stays on disk


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each of N queries. Only distances may leave the process."""

    distances: Floats
    """[N]: Euclidean distances in the space of the index."""
    radii: Floats
    """[N]: radius of that training image, which is its distance to the nearest other training image."""
    embeddings: Floats
    """[N, dim]: the queries in the space of the index, not rounded."""
    neighbours: NDArray[np.int64] | None = None
    """[N]: its number in the index; None if another process has searched."""
    copy_scores: Floats | None = None
    """[N]: scores of the copy detector (`dermis.authenticity.copy_detector`); None if there is none."""


class Index:
    """Embeddings of a training set. Safe to search from several threads. `open_index` makes one."""

    def __init__(
        self, description: IndexDescription, index: Any, radii: Floats, held_out: Floats | None, threads: int
    ) -> None:
        self.description = description
        self.radii = radii
        """float32 [vectors], in the order of the index."""
        self.held_out = held_out
        """float32 [held_out, dim] in the space of the index, or None."""
        self._index = index
        self._transforms = _transforms(index)
        self._threads = threads
        # Several threads can search with FAISS on a CPU, but not with the buffers of one GPU.
        self._turn: AbstractContextManager[object] = Lock() if _is_on_gpu(index) else nullcontext()

    def nearest(self, features: Floats) -> Nearest:
        """Find the nearest training image of each row of features [N, feature_dim].

        Raises:
            ValueError: The features have another shape.
        """
        rows = prepared(features, self.description.metric)
        if rows.ndim != 2 or rows.shape[1] != self.description.feature_dim:
            raise ValueError(f"features {rows.shape}; this index takes [N, {self.description.feature_dim}]")
        return self.nearest_of_projected(self.projected(features))

    def nearest_of_projected(self, projected: Floats) -> Nearest:
        """Find the nearest training image of each row [N, dim] in the space of the index."""
        if not len(projected):
            return Nearest(np.empty(0, np.float32), np.empty(0, np.float32), projected, np.empty(0, np.int64))
        index = self._index.index if isinstance(self._index, import_faiss().IndexPreTransform) else self._index
        with self._turn:
            squared, neighbours = search(index, projected, 1, self._threads)
        numbers = neighbours[:, 0]
        return Nearest(np.sqrt(np.maximum(squared[:, 0], 0)), self.radii[numbers], projected, numbers)

    def stored(self, numbers: NDArray[np.int64]) -> Floats:
        """Return the stored embeddings, float32 [N, dim], of training images by their numbers [N]."""
        base = base_of(self._index)
        if _is_on_gpu(self._index):  # which returns no stored vectors of lists
            base = import_faiss().index_gpu_to_cpu(base)
            base.make_direct_map()
        rows = np.empty((len(numbers), self.description.dim), np.float32)
        for row, number in zip(rows, numbers, strict=True):
            base.reconstruct(int(number), row)
        return rows

    def projected(self, features: Floats) -> Floats:
        """Transform features [N, feature_dim] into the space of the index, [N, dim], not rounded."""
        rows = prepared(features, self.description.metric)
        if not len(rows):
            return np.empty((0, self.description.dim), np.float32)
        for matrix, shift in self._transforms:
            # einsum sums each row by itself; the rounding of a matrix product depends on the other rows.
            rows = np.einsum("nd,kd->nk", rows, matrix) + shift
        return rows


def prepared(features: Floats, metric: str) -> Floats:
    """Prepare features for the index: scale them to length 1 if the metric is cosine."""
    rows = np.ascontiguousarray(features, dtype=np.float32)
    if metric == "cosine":
        rows = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), np.float32(1e-12))
    return np.ascontiguousarray(rows, dtype=np.float32)


def search(index: Any, rows: Floats, k: int, threads: int) -> tuple[Floats, NDArray[np.int64]]:
    """Return squared distances and numbers, [N, k] each, of the k nearest vectors."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(threads)
    squared, numbers = index.search(rows, k)
    return squared, numbers


def _transforms(index: Any) -> list[tuple[Floats, Floats]]:
    """Return the linear maps of an index: matrix [out, in] and shift [out] (or [1]) of each."""
    faiss = import_faiss()
    transforms = []
    for k in range(index.chain.size()) if isinstance(index, faiss.IndexPreTransform) else ():
        linear = faiss.downcast_VectorTransform(index.chain.at(k))
        matrix = faiss.vector_to_array(linear.A).reshape(linear.d_out, linear.d_in)
        shift = faiss.vector_to_array(linear.b) if linear.have_bias else np.zeros(1, np.float32)
        transforms.append((np.ascontiguousarray(matrix, np.float32), np.asarray(shift, np.float32)))
    return transforms


def base_of(index: Any) -> Any:
    """Return the index that stores the vectors, without the transformation of queries."""
    faiss = import_faiss()
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _is_on_gpu(index: Any) -> bool:
    kind = getattr(import_faiss(), "GpuIndex", None)  # only faiss-gpu has it
    return kind is not None and isinstance(base_of(index), kind)


def import_faiss() -> Any:
    """Import FAISS, with the settings on which results depend.

    Raises:
        DermisError: FAISS is not installed. The message says how to get it.
    """
    try:
        import faiss
    except ImportError as error:
        raise DermisError(f"authenticity needs FAISS ({error}); {install_command('cpu')}") from error
    # From this number of queries on, FAISS multiplies matrices, whose rounding depends on the other queries.
    if faiss.cvar.distance_compute_blas_threshold != _BUILDING:
        faiss.cvar.distance_compute_blas_threshold = _NEVER
    return faiss


@contextmanager
def products_of_matrices() -> Iterator[None]:
    """Let FAISS compute distances by matrix products inside the block: several times as fast, for building an index."""
    faiss = import_faiss()
    faiss.cvar.distance_compute_blas_threshold = _BUILDING
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = _NEVER


def find_index(source: Bundle | str | Path) -> str:
    """Return the folder of the index of a bundle, or of an index outside of a bundle.

    Raises:
        BundleError: The bundle has no index.
    """
    return find_part(source, INDEX_PART, "has no index of its training images; make one: dermis index build")


def open_index(source: Bundle | str | Path, *, device: str = "auto", threads: int | None = None) -> Index:
    """Open an index and verify every file of it.

    An index of more than half a gigabyte in a local folder stays on disk and is mapped into memory.

    Args:
        source: A bundle, or the folder or fsspec URL of a bundle or of an index.
        device: "auto" uses a GPU if FAISS has one; "cpu" uses none.
        threads: CPU cores to use; None for all that this process can use.

    Raises:
        BundleError: There is no index, or a file differs from the description.
        DermisError: FAISS is not installed, or the device does not exist.
    """
    import_faiss()
    folder, description, _ = open_index_folder(find_index(source))
    known = None if isinstance(source, str | Path) else source.authenticity
    if known is not None and known.digest != description.digest:
        raise BundleError(f"{folder.where}: was changed since the bundle was opened; try again")
    record = description.files[INDEX]
    where = f"{folder.where}/{INDEX}"
    if record.bytes > max_bytes(description):
        raise BundleError(f"{where}: is larger than an index of its description can be; build the index again")
    mapped = record.bytes > _MAPPED_BYTES and folder.local
    data = (Path(folder.root) / INDEX).resolve() if mapped else folder.read(INDEX, record)
    state = None
    if isinstance(data, Path):
        state = _state(data)
        folder.verify(INDEX, record)
    check_index(data, description, where)
    try:
        index = read(data)
    except RuntimeError as error:
        cause = error if lacks_resources(error) else None
        raise BundleError(f"{where}: is not a FAISS index ({reason_of(error)})") from cause
    if isinstance(data, Path) and (state is None or _state(data) != state):
        raise BundleError(f"{where}: was changed while it was read; try again")
    radii = _array(folder, description, RADII, (description.vectors,))
    held_out = (
        _array(folder, description, HELD_OUT, (description.held_out, description.dim)) if description.held_out else None
    )
    return Index(description, on_device(index, device), radii, held_out, threads or available_cpus())


def _state(path: Path) -> tuple[int, ...] | None:
    """Return values that change if a file is replaced or written to; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _array(folder: Folder, description: IndexDescription, name: str, shape: tuple[int, ...]) -> Floats:
    where = f"{folder.where}/{name}"
    limit = 4 * math.prod(shape) + MAX_HEADER_BYTES
    numbers = np.asarray(read_array(folder.read(name, description.files[name], limit=limit), where, shape), np.float32)
    if not np.isfinite(numbers).all():
        raise BundleError(f"{where}: must be finite numbers; build the index again")
    return numbers


def on_device(index: Any, device: str) -> Any:
    """Move an index to a GPU if `device` allows it and FAISS has one.

    FAISS uses no Apple or Intel GPU. Only IVF indexes are moved: vectors of a scalar quantizer cannot be read back from a GPU.
    """
    device = without_torch(device)
    faiss = import_faiss()
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if device.startswith("cuda") and not gpus:
        raise DermisError(f"device: {device} was requested, but FAISS finds no GPU; use cpu or auto")
    if device == "cpu" or not gpus or not isinstance(base_of(index), faiss.IndexIVF):
        return index
    number = int(device.partition(":")[2] or 0)
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, index)
