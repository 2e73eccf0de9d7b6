"""`dermis augment ...`: additional synthetic images near those that a classifier finds difficult."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.options import (
    AgreementOption,
    DeviceOption,
    GeneratorOption,
    NeighbourDistanceOption,
    NeighboursOption,
    NeighbourSpaceOption,
    OddsOption,
    ThreadsOption,
    TruncationOption,
)
from dermis.errors import DataError, escape

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.latent_neighbours import Anchor

augment_app = typer.Typer(
    no_args_is_help=True, help="Make synthetic images near those that a classifier finds difficult."
)


@augment_app.callback()
def _root() -> None:
    """Make synthetic images near those that a classifier finds difficult."""


@augment_app.command("edge-cases")
def augment_edge_cases(
    generator: GeneratorOption,
    out: Annotated[
        Path,
        typer.Option(
            help="New folder with a sub-folder for each class; `dermis train classifier --synthetic` reads it."
        ),
    ],
    count: Annotated[int, typer.Option(help="Neighbours of each edge case.")],
    distance: NeighbourDistanceOption = 0.1,
    space: NeighbourSpaceOption = "w",
    classifier: Annotated[
        str | None,
        typer.Option(help="Use edge cases of this classifier (bundle, folder or fsspec URL) among generated images."),
    ] = None,
    generate: Annotated[
        int, typer.Option(help="With --classifier: images to generate, among which edge cases are searched.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of these images, or of the neighbours of projections.")] = 0,
    cases: Annotated[
        Path | None,
        typer.Option(help="Use the edge-cases.csv that `dermis explain edge-cases` wrote for generated images."),
    ] = None,
    projections: Annotated[
        Path | None,
        typer.Option(help="Use projected images: an .npz with ws, classes and optionally ids, or a folder of them."),
    ] = None,
    most: Annotated[
        int | None, typer.Option(help="Maximum number of edge cases, those with the highest score first.")
    ] = None,
    neighbours: NeighboursOption = 15,
    agreement: AgreementOption = 0.6,
    odds: OddsOption = 1.5,
    truncation_psi: TruncationOption = 1.0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Generate latent neighbours of edge cases, with the labels that the generator is conditioned on.

    Give one of --classifier, --cases and --projections. After Ctrl-C, run the same command again to continue.
    """
    from tqdm import tqdm

    from dermis.bundle import load_generator, open_bundle
    from dermis.dataset.neighbours import write_neighbours
    from dermis.latent_neighbours import check_options, read_projections
    from dermis.synthesizer import Synthesizer
    from training.classifier.synthetic import parse_source

    if sum(source is not None for source in (classifier, cases, projections)) != 1:
        raise DataError("give one of --classifier, --cases and --projections")
    if out.exists():
        raise DataError(f"--out: {out} exists already; choose another folder or remove it")
    check_options(distance, space)
    source = parse_source(generator)
    bundle = open_bundle(source.location)
    names = bundle.class_names or ((source.class_name,) if source.class_name else ())
    if not names:
        raise DataError(
            f"{bundle.location}: its generator has no classes; give benign={bundle.location} or malignant={bundle.location}"
        )
    if projections is not None:
        config = bundle.generator
        anchors = read_projections(projections, names, config.num_ws, config.w_dim, seed=seed)[:most]
    elif cases is not None:
        anchors = _anchors_of_csv(cases, bundle, most)
    else:
        assert classifier is not None
        anchors = _anchors_of_classifier(
            classifier, generator, generate, seed, truncation_psi, (neighbours, agreement, odds), most, device, threads
        )
    network = load_generator(bundle)
    with (
        Synthesizer(bundle, device=device, threads=threads, generator=network) as synthesizer,
        tqdm(total=len(anchors) * count, desc="neighbours", unit="img", disable=None) as bar,
    ):
        images = write_neighbours(
            out,
            bundle,
            network,
            synthesizer,
            anchors,
            count=count,
            distance=distance,
            space=space,
            truncation_psi=truncation_psi,
            class_names=names,
            done=bar.update,
        )
    classes = [names[anchor.label] for anchor in anchors]
    counts = ", ".join(f"{classes.count(name):,} {name}" for name in names)
    typer.echo(f"{out}: {images:,} neighbours of {len(anchors):,} edge cases ({counts})", err=True)
    if projections is not None:
        typer.echo(
            f"{out}: has latents of real images and images like them, so protect it as you protect them", err=True
        )


def _anchors_of_classifier(
    classifier: str,
    generator: str,
    generate: int,
    seed: int,
    truncation_psi: float,
    criteria: tuple[int, float, float],
    most: int | None,
    device: str,
    threads: int | None,
) -> list[Anchor]:
    """Find edge cases of a classifier among newly generated images."""
    from commands.explain.edge_cases import generate_and_embed, score_images, summary
    from dermis.classifier.onnx_session import Classifier
    from dermis.explain.edge_cases import Criteria

    limits = Criteria(*criteria)
    with Classifier(classifier, device=device, threads=threads) as session:
        images = generate_and_embed(
            session,
            generator,
            generate,
            seed=seed,
            truncation_psi=truncation_psi,
            thumbnail=8,
            device=device,
            threads=threads,
        )
        description = session.description
    scores = score_images(images, description.class_names, description.threshold(), limits)
    typer.echo(summary(images, scores), err=True)
    return anchors_of([vars(images.items[i]) for i in scores.order[:most]])


def _anchors_of_csv(cases: Path, bundle: Bundle, most: int | None) -> list[Anchor]:
    """Read edge cases of generated images from a CSV."""
    from dermis.explain.edge_cases import from_csv

    try:
        rows = from_csv(cases.read_text(encoding="utf-8"), str(cases))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{cases}: cannot be read ({escape(error)})") from None
    for row in rows:
        if not (row["seed"] and row["index"] and row["label"]):
            raise DataError(
                f"{cases}: {row['id']} is not a generated image, so its latent is not known; see --projections"
            )
        if row["source"] != bundle.name:
            raise DataError(f"{cases}: {row['id']} was generated by the bundle {row['source']}, not by {bundle.name}")
    return anchors_of(rows[:most])


def anchors_of(rows: list[dict[str, str]] | list[dict[str, object]]) -> list[Anchor]:
    """Make anchors from the id, label, seed and index of generated images."""
    from dermis.latent_neighbours import Anchor

    return [Anchor(str(r["id"]), int(str(r["label"])), int(str(r["seed"])), int(str(r["index"]))) for r in rows]
