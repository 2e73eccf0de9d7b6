"""The numbers of an evaluation as text: rows for tables, and what the test for memorising says in plain words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Part = Mapping[str, Any]
MEMORISES, SUSPICIOUS = 0.001, 0.05  # p-values below which the test says so; see docs/evaluation.md


def table_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """One metric a row, the header first; all images, every class and the held-out images a column.

    A metric that was not measured is left out, a cell without a number is empty.
    """
    parts: dict[str, Part] = {"all": metrics, **metrics.get("classes", {})}
    if "holdout" in metrics:
        parts["held-out instead"] = metrics["holdout"]["instead_of_generated"]
    rows = [[label, *(_cell(text, part) for part in parts.values())] for label, text in _lines(metrics["extractor"])]
    return [["", *parts], *(row for row in rows if any(row[1:]))]


def memorising(metrics: Part) -> str:
    """Whether the generator memorises, as far as was tested, in sentences for people who know no p-values."""
    if "holdout" not in metrics:
        return (
            "Nothing was held out, so nothing was tested for memorising: a distance to the training set does not tell a "
            "good generator from one that copies."
        )
    held = metrics["holdout"]
    test, patients = held["test"], held.get("patients")
    of_patients = f" ({patients:,} groups by patient or lesion)" if patients else ""
    numbers = (
        f"{test['nearer_train']:.1%} of the generated images are nearer to one of the {metrics['real_images']:,} real "
        f"images than to any of the {held['images']:,} held-out ones{of_patients}; {test['expected_nearer_train']:.1%} "
        f"are expected of an honest generator (p = {test['p_value']:.2g}, {test['permutations']:,} permutations)."
    )
    if not metrics["real_is_training_set"]:
        verdict = "Whether it memorises is not known: the real images are not the set that it was trained on."
    elif test["p_value"] < MEMORISES:
        verdict = "It memorises: its images lie nearer to the training images than chance allows."
    elif test["p_value"] < SUSPICIOUS:
        verdict = "It may memorise: measure again with more held-out images or another seed."
    else:
        verdict = "No sign of memorising was found; a few copies among many images can escape the test."
    return f"{verdict} {numbers}"


def _lines(space: str) -> list[tuple[str, Callable[[Part], str]]]:
    def share(key: str) -> Callable[[Part], str]:
        return lambda part: f"{part[key]:.3f}"

    return [
        ("images", lambda part: f"{part['images']:,}"),
        ("real images", lambda part: f"{part['real_images']:,}"),
        (
            f"FID@{space}",
            lambda part: _with_interval(part, "fid", 1),
        ),
        (f"KID@{space} x 1000", lambda part: _with_interval(part, "kid", 1000)),
        (f"precision@{space}", share("precision")),
        (f"recall@{space}", share("recall")),
        (f"density@{space}", share("density")),
        (f"coverage@{space}", lambda part: f"{part['coverage']:.3f} (expected {part['expected_coverage']:.3f})"),
        (f"alpha-precision@{space}", share("alpha_precision")),
        (f"beta-recall@{space}", share("beta_recall")),
        (f"authenticity@{space}", share("authenticity")),
        ("PPL w, end", lambda part: _ppl(part, "end")),
        ("PPL w, full", lambda part: _ppl(part, "full")),
    ]


def _with_interval(part: Part, key: str, factor: float) -> str:
    value, interval = factor * part[key], part.get(f"{key}_interval")
    if interval is None:  # measured on the way of a training, or by an early version
        return f"{value:.4g}"
    return f"{value:.4g} [{factor * interval[0]:.4g}, {factor * interval[1]:.4g}]"


def _ppl(part: Part, sampling: str) -> str:
    ppl = part["ppl"]
    return f"{ppl[sampling]:.4g} ± {ppl[f'{sampling}_error']:.2g} @{ppl['distance']}"


def _cell(text: Callable[[Part], str], part: Part) -> str:
    try:
        return text(part)
    except KeyError:
        return ""
