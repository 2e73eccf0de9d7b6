"""`dermis explain embeddings`: real and generated images in a classifier's feature space, as a page and for TensorBoard."""

from __future__ import annotations

import csv
import io
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from commands.options import (
    ClassColumnOption,
    ClassifierOption,
    DatasetOption,
    DeviceOption,
    GenerateOption,
    MetadataOption,
    OptionalDataOption,
    OptionalGeneratorOption,
    PartsOption,
    PredictionsOption,
    SampleSeedOption,
    ThreadsOption,
    ThresholdOption,
    TruncationOption,
)
from dermis.errors import DataError

if TYPE_CHECKING:
    from dermis.bundle.classifier import ClassifierDescription
    from dermis.explain.embeddings import Embedded

PAGE, FEATURES, METADATA, PROJECTOR = "index.html", "features.npz", "metadata.csv", "projector"
_COLUMNS = ("id", "kind", "class", "source", "part", "seed", "index", "label", "predicted", "calibrated", "edge case")


def embeddings(
    classifier: ClassifierOption,
    out: Annotated[Path, typer.Option(help="Folder for the page, the numbers and the files for TensorBoard.")],
    data: OptionalDataOption = None,
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    predictions: PredictionsOption = None,
    split: PartsOption = None,
    generator: OptionalGeneratorOption = None,
    generate: GenerateOption = 1000,
    seed: SampleSeedOption = 0,
    truncation_psi: TruncationOption = 1.0,
    dataset: DatasetOption = None,
    add: Annotated[
        list[str] | None,
        typer.Option(help="KIND=FOLDER: images of another kind, such as projected=FOLDER. May be repeated."),
    ] = None,
    threshold: ThresholdOption = "default",
    perplexity: Annotated[float, typer.Option(help="Perplexity of t-SNE: the effective number of neighbours.")] = 30.0,
    map_seed: Annotated[int, typer.Option(help="Seed of t-SNE.")] = 0,
    thumbnail: Annotated[int, typer.Option(help="Side in pixels of the pictures on the page.")] = 48,
    projector: Annotated[bool, typer.Option(help="Write the files for TensorBoard.")] = True,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "What the classifier sees",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Compute features of images and a map of them in three dimensions, and write a page to explore it.

    Sources of images can be combined. Not a medical device.
    """
    from tqdm import tqdm

    from commands.classify import threshold_value
    from commands.explain.edge_cases import write_files
    from commands.explain.images import (
        added_images,
        dataset_images,
        embed_sets,
        generated_images,
        read_parts,
        real_images,
    )
    from dermis.bundle import open_bundle
    from dermis.bundle.classifier import NOTICE
    from dermis.classifier.onnx_session import Classifier
    from dermis.explain.embeddings import GENERATED, ITERATIONS, map_in_3d, open_tsne
    from dermis.explain.embeddings_page import NEIGHBOURS, SPRITE_SIDE, embeddings_page
    from dermis.explain.nearest import nearest_by_cosine
    from dermis.explain.tensorboard_projector import write_projector
    from dermis.synthesizer import Synthesizer
    from training.classifier.synthetic import parse_source

    if data is None and generator is None and dataset is None and not add:
        raise DataError("give images: --data, --generator, --dataset or --add")
    if (predictions or split or metadata) and data is None:
        raise DataError("--predictions, --split and --metadata need --data")
    if thumbnail < 8:
        raise DataError(f"--thumbnail: must be at least 8; got {thumbnail}")
    if not perplexity > 1:
        raise DataError(f"--perplexity: must be above 1; got {perplexity:g}")
    open_tsne()  # raises before the long work if openTSNE is not installed
    with ExitStack() as stack:
        session = stack.enter_context(Classifier(classifier, device=device, threads=threads))
        description = session.description
        limit, names = description.threshold(threshold_value(threshold)), description.class_names
        sets = []
        if data is not None:
            parts = read_parts(predictions, split)
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
                f"--thumbnail: {total:,} images of {thumbnail} px do not fit on one page, but {fit:,} do; make it smaller"
            )
        if total < 2:
            raise DataError("one image has no neighbours; give more")
        images = embed_sets(session, sets, thumbnail=thumbnail)
    with tqdm(total=sum(ITERATIONS), desc="t-SNE", unit="step", disable=None) as bar:
        positions = map_in_3d(
            images.features, seed=map_seed, perplexity=perplexity, iterations=ITERATIONS, done=bar.update
        )
    similarities, neighbours = nearest_by_cosine(images.features, min(NEIGHBOURS, len(images) - 1))
    reasons = _reasons(images, description, limit)
    page = embeddings_page(
        images, positions, similarities, neighbours, description, title=title, threshold=limit, reasons=reasons
    )
    predicted = [description.class_at(p, limit) for p in images.calibrated]
    if projector:
        write_projector(out / PROJECTOR, images, predicted)
    files = {
        FEATURES: _features(images, positions),
        METADATA: _metadata(images, predicted, reasons).encode(),
        PAGE: page.encode(),
    }
    write_files(out, files)
    typer.echo(f"{len(images):,} images; the page has {len(page) / 1e6:.1f} MB and needs no network", err=True)
    if any(item.kind != GENERATED for item in images.items):
        typer.echo(f"{out}: shows training images or patients, so protect it as you protect them", err=True)
    typer.echo(NOTICE, err=True)


def _reasons(images: Embedded, description: ClassifierDescription, threshold: float) -> list[str]:
    """Reasons why each image is an edge case among the classified images of its kind; "" if it is none."""
    from dermis.explain.edge_cases import Criteria, edge_scores, labels_of

    reasons = [""] * len(images)
    for kind in {item.kind for item in images.items}:
        rows = np.array([i for i, item in enumerate(images.items) if item.kind == kind and item.class_name], np.int64)
        chosen = images.select(rows)
        try:
            scores = edge_scores(
                chosen.features,
                labels_of(chosen.items, description.class_names),
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


def _features(images: Embedded, positions: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        ids=np.array([item.id for item in images.items]),
        features=images.features,
        positions=positions,
        calibrated=images.calibrated,
    )
    return buffer.getvalue()


def _metadata(images: Embedded, predicted: list[str], reasons: list[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for item, class_name, p, reason in zip(images.items, predicted, images.calibrated, reasons, strict=True):
        latent = ["" if value is None else value for value in (item.seed, item.index, item.label)]
        row = (item.id, item.kind, item.class_name, item.source, item.part, *latent, class_name, f"{p:.6f}", reason)
        writer.writerow(row)
    return text.getvalue()
