"""`dermis evaluate`: compare generated with real images and write the numbers into the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from commands.console import table_console
from commands.options import (
    CACHE,
    CacheOption,
    ClassColumnOption,
    DataOption,
    DeviceOption,
    HoldoutMetadataOption,
    MetadataOption,
    PplPathsOption,
    SampleSeedOption,
    TruncationOption,
)

if TYPE_CHECKING:
    from rich.console import Console

    from training.data.images import ImageDataset


def evaluate(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle; its metrics.json and card are replaced.")],
    data: DataOption,
    holdout: Annotated[
        Path | None,
        typer.Option(
            help="Held-out real images, from the same population; default: --data if --holdout-metadata is given."
        ),
    ] = None,
    extractor: Annotated[
        list[str] | None,
        typer.Option(
            help="Feature space, such as inception, lite0 or timm:MODEL\\[@FILE.safetensors]; may be repeated, or be "
            "several separated by commas. Default: lite0 and lite1."
        ),
    ] = None,
    metrics: Annotated[
        Literal["all", "fast"],
        typer.Option(help="all, or fast: only Fréchet distance, KID, precision, recall and copies."),
    ] = "all",
    noise_mode: Annotated[
        list[str] | None,
        typer.Option(
            help="Noise of the generated images: random (default), const or none; repeat it to compare several."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a web page with pictures. It shows training images.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Number of generated images; default: as many as real ones.")
    ] = None,
    ppl_paths: PplPathsOption = 2000,
    truncation_psi: TruncationOption = 1.0,
    seed: SampleSeedOption = 0,
    class_column: ClassColumnOption = None,
    metadata: MetadataOption = None,
    holdout_metadata: HoldoutMetadataOption = None,
    cache: CacheOption = CACHE,
    device: DeviceOption = "auto",
) -> None:
    """Measure distance, variety and copying of generated images, overall and for each class, in feature spaces.

    --data are the images that the bundle was trained on.
    """
    from dermis.bundle import open_bundle
    from dermis.devices import resolve_device
    from training.data.isic import load_isic
    from training.evaluation.evaluation import evaluate_bundle, keep_metrics
    from training.evaluation.report import check_report_folder, write_report
    from training.evaluation.sets import load_spaces, parse_noise_modes

    console = table_console()
    if report is not None:
        check_report_folder(report, bundle)
    noise_modes = parse_noise_modes(noise_mode or ["random"])
    opened = open_bundle(bundle)
    # Before the long work, since weights may have to be downloaded.
    spaces, remark = load_spaces(extractor or [], resolve_device(device))
    if remark:
        typer.echo(remark, err=True)
    held_out_folder = data if holdout is None and holdout_metadata is not None else holdout

    def load(source: Path, csv: Path | None) -> ImageDataset:
        return load_isic(source, opened.generator.img_resolution, class_column=class_column, metadata=csv, cache=cache)

    result = evaluate_bundle(
        opened,
        load(data, metadata),
        spaces,
        holdout=None if held_out_folder is None else load(held_out_folder, holdout_metadata),
        holdout_name=(holdout_metadata or held_out_folder or Path()).name,
        selection=metrics,
        count=count,
        ppl_paths=ppl_paths,
        seed=seed,
        truncation_psi=truncation_psi,
        noise_modes=noise_modes,
        cache=cache,
        device=device,
        page=report is not None,
    )
    keep_metrics(opened, result.metrics)
    _show(console, result.metrics)
    if report is not None and result.page is not None:
        console.print(f"{write_report(report, result.page)}: shows training images, so protect it as you protect them")


def _show(console: Console, metrics: Mapping[str, Any]) -> None:
    from rich.table import Table

    from training.evaluation.table import copies, held_out_text, path_length_text, space_tables

    for block in space_tables(metrics):
        console.print(f"{block.space}: {block.remark}", highlight=False)
        for header, *rows in filter(None, (block.rows, block.class_rows)):
            table = Table()
            for column, name in enumerate(header):
                table.add_column(name, no_wrap=column == 0)
            for row in rows:
                table.add_row(*row)
            console.print(table)
    for text in (held_out_text(metrics), path_length_text(metrics), *copies(metrics)):
        if text:
            console.print(text, highlight=False)
    repeated = [space["copies"].get("real_near_duplicates", 0) for space in metrics["spaces"].values()]
    if max(repeated):
        console.print(
            f"{max(repeated):,} of the real images occur more than once; authenticity counts each as one image, the other "
            "metrics do not: find them with `dermis data leaks`",
            highlight=False,
        )
    if not metrics["real_is_training_set"]:
        console.print(
            "--data is not the set that the bundle names: authenticity says nothing about copies of its training images",
            highlight=False,
        )
