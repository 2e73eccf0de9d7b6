"""`dermis evaluate`: measure a bundle against real images and write the numbers into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from commands.console import table_console

if TYPE_CHECKING:
    from rich.console import Console

    from training.data.isic import ImageDataset


def evaluate(
    bundle: Annotated[Path, typer.Option(help="Bundle folder; its metrics.json and card are renewed.")],
    data: Annotated[
        Path, typer.Option(help="Real images that it was trained on: a folder of images and metadata.csv.")
    ],
    holdout: Annotated[
        Path | None,
        typer.Option(
            help="Real images that it never saw, split off at random; --data if only --holdout-metadata is given."
        ),
    ] = None,
    extractor: Annotated[
        list[str] | None,
        typer.Option(
            help="Feature space, such as inception, lite0 or timm:MODEL\\[@FILE.safetensors]; may be repeated, or hold "
            "several with commas between them. Default: lite0 and lite1."
        ),
    ] = None,
    metrics: Annotated[
        Literal["all", "fast"], typer.Option(help="all, or fast: Fréchet distance, KID, precision and recall.")
    ] = "all",
    noise_mode: Annotated[
        list[str] | None,
        typer.Option(
            help="Noise of the generated images: random (default), const or none; repeated, all are compared."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page with pictures. It shows training images.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Generated images; default: as many as real ones.")] = None,
    ppl_paths: Annotated[int, typer.Option(help="Paths of the perceptual path length; publications use 50000.")] = 2000,
    truncation_psi: Annotated[float, typer.Option(help="As in generation.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the generated images.")] = 0,
    class_column: Annotated[str | None, typer.Option(help="CSV column of the classes.")] = None,
    metadata: Annotated[Path | None, typer.Option(help="CSV of --data, if it is not its metadata.csv.")] = None,
    holdout_metadata: Annotated[
        Path | None, typer.Option(help="CSV of --holdout, for instance of the same folder.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where decoded images and features are kept.")] = Path(".dermis/cache"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Distances, variety and copying of generated against real images, overall and per class, in feature spaces."""
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
    # Weights may have to be downloaded: before the long work.
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
        console.print(f"{write_report(report, result.page)}: shows training images, keep it as you keep them")


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
