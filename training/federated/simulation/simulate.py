"""Simulated hospitals on one machine: one source of images divided by patient, each part is a client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from training.data.sources import Source
from training.data.splits import HOSPITALS, REST, read_split, split_by_patient, write_split
from training.federated.client.app import app
from training.federated.config import FederationConfig
from training.federated.server.global_state import GlobalState, as_begun
from training.federated.server.rounds import OnRound, run_federation
from training.federated.simulation.local_grid import LocalGrid
from training.federated.site import Site

SPLIT = "hospitals"


def hospital_sizes(count: int, sizes: Sequence[float] = ()) -> dict[str, float]:
    """Return proportions of images by the hospital's name.

    Args:
        count: Number of hospitals. Without `sizes`, three have the paper's sizes, and other numbers equal ones.
        sizes: Proportions, one for each hospital.
    """
    if sizes:
        return {f"hospital-{i}": size for i, size in enumerate(sizes, 1)}
    return dict(HOSPITALS) if count == 3 else {f"hospital-{i}": 1 / count for i in range(1, count + 1)}


def divide(source: Source, sizes: Mapping[str, float], out: Path, seed: int = 0) -> dict[str, Path]:
    """Divide images by patient among hospitals, as CSV files in out/hospitals. An existing division is used again.

    Args:
        source: The images.
        sizes: Proportions by name.
        out: Folder of the federation.
        seed: Decides the division.

    Returns:
        The CSV file of each hospital.

    Raises:
        DataError: The images cannot be divided in this way.
    """
    folder = out / SPLIT
    if not folder.exists():
        # The sizes are proportions: every image belongs to a hospital.
        scale = len(source.records) / sum(sizes.values())
        targets = {name: size * scale for name, size in sizes.items()}
        write_split(source, split_by_patient(source.records, targets, seed), folder)
    return hospitals_of_split(folder)


def hospitals_of_split(folder: Path) -> dict[str, Path]:
    """Return the CSV file of each part that `dermis data split` wrote, except the rest.

    Raises:
        DataError: The folder is not a split.
    """
    names = sorted(set(read_split(folder).values()) - {REST})
    return {name: folder / f"{name}.csv" for name in names}


def hospital_sites(
    data: Path,
    tables: Mapping[str, Path],
    out: Path,
    *,
    class_column: str | None = None,
    cache: Path | None = None,
    validation: float = 0.2,
    device: str = "auto",
    threads: int = 0,
) -> dict[str, Site]:
    """Return a site for each hospital, with different seeds and with their states in out/members."""
    return {
        name: Site(
            data,
            out / "members" / name,
            metadata=table,
            class_column=class_column,
            cache=cache,
            validation=validation,
            seed_offset=number,
            device=device,
            threads=threads,
        )
        for number, (name, table) in enumerate(tables.items())
    }


def simulate(
    federation: FederationConfig,
    sites: Sequence[Site],
    out: Path,
    *,
    on_progress: Callable[[str], None] = lambda text: None,
    on_round: OnRound | None = None,
    loggers: Sequence[str] = (),
) -> GlobalState:
    """Run `run_federation` with these clients in this process. The same call continues a federation that was stopped.

    Without a `start`, it is continued with the one that it began with.
    """
    federation = as_begun(federation, out)
    grid = LocalGrid(app, [site.to_node_config() for site in sites], federation.to_run_config())
    return run_federation(grid, federation, out, on_progress=on_progress, on_round=on_round, loggers=loggers)
