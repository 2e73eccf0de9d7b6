"""`dermis directions measure`: the effects of directions on attributes, and which of them remove the black frame."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from commands.console import table_console
from commands.options import BundleArgument, DeviceOption, DirectionsOption, TruncationOption

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

    from dermis.bundle import Bundle
    from dermis.bundle.directions import Direction
    from training.evaluation.disentanglement import Effect, Measure, Measurements, Removal, Units, Ws
    from training.evaluation.measurements import ImageMeasurer


def measure(
    bundle: BundleArgument,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.", show_default=False)] = None,
    direction: DirectionsOption = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(
            help="Standard deviations, in both directions. Default 3; with --framed 2, 4 and 6, and it may be repeated."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples to move; with --framed the number of framed ones.")] = 64,
    baseline: Annotated[int, typer.Option(help="Unedited samples whose standard deviations are the units.")] = 500,
    framed: Annotated[
        bool, typer.Option("--framed", help="Move samples with the black frame, and measure which moves remove it.")
    ] = False,
    search: Annotated[
        int, typer.Option(help="With --framed: maximum number of samples among which framed ones are searched.")
    ] = 5000,
    controls: Annotated[int, typer.Option(help="Random directions to measure as controls.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the samples, which have all classes in turn.")] = 1000,
    truncation_psi: TruncationOption = 1.0,
    device: DeviceOption = "auto",
) -> None:
    """Move samples along each direction and report what changes, in standard deviations of unedited samples.

    Attributes are the scores of the detectors of frame, ruler, hair and ink and, where the bundle has a classifier, its
    calibrated probability; identity is the cosine distance of its features. Not a medical device: for research only.
    """
    from dermis.bundle import open_bundle
    from dermis.directions.edit import MAX_STRENGTH
    from dermis.errors import RequestError
    from training.evaluation.disentanglement import random_directions, units_of
    from training.evaluation.measurements import open_measurer

    strengths = strength or ([2.0, 4.0, 6.0] if framed else [3.0])
    if not all(0 < value <= MAX_STRENGTH for value in strengths) or (len(strengths) > 1 and not framed):
        raise RequestError(
            "--strength", f"must be above 0 and at most {MAX_STRENGTH:g}; it can be repeated only with --framed"
        )
    if samples < 2 or baseline < 2 or search < 2 or controls < 0 or (baseline < samples and not framed):
        raise RequestError("--samples", "must be at least 2, and --baseline at least as many; --controls at least 0")
    opened = open_bundle(bundle)
    directions = _chosen(opened, direction)
    num_ws = opened.generator.num_ws
    with open_measurer(opened, device=device) as measurer:
        indices = np.arange(baseline)
        ws = measurer.ws(indices, seed=seed, truncation_psi=truncation_psi)
        directions += random_directions(ws[:, 0], indices % measurer.classes, controls, num_ws=num_ws, seed=0)
        typer.echo(f"reading {baseline:,} unedited samples", err=True)
        before = measurer.measure(ws, indices, seed=seed)
        units = units_of(before)
        document: dict[str, Any] = {
            "bundle": f"{opened.name}@{opened.digest}",
            "seed": seed,
            "truncation_psi": truncation_psi,
            "noise_mode": "random",
            "baseline": baseline,
            "units": asdict(units),
        }
        if framed:
            both = [sign * value for value in strengths for sign in (1, -1)]
            # Other samples than the baseline's, so that the units do not depend on the images that are moved.
            chosen, framed_ws, searched = _framed(
                measurer, samples, search=search, seed=seed + 1, truncation_psi=truncation_psi
            )
            document |= {"framed": len(framed_ws), "looked_at": searched}
            measure = partial(measurer.measure, indices=chosen, seed=seed + 1)
            document |= _removals(framed_ws, directions, both, units, measure)
        else:
            document |= {"samples": samples, "strength": strengths[0]}
            measure = partial(measurer.measure, indices=indices[:samples], seed=seed)
            document |= _effects(ws[:samples], directions, strengths[0], _first(before, samples), units, measure)
    if out is not None:
        from dermis.files import write_file

        write_file(out, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
        typer.echo(f"{out} written", err=True)


def _chosen(bundle: Bundle, names: Sequence[str] | None) -> list[Direction]:
    from dermis.errors import RequestError

    known = {direction.name: direction for direction in bundle.directions}
    if not known:
        raise RequestError("bundle", f"has no directions; find some: dermis directions fit {bundle.location}")
    for name in names or ():
        if name not in known:
            raise RequestError("--direction", f"{name!r} is unknown; this bundle has {', '.join(known)}")
    return [known[name] for name in names or known]


def _first(measurements: Measurements, count: int) -> Measurements:
    from training.evaluation.disentanglement import Measurements

    attributes = {name: values[:count] for name, values in measurements.attributes.items()}
    return Measurements(attributes, measurements.features[:count])


def _framed(
    measurer: ImageMeasurer, count: int, *, search: int, seed: int, truncation_psi: float
) -> tuple[NDArray[np.int64], Ws, int]:
    """Search framed samples.

    Returns:
        Their indices, their style vectors, and the number of samples that were searched.
    """
    from tqdm import tqdm

    from dermis.errors import RequestError

    chosen, parts, searched = [], [], 0
    with tqdm(total=search, desc="searching frames", unit="img", disable=None) as bar:
        for number, indices, part in measurer.find_framed(
            count, search=search, seed=seed, truncation_psi=truncation_psi
        ):
            chosen.append(indices)
            parts.append(part)
            searched += number
            bar.update(number)
    ws = np.concatenate(parts)
    if len(ws) < 2:
        raise RequestError("--search", f"{len(ws)} of {searched:,} samples have the frame; search more")
    typer.echo(f"{len(ws)} framed among {searched:,} samples", err=True)
    return np.concatenate(chosen), ws, searched


def _effects(
    ws: Ws, directions: Sequence[Direction], strength: float, before: Measurements, units: Units, measure: Measure
) -> dict[str, Any]:
    from tqdm import tqdm

    from training.evaluation.disentanglement import measure_effects

    effects = list(
        tqdm(
            measure_effects(ws, directions, strength, before, units, measure),
            total=len(directions),
            desc="directions",
            disable=None,
        )
    )
    _print(_effect_table(effects, units))
    return {
        "effects": [
            {**asdict(each), "most_moved": each.most_moved, "share": each.share(each.most_moved or "")}
            for each in effects
        ]
    }


def _removals(
    ws: Ws, directions: Sequence[Direction], strengths: Sequence[float], units: Units, measure: Measure
) -> dict[str, Any]:
    from tqdm import tqdm

    from dermis.artefacts import THRESHOLDS
    from training.evaluation.disentanglement import best_removal, measure_removals

    removals = list(
        tqdm(
            measure_removals(ws, "frame", THRESHOLDS["frame"], directions, strengths, measure(ws), units, measure),
            total=len(directions) * len(strengths),
            desc="moves",
            disable=None,
        )
    )
    candidates = [removal for removal in removals if not removal.direction.startswith("random-")]
    _print(_removal_table(removals))
    best = best_removal(candidates)
    typer.echo(
        f"best: {best.direction}={best.strength:+g} removes the frame in {best.removed} of {best.images} images "
        f"(95 % interval {best.low:.0%} to {best.high:.0%}); in the half of the images that was not used for the choice: "
        f"{best.confirmed:.0%}"
    )
    return {"removals": [asdict(each) for each in removals], "best": asdict(best)}


def _effect_table(effects: Sequence[Effect], units: Units) -> Table:
    """Half the difference between moving by plus and by minus; in brackets where it is within chance."""
    names = [name for name, deviation in units.deviations.items() if deviation > 0]
    table = _table("direction", *names, "identity", "largest change", "share")
    for each in effects:
        cells = [_cell(each.shifts[name].value, each.shifts[name].significant) for name in names]
        most = each.most_moved
        share = each.share(most) if most else None
        table.add_row(
            each.direction,
            *cells,
            _number(each.identity),
            most or "nothing",
            f"{share:.0%}" if share is not None else "",
        )
    return table


def _removal_table(removals: Sequence[Removal]) -> Table:
    """The move of each direction that removes most frames, best direction first."""
    best: dict[str, Removal] = {}
    for each in removals:
        known = best.get(each.direction)
        if known is None or each.share > known.share:
            best[each.direction] = each
    names = list(removals[0].others)
    table = _table("direction", "strength", "frames removed", "95 %", *names, "identity")
    for each in sorted(best.values(), key=lambda removal: -removal.share):
        table.add_row(
            each.direction,
            f"{each.strength:+g}",
            f"{each.removed} of {each.images}",
            f"{each.low:.0%} to {each.high:.0%}",
            *(f"{each.others[name]:+.2f}" for name in names),
            _number(each.identity),
        )
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right")
    return table


def _print(table: Table) -> None:
    table_console().print(table)


def _cell(value: float, clear: bool) -> str:
    return f"{value:+.2f}" if clear else f"({value:+.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
