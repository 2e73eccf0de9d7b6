"""`dermis experiment list`, `show` and `table1`: the paper's generators, and your own, trained, evaluated and compared."""

from __future__ import annotations

import json
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
    CompileOption,
    DataOption,
    DeviceOption,
    ExtractorOption,
    HoldoutMetadataOption,
    HoldoutOption,
    LicenceOption,
    MetadataOption,
    PplPathsOption,
    SettingsOption,
)

if TYPE_CHECKING:
    from training.experiments.table import Outcome

ScaleOption = Annotated[float, typer.Option(help="Factor for the length of every run: 0.01 turns 25000 kimg into 250.")]
KimgOption = Annotated[float | None, typer.Option(help="Length of every run, in place of the files' and --scale.")]
ResolutionOption = Annotated[int | None, typer.Option(help="Image side in pixels; default: that of the files, 256.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of training and of the generated images; default 0.")]


def list_experiments() -> None:
    """List the experiments that come with dermis."""
    from rich.table import Table

    from training.experiments.experiment import experiment_names, read_experiment

    table = Table("name", "title", "classes", "conditional", "base", "px", "kimg", "augment", "source")
    for name in experiment_names():
        experiment = read_experiment(name)
        config = experiment.config()
        conditional = "yes" if experiment.conditional else "no"
        size = f"{config.resolution}", f"{config.total_kimg:,.0f}", config.augment
        table.add_row(
            name,
            experiment.title,
            ", ".join(experiment.classes),
            conditional,
            experiment.base,
            *size,
            experiment.source,
        )
    table_console().print(table)
    typer.echo("dermis experiment table1 trains and compares all of them; the other experiments are:")
    typer.echo("dermis experiment table2: classifiers trained on images of these generators")
    typer.echo("dermis experiment hospitals: a generator trained at each hospital alone, and at all of them together")
    typer.echo("dermis experiment frame-removal: classifiers trained on images whose black frame was removed")
    typer.echo("dermis experiment edge-cases: classifiers trained on neighbours of edge cases")


def show(
    name: Annotated[str, typer.Argument(help="Name of an experiment, or a TOML file.", show_default=False)],
    scale: ScaleOption = 1.0,
    kimg: KimgOption = None,
    resolution: ResolutionOption = None,
    settings: SettingsOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Show an experiment with its whole configuration, as `table1` with the same options would train it."""
    from dermis.devices import resolve_device
    from training.experiments.experiment import read_experiment
    from training.experiments.plan import configure
    from training.gan.config import GanConfig
    from training.options import parse_settings

    experiment = read_experiment(name)
    config = configure(
        experiment,
        resolve_device(device),
        scale=scale,
        kimg=kimg,
        resolution=resolution,
        seed=seed,
        settings=parse_settings(settings or [], GanConfig),
    )
    kind = "conditional on" if experiment.conditional else "unconditional, trained on"
    typer.echo(f"{experiment.title} ({experiment.source}): {kind} {', '.join(experiment.classes)}")
    for option, value in config.to_dict().items():
        typer.echo(f"{option:<20} {'none' if value is None else json.dumps(value).strip(chr(34))}")
    for metric, number in experiment.reported.items():
        typer.echo(f"{'reported ' + metric:<20} {number:g}")


def table1(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for the table, with a sub-folder for each experiment.")],
    which: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERIMENT]...",
            help="Names of `dermis experiment list`, or TOML files; table1 for the paper's five. Default: table1.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run only this experiment now; may be repeated.")] = None,
    scale: ScaleOption = 1.0,
    kimg: KimgOption = None,
    resolution: ResolutionOption = None,
    settings: SettingsOption = None,
    seed: SeedOption = None,
    extractor: ExtractorOption = "inception",
    samples: Annotated[
        int | None, typer.Option(help="Generated images of an evaluation; default: as many as real ones.")
    ] = None,
    ppl_paths: PplPathsOption = 2000,
    holdout: HoldoutOption = None,
    metadata: MetadataOption = None,
    holdout_metadata: HoldoutMetadataOption = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
    licence: LicenceOption = "unknown",
    attribution: AttributionOption = "",
    device: DeviceOption = "auto",
    compile_networks: CompileOption = None,
    snapshot_kimg: Annotated[
        float | None,
        typer.Option(help="Interval of the checkpoints in kimg; default 20, or a hundredth of a long run."),
    ] = None,
    cache: CacheOption = CACHE,
) -> None:
    """Train and evaluate generators one after another, choose the best and print the table.

    Without arguments these are the paper's five. Ctrl-C saves the state. Run the same command again to continue; finished parts
    are not repeated.
    """
    from dermis.devices import resolve_device
    from dermis.errors import TrainingError
    from dermis.features import feature_extractor
    from dermis.metrics.perceptual import lpips
    from training.data.sources import Source, read_source
    from training.experiments.plan import (
        EvaluationOptions,
        check_or_write_plan,
        configure,
        plan_tasks,
        read_experiments,
    )
    from training.experiments.run import read_result, run_experiment
    from training.experiments.table import collect, write_outcome
    from training.gan.config import GanConfig
    from training.gan.snapshot import GeneratorOrigin
    from training.options import parse_settings

    target = resolve_device(device)
    experiments = read_experiments(which or ["table1"])
    names = [experiment.name for experiment in experiments]
    if unknown := set(only or ()) - set(names):
        raise TrainingError(f"--only: {min(unknown)} is none of {', '.join(names)}")
    overrides = parse_settings(settings or [], GanConfig)
    configs = [
        configure(each, target, scale=scale, kimg=kimg, resolution=resolution, seed=seed, settings=overrides)
        for each in experiments
    ]

    def read(path: Path, csv: Path | None) -> Source:
        return read_source(path, metadata=csv, class_column=class_column, binary=binary)

    held_out = None if holdout is None else read(holdout, holdout_metadata)
    tasks = plan_tasks(experiments, configs, read(data, metadata), held_out, cache=cache)
    space = feature_extractor(extractor, target)
    if space.embed is None:
        lpips(target)  # downloads its weights, which should not fail after the training
    evaluation = EvaluationOptions(space, samples, ppl_paths)
    check_or_write_plan(out, tasks, evaluation)

    selected = [task for task in tasks if not only or task.experiment.name in only]
    for number, task in enumerate(selected, 1):
        name, folder = task.experiment.name, out / task.experiment.name
        head = f"[{number}/{len(selected)}] {name}:"
        if read_result(folder) is not None:
            typer.echo(f"{head} done already", err=True)
            continue
        typer.echo(f"{head} {len(task.dataset.labels):,} images, {task.config.total_kimg:,.4g} kimg", err=True)
        origin = GeneratorOrigin(name, data.resolve().name, licence, attribution)
        try:
            result = run_experiment(
                task,
                folder,
                evaluation,
                origin,
                device=target,
                cache=cache,
                snapshot_kimg=snapshot_kimg,
                compile_networks=target.type == "cuda" if compile_networks is None else compile_networks,
            )
        except KeyboardInterrupt:  # during the evaluation, which writes nothing before its end
            result = None
        if result is None:
            typer.echo(f"{name}: stopped and saved; run the same command again to continue", err=True)
            raise typer.Exit(130)
    outcome = collect(out, experiments)
    write_outcome(out, outcome)
    _show(outcome)
    typer.echo(f"{out / 'table.md'} and {out / 'results.json'} written", err=True)


def _show(outcome: Outcome) -> None:
    """Print measured numbers, and below them reported ones: one table of both would not fit into 80 columns."""
    from rich.table import Table

    from training.experiments.table import remarks, rows

    console = table_console()
    header, *body = rows(outcome)
    names, spaces = zip(*(name.partition("@")[::2] for name in header), strict=True)
    split = header.index("s/kimg") + 1  # columns to the left of it are measured here

    def show(title: str, columns: list[str], lines: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for column in columns:
            table.add_column(column, overflow="fold", min_width=12 if column == "" else None)
        for line in lines:
            table.add_row(*(cell.replace(" [", "\n[").replace(" ±", "\n±") for cell in line))
        console.print(table, "")

    if outcome.results:
        space, distance = spaces[names.index("P")], spaces[names.index("PPL")]
        show(f"Feature space {space}, PPL by {distance}", list(names[:split]), [line[:split] for line in body])
    if reported := [line[:1] + line[split:] for line in body if any(line[split:])]:
        columns = [name.removeprefix("reported ") for name in names[split:]]
        show("Reported, in its own feature space", ["", *columns], reported)
    for text in remarks(outcome):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
