"""`dermis data ...`: from the ISIC Archive, or what users have, to one checked file of training images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import table_console
from commands.options import (
    BinaryOption,
    ClassColumnOption,
    ImageColumnOption,
    LayoutOption,
    MapOption,
    MetadataOption,
    SourceArgument,
    check_maps,
    read_described,
    read_options,
    show_preparation,
)

if TYPE_CHECKING:
    from training.data.inspection import Inspection
    from training.data.leaks import Leaks

data_app = typer.Typer(no_args_is_help=True, help="Download, inspect, split and prepare training images.")


@data_app.command("download")
def download(
    out: Annotated[Path, typer.Option(help="Folder; each collection gets a sub-folder with images and metadata.csv.")],
    collection: Annotated[
        list[str] | None,
        typer.Option(
            help="isic-2020, isic-2019-melanoma, isic-2019, ham10000 or a number of `isic collection list`; may be "
            "repeated. Default: the paper's set, the first two."
        ),
    ] = None,
) -> None:
    """Download the paper's images, or other collections, from the ISIC Archive. The same command goes on."""
    from training.data.download import PAPER, find_collection
    from training.data.download import download as download_all

    try:
        images = download_all([find_collection(name) for name in dict.fromkeys(collection or PAPER)], out)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on", err=True)
        raise typer.Exit(130) from None
    for name, count in images.items():
        typer.echo(f"{out / name}: {count:,} images")


@data_app.command("inspect")
def inspect(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="Folder for report.json, artefacts.csv and contact-sheet.png.")],
    metadata: MetadataOption = None,
    image_column: ImageColumnOption = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
    maps: MapOption = None,
    layout: LayoutOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a processor.")] = None,
) -> None:
    """Show class balance, sizes, missing metadata and artefacts: above all, how many images of a class are framed."""
    from training.data.inspection import inspect_source, write_inspection

    inspection = inspect_source(
        read_described(source, metadata, image_column, class_column, binary, maps, layout), workers=workers
    )
    write_inspection(inspection, out)
    _show_inspection(inspection)
    typer.echo(f"written to {out}", err=True)
    if inspection.broken:
        name, reason = inspection.broken[0]
        typer.echo(
            f"{len(inspection.broken):,} images cannot be opened, see {out / 'report.json'}; the first is {name}: {reason}",
            err=True,
        )
        raise typer.Exit(3)


@data_app.command("leaks")
def leaks(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="Folder for leaks.csv and what --remove writes.")],
    split: Annotated[Path | None, typer.Option(help="Folder that `dermis data split` wrote.")] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Write a cleaned split (OUT/split), or OUT/cleaned.csv without --split.")
    ] = False,
    within_parts: Annotated[
        bool, typer.Option("--within-parts", help="With --split and --remove: also those inside one part.")
    ] = False,
    embedding: Annotated[
        str, typer.Option(help="Feature space that finds what the hash does not; none leaves it out.")
    ] = "lite0",
    min_correlation: Annotated[
        float | None, typer.Option(min=0.5, max=1, help="Of two images laid over each other; default: 0.8.")
    ] = None,
    mirrors: Annotated[bool, typer.Option("--mirrors", help="Also find mirrored and turned copies; slower.")] = False,
    cache: Annotated[Path, typer.Option(help="Where features are kept.")] = Path(".dermis/cache"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    metadata: MetadataOption = None,
    image_column: ImageColumnOption = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
    maps: MapOption = None,
    layout: LayoutOption = None,
) -> None:
    """Find near-duplicates, those across the parts of a split first. Removing spares the smallest part."""
    from training.data.duplicates import CORRELATION
    from training.data.leaks import find_leaks, surplus, write_cleaned, write_leaks
    from training.data.splits import check_empty, read_split

    target = out if split is None else out / "split"
    if remove and split is not None:
        check_empty(target)
    images = read_described(source, metadata, image_column, class_column, binary, maps, layout)
    parts = None if split is None else read_split(split)
    extractor = None
    if embedding != "none":
        from dermis.devices import resolve_device
        from dermis.features import feature_extractor

        extractor = feature_extractor(embedding, resolve_device(device))
    found = find_leaks(
        images,
        parts,
        extractor=extractor,
        min_correlation=CORRELATION if min_correlation is None else min_correlation,
        mirrors=mirrors,
        cache=cache,
    )
    write_leaks(found, out / "leaks.csv")
    _show_leaks(found, embedding != "none")
    typer.echo(f"written to {out / 'leaks.csv'}", err=True)
    if remove:
        removed = surplus(found, within_parts=within_parts or parts is None)
        write_cleaned(images, parts, removed, target)
        typer.echo(f"{len(removed):,} of {len(found.records):,} images removed; the others are in {target}")
    if found.broken:
        typer.echo(f"{len(found.broken):,} images cannot be read, the first is {found.broken[0][0]}", err=True)
        raise typer.Exit(3)


@data_app.command("prepare")
def prepare(
    sources: Annotated[list[Path], typer.Argument(help="One or more sources, as for `split`; ids must differ.")],
    out: Annotated[Path, typer.Option(help="The data set: a new .zip.")],
    resolution: Annotated[int, typer.Option(help="Image side in pixels.")] = 256,
    licence: Annotated[str, typer.Option(help="Licence of the images, for the data card.")] = "unknown",
    attribution: Annotated[str, typer.Option(help="Whom users must credit, for the data card.")] = "",
    metadata: Annotated[list[Path] | None, typer.Option(help="CSV of the images; once for each source.")] = None,
    image_column: ImageColumnOption = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
    maps: MapOption = None,
    layout: LayoutOption = None,
    skip_unlabelled: Annotated[bool, typer.Option("--skip-unlabelled", help="Leave out images with no class.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse to leave out images that are broken.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one a processor.")] = None,
) -> None:
    """Centre-crop, resize and write one StyleGAN zip. Exit status 3 if images were skipped; Ctrl-C, and it goes on."""
    from dermis.errors import DataError
    from training.data.prepare import prepare as prepare_zip
    from training.data.sources import read_source

    if metadata and len(metadata) != len(sources):
        raise DataError(f"--metadata: {len(metadata)} tables for {len(sources)} sources; give it once for each")
    tables: list[Path | None] = [*metadata] if metadata else [None] * len(sources)
    read = []
    for path, table in zip(sources, tables, strict=True):
        options = read_options(
            metadata=table,
            image_column=image_column,
            class_column=class_column,
            binary=binary,
            maps=maps,
            layout=layout,
        )
        read.append(read_source(path, **options))
    check_maps(read, maps)
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
    show_preparation(read, prepared)
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
        str,
        typer.Option(
            help="train-validation, train-validation-test, hospitals, or NAME=SIZE,... with sizes in images or as shares."
        ),
    ] = "train-validation",
    seed: Annotated[int, typer.Option(help="Decides which patients go where.")] = 0,
    metadata: MetadataOption = None,
    image_column: ImageColumnOption = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
    maps: MapOption = None,
    layout: LayoutOption = None,
) -> None:
    """Divide images by patient, with the classes in the same proportions in every part."""
    from training.data.splits import check_empty, split_by_patient, write_split

    check_empty(out)
    images = read_described(source, metadata, image_column, class_column, binary, maps, layout)
    divided = split_by_patient(images.records, _part_sizes(parts), seed)
    write_split(images, divided, out)
    from rich.table import Table

    names = [name or "(no class)" for name in divided.whole.classes]
    table = Table("part", "images", "wanted", "groups", *names)
    for part in (*divided.summary, divided.whole):
        shares = [f"{count:,} ({100 * part.share(name):.2f} %)" for name, count in part.classes.items()]
        table.add_row(part.name, f"{part.images:,}", f"{part.target:,.0f}", f"{part.groups:,}", *shares)
    table_console().print(table)


def _show_inspection(inspection: Inspection) -> None:
    from rich.table import Table

    console, classes = table_console(), inspection.classes
    total = sum(classes.values())
    if inspection.by_class:
        framed = [inspection.by_class.share("frame", name) for name in classes if name in _seen_classes(inspection)]
        association = next(each for each in inspection.by_class.associations if each.artefact == "frame")
        shares = ", ".join(f"{100 * each.share:.1f} % of {each.class_name}" for each in framed)
        console.print(f"[bold]Black frame: {shares}[/bold] (Cramér's V {association.cramers_v:.2f})")
    table = Table("", *classes, "all", title=f"{total:,} images")
    table.add_row("images", *(f"{count:,} ({100 * count / total:.2f} %)" for count in classes.values()), f"{total:,}")
    for column, counts in inspection.missing.items():
        cells = [f"{100 * counts.get(name, 0) / count:.1f} %" for name, count in classes.items()]
        table.add_row(f"no {column}", *cells, f"{100 * sum(counts.values()) / total:.1f} %")
    console.print(table)
    if inspection.by_class:
        seen = _seen_classes(inspection)
        table = Table("artefact", *seen, "Cramér's V", "p", title="Images with artefacts (95 % interval)")
        for association in inspection.by_class.associations:
            shares_of = [inspection.by_class.share(association.artefact, name) for name in seen]
            cells = [f"{100 * each.share:.1f} % ({100 * each.low:.1f} to {100 * each.high:.1f})" for each in shares_of]
            table.add_row(association.artefact, *cells, f"{association.cramers_v:.2f}", f"{association.p_value:.1g}")
        console.print(table)
    if inspection.by_source:
        origins = sorted({each.class_name for each in inspection.by_source.shares})
        table = Table("artefact", *origins, title="By source")
        for association in inspection.by_source.associations:
            cells = [f"{100 * inspection.by_source.share(association.artefact, name).share:.1f} %" for name in origins]
            table.add_row(association.artefact, *cells)
        console.print(table)
    sizes = list(inspection.sizes.items())
    if sizes:
        listed = ", ".join(f"{width} x {height} ({count:,})" for (width, height), count in sizes[:5])
        console.print(f"Sizes in px: {listed}" + (f" and {len(sizes) - 5} more" if len(sizes) > 5 else ""))


def _seen_classes(inspection: Inspection) -> list[str]:
    """Classes of the images that could be opened; others have no shares."""
    return sorted({each.class_name for each in inspection.by_class.shares}) if inspection.by_class else []


def _show_leaks(found: Leaks, compared: bool) -> None:
    from rich.table import Table

    by_hash = sum(pair.hash_distance is not None for pair in found.pairs)
    by_embedding = sum(pair.similarity is not None for pair in found.pairs)
    touched = len({i for pair in found.pairs for i in (pair.a, pair.b)})
    typer.echo(
        f"{len(found.pairs):,} pairs of near-duplicates among {len(found.records):,} images ({touched:,} of them in a "
        f"pair): {by_hash:,} found by hash, {by_embedding:,} by embedding{'' if compared else ' (left out)'}, "
        f"{sum(pair.identical for pair in found.pairs):,} identical files"
    )
    if any(found.parts):
        typer.echo(f"{len(found.across):,} pairs across parts")
    if not found.pairs:
        return
    table = Table("image", "near-duplicate", "parts", "same patient", "correlation", title="First pairs")
    for pair in found.pairs[:10]:
        table.add_row(
            found.records[pair.a].id,
            found.records[pair.b].id,
            " / ".join(filter(None, (found.parts[pair.a], found.parts[pair.b]))),
            "yes" if pair.same_patient else "no",
            f"{pair.correlation:.2f}",
        )
    table_console().print(table)


def _part_sizes(text: str) -> dict[str, float]:
    from dermis.errors import DataError
    from training.data.splits import PRESETS

    if text in PRESETS:
        return dict(PRESETS[text])
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
                f"or give {' or '.join(PRESETS)}"
            ) from None
    return sizes
