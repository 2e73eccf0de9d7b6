"""`dermis experiment run table2`: what synthetic images are worth to a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from commands.console import table_console

if TYPE_CHECKING:
    from training.experiments.worth import Row


def run_table2(
    data: Path,
    out: Path,
    *,
    only: Sequence[str] | None,
    scale: float,
    size: int | None,
    settings: Sequence[str] | None,
    seeds: Sequence[int],
    generator: Sequence[str],
    generators: Path | None,
    split: Path | None,
    metadata: Path | None,
    class_column: str | None,
    weights: str,
    truncation_psi: float,
    licence: str,
    attribution: str,
    device: str,
    cache: Path,
) -> None:
    """Train classifiers in the scenarios whose generators are given, and print what came of them beside the paper's numbers.

    Ctrl-C saves; the same command goes on, and passes over what is done.
    """
    from dermis.devices import resolve_device
    from dermis.errors import TrainingError
    from training.classifier.config import ClassifierConfig
    from training.classifier.data import load_real
    from training.classifier.export import require_onnx
    from training.classifier.run import Origin
    from training.experiments.scenarios import TABLE2
    from training.experiments.table2 import plan_tasks, read_generators, read_runs, remember, run_tasks
    from training.experiments.worth import compare, remarks, write_worth
    from training.gan.parallel import joined_ranks
    from training.options import parse_settings

    require_onnx()
    names = [scenario.name for scenario in TABLE2]
    if unknown := set(only or ()) - set(names):
        raise TrainingError(f"--only: {min(unknown)} is none of {', '.join(names)}")
    if not scale > 0:
        raise TrainingError(f"--scale: {scale:g} must be positive")
    if not seeds:
        raise TrainingError("--seeds: must be at least 1")
    given = parse_settings(settings or [], ClassifierConfig)
    config = ClassifierConfig(**given | ({} if size is None else {"size": size}))
    sources = read_generators(generator, generators)
    if absent := sorted({each.generator for each in TABLE2 if each.generator} - sources.keys()):
        typer.echo(f"left out, as no --generator is given: scenarios of {', '.join(absent)}", err=True)
    with joined_ranks(resolve_device(device)) as ranks:

        def tell(text: str) -> None:
            if ranks.first:
                typer.echo(text, err=True)

        with ranks.one_after_another():
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
                remember(out, tasks, config, seeds, weights)
        origin = Origin("", "", licence, attribution)
        wanted = [task for task in tasks if not only or task.scenario.name in only]
        done = run_tasks(out, wanted, config, seeds, weights=weights, origin=origin, ranks=ranks, tell=tell)
        if not ranks.first:
            return
        if not done:
            tell("stopped and saved; the same command goes on")
            raise typer.Exit(130)
    runs = {task.scenario.name: read_runs(out, task.scenario, real.test.ids) for task in tasks}
    rows = compare(runs, {task.scenario.name: len(task.data.training) for task in tasks}, real.test)
    warned = [
        task.scenario.title
        for task in tasks
        if runs[task.scenario.name]
        and task.data.synthetic is not None
        and not task.data.generator_saw_training_part_only
    ]
    texts = remarks(rows, warned, real.test)
    write_worth(out, rows, texts)
    _show(rows, texts)
    typer.echo(f"{out / 'table.md'} and {out / 'results.json'} written", err=True)


def _show(rows: Sequence[Row], texts: Sequence[str]) -> None:
    from rich.table import Table

    from training.experiments.worth import cells

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
