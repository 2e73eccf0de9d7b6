"""`dermis experiment run frame-removal`: does a classifier learn better from images without the black frame?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer


def run_frames(
    data: Path,
    out: Path,
    *,
    generator: Sequence[str],
    direction: str | None,
    framing: float,
    removing: float,
    samples: int | None,
    scale: float,
    size: int | None,
    settings: Sequence[str] | None,
    seeds: int,
    synthetic_seed: int,
    split: Path | None,
    metadata: Path | None,
    class_column: str | None,
    weights: str,
    truncation_psi: float,
    device: str,
    cache: Path,
) -> None:
    """Draw the arms, train every seed of each, print the table. Ctrl-C saves; the same command goes on."""
    from dermis.bundle import open_bundle
    from dermis.devices import resolve_device
    from dermis.errors import RequestError
    from training.classifier.config import ClassifierConfig
    from training.classifier.data import load_real
    from training.experiments.frame_removal import TABLE, FramePlan, run_frame_removal, write_results
    from training.options import parse_settings

    if len(generator) != 1:
        raise RequestError(
            "--generator", "frame-removal takes one bundle with directions, of benign and malignant images"
        )
    bundle = open_bundle(generator[0].partition("=")[2] or generator[0])
    if direction is None:
        raise RequestError(
            "--direction",
            "name the direction that moves images towards the frame; dermis directions measure --framed tells",
        )
    plan = FramePlan(
        direction=direction,
        framing=framing,
        removing=removing,
        per_class=samples or max(1, round(10_000 * scale)),
        truncation_psi=truncation_psi,
        synthetic_seed=synthetic_seed,
        seeds=seeds,
    )
    given = parse_settings(settings or [], ClassifierConfig)
    config = ClassifierConfig(**given | ({} if size is None else {"size": size}))
    real = load_real(data, config.size, metadata=metadata, class_column=class_column, split=split, cache=cache)
    trained_on = bundle.provenance.get("dataset")
    if not isinstance(trained_on, dict) or trained_on.get("sha256") != real.train.sha256:
        typer.echo(
            "warning: the generator may have seen test images, and then all numbers are too good; train it on the training "
            "part alone (see docs/classifier.md)",
            err=True,
        )
    measured = run_frame_removal(
        real,
        bundle,
        config,
        plan,
        out,
        weights=weights,
        device=device,
        target=resolve_device(device),
        cache=cache,
    )
    if measured is None:
        typer.echo("stopped and saved; the same command goes on", err=True)
        raise typer.Exit(130)
    typer.echo(write_results(out, real.test, measured, plan), nl=False)
    typer.echo(f"{out / TABLE}", err=True)
