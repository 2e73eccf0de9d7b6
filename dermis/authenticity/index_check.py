"""Check in a separate process that index.faiss fits its description, before this process reads it.

FAISS trusts most numbers in a file: a wrong one can reserve any amount of memory, or let a search read beyond the end of an
array, and some kinds of index name another file that is then opened. So a separate process with limits of time and memory
reads and searches the file first, and every number on which a search depends is checked.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dermis.errors import BundleError, escape
from dermis.limited import LimitError, ProcessLimits, run_limited

if TYPE_CHECKING:
    from dermis.bundle.index import IndexDescription

_CPU_SECONDS, _WALL_SECONDS = 120, 480
_MEMORY_BYTES = 1 << 30
_COPIES = 3  # copies of the file that are in memory at the same time
_VECTOR_BYTES = 4096  # for each vector besides its components: links of HNSW, identifiers
_FIXED_BYTES = 64 << 20
_MAX_EFFORT = 1 << 16  # lists or nodes that one search visits
_OTHER_KIND = "is not of the kind {kind} as dermis builds it"

_passed: set[tuple[str, str]] = set()
"""Indexes in memory that passed in this process, by SHA-256 and what was expected: each opening would check them again."""


def max_bytes(description: IndexDescription) -> int:
    """Return an upper bound for the size of index.faiss in bytes."""
    numbers = description.vectors * description.dim * 2 + description.feature_dim * (description.dim + 2)
    return 4 * numbers + description.vectors * _VECTOR_BYTES + _FIXED_BYTES


def check_index(data: bytes | Path, description: IndexDescription, where: str) -> None:
    """Check an index in memory or in a file.

    Raises:
        BundleError: It does not fit the description. The message begins with `where`.
    """
    expected = {"kind": description.kind, "vectors": description.vectors}
    expected |= {"dim": description.dim, "feature_dim": description.feature_dim}
    key = None if isinstance(data, Path) else (hashlib.sha256(data).hexdigest(), json.dumps(expected))
    if key in _passed:
        return
    memory = _MEMORY_BYTES + _COPIES * description.files["index.faiss"].bytes
    limits = ProcessLimits(_CPU_SECONDS, _WALL_SECONDS, memory)
    cause = None
    try:
        problem = run_limited(f"{__name__}:problem_of", data, json.dumps(expected), limits=limits, imports=["faiss"])
    except LimitError as error:
        problem = f"is not used: to read and search it {error}"
        cause = error
    if problem:
        raise BundleError(f"{where}: {problem}; build the index again") from cause
    if key is not None:
        _passed.add(key)


def problem_of(data: bytes | Path, expected_json: str) -> str:
    """Return what is wrong with an index, or "". It runs in the process with limits."""
    expected = json.loads(expected_json)
    try:
        index = read(data)
        problem = _structure(index, expected).replace("{kind}", expected["kind"])
        if not problem:
            index.search(np.zeros((1, expected["feature_dim"]), np.float32), 1)
    except RuntimeError as error:
        return f"is not a FAISS index ({reason_of(error)})"
    return problem


def read(data: bytes | Path) -> Any:
    """Read an index from memory, or map one of a file. Raises RuntimeError if it is not an index."""
    import faiss

    if isinstance(data, Path):
        return faiss.read_index(str(data), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
    return faiss.deserialize_index(np.frombuffer(data, np.uint8))


def reason_of(error: RuntimeError) -> str:
    """Return the message of an error of FAISS without the location in its source."""
    return escape(str(error).rpartition("Error: ")[2].strip())


def _structure(index: Any, expected: dict[str, Any]) -> str:
    import faiss

    dim, vectors = expected["dim"], expected["vectors"]
    base = index
    if isinstance(index, faiss.IndexPreTransform):
        problem = _transforms(index, expected["feature_dim"], dim)
        if problem:
            return problem
        base = faiss.downcast_index(index.index)
    sizes = (index.d, index.ntotal, base.d, base.ntotal)
    if sizes != (expected["feature_dim"], vectors, dim, vectors):
        return "holds other vectors than its description says"
    if not (index.is_trained and base.is_trained) or {index.metric_type, base.metric_type} != {faiss.METRIC_L2}:
        return "does not measure Euclidean distances"
    if expected["kind"] == "flat":
        return _codes(base, vectors)
    if expected["kind"] == "hnsw" and type(base) in (faiss.IndexHNSWFlat, faiss.IndexHNSWSQ):
        storage = faiss.downcast_index(base.storage)
        if (storage.d, storage.ntotal) != (dim, vectors):
            return "holds other vectors than its description says"
        return _codes(storage, vectors) or _graph(base.hnsw, vectors)
    if expected["kind"] == "ivf" and type(base) in (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer):
        return _lists(base, dim, vectors)
    return _OTHER_KIND


def _transforms(index: Any, feature_dim: int, dim: int) -> str:
    import faiss

    width = feature_dim
    for place in range(index.chain.size()):
        linear = faiss.downcast_VectorTransform(index.chain.at(place))
        if not isinstance(linear, faiss.LinearTransform) or linear.d_in != width:
            return _OTHER_KIND
        shift = linear.b.size()
        if linear.A.size() != linear.d_in * linear.d_out or shift != (linear.d_out if linear.have_bias else shift):
            return "has a projection whose numbers do not fit its dimensions"
        width = linear.d_out
    return "" if width == dim else "has a projection to another dimension than its description says"


def _codes(base: Any, vectors: int) -> str:
    """Return what is wrong with an index that stores its vectors in one array, or ""."""
    import faiss

    if type(base) in (faiss.IndexFlat, faiss.IndexFlatL2):
        expected = 4 * base.d
    elif type(base) is faiss.IndexScalarQuantizer:
        expected = base.d
        if not _quantizer_fits(base.sq, base.d):
            return "has a quantizer whose numbers do not fit its dimensions"
    else:
        return _OTHER_KIND
    if base.code_size != expected or base.codes.size() != vectors * expected:
        return "stores other vectors than its description says"
    return ""


def _quantizer_fits(quantizer: Any, dim: int) -> bool:
    import faiss

    eight_bit = quantizer.qtype == faiss.ScalarQuantizer.QT_8bit
    return bool(eight_bit and (quantizer.d, quantizer.code_size, quantizer.trained.size()) == (dim, dim, 2 * dim))


def _graph(graph: Any, vectors: int) -> str:
    """Return what is wrong with an HNSW graph, or "". Links must lead to vectors, and each vector has links of its level."""
    import faiss

    levels = faiss.vector_to_array(graph.levels)
    offsets = faiss.vector_to_array(graph.offsets).astype(np.int64)
    sums = faiss.vector_to_array(graph.cum_nneighbor_per_level).astype(np.int64)
    neighbours = faiss.vector_to_array(graph.neighbors)
    top = graph.max_level
    right = (
        len(levels) == vectors
        and len(offsets) == vectors + 1
        and 0 <= top < len(sums) - 1
        and sums[0] == 0
        and (np.diff(sums) > 0).all()
        and levels.min() >= 1
        and levels.max() == top + 1
        and offsets[0] == 0
        and (np.diff(offsets) == sums[levels]).all()
        and offsets[-1] == len(neighbours)
        and (neighbours >= -1).all()
        and (neighbours < vectors).all()
        and 0 <= graph.entry_point < vectors
        and levels[graph.entry_point] == top + 1
        and 1 <= graph.efSearch <= _MAX_EFFORT
    )
    if not right:
        return "has links to vectors that do not exist"
    # Links of an upper level must lead to vectors that have that level.
    for level in range(1, top + 1):
        rows = np.flatnonzero(levels > level)
        for begin, end in zip(offsets[rows] + sums[level], offsets[rows] + sums[level + 1], strict=True):
            linked = neighbours[begin:end]
            if (levels[linked[linked >= 0]] <= level).any():
                return "has links to vectors that do not exist"
    return ""


def _lists(base: Any, dim: int, vectors: int) -> str:
    """Return what is wrong with the lists of IVF, or "". They must have every vector once, and know the list of each."""
    import faiss

    coarse, lists = faiss.downcast_index(base.quantizer), faiss.downcast_InvertedLists(base.invlists)
    scalar = type(base) is faiss.IndexIVFScalarQuantizer
    code = dim if scalar else 4 * dim
    if type(lists) is not faiss.ArrayInvertedLists or (scalar and not _quantizer_fits(base.sq, dim)):
        return _OTHER_KIND
    if (coarse.d, coarse.ntotal, lists.nlist, base.code_size, lists.code_size) != (
        dim,
        base.nlist,
        base.nlist,
        code,
        code,
    ):
        return "has lists of another number or size than it says"
    if problem := _codes(coarse, base.nlist):
        return problem
    if not 1 <= base.nprobe <= min(base.nlist, _MAX_EFFORT):
        return "has an nprobe that is not from 1 to the number of its lists, or that is too large"
    numbers = [np.empty(0, np.int64)]
    places = np.full(vectors, -1, np.int64)
    for number in range(base.nlist):
        size = lists.list_size(number)
        ids = faiss.rev_swig_ptr(lists.get_ids(number), size).copy() if size else np.empty(0, np.int64)
        if size and not (ids.min() >= 0 and ids.max() < vectors):
            return "refers to vectors that do not exist"
        places[ids] = (number << 32) | np.arange(size)
        numbers.append(ids)
    if len(np.unique(np.concatenate(numbers))) != vectors or sum(map(len, numbers)) != vectors:
        return "does not hold every vector once"
    kept = faiss.vector_to_array(base.direct_map.array) if base.direct_map.type == base.direct_map.Array else None
    if kept is None or not np.array_equal(kept, places):
        return "has a direct map that does not match its lists"
    return ""
