"""`dermis explain edge-cases`: images between the clusters, near the threshold or misclassified, listed with reasons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dermis.errors import DataError
from dermis.files import write_file

if TYPE_CHECKING:
    from dermis.classifier.onnx_session import Classifier
    from dermis.explain.edge_cases import Criteria, EdgeScores
    from dermis.explain.embeddings import Embedded

TABLE, SHEET = "edge-cases.csv", "edge-cases.png"

NeighboursOption = Annotated[int, typer.Option(help="Nearest neighbours by cosine that are looked at.")]
AgreementOption = Annotated[
    float, typer.Option(help="Between clusters: at most this share of them, weighted by class, is of its own class.")
]
OddsOption = Annotated[float, typer.Option(help="Near the threshold: odds within this factor of the threshold's.")]


def edge_cases(
    classifier: Annotated[str, typer.Option(help="Bundle with a classifier, or a classifier's folder, or fsspec URL.")],
    out: Annotated[Path, typer.Option(help="Folder of edge-cases.csv and edge-cases.png.")],
    data: Annotated[Path | None, typer.Option(help="Real images: anything that `dermis data` reads.")] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="predictions.csv of the classifier's run: which part each image of --data is in."),
    ] = None,
    split: Annotated[Path | None, typer.Option(help="Instead: the folder of `dermis data split`.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="Only these parts; default: validation and test. May be repeated.")
    ] = None,
    metadata: Annotated[Path | None, typer.Option(help="CSV of --data, if it is not its metadata.csv.")] = None,
    class_column: Annotated[str | None, typer.Option(help="CSV column of the diagnosis; default: target, ...")] = None,
    dataset: Annotated[Path | None, typer.Option(help="A dataset of `dermis generate`.")] = None,
    generator: Annotated[
        str | None, typer.Option(help="A bundle to draw images from; benign=... or malignant=... if it has no classes.")
    ] = None,
    generate: Annotated[int, typer.Option(help="Images to draw from --generator.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the images that are drawn.")] = 0,
    truncation_psi: Annotated[float, typer.Option(help="Likewise.")] = 1.0,
    neighbours: NeighboursOption = 15,
    agreement: AgreementOption = 0.6,
    odds: OddsOption = 1.5,
    threshold: Annotated[str, typer.Option(help="Name of one of the classifier's thresholds, or 0 to 1.")] = "default",
    rows: Annotated[int, typer.Option(help="Edge cases on the contact sheet, each with its nearest neighbours.")] = 24,
    thumbnail: Annotated[int, typer.Option(help="Side of its pictures in pixels.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU cores to use; default: all.")] = None,
) -> None:
    """Find edge cases among real or generated images. Each kind has its neighbours among itself. Not a medical device.

    Of real images those of validation and test count, since on images that it learnt from a classifier has few.
    """
    from commands.classify import threshold_value
    from dermis.bundle.classifier import NOTICE
    from dermis.classifier.onnx_session import Classifier
    from dermis.explain.edge_cases import Criteria, edge_case_rows, edge_case_sheet, to_csv
    from dermis.imaging import encode

    criteria = Criteria(neighbours, agreement, odds)
    if sum(given is not None for given in (data, dataset, generator)) != 1:
        raise DataError("give one of --data, --dataset and --generator")
    if (predictions or split or part) and data is None:
        raise DataError("--predictions, --split and --part are of the images of --data")
    if part and not (predictions or split):
        raise DataError("--part: give --predictions or --split, which tell the parts")
    if rows < 1 or thumbnail < 8:
        raise DataError("--rows must be at least 1 and --thumbnail at least 8")
    with Classifier(classifier, device=device, threads=threads) as session:
        limit = session.description.threshold(threshold_value(threshold))
        found = _looked_at(
            session,
            data,
            predictions,
            split,
            part,
            metadata,
            class_column,
            dataset,
            generator,
            generate,
            seed,
            truncation_psi,
            thumbnail,
            device,
            threads,
        )
        names = session.description.class_names
    scores = scored(found, names, limit, criteria)
    typer.echo(summary(found, scores), err=True)
    table = edge_case_rows(found, scores, names, limit)
    files = {TABLE: to_csv(table).encode()}
    if table:
        files[SHEET] = encode(edge_case_sheet(found, scores, names, rows))
    write_files(out, files)
    if data is not None:
        typer.echo(f"{out}: names and shows real images, keep it as you keep them", err=True)
    typer.echo(NOTICE, err=True)


def _looked_at(
    session: Classifier,
    data: Path | None,
    predictions: Path | None,
    split: Path | None,
    part: list[str] | None,
    metadata: Path | None,
    class_column: str | None,
    dataset: Path | None,
    generator: str | None,
    generate: int,
    seed: int,
    truncation_psi: float,
    thumbnail: int,
    device: str,
    threads: int | None,
) -> Embedded:
    """The one set of images that was asked for, as the classifier sees them."""
    from commands.explain_images import dataset_images, embedded, parts_of, real_images

    names = session.description.class_names
    if generator is not None:
        return drawn_and_embedded(
            session, generator, generate, seed=seed, truncation_psi=truncation_psi, thumbnail=thumbnail, device=device,
            threads=threads,
        )  # fmt: skip
    if dataset is not None:
        return embedded(session, [dataset_images(dataset, names)], thumbnail=thumbnail)
    assert data is not None
    parts = parts_of(predictions, split)
    only = (part or ["validation", "test"]) if parts else []
    pictures = real_images(data, names, metadata=metadata, class_column=class_column, parts=parts, only=only)
    return embedded(session, [pictures], thumbnail=thumbnail)


def drawn_and_embedded(
    session: Classifier,
    generator: str,
    count: int,
    *,
    seed: int,
    truncation_psi: float,
    thumbnail: int,
    device: str,
    threads: int | None,
) -> Embedded:
    """Samples of a bundle as the classifier sees them."""
    from commands.explain_images import embedded, generated_images
    from dermis.bundle import open_bundle
    from dermis.synthesizer import Synthesizer
    from training.classifier.synthetic import parse_source

    source = parse_source(generator)
    bundle = open_bundle(source.location)
    with Synthesizer(bundle, device=device, threads=threads) as synthesizer:
        pictures = generated_images(
            bundle,
            synthesizer,
            count,
            session.description.class_names,
            seed=seed,
            truncation_psi=truncation_psi,
            class_name=source.class_name,
        )
        return embedded(session, [pictures], thumbnail=thumbnail)


def scored(found: Embedded, names: tuple[str, str], threshold: float, criteria: Criteria) -> EdgeScores:
    """Edge scores of a set of one kind."""
    from dermis.explain.edge_cases import edge_scores, labels_of

    labels = labels_of(found.items, names)
    groups = [item.group for item in found.items]
    return edge_scores(found.features, labels, found.calibrated, threshold, criteria, groups=groups)


def summary(found: Embedded, scores: EdgeScores) -> str:
    """How many there are, by reason."""
    reasons = {
        "misclassified": scores.misclassified,
        "near the threshold": scores.near_threshold,
        "between clusters": scores.between_clusters,
    }
    counts = ", ".join(f"{int(holds.sum()):,} {name}" for name, holds in reasons.items())
    return f"{int(scores.is_edge.sum()):,} of {len(found):,} images are edge cases: {counts}"


def write_files(out: Path, files: dict[str, bytes]) -> None:
    """Each file whole or not at all. StorageError if the folder cannot be written."""
    for name, data in files.items():
        write_file(out / name, data)
        typer.echo(f"{out / name}", err=True)
