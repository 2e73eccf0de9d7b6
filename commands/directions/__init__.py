"""`dermis directions ...`: find directions of a generator, keep them in its bundle, show and measure them."""

from __future__ import annotations

import typer

from commands.directions.fit import fit, list_directions
from commands.directions.measure import measure
from commands.directions.pictures import strips, sweep

directions_app = typer.Typer(no_args_is_help=True, help="Find, list, show and measure directions of a generator.")
directions_app.command("fit")(fit)
directions_app.command("list")(list_directions)
directions_app.command("strips")(strips)
directions_app.command("sweep")(sweep)
directions_app.command("measure")(measure)
