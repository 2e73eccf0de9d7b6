"""`dermis data ...`: from the ISIC Archive, or what users have, to one checked file of training images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import table_console
from commands.options import (
    CACHE,
    AttributionOption,
    BinaryOption,
    CacheOption,
    ClassColumnOption,
    DeviceOption,
    ImageColumnOption,
    LayoutOption,
    LicenceOption,
    MapOption,
    MetadataOption,
    PartsOption,
    SourceArgument,
)
from commands.sources import check_maps, read_and_report, read_options, show_preparation

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
            help="isic-2020, isic-2019-melanoma, isic-2019, ham10000, or a number from `isic collection list`; may be "
            "repeated. Default: the paper's set, the first two."
        ),
    ] = None,
) -> None:
    """Download the paper's images, or other collections, from the ISIC Archive.

    After an interruption, run the same command again to continue.
    """
    from training.data.download import PAPER, find_collection
    from training.data.download import download as download_all

    try:
        images = download_all([find_collection(name) for name in dict.fromkeys(collection or PAPER)], out)
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to continue", err=True)
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
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; default: one for each processor.")
    ] = None,
) -> None:
    """Show class balance, sizes, missing metadata and artefacts, first of all the share of framed images in each class."""
    from training.data.inspection import inspect_source, write_inspection

    inspection = inspect_source(
        read_and_report(source, metadata, image_column, class_column, binary, maps, layout), workers=workers
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
def find_duplicates(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="Folder for leaks.csv and for the files of --remove.")],
    split: PartsOption = None,
    remove: Annotated[
        bool,
        typer.Option(
            "--remove", help="Write the split without duplicates to OUT/split, or without --split to OUT/cleaned.csv."
        ),
    ] = False,
    within_parts: Annotated[
        bool, typer.Option("--within-parts", help="With --split and --remove: remove duplicates within a part, too.")
    ] = False,
    embedding: Annotated[
        str, typer.Option(help="Feature space that finds duplicates which the hash misses; none to use the hash only.")
    ] = "lite0",
    min_correlation: Annotated[
        float | None,
        typer.Option(min=0.5, max=1, help="Correlation above which two aligned images are duplicates; default: 0.8."),
    ] = None,
    mirrors: Annotated[bool, typer.Option("--mirrors", help="Also find mirrored and rotated copies; slower.")] = False,
    cache: CacheOption = CACHE,
    device: DeviceOption = "auto",
    metadata: MetadataOption = None,
    image_column: ImageColumnOption = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
    maps: MapOption = None,
    layout: LayoutOption = None,
) -> None:
    """Find near-duplicates, those across the parts of a split first.

    --remove keeps the duplicate that is in the smallest part.
    """
    from training.data.duplicates import CORRELATION
    from training.data.leaks import find_leaks, ids_to_remove, write_cleaned, write_leaks
    from training.data.splits import check_empty, read_split

    target = out if split is None else out / "split"
    if remove and split is not None:
        check_empty(target)
    images = read_and_report(source, metadata, image_column, class_column, binary, maps, layout)
    parts = None if split is None else read_split(split)
    extractor = None
    if embedding != "none":
        from dermis.devices import resolve_device
        from dermis.features import feature_extractor

        extractor = feature_extractor(embedding, resolve_device(device))
    leaks = find_leaks(
        images,
        parts,
        extractor=extractor,
        min_correlation=CORRELATION if min_correlation is None else min_correlation,
        mirrors=mirrors,
        cache=cache,
    )
    write_leaks(leaks, out / "leaks.csv")
    _show_leaks(leaks, embedding != "none")
    typer.echo(f"written to {out / 'leaks.csv'}", err=True)
    if remove:
        removed = ids_to_remove(leaks, within_parts=within_parts or parts is None)
        write_cleaned(images, parts, removed, target)
        typer.echo(f"{len(removed):,} of {len(leaks.records):,} images removed; the others are in {target}")
    if leaks.broken:
        typer.echo(f"{len(leaks.broken):,} images cannot be read, the first is {leaks.broken[0][0]}", err=True)
        raise typer.Exit(3)


@data_app.command("prepare")
def prepare(
    sources: Annotated[
        list[Path], typer.Argument(help="One or more sources, as for `dermis data split`; their ids must differ.")
    ],
    out: Annotated[Path, typer.Option(help="New .zip for the data set.")],
    resolution: Annotated[int, typer.Option(help="Image side in pixels.")] = 256,
    licence: LicenceOption = "unknown",
    attribution: AttributionOption = "",
    metadata: Annotated[
        list[Path] | None, typer.Option(help="CSV of the images; give it once for each source.")
    ] = None,
    image_column: ImageColumnOption = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
    maps: MapOption = None,
    layout: LayoutOption = None,
    skip_unlabelled: Annotated[
        bool, typer.Option("--skip-unlabelled", help="Leave out images without a class.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if an image is broken, instead of leaving it out.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of threads; default: one for each processor.")
    ] = None,
) -> None:
    """Centre-crop and resize images, and write one StyleGAN zip.

    The exit status is 3 if images were skipped. After Ctrl-C, run the same command again to continue.
    """
    from dermis.errors import DataError
    from training.data.prepare import prepare as prepare_zip
    from training.data.sources import read_source

    if metadata and len(metadata) != len(sources):
        raise DataError(f"--metadata: {len(metadata)} tables for {len(sources)} sources; give it once for each")
    tables: list[Path | None] = [*metadata] if metadata else [None] * len(sources)
    loaded = []
    for path, table in zip(sources, tables, strict=True):
        options = read_options(
            metadata=table,
            image_column=image_column,
            class_column=class_column,
            binary=binary,
            maps=maps,
            layout=layout,
        )
        loaded.append(read_source(path, **options))
    check_maps(loaded, maps)
    try:
        prepared = prepare_zip(
            loaded,
            out,
            resolution,
            licence=licence,
            attribution=attribution,
            skip_unlabelled=skip_unlabelled,
            strict=strict,
            workers=workers,
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; run the same command again to continue with {out}.partial", err=True)
        raise typer.Exit(130) from None
    show_preparation(loaded, prepared)
    classes = ", ".join(f"{count:,} {name}" for name, count in prepared.classes.items()) or "no classes"
    typer.echo(f"{out}: {prepared.images:,} images ({classes}), sha256 {prepared.sha256}")
    if prepared.skipped:
        typer.echo(f"{len(prepared.skipped):,} images were skipped, see {out.with_suffix('.skipped.csv')}", err=True)
        raise typer.Exit(3)


@data_app.command("split")
def split(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="New folder for a CSV of each part and split.json.")],
    parts: Annotated[
        str,
        typer.Option(
            help="train-validation, train-validation-test, hospitals, or NAME=SIZE,... with numbers of images or shares."
        ),
    ] = "train-validation",
    seed: Annotated[int, typer.Option(help="Seed of the division.")] = 0,
    skin_tone: Annotated[
        bool,
        typer.Option("--skin-tone", help="Open all images, and add the estimated skin tone of each to the tables."),
    ] = False,
    metadata: MetadataOption = None,
    image_column: ImageColumnOption = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
    maps: MapOption = None,
    layout: LayoutOption = None,
) -> None:
    """Divide images by patient, with the same proportions of the classes in every part."""
    from training.data.splits import check_empty, split_by_patient, write_split

    check_empty(out)
    images = read_and_report(source, metadata, image_column, class_column, binary, maps, layout)
    broken: tuple[tuple[str, str], ...] = ()
    if skin_tone:
        from training.data.inspection import with_skin_tones

        images, broken = with_skin_tones(images)
    division = split_by_patient(images.records, _part_sizes(parts), seed)
    write_split(images, division, out)
    from rich.table import Table

    names = [name or "(no class)" for name in division.whole.classes]
    table = Table("part", "images", "target", "groups", *names)
    for part in (*division.summary, division.whole):
        shares = [f"{count:,} ({100 * part.share(name):.2f} %)" for name, count in part.classes.items()]
        table.add_row(part.name, f"{part.images:,}", f"{part.target:,.0f}", f"{part.groups:,}", *shares)
    table_console().print(table)
    if broken:
        name, reason = broken[0]
        typer.echo(
            f"{len(broken):,} images cannot be opened and have no skin tone; the first is {name}: {reason}", err=True
        )
        raise typer.Exit(3)


_ATTRIBUTE_TITLES = {"skin_type": "Skin types (of the table)", "skin_tone": "Skin tones (ITA, estimated)"}


def _show_inspection(inspection: Inspection) -> None:
    from rich.table import Table

    from training.data.inspection import attribute_counts

    console, classes = table_console(), inspection.classes
    total = sum(classes.values())
    if inspection.by_class:
        framed = [inspection.by_class.share("frame", name) for name in classes if name in _read_classes(inspection)]
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
        names = _read_classes(inspection)
        table = Table("artefact", *names, "Cramér's V", "p", title="Images with artefacts (95 % interval)")
        for association in inspection.by_class.associations:
            shares_of = [inspection.by_class.share(association.artefact, name) for name in names]
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
    for attribute, rows in attribute_counts(inspection).items():
        table = Table(attribute.replace("_", " "), *classes, title=_ATTRIBUTE_TITLES[attribute])
        for value, counts in rows.items():
            table.add_row(value, *(f"{counts[name]:,}" for name in classes))
        console.print(table)
    sizes = list(inspection.sizes.items())
    if sizes:
        listed = ", ".join(f"{width} x {height} ({count:,})" for (width, height), count in sizes[:5])
        console.print(f"Sizes in px: {listed}" + (f" and {len(sizes) - 5} more" if len(sizes) > 5 else ""))


def _read_classes(inspection: Inspection) -> list[str]:
    """Classes of the images that could be opened; others have no shares."""
    return sorted({each.class_name for each in inspection.by_class.shares}) if inspection.by_class else []


def _show_leaks(leaks: Leaks, compared: bool) -> None:
    from rich.table import Table

    by_hash = sum(pair.hash_distance is not None for pair in leaks.pairs)
    by_embedding = sum(pair.similarity is not None for pair in leaks.pairs)
    touched = len({i for pair in leaks.pairs for i in (pair.a, pair.b)})
    typer.echo(
        f"{len(leaks.pairs):,} pairs of near-duplicates among {len(leaks.records):,} images ({touched:,} of them in a "
        f"pair): {by_hash:,} found by hash, {by_embedding:,} by embedding{'' if compared else ' (left out)'}, "
        f"{sum(pair.identical for pair in leaks.pairs):,} identical files"
    )
    if any(leaks.parts):
        typer.echo(f"{len(leaks.across):,} pair{'' if len(leaks.across) == 1 else 's'} across parts")
    if not leaks.pairs:
        return
    table = Table("image", "near-duplicate", "parts", "same patient", "correlation", title="First pairs")
    for pair in leaks.pairs[:10]:
        table.add_row(
            leaks.records[pair.a].id,
            leaks.records[pair.b].id,
            " / ".join(filter(None, (leaks.parts[pair.a], leaks.parts[pair.b]))),
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
