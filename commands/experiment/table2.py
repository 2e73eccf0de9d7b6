"""`dermis experiment table2`: classifiers trained with and without synthetic images, compared on real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import table_console
from commands.options import (
    CACHE,
    AttributionOption,
    CacheOption,
    ClassColumnOption,
    DataOption,
    DeviceOption,
    LicenceOption,
    MetadataOption,
    SettingsOption,
    SplitOption,
    TruncationOption,
    WeightsOption,
)

if TYPE_CHECKING:
    from training.experiments.synthetic_value import Row


def table2(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for the runs and the table.")],
    generator: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SOURCE: the bundle or dataset of gan, cgan or cgan-no-color; gan=benign=SOURCE and "
            "gan=malignant=SOURCE for two generators of one class each. May be repeated."
        ),
    ] = None,
    generators: Annotated[
        Path | None, typer.Option(help="Folder of `dermis experiment table1` with the generators.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Train only this scenario now; may be repeated.")] = None,
    scale: Annotated[float, typer.Option(help="Factor for the numbers of synthetic images.")] = 1.0,
    seeds: Annotated[int, typer.Option(help="Classifiers in each scenario; more can be added later.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the first classifier; the others have the next ones.")] = 0,
    split: SplitOption = None,
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side in pixels of the classifier's input; default 256.")
    ] = None,
    settings: SettingsOption = None,
    weights: WeightsOption = "imagenet",
    truncation_psi: TruncationOption = 1.0,
    licence: LicenceOption = "unknown",
    attribution: AttributionOption = "",
    device: DeviceOption = "auto",
    cache: CacheOption = CACHE,
) -> None:
    """Train classifiers on real images, on synthetic ones and on both, several seeds each, and compare them.

    Scenarios whose generator is not given are skipped. Ctrl-C saves the state. Run the same command again to continue; finished
    parts are not repeated. Not a medical device.
    """
    from dermis.devices import resolve_device
    from dermis.errors import TrainingError
    from training.classifier.config import ClassifierConfig
    from training.classifier.data import load_real
    from training.classifier.export import require_onnx
    from training.classifier.run import ClassifierOrigin
    from training.distributed import joined_ranks
    from training.experiments.scenarios import TABLE2
    from training.experiments.synthetic_value import compare, remarks, write_results
    from training.experiments.table2 import check_or_write_plan, plan_tasks, read_generators, read_runs, run_tasks
    from training.options import parse_settings

    require_onnx()
    names = [scenario.name for scenario in TABLE2]
    if unknown := set(only or ()) - set(names):
        raise TrainingError(f"--only: {min(unknown)} is none of {', '.join(names)}")
    if not scale > 0:
        raise TrainingError(f"--scale: {scale:g} must be positive")
    if seeds < 1:
        raise TrainingError("--seeds: must be at least 1")
    overrides = parse_settings(settings or [], ClassifierConfig)
    config = ClassifierConfig(**overrides | ({} if resolution is None else {"size": resolution}))
    sources = read_generators(generator or [], generators)
    if absent := sorted({each.generator for each in TABLE2 if each.generator} - sources.keys()):
        typer.echo(f"skipped, because no --generator is given: scenarios of {', '.join(absent)}", err=True)
    seed_range = range(seed, seed + seeds)
    with joined_ranks(resolve_device(device)) as ranks:

        def report(text: str) -> None:
            if ranks.first:
                typer.echo(text, err=True)

        with ranks.first_rank_first():
            real = load_real(
                data,
                config.size,
                metadata=metadata,
                class_column=class_column,
                split=split,
                cache=cache,
                progress=ranks.first,
            )
            tasks = plan_tasks(
                TABLE2,
                sources,
                real,
                config.size,
                scale,
                synthetic_seed=0,
                truncation_psi=truncation_psi,
                cache=cache,
                device=device,
                progress=ranks.first,
            )
            if ranks.first:
                check_or_write_plan(out, tasks, config, seed_range, weights)
        origin = ClassifierOrigin("", "", licence, attribution)
        selected = [task for task in tasks if not only or task.scenario.name in only]
        done = run_tasks(out, selected, config, seed_range, weights=weights, origin=origin, ranks=ranks, report=report)
        if not ranks.first:
            return
        if not done:
            report("stopped and saved; run the same command again to continue")
            raise typer.Exit(130)
    runs = {task.scenario.name: read_runs(out, task.scenario, real.test.ids) for task in tasks}
    rows = compare(runs, {task.scenario.name: len(task.data.training) for task in tasks}, real.test)
    uncertain = [
        task.scenario.title
        for task in tasks
        if runs[task.scenario.name]
        and task.data.synthetic is not None
        and not task.data.generator_saw_training_part_only
    ]
    texts = remarks(rows, uncertain, real.test)
    write_results(out, rows, texts)
    _show(rows, texts)
    typer.echo(f"{out / 'table.md'} and {out / 'results.json'} written", err=True)


def _show(rows: Sequence[Row], texts: Sequence[str]) -> None:
    from rich.table import Table

    from training.experiments.synthetic_value import cells

    header, *body = cells(rows)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in header:
        table.add_column(name, overflow="fold")
    for line in body:
        table.add_row(*(cell.replace(" [", "\n[") for cell in line))
    console = table_console()
    console.print(table, "")
    for text in texts:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
