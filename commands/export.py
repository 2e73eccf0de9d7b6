"""`dermis export ...`: finished datasets in the formats of other tools."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from dermis.exports.output import Write
    from dermis.exports.source import ExportSource

export_app = typer.Typer(no_args_is_help=True, help="Write a dataset in the format of another tool.")

DatasetArgument = Annotated[str, typer.Argument(help="Folder or fsspec URL of a finished dataset.", show_default=False)]
OutOption = Annotated[
    Path, typer.Option("--out", help="New folder, or a new file that ends in .zip.", show_default=False)
]


@export_app.command("dicom")
def dicom(
    dataset: DatasetArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="New folder, or a new file that ends in .zip.", show_default=False)
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="URL",
            help="DICOMweb service to send the objects to (STOW-RS). Credentials: DERMIS_DICOMWEB_AUTHORIZATION.",
            show_default=False,
        ),
    ] = None,
    storage_class: Annotated[
        Literal["dermoscopic", "photographic"],
        typer.Option(
            "--class",
            help="Storage class: dermoscopic (Dermoscopic Photography Image), or photographic (VL Photographic Image), "
            "which older programs know, too.",
        ),
    ] = "dermoscopic",
) -> None:
    """Write each image as a DICOM object that says that it is synthetic and has no patient."""
    from dermis.errors import RequestError
    from dermis.exports.dicom import dicom_files
    from dermis.exports.output import export_output
    from dermis.exports.source import open_source
    from dermis.exports.stow import AUTHORIZATION, store_instances, stow_target

    if (out is None) == (to is None):
        raise RequestError("--out", "give either --out or --to")
    if to is not None:
        target = stow_target(to, os.environ.get(AUTHORIZATION) or None)
        stored = store_instances(target, dicom_files(open_source(dataset), storage_class))
        typer.echo(f"{target.url}: {stored:,} images stored")
        return
    assert out is not None
    with export_output(out) as write:
        images = 0
        for name, data in dicom_files(open_source(dataset), storage_class):
            write(name, data)
            images += 1
    typer.echo(f"{out}: {images:,} images as DICOM")


@export_app.command("coco")
def coco(dataset: DatasetArgument, out: OutOption) -> None:
    """Write data/ and labels.json as COCO: the class of an image is that of a box around all of it."""
    from dermis.exports.classification import write_coco

    _export(dataset, out, write_coco)


@export_app.command("fiftyone")
def fiftyone(dataset: DatasetArgument, out: OutOption) -> None:
    """Write data/ and labels.json as FiftyOne's FiftyOneImageClassificationDataset."""
    from dermis.exports.classification import write_fiftyone

    _export(dataset, out, write_fiftyone)


@export_app.command("yolo")
def yolo(
    dataset: DatasetArgument,
    out: OutOption,
    validation: Annotated[float, typer.Option(help="Share of each class in val/.")] = 0.2,
) -> None:
    """Write train/CLASS/ and val/CLASS/ for YOLO's classification."""
    from dermis.exports.classification import write_yolo

    _export(dataset, out, lambda source, write: write_yolo(source, write, validation))


@export_app.command("croissant")
def croissant(
    dataset: DatasetArgument,
    url: Annotated[str, typer.Option(help="Address at which the dataset is published.", show_default=False)],
    date: Annotated[str, typer.Option(help="Date of publication, YYYY-MM-DD.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="File to write.", show_default=False)],
) -> None:
    """Write a copy of croissant.json with the address and the date of publication."""
    import datetime
    import json

    from dermis.dataset.manifest import CROISSANT, read_manifest
    from dermis.dataset.store import Store
    from dermis.errors import DataError, RequestError, StorageError
    from dermis.exports.source import read_croissant
    from dermis.files import write_file

    if not re.fullmatch(r"https?://[^\s\"<>]+", url):
        raise RequestError("--url", "must begin with https:// or http://")
    if out.exists():
        raise StorageError(f"{out}: exists already; choose another place or remove it")
    try:
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
            raise ValueError
        datetime.date.fromisoformat(date)
    except ValueError:
        raise RequestError("--date", f"must be a date of the form YYYY-MM-DD, not {date!r}") from None
    store = Store(dataset)
    document = read_croissant(store, read_manifest(store))
    if not document:
        raise DataError(f"{dataset}: has no {CROISSANT}, as an earlier version made it; make the dataset again")
    document |= {"url": url, "datePublished": date}
    write_file(out, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    typer.echo(f"{out}: published at {url} on {date}")


def _export(dataset: str, out: Path, write_all: Callable[[ExportSource, Write], int]) -> None:
    from dermis.exports.output import export_output
    from dermis.exports.source import open_source

    with export_output(out) as write:
        images = write_all(open_source(dataset), write)
    typer.echo(f"{out}: {images:,} images")
