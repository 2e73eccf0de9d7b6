"""`dermis explain embeddings`: real and generated images in the space of a classifier, as a page and for TensorBoard."""

from __future__ import annotations

import csv
import io
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from dermis.errors import DataError

if TYPE_CHECKING:
    from dermis.bundle.classifier import ClassifierDescription
    from dermis.explain.embeddings import Embedded

PAGE, FEATURES, METADATA, PROJECTOR = "index.html", "features.npz", "metadata.csv", "projector"
_COLUMNS = ("id", "kind", "class", "source", "part", "seed", "index", "label", "predicted", "calibrated", "edge case")


def embeddings(
    classifier: Annotated[str, typer.Option(help="Bundle with a classifier, or a classifier's folder, or fsspec URL.")],
    out: Annotated[Path, typer.Option(help="Folder of the page, the numbers and the files for TensorBoard.")],
    data: Annotated[Path | None, typer.Option(help="Real images: anything that `dermis data` reads.")] = None,
    metadata: Annotated[Path | None, typer.Option(help="CSV of --data, such as one part of a split.")] = None,
    class_column: Annotated[str | None, typer.Option(help="CSV column of the diagnosis; default: target, ...")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="predictions.csv of the classifier's run: which part an image is in.")
    ] = None,
    split: Annotated[Path | None, typer.Option(help="Instead: the folder of `dermis data split`.")] = None,
    generator: Annotated[
        str | None, typer.Option(help="A bundle to draw images from; benign=... or malignant=... if it has no classes.")
    ] = None,
    generate: Annotated[int, typer.Option(help="Images to draw from --generator.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the images that are drawn.")] = 0,
    truncation_psi: Annotated[float, typer.Option(help="Likewise.")] = 1.0,
    dataset: Annotated[Path | None, typer.Option(help="A dataset of `dermis generate`, besides or instead.")] = None,
    add: Annotated[
        list[str] | None, typer.Option(help="KIND=FOLDER: more images, such as projected=FOLDER. May be repeated.")
    ] = None,
    threshold: Annotated[str, typer.Option(help="Name of one of the classifier's thresholds, or 0 to 1.")] = "default",
    perplexity: Annotated[float, typer.Option(help="Of t-SNE: about how many neighbours count.")] = 30.0,
    map_seed: Annotated[int, typer.Option(help="Of t-SNE.")] = 0,
    thumbnail: Annotated[int, typer.Option(help="Side of the page's pictures in pixels.")] = 48,
    projector: Annotated[bool, typer.Option(help="Write the files for TensorBoard.")] = True,
    title: Annotated[str, typer.Option(help="Of the page.")] = "What the classifier sees",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU cores to use; default: all.")] = None,
) -> None:
    """Features of images, a map of them in three dimensions, and a page to explore it. Not a medical device."""
    from tqdm import tqdm

    from commands.classify import threshold_value
    from commands.explain_edge_cases import write_files
    from commands.explain_images import added_images, dataset_images, embedded, generated_images, parts_of, real_images
    from dermis.bundle import open_bundle
    from dermis.bundle.classifier import NOTICE
    from dermis.classifier.onnx_session import Classifier
    from dermis.explain.embeddings import GENERATED, ITERATIONS, map_in_3d, open_tsne
    from dermis.explain.embeddings_page import NEIGHBOURS, SPRITE_SIDE, embeddings_page
    from dermis.explain.nearest import nearest_by_cosine
    from dermis.explain.projector import write_projector
    from dermis.synthesizer import Synthesizer
    from training.classifier.synthetic import parse_source

    if data is None and generator is None and dataset is None and not add:
        raise DataError("give images: --data, --generator, --dataset or --add")
    if (predictions or split or metadata) and data is None:
        raise DataError("--predictions, --split and --metadata are of the images of --data")
    if thumbnail < 8:
        raise DataError(f"--thumbnail: must be at least 8; got {thumbnail}")
    if not perplexity > 1:
        raise DataError(f"--perplexity: must be above 1; got {perplexity:g}")
    open_tsne()  # before the long work, if it is not there
    with ExitStack() as stack:
        session = stack.enter_context(Classifier(classifier, device=device, threads=threads))
        described = session.description
        limit, names = described.threshold(threshold_value(threshold)), described.class_names
        sets = []
        if data is not None:
            parts = parts_of(predictions, split)
            sets.append(real_images(data, names, metadata=metadata, class_column=class_column, parts=parts))
        if generator is not None:
            source = parse_source(generator)
            bundle = open_bundle(source.location)
            synthesizer = stack.enter_context(Synthesizer(bundle, device=device, threads=threads))
            sets.append(
                generated_images(
                    bundle,
                    synthesizer,
                    generate,
                    names,
                    seed=seed,
                    truncation_psi=truncation_psi,
                    class_name=source.class_name,
                )
            )
        if dataset is not None:
            sets.append(dataset_images(dataset, names))
        sets += [added_images(text, names) for text in add or ()]
        total, fit = sum(each.count for each in sets), (SPRITE_SIDE // thumbnail) ** 2
        if total > fit:
            raise DataError(
                f"--thumbnail: {total:,} images of {thumbnail} px do not fit on one page, {fit:,} do; give less"
            )
        if total < 2:
            raise DataError("one image has no neighbours; give more")
        found = embedded(session, sets, thumbnail=thumbnail)
    with tqdm(total=sum(ITERATIONS), desc="t-SNE", unit="step", disable=None) as bar:
        positions = map_in_3d(
            found.features, seed=map_seed, perplexity=perplexity, iterations=ITERATIONS, done=bar.update
        )
    similarities, neighbours = nearest_by_cosine(found.features, min(NEIGHBOURS, len(found) - 1))
    reasons = _reasons(found, described, limit)
    page = embeddings_page(
        found, positions, similarities, neighbours, described, title=title, threshold=limit, reasons=reasons
    )
    predicted = [described.class_at(p, limit) for p in found.calibrated]
    if projector:
        write_projector(out / PROJECTOR, found, predicted)
    files = {
        FEATURES: _features(found, positions),
        METADATA: _metadata(found, predicted, reasons).encode(),
        PAGE: page.encode(),
    }
    write_files(out, files)
    typer.echo(f"{len(found):,} images; the page has {len(page) / 1e6:.1f} MB and needs no network", err=True)
    if any(item.kind != GENERATED for item in found.items):
        typer.echo(f"{out}: shows training images or patients, keep it as you keep them", err=True)
    typer.echo(NOTICE, err=True)


def _reasons(found: Embedded, described: ClassifierDescription, threshold: float) -> list[str]:
    """Why each image is an edge case among those of its kind that have a class; "" if it is none."""
    from dermis.explain.edge_cases import Criteria, edge_scores, labels_of

    reasons = [""] * len(found)
    for kind in {item.kind for item in found.items}:
        rows = np.array([i for i, item in enumerate(found.items) if item.kind == kind and item.class_name], np.int64)
        chosen = found.select(rows)
        try:
            scores = edge_scores(
                chosen.features,
                labels_of(chosen.items, described.class_names),
                chosen.calibrated,
                threshold,
                Criteria(),
                groups=[item.group for item in chosen.items],
            )
        except DataError:  # one class only, or too few images for neighbours
            continue
        for place, i in enumerate(rows):
            reasons[i] = "; ".join(scores.reasons(place))
    return reasons


def _features(found: Embedded, positions: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        ids=np.array([item.id for item in found.items]),
        features=found.features,
        positions=positions,
        calibrated=found.calibrated,
    )
    return buffer.getvalue()


def _metadata(found: Embedded, predicted: list[str], reasons: list[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for item, said, p, reason in zip(found.items, predicted, found.calibrated, reasons, strict=True):
        latent = ["" if value is None else value for value in (item.seed, item.index, item.label)]
        row = (item.id, item.kind, item.class_name, item.source, item.part, *latent, said, f"{p:.6f}", reason)
        writer.writerow(row)
    return text.getvalue()
