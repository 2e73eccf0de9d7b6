"""`dermis federate ...`: hospitals that train together, simulated on one machine or over the network."""

from __future__ import annotations

import typer

from commands.federate.server import init, invite, register, run_federation, serve
from commands.federate.simulate import simulate, watch
from commands.federate.site import check, join, key

federate_app = typer.Typer(no_args_is_help=True, help="Train one generator or classifier at several hospitals.")
for command in (simulate, watch, init, serve, invite, register, key, check, join):
    federate_app.command()(command)
federate_app.command("run")(run_federation)
