"""The paper's second setting: hospitals of different size train alone, federated, and centrally with all images.

All arms start from the same random weights and show the same number of images at each client. The arms with one hospital, and
the central arm, are federations with one client. They compute the same as training without a federation. Therefore all arms
are measured at the same points and by the same code, against the hospitals' own validation images, which no arm is trained on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dermis.devices import resolve_device
from dermis.errors import TrainingError
from dermis.files import write_file
from training.data.sources import Source
from training.data.splits import write_rows
from training.evaluation.table import fd_name
from training.federated.config import FederationConfig, gan_config
from training.federated.server.gan_result import averaged_generator
from training.federated.server.global_state import GlobalState
from training.federated.server.record import read_rounds
from training.federated.simulation.simulate import divide, hospital_sites, simulate
from training.federated.site import Site, site_images
from training.federated.tasks.gan import distances

CENTRAL, FEDERATED = "central", "federated"
FACTORS = (2.0, 1.5, 1.25, 1.1, 1.0)  # levels: multiples of the best distance that all arms reach
RESULTS = "results.json"


@dataclass(frozen=True)
class Hospitals:
    """The experiment.

    Attributes:
        federation: Options that all arms share.
        sites: Hospitals by name, from the smallest.
        out: Folder of the experiment.
    """

    federation: FederationConfig
    sites: Mapping[str, Site]
    out: Path

    @property
    def arms(self) -> list[str]:
        """Names of the arms: central, each hospital alone, federated."""
        return [CENTRAL, *self.sites, FEDERATED]


@dataclass(frozen=True)
class Point:
    """A measurement after `round` rounds, after each client has shown `kimg` thousand images to its discriminator."""

    round: int
    kimg: float
    fid: float
    kid: float


Curves = dict[str, dict[str, list[Point]]]
"""Measurements by arm and hospital."""


def plan(
    source: Source,
    data: Path,
    out: Path,
    federation: FederationConfig,
    sizes: Mapping[str, float],
    *,
    class_column: str | None = None,
    cache: Path | None = None,
    device: str = "auto",
) -> Hospitals:
    """Divide the images by patient among the hospitals.

    Args:
        source: The images.
        data: Folder that they were read from.
        out: Folder of the experiment.
        federation: Options that all arms share.
        sizes: Proportions of the hospitals by name.
        class_column: CSV column of the classes.
        cache: Folder for decoded images and features.
        device: auto, cpu, cuda, mps or xpu.

    Raises:
        DataError: The images cannot be divided in this way.
        TrainingError: An option does not fit.
    """
    if federation.task != "gan":
        raise TrainingError("task: this experiment compares generators; use task=gan")
    gan_config(federation, torch.device("cpu"))
    tables = divide(source, sizes, out, federation.seed)
    sites = hospital_sites(data, tables, out, class_column=class_column, cache=cache, device=device)
    ordered = sorted(sites, key=lambda name: len(_images(federation, sites[name]).train.labels))
    return Hospitals(federation, {name: sites[name] for name in ordered}, out)


def run_arm(hospitals: Hospitals, arm: str, tell: Callable[[str], None] = lambda text: None) -> None:
    """Train and measure one arm in its folder, or continue it."""
    out, federation = hospitals.out / arm, hospitals.federation
    if arm == FEDERATED:
        members = [replace(site, state=out / "members" / name) for name, site in hospitals.sites.items()]
        simulate(replace(federation, clients=len(members)), members, out, on_progress=tell)
        return
    alone = replace(federation, clients=1, min_clients=1, strategy="fedavg", strategy_options="", wire_dtype="fp32")
    alone = replace(alone, secure_aggregation=False, optimizer="local", share="both")
    if arm != CENTRAL:
        simulate(alone, [replace(hospitals.sites[arm], state=out / "members", seed_offset=0)], out, on_progress=tell)
        return
    site = _central_site(hospitals, out)
    simulate(alone, [site], out, on_progress=tell, on_round=lambda state: {"measured": _measure_all(hospitals, state)})


def curves(hospitals: Hospitals) -> Curves:
    """Return all measurements so far, by arm and hospital."""
    federation = hospitals.federation
    step = federation.iterations * gan_config(federation, torch.device("cpu")).batch / 1000
    by_size = list(hospitals.sites)
    measured: Curves = {}
    for arm in hospitals.arms:
        by_hospital: dict[str, list[Point]] = {}
        for line in read_rounds(hospitals.out / arm):
            if line["round"] > federation.rounds:  # the arm was run with more rounds before
                break
            for name, numbers in line.get("measured", {}).items():
                # Clients of a federation are numbered by size, so the k-th is the k-th smallest hospital.
                hospital = name if name in by_size else arm if arm in by_size else by_size[int(name.split("-")[1]) - 1]
                if "fid" in numbers:
                    point = Point(line["round"], line["round"] * step, numbers["fid"], numbers["kid"])
                    by_hospital.setdefault(hospital, []).append(point)
        if by_hospital:
            measured[arm] = by_hospital
    return measured


def levels(measurements: Curves, hospital: str) -> list[float]:
    """Return the target distances (levels). The experiment compares how soon each arm reaches them.

    They are multiples of the best distance that all arms reach for this hospital, rounded up, and below the start.
    """
    measured = [by_hospital[hospital] for by_hospital in measurements.values() if by_hospital.get(hospital)]
    if not measured:
        return []
    best, start = max(_best(points).fid for points in measured), min(points[0].fid for points in measured)
    multiples = [float(math.ceil(best * factor)) for factor in FACTORS]
    return [level for level in multiples if level < start]


def reached(points: Sequence[Point], level: float) -> Point | None:
    """Return the first measurement at or below a level, without interpolation; None if there is none."""
    return next((point for point in points if point.fid <= level), None)


def _best(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: point.fid)


def results(hospitals: Hospitals) -> dict[str, Any]:
    """Return the curves, when levels were reached, and the speed-up over each hospital alone, for JSON."""
    measured = curves(hospitals)
    sizes = {name: len(_images(hospitals.federation, site).train.labels) for name, site in hospitals.sites.items()}
    validation = {name: _validation_images(hospitals, site) for name, site in hospitals.sites.items()}
    rows = []
    for hospital in hospitals.sites:
        for level in levels(measured, hospital):
            times = {arm: reached(points[hospital], level) for arm, points in measured.items() if hospital in points}
            alone, together = times.get(hospital), times.get(FEDERATED)
            rows.append(
                {
                    "hospital": hospital,
                    "fid": level,
                    "reached": {
                        arm: None if p is None else {"round": p.round, "kimg": p.kimg} for arm, p in times.items()
                    },
                    "speed_up": alone.kimg / together.kimg if alone and together and together.kimg else None,
                }
            )
    last = {
        arm: {name: {"end": asdict(points[-1]), "best": asdict(_best(points))} for name, points in by_hospital.items()}
        for arm, by_hospital in measured.items()
    }
    return {
        "extractor": hospitals.federation.extractor,
        "generated": hospitals.federation.evaluate_images,
        "training_images": sizes,
        "validation_images": validation,
        "levels": rows,
        "distances": last,
        "curves": {
            arm: {h: [asdict(p) for p in points] for h, points in curve.items()} for arm, curve in measured.items()
        },
        "bytes": _bytes(hospitals.out / FEDERATED),
    }


def write_results(hospitals: Hospitals) -> dict[str, Any]:
    """Write results.json and table.md in the experiment's folder; returns the content of results.json."""
    content = results(hospitals)
    write_file(hospitals.out / RESULTS, (json.dumps(content, indent=2) + "\n").encode())
    write_file(hospitals.out / "table.md", markdown(content).encode())
    return content


def markdown(content: Mapping[str, Any]) -> str:
    """Return two tables: distances at the end, and when levels were reached."""
    space, sizes, validation = content["extractor"], content["training_images"], content["validation_images"]
    arms = list(content["distances"])
    lines = [f"{fd_name(space)} at the end (best) | " + " | ".join(sizes), " | ".join(["---"] * (len(sizes) + 1))]
    lines.append(
        "images to train / to measure | " + " | ".join(f"{sizes[name]:,} / {validation[name]:,}" for name in sizes)
    )
    for arm in arms:
        cells = []
        for name in sizes:
            numbers = content["distances"][arm].get(name)
            cells.append(f"{numbers['end']['fid']:.1f} ({numbers['best']['fid']:.1f})" if numbers else "")
        lines.append(f"{arm} | " + " | ".join(cells))
    text = "\n".join(f"| {line} |" for line in lines)
    head = [
        "hospital",
        fd_name(space),
        "alone: rounds, kimg",
        "federated: rounds, kimg",
        "central: rounds, kimg",
        "times as fast",
    ]
    rows = [head, ["---"] * len(head)]
    for row in content["levels"]:
        times = [row["reached"].get(arm) for arm in (row["hospital"], FEDERATED, CENTRAL)]
        shown = ["not reached" if t is None else f"{t['round']}, {t['kimg']:g}" for t in times]
        rows.append([row["hospital"], f"{row['fid']:g}", *shown, f"{row['speed_up']:.2f}" if row["speed_up"] else ""])
    return text + "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _central_site(hospitals: Hospitals, out: Path) -> Site:
    """Return a site with the training images of all hospitals, without their validation images."""
    table, rows = out / "all.csv", []
    for site in hospitals.sites.values():
        rows += [record.row for record in _images(hospitals.federation, site).train.records]
    out.mkdir(parents=True, exist_ok=True)
    write_rows(table, list(dict.fromkeys(column for row in rows for column in row)), rows)
    any_site = next(iter(hospitals.sites.values()))
    return replace(any_site, metadata=table, state=out / "members", validation=0.0, seed_offset=0)


def _measure_all(hospitals: Hospitals, state: GlobalState) -> dict[str, Any]:
    federation, measured = hospitals.federation, {}
    for name, site in hospitals.sites.items():
        device = resolve_device(site.device)
        generator = averaged_generator(federation, state.tensors).to(device)
        validation = _images(federation, site).validation
        assert validation is not None
        measured[name] = distances(generator, validation, federation, device, site)
    return measured


def _images(federation: FederationConfig, site: Site) -> Any:
    return site_images(site, federation.class_names, federation.binary, federation.resolution)


def _validation_images(hospitals: Hospitals, site: Site) -> int:
    return len(_images(hospitals.federation, site).validation.labels)


def _bytes(out: Path) -> dict[str, int]:
    lines = [line for line in read_rounds(out) if "bytes_up" in line]
    return {key: lines[-1][key] for key in ("bytes_down", "bytes_up")} if lines else {}
