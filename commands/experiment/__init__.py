"""`dermis experiment ...`: the paper's experiments, and your own, trained, measured and compared."""

from __future__ import annotations

from typing import Annotated

import typer

from commands.experiment.edge_cases import edge_cases
from commands.experiment.frame_removal import frame_removal
from commands.experiment.generators import list_experiments, show, table1
from commands.experiment.hospitals import hospitals
from commands.experiment.table2 import table2

experiment_app = typer.Typer(no_args_is_help=True, help="Run experiments and compare them with reported results.")
experiment_app.command("list")(list_experiments)
experiment_app.command("show")(show)
experiment_app.command("table1")(table1)
experiment_app.command("table2")(table2)
experiment_app.command("hospitals")(hospitals)
experiment_app.command("frame-removal")(frame_removal)
experiment_app.command("edge-cases")(edge_cases)


@experiment_app.command("run", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    which: Annotated[str, typer.Argument(help="First argument of the former command.", show_default=False)] = "table1",
) -> None:
    """Replaced by a command for each experiment: name the one to use."""
    own = which in ("table2", "hospitals", "frame-removal")
    command = which if own else "table1"
    names = "" if own or which == "table1" else f" {which} ..."
    typer.echo(
        f"error: `dermis experiment run` was replaced by `dermis experiment {command}{names}`, with the same options",
        err=True,
    )
    raise typer.Exit(2)
