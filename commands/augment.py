"""`dermis augment ...`: more synthetic images where a classifier needs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.explain_edge_cases import AgreementOption, NeighboursOption, OddsOption
from dermis.errors import DataError, escape

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.latent_neighbours import Anchor

augment_app = typer.Typer(no_args_is_help=True, help="Make synthetic images where a classifier needs them.")


@augment_app.callback()
def _root() -> None:
    """Make synthetic images where a classifier needs them."""


@augment_app.command("edge-cases")
def augment_edge_cases(
    generator: Annotated[str, typer.Option(help="A bundle; benign=... or malignant=... if it has no classes.")],
    out: Annotated[Path, typer.Option(help="Folder of class sub-folders; `dermis train classifier` takes it.")],
    count: Annotated[int, typer.Option(help="Neighbours of each edge case.")],
    distance: Annotated[float, typer.Option(help="Relative: |w' - w| = DISTANCE |w - w_avg|, or in z of |z|.")] = 0.1,
    space: Annotated[str, typer.Option(help="w, or z (along the sphere; not for projections).")] = "w",
    classifier: Annotated[
        str | None, typer.Option(help="Find edge cases of this classifier among images that are drawn.")
    ] = None,
    generate: Annotated[int, typer.Option(help="Images to draw and look at.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of these images; of the neighbours of projections.")] = 0,
    cases: Annotated[
        Path | None, typer.Option(help="Instead: edge-cases.csv of `dermis explain edge-cases` on generated images.")
    ] = None,
    projections: Annotated[
        Path | None,
        typer.Option(help="Instead: .npz with ws and classes (ids) of projected images, or a folder of them."),
    ] = None,
    most: Annotated[int | None, typer.Option(help="Edge cases at most, those of the highest score first.")] = None,
    neighbours: NeighboursOption = 15,
    agreement: AgreementOption = 0.6,
    odds: OddsOption = 1.5,
    truncation_psi: Annotated[float, typer.Option(help="Of the images that are drawn, or were for --cases.")] = 1.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU cores to use; default: all.")] = None,
) -> None:
    """Draw latent neighbours of edge cases. Labels are those of the generator's condition. Ctrl-C: run it again to go on."""
    from tqdm import tqdm

    from dermis.bundle import load_generator, open_bundle
    from dermis.dataset.neighbours import write_neighbours
    from dermis.latent_neighbours import check_options, read_projections
    from dermis.synthesizer import Synthesizer
    from training.classifier.synthetic import parse_source

    if sum(given is not None for given in (classifier, cases, projections)) != 1:
        raise DataError("give one of --classifier, --cases and --projections")
    if out.exists():
        raise DataError(f"--out: {out} exists already; choose another folder or remove it")
    check_options(distance, space)
    source = parse_source(generator)
    bundle = open_bundle(source.location)
    names = bundle.class_names or ((source.class_name,) if source.class_name else ())
    if not names:
        raise DataError(
            f"{bundle.location}: its generator has no classes; write benign={bundle.location}, or malignant="
        )
    if projections is not None:
        config = bundle.generator
        anchors = read_projections(projections, names, config.num_ws, config.w_dim, seed=seed)[:most]
    elif cases is not None:
        anchors = _listed(cases, bundle, most)
    else:
        assert classifier is not None
        anchors = _found(
            classifier, generator, generate, seed, truncation_psi, (neighbours, agreement, odds), most, device, threads
        )
    network = load_generator(bundle)
    with (
        Synthesizer(bundle, device=device, threads=threads, generator=network) as synthesizer,
        tqdm(total=len(anchors) * count, desc="neighbours", unit="img", disable=None) as bar,
    ):
        made = write_neighbours(
            out,
            bundle,
            network,
            synthesizer,
            anchors,
            count=count,
            distance=distance,
            space=space,  # type: ignore[arg-type]
            truncation_psi=truncation_psi,
            class_names=names,
            done=bar.update,
        )
    classes = [names[anchor.label] for anchor in anchors]
    of = ", ".join(f"{classes.count(name):,} {name}" for name in names)
    typer.echo(f"{out}: {made:,} neighbours of {len(anchors):,} edge cases ({of})", err=True)


def _found(
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
    """Edge cases of a classifier among images that are drawn now."""
    from commands.explain_edge_cases import drawn_and_embedded, scored, summary
    from dermis.classifier.onnx_session import Classifier
    from dermis.explain.edge_cases import Criteria

    limits = Criteria(*criteria)
    with Classifier(classifier, device=device, threads=threads) as session:
        drawn = drawn_and_embedded(
            session,
            generator,
            generate,
            seed=seed,
            truncation_psi=truncation_psi,
            thumbnail=8,
            device=device,
            threads=threads,
        )
        described = session.description
    scores = scored(drawn, described.class_names, described.threshold(), limits)
    typer.echo(summary(drawn, scores), err=True)
    return anchors_of([vars(drawn.items[i]) for i in scores.order[:most]])


def _listed(cases: Path, bundle: Bundle, most: int | None) -> list[Anchor]:
    """Edge cases of a CSV."""
    from dermis.explain.edge_cases import from_csv

    try:
        rows = from_csv(cases.read_text(encoding="utf-8"), str(cases))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{cases}: cannot be read ({escape(error)})") from None
    for row in rows:
        if not (row["seed"] and row["index"] and row["label"]):
            raise DataError(
                f"{cases}: {row['id']} is no generated image, so its latent is not known; see --projections"
            )
        if row["source"] != bundle.name:
            raise DataError(f"{cases}: {row['id']} is of the bundle {row['source']}, not of {bundle.name}")
    return anchors_of(rows[:most])


def anchors_of(rows: list[dict[str, str]] | list[dict[str, object]]) -> list[Anchor]:
    """Anchors of generated images, by id, label, seed and index."""
    from dermis.latent_neighbours import Anchor

    return [Anchor(str(r["id"]), int(str(r["label"])), int(str(r["seed"])), int(str(r["index"]))) for r in rows]
