"""Cost of comparing with training images: `python -m benchmarks.authenticity [--json] [--bundle B] [--large]`.

First the bundle's own index: the time to search for the nearest neighbours of 40,000 images, the time of the whole gate
(features, search and copy detector), and the time to generate these images. The search is measured on 40,000 vectors; the rest
on a thousand images and extrapolated, as each image takes the same time. Then each kind of index with 1 million vectors (10
million with --large) in 128 dimensions: clustered random vectors, stored in 8 bits per number as in a bundle. Recall is the
share of queries near the vectors for which the true nearest neighbour was found.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.build import new_index
from dermis.authenticity.checker import Checker
from dermis.authenticity.index import Nearest, import_faiss, products_of_matrices, search
from dermis.bundle import open_bundle
from dermis.bundle.index import Kind
from dermis.cpus import available_cpus
from dermis.dataset.privacy import distance_at_percentile
from dermis.imaging import Images
from dermis.synthesizer import Synthesizer

BUNDLE = Path("bundles/demo")
DATASET = 40_000
GENERATED = 1024
PERCENTILE = 1.0  # the default of the gate min_distance
DIM = 128
QUERIES = 1000
_PIECE = 1_000_000

Floats = NDArray[np.float32]


def clustered(count: int, seed: int) -> Floats:
    """float32 [count, 128]: vectors of length about 1 in 1,000 clusters, similar to embeddings."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(1000, DIM)).astype(np.float32) / DIM**0.5
    vectors: Floats = centres[rng.integers(0, len(centres), count)]
    vectors += 0.5 * rng.standard_normal((count, DIM), dtype=np.float32) / DIM**0.5
    return vectors


def measure_bundle(path: Path, threads: int) -> dict[str, Any]:
    """Measure generation of 40,000 images and their comparison with a bundle's training images."""
    bundle = open_bundle(path)
    classes = max(bundle.generator.c_dim, 1)
    with Synthesizer(bundle, threads=threads) as synthesizer, Checker(bundle, threads=threads) as checker:
        labels = [i % classes for i in range(GENERATED)]
        images = synthesizer.images([1] * GENERATED, range(GENERATED), labels)  # warm-up, which is not measured
        start = time.perf_counter()
        images = synthesizer.images([2] * GENERATED, range(GENERATED), labels)
        generate = (time.perf_counter() - start) * DATASET / GENERATED
        limit = distance_at_percentile(checker.description, PERCENTILE)
        ways: dict[str, Callable[[Images], Nearest]] = {
            "gate": partial(checker.nearest, exact_below=limit),
            "exact_gate": checker.nearest,
            "gate_without_copy_detector": partial(checker.nearest, exact_below=limit, detect_copies=False),
        }
        seconds = {}
        for name, compare in ways.items():
            compare(images[:32])
            start = time.perf_counter()
            compare(images)
            seconds[name] = (time.perf_counter() - start) * DATASET / GENERATED
        features = checker.embed(images)
        rows = np.tile(features, (-(-DATASET // GENERATED), 1))[:DATASET]
        rows = rows + 0.01 * np.random.default_rng(0).standard_normal(rows.shape, dtype=np.float32)
        checker.index.nearest(rows[:100])
        start = time.perf_counter()
        checker.index.nearest(rows)
        look_up = time.perf_counter() - start
    description = checker.description
    return {
        "bundle": f"{bundle.name}@{bundle.digest[:12]}",
        "vectors": description.vectors,
        "kind": description.kind,
        "images": DATASET,
        "generate_seconds": generate,
        "look_up_seconds": look_up,
        "look_up_share": look_up / generate,
        **{f"{name}_seconds": value for name, value in seconds.items()},
        **{f"{name}_share": value / generate for name, value in seconds.items()},
    }


def measure_kind(kind: Kind, count: int, exact: NDArray[np.int64], queries: Floats, threads: int) -> dict[str, Any]:
    """Measure building an index of `count` vectors and searching it."""
    faiss = import_faiss()
    start = time.perf_counter()
    index = new_index(kind, DIM, "8bit", count)
    faiss.omp_set_num_threads(threads)
    with products_of_matrices():
        index.train(clustered(min(count, 200_000), seed=1))
        for piece in range(0, count, _PIECE):
            index.add(clustered(min(_PIECE, count - piece), seed=100 + piece // _PIECE))
    build = time.perf_counter() - start
    size = len(faiss.serialize_index(index)) if count <= _PIECE else None
    search(index, queries[:10], 1, threads)
    start = time.perf_counter()
    _, nearest = search(index, queries, 1, threads)
    batch = (time.perf_counter() - start) / len(queries)
    start = time.perf_counter()
    for query in queries[:50]:
        search(index, query[None], 1, 1)
    single = (time.perf_counter() - start) / 50
    result = {
        "kind": kind,
        "vectors": count,
        "build_seconds": build,
        "bytes": size,
        "recall_at_1": float((nearest[:, 0] == exact).mean()),
        "milliseconds_alone": 1000 * single,
        "milliseconds_in_a_batch": 1000 * batch,
    }
    del index
    gc.collect()
    return result


def exact_neighbours(count: int, queries: Floats) -> NDArray[np.int64]:
    """The true nearest vectors, by comparing with all vectors in float32."""
    faiss = import_faiss()
    best = np.full(len(queries), np.inf, np.float32)
    number = np.zeros(len(queries), np.int64)
    for piece in range(0, count, _PIECE):
        base = clustered(min(_PIECE, count - piece), seed=100 + piece // _PIECE)
        with products_of_matrices():
            squared, nearest = faiss.knn(queries, base, 1)
        improved = squared[:, 0] < best
        best[improved], number[improved] = squared[improved, 0], nearest[improved, 0] + piece
    return number


def run(bundle: Path, counts: list[int], threads: int) -> dict[str, Any]:
    """Run all measurements."""
    document: dict[str, Any] = {"cores": threads, "own": measure_bundle(bundle, threads), "kinds": []}
    for count in counts:
        queries = clustered(QUERIES, seed=100)  # the first vectors of the index ...
        queries = queries + 0.1 * np.random.default_rng(5).standard_normal(queries.shape, dtype=np.float32) / DIM**0.5
        exact = exact_neighbours(count, queries)
        kinds: tuple[Kind, ...] = ("flat", "hnsw", "ivf") if count <= _PIECE else ("ivf",)
        for kind in kinds:
            document["kinds"].append(measure_kind(kind, count, exact, queries, threads))
    return document


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--vectors", type=int, default=1_000_000, help="0: measure the bundle only")
    parser.add_argument("--large", action="store_true", help="also 10 million vectors (about 3 GB)")
    arguments = parser.parse_args()
    counts = ([arguments.vectors] if arguments.vectors else []) + ([10_000_000] if arguments.large else [])
    document = run(arguments.bundle, counts, available_cpus())
    if arguments.json:
        print(json.dumps(document, indent=2))
        return
    own = document["own"]
    print(f"{own['bundle']}: {own['vectors']:,} training images, {own['kind']}; {document['cores']} cores")
    print(f"  {own['images']:,} images: generated {own['generate_seconds']:.0f} s")
    print(
        f"  searched {own['look_up_seconds']:.1f} s, which is {own['look_up_share']:.1%} of the time to generate them"
    )
    for name, text in (
        ("gate", f"whole gate (min_distance {PERCENTILE:g})"),
        ("gate_without_copy_detector", "without the copy detector"),
        ("exact_gate", "all embeddings in float32"),
    ):
        print(f"  {text}: {own[f'{name}_seconds']:.0f} s, {own[f'{name}_share']:.1%} of the time to generate them")
    if not document["kinds"]:
        return
    print(f"{'':<6}{'vectors':>12}{'build s':>9}{'MB':>8}{'recall@1':>10}{'ms alone':>10}{'ms in 1000':>12}")
    for row in document["kinds"]:
        size = "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f}"
        print(
            f"{row['kind']:<6}{row['vectors']:>12,}{row['build_seconds']:>9.0f}{size:>8}{row['recall_at_1']:>10.3f}"
            f"{row['milliseconds_alone']:>10.2f}{row['milliseconds_in_a_batch']:>12.3f}"
        )


if __name__ == "__main__":
    main()
