"""`dermis evaluate`: measure a bundle against real images and write the numbers into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from commands.console import table_console

if TYPE_CHECKING:
    from training.data.isic import ImageDataset


def evaluate(
    bundle: Annotated[Path, typer.Option(help="Bundle folder; its metrics.json and card are renewed.")],
    data: Annotated[
        Path, typer.Option(help="Real images that it was trained on: a folder of images and metadata.csv.")
    ],
    holdout: Annotated[Path | None, typer.Option(help="Real images that it never saw, split off at random.")] = None,
    extractor: Annotated[
        str, typer.Option(help="Feature space: inception, lite0 or timm:MODEL[@FILE.safetensors].")
    ] = "inception",
    metrics: Annotated[
        Literal["all", "fast"], typer.Option(help="all, or fast: FID, KID, precision and recall.")
    ] = "all",
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page with pictures. It shows training images.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Generated images; default: as many as real ones.")] = None,
    ppl_paths: Annotated[int, typer.Option(help="Paths of the perceptual path length; publications use 50000.")] = 2000,
    truncation_psi: Annotated[float, typer.Option(help="As in generation.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the generated images.")] = 0,
    class_column: Annotated[str | None, typer.Option(help="CSV column of the classes.")] = None,
    metadata: Annotated[Path | None, typer.Option(help="CSV of --data, if it is not its metadata.csv.")] = None,
    holdout_metadata: Annotated[Path | None, typer.Option(help="CSV of --holdout, likewise.")] = None,
    cache: Annotated[Path, typer.Option(help="Where decoded images and features are kept.")] = Path(".dermis/cache"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Distances, coverage and copying of generated against real images, overall and per class, in a feature space."""
    from rich.table import Table

    from dermis.bundle import open_bundle
    from dermis.devices import resolve_device
    from dermis.features import feature_extractor
    from training.data.isic import load_isic
    from training.evaluation.evaluation import evaluate_bundle, keep_metrics
    from training.evaluation.report import check_report_folder, write_report
    from training.evaluation.table import memorising, table_rows

    console = table_console()
    if report is not None:
        check_report_folder(report, bundle)
    opened = open_bundle(bundle)
    space = feature_extractor(
        extractor, resolve_device(device)
    )  # it may have weights to download: before the long work

    def load(source: Path, csv: Path | None) -> ImageDataset:
        return load_isic(source, opened.generator.img_resolution, class_column=class_column, metadata=csv, cache=cache)

    found = evaluate_bundle(
        opened,
        load(data, metadata),
        space,
        holdout=None if holdout is None else load(holdout, holdout_metadata),
        selection=metrics,
        count=count,
        ppl_paths=ppl_paths,
        seed=seed,
        truncation_psi=truncation_psi,
        cache=cache,
        device=device,
        page=report is not None,
    )
    keep_metrics(opened, found.metrics)

    header, *rows = table_rows(found.metrics)
    table = Table()
    for column, name in enumerate(header):
        table.add_column(name, no_wrap=column == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(memorising(found.metrics), highlight=False)
    if repeated := found.metrics.get("real_near_duplicates"):
        console.print(
            f"{repeated:,} of the real images occur more than once; authenticity counts each as one image, the other "
            "metrics do not: find them with `dermis data leaks`",
            highlight=False,
        )
    if not found.metrics["real_is_training_set"]:
        console.print(
            "--data is not the set that the bundle names: authenticity says nothing about copies of its training images",
            highlight=False,
        )
    if report is not None and found.page is not None:
        console.print(f"{write_report(report, found.page)}: shows training images, keep it as you keep them")
