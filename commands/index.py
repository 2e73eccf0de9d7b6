"""`dermis index ...`: the index of training images with which generated images are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from commands.console import table_console
from commands.options import CACHE, CacheOption, ClassColumnOption, DataOption, DeviceOption, MetadataOption
from dermis.bundle.index import Metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dermis.bundle import Bundle
    from dermis.bundle.index import IndexDescription
    from dermis.imaging import Images

index_app = typer.Typer(
    no_args_is_help=True, help="Build and show the index of training images, which finds copies of them."
)


@index_app.command("build")
def build(
    data: DataOption,
    bundle: Annotated[
        Path | None, typer.Option(help="Folder of the bundle for the index; it gets a new digest.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the index alone, without a bundle.")] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Held-out images: real ones that the generator was not trained on, to measure attacks."),
    ] = None,
    held_out_metadata: Annotated[Path | None, typer.Option(help="CSV of the held-out images.")] = None,
    extractor: Annotated[
        str,
        typer.Option(
            help="Feature space: auto (the bundle's classifier if it has one, otherwise inception), inception, dinov2, clip, "
            "lite0, lite1, lite2 or timm:MODEL."
        ),
    ] = "auto",
    classifier: Annotated[
        Path | None, typer.Option(help="Folder of a classifier whose features are used, without a bundle.")
    ] = None,
    resolution: Annotated[int, typer.Option(help="Side of the images in pixels, without a bundle.")] = 256,
    metric: Annotated[Metric, typer.Option(help="Distance of features.")] = "cosine",
    dim: Annotated[int, typer.Option(help="Principal components to keep; 0 keeps all dimensions.")] = 128,
    storage: Annotated[
        Literal["8bit", "float"], typer.Option(help="How vectors are stored: 8bit, or float (four times as large).")
    ] = "8bit",
    kind: Annotated[
        Literal["auto", "flat", "ivf", "hnsw"], typer.Option(help="Kind of the FAISS index; flat is exact.")
    ] = "auto",
    groups: Annotated[
        bool,
        typer.Option(help="Images of the same patient or lesion, if the CSV names them, do not count as neighbours."),
    ] = True,
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    device: DeviceOption = "auto",
    cache: CacheOption = CACHE,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the index in --out.")] = False,
) -> None:
    """Build an index of the embeddings of all training images, in a bundle or alone. It contains no names of images.

    --data are the images that the generator was trained on.
    """
    from dermis.authenticity.build import MIN_APPROXIMATE, build_index, write_index
    from dermis.authenticity.checker import CLASSIFIER, Embedder
    from dermis.bundle import open_bundle, trained_on
    from dermis.errors import RequestError
    from training.data.embedding import embed_array, progress_bar
    from training.data.isic import load_isic
    from training.evaluation.copies import MAX_RECOMPRESSED, find_copies
    from training.evaluation.holdout import check_holdout, groups_of

    if (bundle is None) == (out is None):
        raise RequestError("--bundle", "give either a bundle for the index, or --out for the index alone")
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
    training_set = None if opened is None else trained_on(opened.provenance)
    if held_out is not None:
        held = load_isic(held_out, size, class_column=class_column, metadata=held_out_metadata, cache=cache)
        check_holdout(dataset, held, training_set)
    if training_set is not None and training_set != dataset.sha256:
        typer.echo("warning: --data is not the set that the bundle names as its training set", err=True)
    image_groups = groups_of(dataset, held)
    total = len(dataset.images) + (0 if held is None else len(held.images)) + min(len(dataset.images), MAX_RECOMPRESSED)
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
        groups=image_groups[: len(features)] if groups and image_groups is not None else None,
        copies=copies,
        metric=metric,
        kind=kind,
        dim=dim or None,
        storage=storage,
        provenance={
            "dataset": {"name": data.name, "sha256": dataset.sha256, "is_training_set": training_set == dataset.sha256},
            "grouped": groups and image_groups is not None,
        },
    )
    if opened is None:
        assert out is not None
        write_index(out, built, replace=replace)
        destination = str(out)
    else:
        destination = _attach(opened, built)
    _show(built[0])
    if kind not in ("auto", built[0].kind):
        typer.echo(
            f"--kind {kind}: fewer than {MIN_APPROXIMATE:,} images, so the index compares all of them (flat)",
            err=True,
        )
    _warn(built[0], str(data))
    typer.echo(destination)


@index_app.command("show")
def show(
    source: Annotated[str, typer.Argument(help="Folder or fsspec URL of a bundle or an index.", show_default=False)],
) -> None:
    """Verify an index and show its content."""
    from dermis.authenticity.index import open_index

    description = open_index(source, device="cpu").description
    _show(description)
    _warn(description, "IMAGES")


def _attach(bundle: Bundle, built: tuple[IndexDescription, Mapping[str, bytes]]) -> str:
    """Put the index into the bundle; return the location, name and new digest."""
    from tempfile import TemporaryDirectory

    from dermis.authenticity.build import write_index
    from dermis.bundle import amend_bundle

    with TemporaryDirectory() as folder:
        write_index(Path(folder) / "index", built)
        amended = amend_bundle(bundle, parts={"authenticity": Path(folder) / "index"})
    return f"{bundle.location}: {amended.name}@{amended.digest}"


def _show(description: IndexDescription) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    megabytes = sum(file.bytes for file in description.files.values()) / 1e6
    rows = {
        "training images": f"{description.vectors:,}",
        "held-out images": f"{description.held_out:,}" if description.held_out else "none: attacks cannot be measured",
        "feature space": f"{description.extractor}, {description.feature_dim} dimensions, {description.metric}",
        "stored": f"{description.dim} principal components ({description.explained:.1%} of the variance), {description.kind}"
        + (f", {megabytes:.2f} MB" if megabytes else ""),
        "to the nearest other training image": f"median {description.radii[50]:.4f}, 1 % below {description.radii[1]:.4f}",
    }
    if description.held_out:
        values = description.held_out_distances
        rows["held-out to nearest training image"] = f"median {values[50]:.4f}, 1 % below {values[1]:.4f}"
    duplicates = description.duplicates
    rows["near-duplicates"] = "not searched: the index is of an older version"
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


def _warn(description: IndexDescription, data: str) -> None:
    """Print weaknesses of the training images and of the baseline on stderr."""
    from dermis.authenticity.verdict import baseline_problem

    duplicates = description.duplicates
    if duplicates is not None and duplicates.images:
        typer.echo(
            f"{duplicates.images:,} of the {description.vectors:,} training images are near-duplicates, in "
            f"{duplicates.groups:,} groups. Each group counts as one image in the radii, but a generator memorises such images "
            f"more easily: remove them with `dermis data leaks {data} --remove` and train on the rest",
            err=True,
        )
    if duplicates is not None and duplicates.held_out:
        typer.echo(
            f"warning: {duplicates.held_out:,} held-out images are copies of training images, so the measured success "
            "of attacks is too low; find them with `dermis data leaks`",
            err=True,
        )
    if (reason := baseline_problem(description)) is not None:
        typer.echo(f"warning: copies may pass: {reason}", err=True)
