"""`dermis explain edge-cases`: images between the clusters, near the threshold or misclassified, listed with reasons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.options import (
    AgreementOption,
    ClassColumnOption,
    ClassifierOption,
    DatasetOption,
    DeviceOption,
    GenerateOption,
    MetadataOption,
    NeighboursOption,
    OddsOption,
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
from dermis.files import write_file

if TYPE_CHECKING:
    from dermis.classifier.onnx_session import Classifier
    from dermis.explain.edge_cases import Criteria, EdgeScores
    from dermis.explain.embeddings import Embedded

TABLE, SHEET = "edge-cases.csv", "edge-cases.png"


def edge_cases(
    classifier: ClassifierOption,
    out: Annotated[Path, typer.Option(help="Folder for edge-cases.csv and edge-cases.png.")],
    data: OptionalDataOption = None,
    predictions: PredictionsOption = None,
    split: PartsOption = None,
    part: Annotated[
        list[str] | None, typer.Option(help="Part to use; may be repeated. Default: validation and test.")
    ] = None,
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    dataset: DatasetOption = None,
    generator: OptionalGeneratorOption = None,
    generate: GenerateOption = 1000,
    seed: SampleSeedOption = 0,
    truncation_psi: TruncationOption = 1.0,
    neighbours: NeighboursOption = 15,
    agreement: AgreementOption = 0.6,
    odds: OddsOption = 1.5,
    threshold: ThresholdOption = "default",
    rows: Annotated[int, typer.Option(help="Edge cases on the contact sheet, each with its nearest neighbours.")] = 24,
    thumbnail: Annotated[int, typer.Option(help="Side in pixels of the pictures on the contact sheet.")] = 64,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Find edge cases among real or generated images. Not a medical device.

    By default only real images of validation and test are used: a classifier has few edge cases among its training images.
    """
    from commands.classify import threshold_value
    from dermis.bundle.classifier import NOTICE
    from dermis.classifier.onnx_session import Classifier
    from dermis.explain.edge_cases import Criteria, edge_case_rows, edge_case_sheet, to_csv
    from dermis.explain.embeddings import origin_of_items
    from dermis.imaging import encode

    criteria = Criteria(neighbours, agreement, odds)
    if sum(source is not None for source in (data, dataset, generator)) != 1:
        raise DataError("give one of --data, --dataset and --generator")
    if (predictions or split or part) and data is None:
        raise DataError("--predictions, --split and --part need --data")
    if part and not (predictions or split):
        raise DataError("--part: give --predictions or --split, which name the parts")
    if rows < 1 or thumbnail < 8:
        raise DataError("--rows must be at least 1 and --thumbnail at least 8")
    with Classifier(classifier, device=device, threads=threads) as session:
        limit = session.description.threshold(threshold_value(threshold))
        images = _embedded_images(
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
    scores = score_images(images, names, limit, criteria)
    typer.echo(summary(images, scores), err=True)
    table = edge_case_rows(images, scores, names, limit)
    files = {TABLE: to_csv(table).encode()}
    if table:
        sheet = edge_case_sheet(images, scores, names, rows)
        files[SHEET] = encode(sheet, origin=origin_of_items(images.items))
    write_files(out, files)
    if data is not None:
        typer.echo(f"{out}: names and shows real images, so protect it as you protect them", err=True)
    typer.echo(NOTICE, err=True)


def _embedded_images(
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
    """Embed the one set of images that the options name."""
    from commands.explain.images import dataset_images, embed_sets, read_parts, real_images

    names = session.description.class_names
    if generator is not None:
        return generate_and_embed(
            session, generator, generate, seed=seed, truncation_psi=truncation_psi, thumbnail=thumbnail, device=device,
            threads=threads,
        )  # fmt: skip
    if dataset is not None:
        return embed_sets(session, [dataset_images(dataset, names)], thumbnail=thumbnail)
    assert data is not None
    parts = read_parts(predictions, split)
    only = (part or ["validation", "test"]) if parts else []
    pictures = real_images(data, names, metadata=metadata, class_column=class_column, parts=parts, only=only)
    return embed_sets(session, [pictures], thumbnail=thumbnail)


def generate_and_embed(
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
    """Generate samples of a bundle and embed them by the classifier."""
    from commands.explain.images import embed_sets, generated_images
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
        return embed_sets(session, [pictures], thumbnail=thumbnail)


def score_images(images: Embedded, names: tuple[str, str], threshold: float, criteria: Criteria) -> EdgeScores:
    """Compute edge scores of a set of images of one kind."""
    from dermis.explain.edge_cases import edge_scores, labels_of

    labels = labels_of(images.items, names)
    groups = [item.group for item in images.items]
    return edge_scores(images.features, labels, images.calibrated, threshold, criteria, groups=groups)


def summary(images: Embedded, scores: EdgeScores) -> str:
    """State the number of edge cases, by reason."""
    reasons = {
        "misclassified": scores.misclassified,
        "near the threshold": scores.near_threshold,
        "between clusters": scores.between_clusters,
    }
    counts = ", ".join(f"{int(applies.sum()):,} {name}" for name, applies in reasons.items())
    return f"{int(scores.is_edge.sum()):,} of {len(images):,} images are edge cases: {counts}"


def write_files(out: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder, each completely or not at all."""
    for name, data in files.items():
        write_file(out / name, data)
        typer.echo(f"{out / name}", err=True)
