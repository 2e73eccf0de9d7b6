"""Flower's ServerApp: runs the rounds, and leaves everything in the folder that the run's configuration names as `out`."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from dermis.errors import TrainingError
from training.federated.config import parse_run_config
from training.federated.server.rounds import run_federation

_LOG = logging.getLogger("flwr")  # which `flwr run --stream` shows
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Begin the federation, or go on with the one in `out`."""
    out = context.run_config.get("out")
    if not isinstance(out, str) or not out:
        raise TrainingError("out: must name a folder of the server, as in --run-config 'out=\"/federation/first\"'")
    federation = parse_run_config(context.run_config)
    run_federation(grid, federation, Path(out), tell=lambda text: _LOG.info("%s", text))
