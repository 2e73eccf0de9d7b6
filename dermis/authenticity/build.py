"""Build an index from embeddings of a training set."""

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
EXACT = 200_000  # largest number of vectors for an exact search
GRAPH = 2_000_000  # largest number of vectors for a graph; above it, lists need much less memory
MIN_APPROXIMATE = 25_000  # with fewer vectors, lists (IVF) cannot be trained well, and an exact search is as fast
DIM = 128
_TRAINING = 200_000  # vectors that quantizer, components and lists are trained on
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
    """Build an index.

    The bytes of the files depend on the arguments and library versions alone.

    Args:
        features: Features [N, feature_dim] of the training images.
        extractor: Name of the feature space.
        extractor_identity: Identity of the extractor; see `IndexDescription`.
        resolution: Side in px to which images are resized before the extractor.
        held_out: Features [H, feature_dim] of real images that the generator never saw, for attacks.
        groups: Lesion or patient of each image. The radius of an image is then its distance to the nearest image of another
            group, so that pictures of one lesion do not make it tiny.
        copies: Measurements on the pixels. Without them near-duplicates, which never count as neighbours, are found by
            distance alone.
        metric: "cosine" or "l2".
        kind: "auto" searches exactly up to 200,000 vectors, with a graph (HNSW) up to 2 million, and with lists (IVF) above.
            With fewer than 25,000 vectors the index is always flat.
        dim: Principal components to keep. None keeps all dimensions, as do fewer than 20 images for each component.
        storage: 8 bits for each number, or float32.
        provenance: Origin of the images, as JSON values.
        threads: CPU cores to use; None for all that this process can use.

    Returns:
        The description, and the files for `write_index_folder`.

    Raises:
        RequestError: There are too few images, or too few different ones.
    """
    rows = prepared(features, metric)
    if len(rows) < 2 or not np.isfinite(rows).all():
        raise RequestError("images", f"{len(rows)} images; an index needs at least 2, with finite features")
    if groups is not None and (len(groups) != len(rows) or len(set(groups)) < 2):
        raise RequestError("groups", "must name the group of every image, and at least two of them")
    # Components of few images represent these images exactly and others poorly, so that other images would look like copies.
    width = rows.shape[1] if dim is None or len(rows) < _IMAGES_PER_DIM * dim else min(dim, rows.shape[1])
    chosen: Kind = automatic_kind(len(rows)) if kind == "auto" else kind
    if len(rows) < MIN_APPROXIMATE:
        chosen = "flat"
    threads = threads or available_cpus()
    index, explained = _index(rows, width, chosen, storage, threads)
    description = IndexDescription(
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
    unscored = Index(description, index, np.zeros(len(rows), np.float32), None, threads)
    projected = unscored.projected(features)
    copied = None if copies is None or not len(copies.indices) else unscored.projected(copies.features)
    result = baseline(
        base_of(index),
        projected,
        groups=groups,
        similar_pairs=None if copies is None else copies.similar_pairs,
        copy_distances=None
        if copies is None or copied is None
        else np.linalg.norm(copied - projected[copies.indices], axis=1),
        threads=threads,
    )
    duplicates = result.duplicates
    description = replace(description, radii=_percentiles(result.radii), exact_radii=result.exact)
    if copied is not None:
        nearest = unscored.nearest_of_projected(copied).distances
        duplicates = replace(duplicates, copies_nearer=float((nearest < description.radii[1]).mean()))
    files = {INDEX: _serialised(index), RADII: _npy(result.radii)}
    if held_out is not None and len(held_out):
        others = unscored.projected(held_out)
        distances = unscored.nearest_of_projected(others).distances
        files[HELD_OUT] = _npy(others.astype(np.float16))
        description = replace(description, held_out_distances=_percentiles(distances))
        duplicates = replace(duplicates, held_out=int((distances <= duplicates.same_distance).sum()))
    return replace(description, duplicates=duplicates), files


def write_index(out: str | Path, built: tuple[IndexDescription, Mapping[str, bytes]], *, replace: bool = False) -> None:
    """Write the result of `build_index` as a folder.

    Raises:
        BundleError: `out` exists and may not be replaced, or cannot be written.
    """
    write_index_folder(out, built[0], built[1], replace=replace)


def _index(rows: Floats, width: int, kind: Kind, storage: Storage, threads: int) -> tuple[Any, float]:
    """Return a trained index with all rows, and the share of variance that its projection keeps."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(threads)
    base = new_index(kind, width, storage, len(rows))
    sample = rows if len(rows) <= _TRAINING else rows[np.random.default_rng(0).permutation(len(rows))[:_TRAINING]]
    index, explained = base, 1.0
    if width < rows.shape[1]:
        components = faiss.PCAMatrix(rows.shape[1], width)
        components.train(np.ascontiguousarray(sample))
        values = faiss.vector_to_array(components.eigenvalues).astype(np.float64)
        explained = float(np.clip(values[:width].sum() / max(values.sum(), 1e-30), 0, 1))
        index = faiss.IndexPreTransform(_linear(components, rows.shape[1], width), base)
    with products_of_matrices():
        index.train(np.ascontiguousarray(sample))
        index.add(rows)
    if kind == "ivf":
        base.make_direct_map()
    return index, explained


def automatic_kind(count: int) -> Kind:
    """Return the kind of index for `count` vectors: an exact search, a graph or lists."""
    return "flat" if count <= EXACT else "hnsw" if count <= GRAPH else "ivf"


def new_index(kind: Kind, width: int, storage: Storage, count: int) -> Any:
    """Make an empty index for about `count` vectors of `width` dimensions."""
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
    index = (
        faiss.IndexIVFScalarQuantizer(coarse, width, lists, eight)
        if storage == "8bit"
        else faiss.IndexIVFFlat(coarse, width, lists)
    )
    index.nprobe = max(1, min(64, lists // 16))
    return index


def _linear(components: Any, wide: int, width: int) -> Any:
    """Return the projection without the other components, which a PCAMatrix would store: ten times as much."""
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
