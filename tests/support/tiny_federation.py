"""A tiny federation in this process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training.federated.client.app import app
from training.federated.config import FederationConfig
from training.federated.simulation.local_grid import LocalGrid
from training.federated.site import Site

TINY = "batch=4 z_dim=8 w_dim=8 channel_base=64 channel_max=8 r1_interval=2 augment_kimg=0.1 augment_target=-1.0"


def tiny_federation(**changes: Any) -> FederationConfig:
    small: dict[str, Any] = {
        "rounds": 2,
        "iterations": 3,
        "resolution": 8,
        "options": TINY,
        "precision": "fp32",
        "evaluate_rounds": 0,
        "wait_timeout": 0.1,
        "attempts": 1,
    }
    return FederationConfig(**(small | changes))


def tiny_sites(data: Path, out: Path, seeds: Iterable[int] = (0, 1, 2)) -> list[Site]:
    return [
        Site(data, out / f"client-{i}", seed_offset=seed, device="cpu", cache=out.parent / "cache")
        for i, seed in enumerate(seeds)
    ]


def local_grid(federation: FederationConfig, sites: list[Site]) -> LocalGrid:
    return LocalGrid(app, [site.to_node_config() for site in sites], federation.to_run_config())
