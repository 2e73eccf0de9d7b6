"""`dermis experiment run hospitals`: alone, together, and in one place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from commands.console import table_console


def run_hospitals(
    data: Path,
    out: Path,
    *,
    only: Sequence[str] | None,
    kimg: float | None,
    resolution: int | None,
    settings: Sequence[str],
    options: Sequence[str],
    sizes: Sequence[float],
    seed: int,
    extractor: str,
    samples: int | None,
    metadata: Path | None,
    class_column: str | None,
    licence: str,
    attribution: str,
    device: str,
    cache: Path,
) -> None:
    """Run the arms, or those in `only`, and print what came of them. Ctrl-C loses no finished round."""
    from dataclasses import replace

    import torch
    from rich.markdown import Markdown
    from rich.text import Text

    from dermis.errors import TrainingError
    from training.data.sources import read_source
    from training.experiments.hospital_curves import draw_curves
    from training.experiments.hospitals import plan, run_arm, write_results
    from training.federated.config import FederationConfig, gan_config, parse_options
    from training.federated.simulation.simulate import hospital_sizes

    logging.getLogger("flwr").setLevel(logging.WARNING)
    given: dict[str, Any] = {
        "name": "hospitals",
        "options": " ".join(settings),
        "resolution": resolution or 256,
        "seed": seed,
        "extractor": extractor,
        "licence": licence,
        "attribution": attribution,
    }
    if samples is not None:
        given["evaluate_images"] = samples
    federation = FederationConfig(**(given | parse_options(options)))
    if kimg is not None:
        batch = gan_config(federation, torch.device("cpu")).batch
        federation = replace(federation, rounds=max(round(kimg * 1000 / batch / federation.iterations), 1))
    source = read_source(data, metadata=metadata, class_column=class_column, binary=federation.binary)
    hospitals = plan(
        source,
        data,
        out,
        federation,
        hospital_sizes(3, sizes),
        class_column=class_column,
        cache=cache,
        device=device,
    )
    if unknown := set(only or ()) - set(hospitals.arms):
        raise TrainingError(f"--only: {min(unknown)} is none of {', '.join(hospitals.arms)}")
    for arm in only or hospitals.arms:
        try:
            run_arm(hospitals, arm, lambda text, arm=arm: typer.echo(f"{arm}: {text}", err=True))  # type: ignore[misc]
        except KeyboardInterrupt:
            typer.echo(f"{arm}: stopped; the same command goes on with the last finished round", err=True)
            raise typer.Exit(130) from None
    write_results(hospitals)
    draw_curves(hospitals)
    console, table = table_console(), (out / "table.md").read_text()
    console.print(Markdown(table) if console.is_terminal else Text(table))
    typer.echo(f"{out / 'table.md'}, {out / 'results.json'} and {out / 'curves.svg'} written", err=True)
