"""`dermis index ...`: the index of a training set's embeddings, against which generated images are checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import table_console

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dermis.bundle import Bundle
    from dermis.bundle.index import IndexDescription
    from dermis.imaging import Images

index_app = typer.Typer(no_args_is_help=True, help="The index of training images against which copies are found.")


@index_app.command("build")
def build(
    data: Annotated[
        Path, typer.Option(help="The images that the generator was trained on: anything that `dermis data` reads.")
    ],
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle that gets the index, which then has a new digest.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Instead of a bundle: a folder for the index alone.")] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Real images that the generator never saw: they make attacks measurable.")
    ] = None,
    held_out_metadata: Annotated[
        Path | None, typer.Option(help="CSV of --held-out, if it is not its metadata.csv.")
    ] = None,
    extractor: Annotated[
        str,
        typer.Option(
            help="auto (the bundle's classifier, if it has one, else inception), inception, dinov2, clip, lite0, lite1, "
            "lite2 or timm:MODEL."
        ),
    ] = "auto",
    classifier: Annotated[
        Path | None, typer.Option(help="Folder of a classifier for --extractor classifier, if there is no bundle.")
    ] = None,
    resolution: Annotated[int, typer.Option(help="Of the images, if there is no bundle to tell.")] = 256,
    metric: Annotated[str, typer.Option(help="cosine or l2.")] = "cosine",
    dim: Annotated[int, typer.Option(help="Principal components to keep; 0 keeps all dimensions.")] = 128,
    storage: Annotated[str, typer.Option(help="8bit or float (four times as large).")] = "8bit",
    kind: Annotated[str, typer.Option(help="auto, flat (exact), hnsw or ivf.")] = "auto",
    groups: Annotated[
        bool,
        typer.Option(help="Other images of one patient or lesion, where the table tells, do not count as neighbours."),
    ] = True,
    metadata: Annotated[Path | None, typer.Option(help="CSV of --data, if it is not its metadata.csv.")] = None,
    class_column: Annotated[str | None, typer.Option(help="CSV column of the classes.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cache: Annotated[Path, typer.Option(help="Where decoded images are kept.")] = Path(".dermis/cache"),
    replace: Annotated[bool, typer.Option("--replace", help="Replace the index in --out.")] = False,
) -> None:
    """Embed all training images and keep them as an index, in a bundle or by itself. It names no image."""
    from typing import get_args

    from dermis.authenticity.build import FEWEST_APPROXIMATE, Storage, build_index, write_index
    from dermis.authenticity.checker import CLASSIFIER, Embedder
    from dermis.bundle import open_bundle
    from dermis.bundle.index import Kind, Metric
    from dermis.errors import RequestError
    from training.data.embedding import embed_array, progress_bar
    from training.data.isic import load_isic
    from training.evaluation.copies import MEASURED, find_copies
    from training.evaluation.holdout import check_holdout, groups_of
    from training.gan.card import trained_on

    if (bundle is None) == (out is None):
        raise RequestError("--bundle", "give either a bundle that gets the index, or --out for the index alone")
    for name, value, known in (
        ("--metric", metric, get_args(Metric)),
        ("--storage", storage, get_args(Storage)),
        ("--kind", kind, ("auto", *get_args(Kind))),
    ):
        if value not in known:
            raise RequestError(name, f"{value!r} is none of {', '.join(known)}")
    if dim < 0:
        raise RequestError("--dim", "must be at least 0")
    if out is not None and out.exists() and not replace:
        raise RequestError("--out", f"{out}: exists already; add --replace, or choose another folder")
    opened = None if bundle is None else open_bundle(bundle)
    if extractor == "auto":
        extractor = CLASSIFIER if (classifier or (opened and opened.classifier)) else "inception"
    embedder = Embedder(extractor, classifier or opened, device=device)
    size = resolution if opened is None else opened.generator.img_resolution
    dataset = load_isic(data, size, class_column=class_column, metadata=metadata, cache=cache)
    held = None
    named = None if opened is None else trained_on(opened.provenance)
    if held_out is not None:
        held = load_isic(held_out, size, class_column=class_column, metadata=held_out_metadata, cache=cache)
        check_holdout(dataset, held, named)
    if named is not None and named != dataset.sha256:
        typer.echo("warning: --data is not the set that the bundle names as its training set", err=True)
    of_whom = groups_of(dataset, held)
    total = len(dataset.images) + (0 if held is None else len(held.images)) + min(len(dataset.images), MEASURED)
    with progress_bar(total, "embedding") as bar:

        def embed(images: Images) -> NDArray[np.float32]:
            return embed_array(images, lambda chunk: embedder.embed(chunk, size), bar)

        features = embed(dataset.images)
        held_features = None if held is None else embed(held.images)
        copies = find_copies(dataset.images, embed)
    embedder.close()
    built = build_index(
        features,
        extractor=extractor,
        extractor_identity=embedder.identity,
        resolution=size,
        held_out=held_features,
        groups=of_whom[: len(features)] if groups and of_whom is not None else None,
        copies=copies,
        metric=metric,  # type: ignore[arg-type]
        kind=kind,  # type: ignore[arg-type]
        dim=dim or None,
        storage=storage,  # type: ignore[arg-type]
        provenance={
            "dataset": {"name": data.name, "sha256": dataset.sha256, "is_training_set": named == dataset.sha256},
            "grouped": groups and of_whom is not None,
        },
    )
    if opened is None:
        assert out is not None
        write_index(out, built, replace=replace)
        where = str(out)
    else:
        where = _attach(opened, built)
    _tell(built[0])
    if kind not in ("auto", built[0].kind):
        typer.echo(
            f"--kind {kind}: fewer than {FEWEST_APPROXIMATE:,} images, so the index looks at all of them (flat)",
            err=True,
        )
    _warn(built[0], str(data))
    typer.echo(where)


@index_app.command("show")
def show(
    source: Annotated[str, typer.Argument(help="Folder or fsspec URL of a bundle or an index.", show_default=False)],
) -> None:
    """Verify an index and say what it holds."""
    from dermis.authenticity.index import open_index

    described = open_index(source, device="cpu").description
    _tell(described)
    _warn(described, "IMAGES")


def _attach(bundle: Bundle, built: tuple[IndexDescription, Mapping[str, bytes]]) -> str:
    """Put the index into the bundle; its new name and digest."""
    from tempfile import TemporaryDirectory

    from dermis.authenticity.build import write_index
    from dermis.bundle import amend_bundle

    with TemporaryDirectory() as folder:
        write_index(Path(folder) / "index", built)
        amended = amend_bundle(bundle, parts={"authenticity": Path(folder) / "index"})
    return f"{bundle.location}: {amended.name}@{amended.digest}"


def _tell(described: IndexDescription) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    megabytes = sum(file.bytes for file in described.files.values()) / 1e6
    rows = {
        "training images": f"{described.vectors:,}",
        "held-out images": f"{described.held_out:,}" if described.held_out else "none: attacks cannot be measured",
        "feature space": f"{described.extractor}, {described.feature_dim} dimensions, {described.metric}",
        "stored": f"{described.dim} principal components ({described.explained:.1%} of the variance), {described.kind}"
        + (f", {megabytes:.2f} MB" if megabytes else ""),
        "to the nearest other training image": f"median {described.radii[50]:.4f}, 1 % below {described.radii[1]:.4f}",
    }
    if described.held_out:
        values = described.held_out_distances
        rows["held-out to nearest training image"] = f"median {values[50]:.4f}, 1 % below {values[1]:.4f}"
    duplicates = described.duplicates
    rows["near-duplicates"] = "not looked for: the index is of an older version"
    if duplicates is not None:
        rows["near-duplicates"] = (
            f"{duplicates.images:,} images in {duplicates.groups:,} groups, {duplicates.largest:,} in the largest; each group "
            "counts as one image"
            if duplicates.images
            else "none"
        ) + f" (distance up to {duplicates.same_distance:.4f})"
    if duplicates is not None and duplicates.copies:
        rows["images saved again (JPEG 90)"] = (
            f"median {duplicates.copy_median:.4f} from the original; {duplicates.copies_nearer:.1%} of {duplicates.copies:,} "
            "are below the 1 % above"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    table_console().print(table)


def _warn(described: IndexDescription, data: str) -> None:
    """What is wrong with the training images or the baseline, on stderr."""
    from dermis.authenticity.verdict import weakness

    duplicates = described.duplicates
    if duplicates is not None and duplicates.images:
        typer.echo(
            f"{duplicates.images:,} of the {described.vectors:,} training images are near-duplicates, in {duplicates.groups:,} "
            "groups. Each group counts as one image in the radii, but a generator memorises such images sooner: remove "
            f"them with `dermis data leaks {data} --remove` and train on the rest",
            err=True,
        )
    if duplicates is not None and duplicates.held_out:
        typer.echo(
            f"warning: {duplicates.held_out:,} held-out images are copies of training images, so attacks look less successful "
            "than they are; find them with `dermis data leaks`",
            err=True,
        )
    if (reason := weakness(described)) is not None:
        typer.echo(f"warning: copies may pass: {reason}", err=True)
