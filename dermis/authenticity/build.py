"""Building an index from embeddings of a training set."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.baseline import Copies, baseline
from dermis.authenticity.index import Floats, Index, base_of, import_faiss, prepared, products_of_matrices
from dermis.bundle.index import (
    HELD_OUT,
    INDEX,
    PERCENTILES,
    RADII,
    IndexDescription,
    Kind,
    Metric,
    write_index_folder,
)
from dermis.cpus import available_cpus
from dermis.errors import RequestError

Storage = Literal["8bit", "float"]
EXACT = 200_000  # vectors up to which every one is looked at
GRAPH = 2_000_000  # up to which a graph of neighbours is quickest; beyond it, lists need far less memory
FEWEST_APPROXIMATE = 25_000  # below, lists (IVF) have too few vectors to be trained on, and an exact search is as fast
DIM = 128
_TRAINING = 200_000
_IMAGES_PER_DIM = 20


def build_index(
    features: Floats,
    *,
    extractor: str,
    extractor_identity: str,
    resolution: int,
    held_out: Floats | None = None,
    groups: Sequence[str] | None = None,
    copies: Copies | None = None,
    metric: Metric = "cosine",
    kind: Kind | Literal["auto"] = "auto",
    dim: int | None = DIM,
    storage: Storage = "8bit",
    provenance: Mapping[str, Any] | None = None,
    threads: int | None = None,
) -> tuple[IndexDescription, dict[str, bytes]]:
    """The description and the files (for `write_index_folder`) of an index of features [N, feature_dim].

    held_out: features of real images that the generator never saw, for attacks. groups: the lesion or patient of each
    image: an image's radius is then its distance to the nearest image of another group, so that pictures of one lesion do not
    make it tiny. copies: measurements on the pixels; near-duplicates, which never count as neighbours, are found by
    distance alone without it. dim: principal components to keep; None keeps all dimensions, as do fewer than 20 images for
    each. storage:
    8 bits a number, or float32. kind: "auto" looks at every vector up to 200,000, then walks a graph (HNSW), and searches
    lists (IVF) beyond 2 million; below 25,000 vectors the index is flat whatever was asked for. The bytes depend on the
    arguments and library versions alone. RequestError if there are too few images, or too few different ones.
    """
    rows = prepared(features, metric)
    if len(rows) < 2 or not np.isfinite(rows).all():
        raise RequestError("images", f"{len(rows)} images; an index needs at least 2, with finite features")
    if groups is not None and (len(groups) != len(rows) or len(set(groups)) < 2):
        raise RequestError("groups", "must name the group of every image, and at least two of them")
    # The components of few images hold those images whole and others in part: everything else would look like a copy.
    width = rows.shape[1] if dim is None or len(rows) < _IMAGES_PER_DIM * dim else min(dim, rows.shape[1])
    chosen: Kind = kind if kind != "auto" else "flat" if len(rows) <= EXACT else "hnsw" if len(rows) <= GRAPH else "ivf"
    if len(rows) < FEWEST_APPROXIMATE:
        chosen = "flat"
    threads = threads or available_cpus()
    index, explained = _index(rows, width, chosen, storage, threads)
    described = IndexDescription(
        extractor=extractor,
        extractor_identity=extractor_identity,
        feature_dim=rows.shape[1],
        dim=width,
        metric=metric,
        kind=chosen,
        resolution=resolution,
        vectors=len(rows),
        held_out=0 if held_out is None else len(held_out),
        explained=explained,
        radii=(),
        held_out_distances=(),
        provenance=dict(provenance or {}),
    )
    unjudged = Index(described, index, np.zeros(len(rows), np.float32), None, threads)
    projected = unjudged.projected(features)
    copied = None if copies is None or not len(copies.of) else unjudged.projected(copies.features)
    found = baseline(
        base_of(index),
        projected,
        groups=groups,
        alike=None if copies is None else copies.alike,
        copy_distances=None
        if copies is None or copied is None
        else np.linalg.norm(copied - projected[copies.of], axis=1),
        threads=threads,
    )
    duplicates = found.duplicates
    described = replace(described, radii=_percentiles(found.radii), exact_radii=found.exact)
    if copied is not None:
        nearest = unjudged.nearest_of_projected(copied).distances
        duplicates = replace(duplicates, copies_nearer=float((nearest < described.radii[1]).mean()))
    files = {INDEX: _serialised(index), RADII: _npy(found.radii)}
    if held_out is not None and len(held_out):
        others = unjudged.projected(held_out)
        distances = unjudged.nearest_of_projected(others).distances
        files[HELD_OUT] = _npy(others.astype(np.float16))
        described = replace(described, held_out_distances=_percentiles(distances))
        duplicates = replace(duplicates, held_out=int((distances <= duplicates.same_distance).sum()))
    return replace(described, duplicates=duplicates), files


def write_index(out: str | Path, built: tuple[IndexDescription, Mapping[str, bytes]], *, replace: bool = False) -> None:
    """Write what `build_index` gave as a folder of its own. Raises BundleError."""
    write_index_folder(out, built[0], built[1], replace=replace)


def _index(rows: Floats, width: int, kind: Kind, storage: Storage, threads: int) -> tuple[Any, float]:
    """A trained index with all rows in it, and the share of variance that its projection keeps."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(threads)
    base = new_index(kind, width, storage, len(rows))
    learnt = rows if len(rows) <= _TRAINING else rows[np.random.default_rng(0).permutation(len(rows))[:_TRAINING]]
    index, explained = base, 1.0
    if width < rows.shape[1]:
        components = faiss.PCAMatrix(rows.shape[1], width)
        components.train(np.ascontiguousarray(learnt))
        values = faiss.vector_to_array(components.eigenvalues).astype(np.float64)
        explained = float(np.clip(values[:width].sum() / max(values.sum(), 1e-30), 0, 1))
        index = faiss.IndexPreTransform(_linear(components, rows.shape[1], width), base)
    with products_of_matrices():
        index.train(np.ascontiguousarray(learnt))
        index.add(rows)
    if kind == "ivf":
        base.make_direct_map()
    return index, explained


def new_index(kind: Kind, width: int, storage: Storage, count: int) -> Any:
    """An empty index of a kind for about `count` vectors of `width` dimensions, with our parameters."""
    faiss = import_faiss()
    eight = faiss.ScalarQuantizer.QT_8bit
    if kind == "flat":
        return faiss.IndexScalarQuantizer(width, eight) if storage == "8bit" else faiss.IndexFlatL2(width)
    if kind == "hnsw":
        graph = faiss.IndexHNSWSQ(width, eight, 32) if storage == "8bit" else faiss.IndexHNSWFlat(width, 32)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = 80, 128
        return graph
    lists = int(4 * count**0.5)
    coarse = faiss.IndexFlatL2(width)
    found = (
        faiss.IndexIVFScalarQuantizer(coarse, width, lists, eight)
        if storage == "8bit"
        else faiss.IndexIVFFlat(coarse, width, lists)
    )
    found.nprobe = max(1, min(64, lists // 16))
    return found


def _linear(components: Any, wide: int, width: int) -> Any:
    """The projection alone: FAISS would store all components of a PCAMatrix, ten times as much."""
    faiss = import_faiss()
    matrix = faiss.vector_to_array(components.A).reshape(-1, wide)[:width]
    linear = faiss.LinearTransform(wide, width, True)
    faiss.copy_array_to_vector(np.ascontiguousarray(matrix, np.float32).ravel(), linear.A)
    faiss.copy_array_to_vector(faiss.vector_to_array(components.b)[:width].astype(np.float32), linear.b)
    linear.is_trained = True
    return linear


def _percentiles(values: NDArray[np.float32]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.maximum.accumulate(np.percentile(values.astype(np.float64), PERCENTILES)))


def _serialised(index: Any) -> bytes:
    return bytes(import_faiss().serialize_index(index).tobytes())


def _npy(values: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()
