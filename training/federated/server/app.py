"""Flower's ServerApp: it runs the rounds in the folder that the run configuration names as `out`."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from dermis.cpus import keep_freed_memory
from dermis.errors import TrainingError
from training.federated.config import parse_run_config
from training.federated.server.rounds import run_federation

_LOG = logging.getLogger("flwr")  # shown by `flwr run --stream`
app = ServerApp()
keep_freed_memory()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start the federation, or continue the one in `out`."""
    out = context.run_config.get("out")
    if not isinstance(out, str) or not out:
        raise TrainingError("out: must name a folder of the server, as in --run-config 'out=\"/federation/first\"'")
    federation = parse_run_config(context.run_config)
    loggers = [name for name in str(context.run_config.get("log", "")).split(",") if name]
    run_federation(grid, federation, Path(out), on_progress=lambda text: _LOG.info("%s", text), loggers=loggers)
