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
    table = Table("part", "images", "wanted", "patients", *names)
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
