"""Scales as drawings: a probability with its thresholds, a distance among the distances of real images."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH = 360


def probability_scale(value: float, positive_class: str, thresholds: Mapping[str, float], used: str | None) -> str:
    """Draw a calibrated probability on its scale, with the thresholds and what each of them says.

    Args:
        value: Calibrated probability of the positive class, 0 to 1.
        positive_class: Name of the positive class.
        thresholds: Thresholds of the calibrated probability by name.
        used: Name of the threshold that the answer was made with; None if it is not one of them.
    """
    x = _WIDTH * min(max(value, 0.0), 1.0)
    marks = "".join(
        f'<line x1="{_WIDTH * at:.1f}" x2="{_WIDTH * at:.1f}" y1="30" y2="48" stroke="var(--ds-text)" stroke-width="1.5"/>'
        for at in sorted(set(thresholds.values()))
    )
    anchor = "start" if x < 30 else "end" if x > _WIDTH - 30 else "middle"
    drawing = (
        f'<svg viewBox="0 0 {_WIDTH} 66" role="img" aria-label="Calibrated probability of {escape(positive_class)} '
        f'{value:.3f} on a scale from 0 to 1">'
        f'<rect x="0" y="34" width="{_WIDTH}" height="10" rx="2" fill="var(--ds-well)" stroke="var(--ds-control)"/>'
        f'<rect x="0" y="34" width="{x:.1f}" height="10" rx="2" fill="var(--ds-accent)"/>{marks}'
        f'<path d="M{x:.1f} 32l-6 -9h12z" fill="var(--ds-mark)"/>'
        f'<text class="ds-value" x="{x:.1f}" y="16" text-anchor="{anchor}">{value:.3f}</text>'
        f'<text x="0" y="62">0</text><text x="{_WIDTH}" y="62" text-anchor="end">1</text></svg>'
    )
    rows = []
    for name, at in sorted(thresholds.items(), key=lambda item: item[1]):
        if name == "default" and any(other != "default" and at == value for other, value in thresholds.items()):
            continue
        said = "at or above" if value >= at else "below"
        chosen = " <b>(used here)</b>" if name == used else ""
        rows.append(f"<div><dt>{escape(threshold_name(name))}</dt><dd>{at:.3f}: the value is {said}{chosen}</dd></div>")
    return f'<div class="ds-scale">{drawing}</div><dl class="ds-facts">{"".join(rows)}</dl>'


def threshold_name(name: str) -> str:
    """Return the name of a threshold in words."""
    known = {
        "default": "Default threshold",
        "balanced_accuracy": "Best balanced accuracy",
        "half": "One half",
    }
    for kind in ("sensitivity", "specificity"):
        if name.startswith(f"{kind}_"):
            return f"{kind.capitalize()} {name.removeprefix(f'{kind}_')} %"
    return known.get(name, name.replace("_", " "))


def distance_scale(value: float, baseline: Mapping[str, float]) -> str:
    """Draw a distance to the nearest training image among those of training images to each other.

    The service tells percentiles of these distances. The area of each bar is the share of distances in its range.

    Args:
        value: The distance.
        baseline: Percentile -> distance of a training image to its nearest neighbour.
    """
    known = sorted((float(percentile), float(distance)) for percentile, distance in baseline.items())
    if len(known) < 2:
        return ""
    right = max(known[-1][1] * 1.25, value * 1.1)
    height, bottom = 70.0, 92.0
    bars = [
        (low, high, (upper - lower) / max(high - low, 1e-9))
        for (lower, low), (upper, high) in itertools.pairwise(known)
    ]
    tallest = max(density for *_, density in bars)

    def at(distance: float) -> float:
        return _WIDTH * min(max(distance / right, 0.0), 1.0)

    shapes = "".join(
        f'<rect x="{at(low):.1f}" y="{bottom - height * density / tallest:.1f}" width="{max(at(high) - at(low), 1):.1f}" '
        f'height="{height * density / tallest:.1f}" fill="var(--ds-well)" stroke="var(--ds-control)"/>'
        for low, high, density in bars
    )
    x = at(value)
    anchor = "start" if x < 60 else "end" if x > _WIDTH - 60 else "middle"
    middle = dict(known).get(50.0)
    half = (
        ""
        if middle is None
        else (
            f'<text x="{at(middle):.1f}" y="106" text-anchor="middle">{middle:.2f}</text>'
            f'<line x1="{at(middle):.1f}" x2="{at(middle):.1f}" y1="92" y2="96" stroke="var(--ds-muted)"/>'
        )
    )
    first, last = known[0], known[-1]
    ends = "".join(
        f'<text x="{at(distance):.1f}" y="106" text-anchor="middle">{distance:.2f}</text>'
        for _, distance in (first, last)
    )
    return (
        f'<figure class="ds-scale"><svg viewBox="0 0 {_WIDTH} 112" role="img" aria-label="Distance {value:.2f}. The distances '
        f'of training images to each other: {first[0]:.0f} % are below {first[1]:.2f}, {last[0]:.0f} % below {last[1]:.2f}.">'
        f'{shapes}<line x1="0" x2="{_WIDTH}" y1="{bottom}" y2="{bottom}" stroke="var(--ds-control)"/>{half}{ends}'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{bottom}" stroke="var(--ds-mark)" stroke-width="2.5"/>'
        f'<text class="ds-value" x="{x:.1f}" y="12" text-anchor="{anchor}">this image {value:.2f}</text></svg>'
        '<figcaption class="ds-muted">Bars: how far training images are from their nearest neighbour among the training images '
        f"({first[0]:.0f} % are left of the bars, {100 - last[0]:.0f} % right of them).</figcaption></figure>"
    )


def distance_chart(distances: Sequence[tuple[int, float]], steps: int) -> str:
    """Draw how the distance of a projection has decreased.

    Args:
        distances: (step, distance) in the order of the steps.
        steps: Steps of the whole projection, for the width.
    """
    if not distances:
        return ""
    left, top, bottom = 40, 8, 88
    highest = max(distance for _, distance in distances) or 1.0
    last_step, last = distances[-1]

    def at(step: int, distance: float) -> tuple[float, float]:
        share = min(step / max(steps, last_step, 1), 1.0)
        return left + (_WIDTH - left) * share, bottom - (bottom - top) * distance / highest

    points = [at(*pair) for pair in distances]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    words = f"Distance after {last_step:,} of {steps:,} steps: {last:.3f}; at the beginning {distances[0][1]:.3f}."
    return (
        f'<figure class="ds-scale ds-chart"><svg viewBox="0 0 {_WIDTH} 106" role="img" aria-label="{words}">'
        f'<line x1="{left}" x2="{_WIDTH}" y1="{bottom}" y2="{bottom}" stroke="var(--ds-control)"/>'
        f'<line x1="{left}" x2="{left}" y1="{top}" y2="{bottom}" stroke="var(--ds-control)"/>'
        f'<text x="{left - 5}" y="{top + 8}" text-anchor="end">{highest:.2f}</text>'
        f'<text x="{left - 5}" y="{bottom}" text-anchor="end">0</text>'
        f'<text x="{left}" y="102">step 0</text><text x="{_WIDTH}" y="102" text-anchor="end">{steps:,}</text>'
        f'<polyline points="{line}" fill="none" stroke="var(--ds-accent)" stroke-width="2" stroke-linejoin="round"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--ds-accent)"/></svg>'
        f'<figcaption class="ds-muted">{words}</figcaption></figure>'
    )
