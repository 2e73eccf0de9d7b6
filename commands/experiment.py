"""`dermis experiment ...`: the paper's experiments, or one's own, trained, evaluated and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import table_console

if TYPE_CHECKING:
    from training.experiments.table import Outcome

experiment_app = typer.Typer(no_args_is_help=True, help="Run experiments and compare them with what was reported.")

Which = Annotated[
    list[str],
    typer.Argument(
        help="table1 (the paper's five generators), names, files of one's own; or table2 (its classifiers), "
        "hospitals, or frame-removal."
    ),
]
ScaleOption = Annotated[float, typer.Option(help="Multiplies the length of every run: 0.01 makes 25000 kimg 250.")]
KimgOption = Annotated[float | None, typer.Option(help="Length of every run, whatever the files and --scale say.")]
ResolutionOption = Annotated[int | None, typer.Option(help="Image side in pixels; default: the files', 256.")]
SeedOption = Annotated[int | None, typer.Option(help="Of training and of the generated images; default 0.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="OPTION=VALUE of every configuration, such as batch=16; may be repeated."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@experiment_app.command("list")
def list_experiments() -> None:
    """The experiments that come with dermis."""
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
    typer.echo("table2 trains classifiers on what such generators draw: dermis experiment run table2 --help")
    typer.echo(
        "hospitals trains a generator at each hospital alone, and at all together: dermis experiment run hospitals"
    )
    typer.echo("frame-removal trains them on images whose black frame was removed: dermis experiment run frame-removal")


@experiment_app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Name, or a file of one's own.")],
    scale: ScaleOption = 1.0,
    kimg: KimgOption = None,
    resolution: ResolutionOption = None,
    settings: SettingsOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
) -> None:
    """One experiment with every option of its configuration, as `run` with the same options would train it."""
    from dermis.devices import resolve_device
    from training.experiments.experiment import read_experiment
    from training.experiments.plan import configure
    from training.gan.config import GanConfig
    from training.options import parse_settings

    experiment = read_experiment(name)
    given = parse_settings(settings or [], GanConfig)
    config = configure(
        experiment, resolve_device(device), scale=scale, kimg=kimg, resolution=resolution, seed=seed, settings=given
    )
    kind = "conditional on" if experiment.conditional else "unconditional, trained on"
    typer.echo(f"{experiment.title} ({experiment.source}): {kind} {', '.join(experiment.classes)}")
    for option, value in config.to_dict().items():
        typer.echo(f"{option:<20} {'none' if value is None else json.dumps(value).strip(chr(34))}")
    for metric, number in experiment.reported.items():
        typer.echo(f"{'reported ' + metric:<20} {number:g}")


@experiment_app.command("run")
def run(
    which: Which,
    data: Annotated[Path, typer.Option(help="ISIC folder with its CSV, folder of class folders, or StyleGAN zip.")],
    out: Annotated[Path, typer.Option(help="Folder; each experiment gets a sub-folder, the table lies beside them.")],
    only: Annotated[list[str] | None, typer.Option(help="Run this one of them now; may be repeated.")] = None,
    scale: ScaleOption = 1.0,
    kimg: KimgOption = None,
    resolution: ResolutionOption = None,
    settings: SettingsOption = None,
    seed: SeedOption = None,
    extractor: Annotated[
        str,
        typer.Option(
            help="Feature space: inception, dinov2, clip, lite0, lite1, lite2 or timm:MODEL\\[@FILE.safetensors]."
        ),
    ] = "inception",
    samples: Annotated[
        int | None,
        typer.Option(
            help="Generated images; default: as many as real ones. frame-removal: of each class, default 10000."
        ),
    ] = None,
    ppl_paths: Annotated[int, typer.Option(help="Paths of the perceptual path length; publications use 50000.")] = 2000,
    holdout: Annotated[Path | None, typer.Option(help="Real images that are not trained on: tests memorising.")] = None,
    metadata: Annotated[Path | None, typer.Option(help="CSV of --data, if it is not its metadata.csv.")] = None,
    holdout_metadata: Annotated[Path | None, typer.Option(help="CSV of --holdout, likewise.")] = None,
    class_column: Annotated[str | None, typer.Option(help="CSV column of the classes; default: target, ...")] = None,
    binary: Annotated[
        bool, typer.Option("--binary", help="Two classes: malignant (melanoma) and benign (every other diagnosis).")
    ] = False,
    licence: Annotated[str, typer.Option(help="Licence of the training images, carried by the weights.")] = "unknown",
    attribution: Annotated[str, typer.Option(help="Whom users of the weights must credit.")] = "",
    device: DeviceOption = "auto",
    compile_networks: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile the main phases; default: on CUDA.")
    ] = None,
    snapshot_kimg: Annotated[
        float | None, typer.Option(help="Checkpoint every so many kimg; default 20, or a hundredth of a long run.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where decoded images and features are kept.")] = Path(".dermis/cache"),
    generator: Annotated[
        list[str] | None,
        typer.Option(
            help="frame-removal: the bundle. table2: NAME=SOURCE of gan, cgan or cgan-no-color, gan=benign=SOURCE too."
        ),
    ] = None,
    generators: Annotated[
        Path | None, typer.Option(help="table2: a folder of `experiment run table1` with the generators.")
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help="frame-removal: direction of the bundle along which the frame comes and goes.")
    ] = None,
    framing: Annotated[float, typer.Option(help="frame-removal: strength that brings the frame.")] = -2.0,
    removing: Annotated[float, typer.Option(help="frame-removal: strength that removes it.")] = 1.0,
    seeds: Annotated[int, typer.Option(help="table2, frame-removal: classifiers in each scenario.")] = 3,
    split: Annotated[
        Path | None, typer.Option(help="table2: folder of `dermis data split` with train, validation and test.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="table2: what classifiers begin with: imagenet, none, or a .safetensors file.")
    ] = "imagenet",
    truncation_psi: Annotated[float, typer.Option(help="table2: of the synthetic images.")] = 1.0,
    federation: Annotated[
        list[str] | None,
        typer.Option(help="hospitals: OPTION=VALUE of the federation, such as iterations=25; may be repeated."),
    ] = None,
    sizes: Annotated[
        str, typer.Option(help="hospitals: their proportions; default the paper's, 2000,12000,20000.")
    ] = "",
) -> None:
    """Train and evaluate experiments one after another, choose the best and print the table.

    table2 trains classifiers on real images, on synthetic ones and on both, several seeds each.

    Ctrl-C saves; the same command goes on, and passes over what is done.
    """
    from dermis.devices import resolve_device
    from dermis.errors import TrainingError
    from dermis.features import feature_extractor
    from dermis.metrics.perceptual import lpips
    from training.data.sources import Source, read_source
    from training.experiments.plan import Measuring, configure, plan_tasks, read_experiments, remember
    from training.experiments.run import read_result, run_experiment
    from training.experiments.table import collect, write_outcome
    from training.gan.config import GanConfig
    from training.gan.snapshot import Origin
    from training.options import parse_settings

    if "table2" in which:
        from commands.experiment_table2 import run_table2

        foreign = {"--kimg": kimg, "--samples": samples, "--holdout": holdout, "--snapshot-kimg": snapshot_kimg}
        for option, value in {"other experiments": which[1:] or None, **foreign}.items():
            if value is not None:
                raise TrainingError(f"table2: takes no {option}; it trains classifiers, run it by itself")
        run_table2(
            data,
            out,
            only=only,
            scale=scale,
            size=resolution,
            settings=settings,
            seeds=range(seed or 0, (seed or 0) + seeds),
            generator=generator or [],
            generators=generators,
            split=split,
            metadata=metadata,
            class_column=class_column,
            weights=weights,
            truncation_psi=truncation_psi,
            licence=licence,
            attribution=attribution,
            device=device,
            cache=cache,
        )
        return
    if "frame-removal" in which:
        from commands.experiment_frame_removal import run_frames

        given_too = {"--kimg": kimg, "--holdout": holdout, "--snapshot-kimg": snapshot_kimg}
        for option, value in {"other experiments": which[1:] or None, "--only": only or None, **given_too}.items():
            if value is not None:
                raise TrainingError(f"frame-removal: takes no {option}; run it by itself")
        run_frames(
            data,
            out,
            generator=generator or [],
            direction=direction,
            framing=framing,
            removing=removing,
            samples=samples,
            scale=scale,
            size=resolution,
            settings=settings,
            seeds=seeds,
            synthetic_seed=seed or 0,
            split=split,
            metadata=metadata,
            class_column=class_column,
            weights=weights,
            truncation_psi=truncation_psi,
            device=device,
            cache=cache,
        )
        return
    if "hospitals" in which:
        from commands.experiment_hospitals import run_hospitals
        from commands.federate import parse_sizes

        foreign = {"--holdout": holdout, "--snapshot-kimg": snapshot_kimg}
        for option, value in {"other experiments": which[1:] or None, **foreign}.items():
            if value is not None:
                raise TrainingError(f"hospitals: takes no {option}; run it by itself")
        run_hospitals(
            data,
            out,
            only=only,
            kimg=kimg,
            resolution=resolution,
            settings=settings or [],
            options=federation or [],
            sizes=parse_sizes(sizes),
            seed=seed or 0,
            extractor=extractor,
            samples=samples,
            metadata=metadata,
            class_column=class_column,
            licence=licence,
            attribution=attribution,
            device=device,
            cache=cache,
        )
        return
    target = resolve_device(device)
    experiments = read_experiments(which)
    names = [experiment.name for experiment in experiments]
    if unknown := set(only or ()) - set(names):
        raise TrainingError(f"--only: {min(unknown)} is none of {', '.join(names)}")
    given = parse_settings(settings or [], GanConfig)
    configs = [
        configure(each, target, scale=scale, kimg=kimg, resolution=resolution, seed=seed, settings=given)
        for each in experiments
    ]

    def read(path: Path, csv: Path | None) -> Source:
        return read_source(path, metadata=csv, class_column=class_column, binary=binary)

    held = None if holdout is None else read(holdout, holdout_metadata)
    tasks = plan_tasks(experiments, configs, read(data, metadata), held, cache=cache)
    space = feature_extractor(extractor, target)
    if space.embed is None:
        lpips(target)  # weights to download, which should not fail after the training
    measuring = Measuring(space, samples, ppl_paths)
    remember(out, tasks, measuring)

    wanted = [task for task in tasks if not only or task.experiment.name in only]
    for number, task in enumerate(wanted, 1):
        name, folder = task.experiment.name, out / task.experiment.name
        head = f"[{number}/{len(wanted)}] {name}:"
        if read_result(folder) is not None:
            typer.echo(f"{head} done already", err=True)
            continue
        typer.echo(f"{head} {len(task.dataset.labels):,} images, {task.config.total_kimg:,.4g} kimg", err=True)
        origin = Origin(name, data.resolve().name, licence, attribution)
        try:
            result = run_experiment(
                task,
                folder,
                measuring,
                origin,
                device=target,
                cache=cache,
                snapshot_kimg=snapshot_kimg,
                compile_networks=target.type == "cuda" if compile_networks is None else compile_networks,
            )
        except KeyboardInterrupt:  # in the evaluation, of which nothing is written before its end
            result = None
        if result is None:
            typer.echo(f"{name}: stopped and saved; the same command goes on", err=True)
            raise typer.Exit(130)
    outcome = collect(out, experiments)
    write_outcome(out, outcome)
    _show(outcome)
    typer.echo(f"{out / 'table.md'} and {out / 'results.json'} written", err=True)


def _show(outcome: Outcome) -> None:
    """What was measured, below it what was reported: in one table they would not fit into 80 columns."""
    from rich.table import Table

    from training.experiments.table import remarks, rows

    console = table_console()
    header, *body = rows(outcome)
    names, spaces = zip(*(name.partition("@")[::2] for name in header), strict=True)
    split = header.index("s/kimg") + 1  # what is left of it is ours

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
