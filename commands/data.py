"""`dermis data ...`: from the ISIC Archive, or what users have, to one checked file of training images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from training.data.sources import Source

data_app = typer.Typer(no_args_is_help=True, help="Download, inspect, split and prepare training images.")

SourceArgument = Annotated[
    Path, typer.Argument(help="ISIC folder with its CSV, folder of class folders, StyleGAN zip, or a CSV alone.")
]
MetadataOption = Annotated[
    Path | None, typer.Option(help="CSV of the images; default: metadata.csv, or the only one with classes.")
]
ClassColumnOption = Annotated[str | None, typer.Option(help="CSV column of the classes; default: target, ...")]
BinaryOption = Annotated[
    bool, typer.Option("--binary", help="Two classes: malignant (melanoma) and benign (every other diagnosis).")
]


@data_app.command("prepare")
def prepare(
    sources: Annotated[list[Path], typer.Argument(help="One or more sources, as for `split`; ids must differ.")],
    out: Annotated[Path, typer.Option(help="The data set: a new .zip.")],
    resolution: Annotated[int, typer.Option(help="Image side in pixels.")] = 256,
    licence: Annotated[str, typer.Option(help="Licence of the images, for the data card.")] = "unknown",
    attribution: Annotated[str, typer.Option(help="Whom users must credit, for the data card.")] = "",
    metadata: Annotated[list[Path] | None, typer.Option(help="CSV of the images; once for each source.")] = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
    skip_unlabelled: Annotated[bool, typer.Option("--skip-unlabelled", help="Leave out images with no class.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse to leave out images that are broken.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one a processor.")] = None,
) -> None:
    """Centre-crop, resize and write one StyleGAN zip. Exit status 3 if images were skipped; Ctrl-C, and it goes on."""
    from dermis.errors import DataError
    from training.data.prepare import prepare as prepare_zip

    if metadata and len(metadata) != len(sources):
        raise DataError(f"--metadata: {len(metadata)} tables for {len(sources)} sources; give it once for each")
    tables: list[Path | None] = [*metadata] if metadata else [None] * len(sources)
    read = [_read(path, table, class_column, binary) for path, table in zip(sources, tables, strict=True)]
    try:
        prepared = prepare_zip(
            read,
            out,
            resolution,
            licence=licence,
            attribution=attribution,
            skip_unlabelled=skip_unlabelled,
            strict=strict,
            workers=workers,
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on with what is in {out}.partial", err=True)
        raise typer.Exit(130) from None
    classes = ", ".join(f"{count:,} {name}" for name, count in prepared.classes.items()) or "no classes"
    typer.echo(f"{out}: {prepared.images:,} images ({classes}), sha256 {prepared.sha256}")
    if prepared.skipped:
        typer.echo(f"{len(prepared.skipped):,} images were skipped, see {out.with_suffix('.skipped.csv')}", err=True)
        raise typer.Exit(3)


@data_app.command("split")
def split(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="New folder: one CSV a part and split.json.")],
    parts: Annotated[
        str, typer.Option(help="train-validation, hospitals, or NAME=SIZE,... with sizes in images or as shares.")
    ] = "train-validation",
    seed: Annotated[int, typer.Option(help="Decides which patients go where.")] = 0,
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
) -> None:
    """Divide images by patient, with the classes in the same proportions in every part."""
    from training.data.splits import split_by_patient, write_split

    images = _read(source, metadata, class_column, binary)
    divided = split_by_patient(images.records, _part_sizes(parts), seed)
    write_split(images, divided, out)
    from rich.console import Console
    from rich.table import Table

    names = [name or "(no class)" for name in divided.whole.classes]
    table = Table("part", "images", "wanted", "groups", *names)
    for part in (*divided.summary, divided.whole):
        shares = [f"{count:,} ({100 * part.share(name):.2f} %)" for name, count in part.classes.items()]
        table.add_row(part.name, f"{part.images:,}", f"{part.target:,.0f}", f"{part.groups:,}", *shares)
    Console().print(table)


def _read(path: Path, metadata: Path | None, class_column: str | None, binary: bool) -> Source:
    from training.data.sources import read_source

    return read_source(path, metadata=metadata, class_column=class_column, binary=binary)


def _part_sizes(text: str) -> dict[str, float]:
    from dermis.errors import DataError
    from training.data.splits import HOSPITALS, TRAIN_VALIDATION

    if text in ("train-validation", "hospitals"):
        return dict(TRAIN_VALIDATION if text == "train-validation" else HOSPITALS)
    sizes: dict[str, float] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        try:
            if not (equals and name.replace("-", "").replace("_", "").isalnum()) or name in sizes:
                raise ValueError
            sizes[name] = float(size)
        except ValueError:
            raise DataError(
                f"--parts: {part.strip()!r} is not of the form NAME=SIZE, each name once; "
                "or give train-validation or hospitals"
            ) from None
    return sizes
