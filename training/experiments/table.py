"""The results of experiments and the numbers that their sources report: results.json and table.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermis.files import write_file
from training.evaluation.record import first_space, read_metrics
from training.experiments.choice import Candidate, Choice, choose
from training.experiments.experiment import REPORTED, Experiment
from training.experiments.run import Result, read_result

RESULTS = "results.json"
TABLE = "table.md"
_HEADINGS = {"kid_percent": "KID (%)", "fid": "FID", "precision": "P", "recall": "R", "ppl": "PPL"}


@dataclass(frozen=True)
class Outcome:
    """Experiments in the requested order with their results.

    Attributes:
        results: Results of the finished experiments by name.
        choice: The generator to use.
    """

    experiments: Sequence[Experiment]
    results: Mapping[str, Result]
    choice: Choice

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes of all experiments. Only a generator of all of them can be chosen."""
        return tuple(sorted({name for experiment in self.experiments for name in experiment.classes}))


def collect(out: Path, experiments: Sequence[Experiment]) -> Outcome:
    """Read the finished experiments in `out`, and choose between the generators of all classes."""
    all_results = {experiment.name: read_result(out / experiment.name) for experiment in experiments}
    results = {name: result for name, result in all_results.items() if result is not None}
    classes = {name for experiment in experiments for name in experiment.classes}
    complete = [e.name for e in experiments if set(e.classes) == classes and (e.conditional or len(classes) == 1)]
    candidates = [_candidate(name, results[name]) for name in complete if name in results]
    spaces = [_space(result)[0] for result in results.values()]
    distance = "FID" if not spaces or spaces[0] == "inception" else "FD"
    return Outcome(experiments, results, choose(candidates, distance))


def _candidate(name: str, result: Result) -> Candidate:
    # Compared with the training images, since held-out images must not influence a choice.
    numbers = _space(result)[1]["comparisons"]["generated_training"]
    fid_interval, kid_interval = ((low, high) for low, high in (numbers["fd_interval"], numbers["kid_interval"]))
    return Candidate(name, numbers["fd"], fid_interval, numbers["kid"], kid_interval, result.seconds_per_kimg)


def _space(result: Result) -> tuple[str, Mapping[str, Any]]:
    """Return the feature space of an experiment and its numbers."""
    return first_space(read_metrics(result.metrics))


def write_outcome(out: Path, outcome: Outcome) -> None:
    """Write out/results.json and out/table.md."""
    experiments = {
        e.name: {
            "title": e.title,
            "source": e.source,
            "classes": list(e.classes),
            "conditional": e.conditional,
            "reported": dict(e.reported),
            "done": e.name in outcome.results,
            **(vars(outcome.results[e.name]) if e.name in outcome.results else {}),
        }
        for e in outcome.experiments
    }
    content = {"experiments": experiments, "chosen": vars(outcome.choice)}
    write_file(out / RESULTS, (json.dumps(content, indent=2) + "\n").encode())
    write_file(out / TABLE, markdown(outcome).encode())


def rows(outcome: Outcome) -> list[list[str]]:
    """Return the cells of the table, header first: a row for each experiment, then for each class if it is conditional."""
    spaces = [_space(result)[0] for result in outcome.results.values()]
    space = f"@{spaces[0]}" if spaces else ""
    reported = [key for key in REPORTED if any(key in e.reported for e in outcome.experiments)]
    headings = _HEADINGS | ({} if space == "@inception" else {"fid": "FD"})
    measured_headings = [headings[key] + ("" if key == "ppl" else space) for key in REPORTED]
    measured_headings[-1] += _distance(outcome.results)
    header = ["", "images", *measured_headings, "s/kimg", *(f"reported {_HEADINGS[key]}" for key in reported)]
    table = [header]
    for experiment in outcome.experiments:
        reported_cells = [f"{experiment.reported[key]:g}" if key in experiment.reported else "" for key in reported]
        result = outcome.results.get(experiment.name)
        if result is None:
            table.append([experiment.title, "not run", *[""] * (len(REPORTED) + 1), *reported_cells])
            continue
        measured, ppl = _space(result)[1], read_metrics(result.metrics).get("ppl", {})
        numbers = _numbers(measured["comparisons"]["generated_training"], ppl)
        table.append([experiment.title, *numbers, f"{result.seconds_per_kimg:.3g}", *reported_cells])
        for name, parts in measured.get("classes", {}).items():
            # Earlier versions did not compare a class with its training images where others were held out.
            part, length = parts.get("generated_training"), ppl.get("classes", {}).get(name, {})
            numbers = ["not measured", *[""] * len(REPORTED)] if part is None else _numbers(part, length)
            table.append([f"- {name}", *numbers, "", *[""] * len(reported)])
    return table


def _distance(results: Mapping[str, Result]) -> str:
    """Return "@" and the distance that path lengths are measured with; empty without results."""
    distances = [read_metrics(result.metrics)["ppl"]["distance"] for result in results.values()]
    return f"@{distances[0]}" if distances else ""


def _numbers(part: Mapping[str, Any], ppl: Mapping[str, Any]) -> list[str]:
    """Return cells: generated images; KID in % and FID with intervals; P; R; PPL (w, end) with its standard error."""
    kid, fid = (
        f"{factor * part[key]:.4g} [{factor * part[f'{key}_interval'][0]:.4g}, {factor * part[f'{key}_interval'][1]:.4g}]"
        for key, factor in (("kid", 100), ("fd", 1))
    )
    length = f"{ppl['end']:.4g} ± {ppl['end_error']:.2g}" if ppl else ""
    return [f"{part['images']:,}", kid, fid, f"{part['precision']:.3f}", f"{part['recall']:.3f}", length]


def markdown(outcome: Outcome) -> str:
    """Return the content of table.md."""
    return "\n\n".join(["# Experiments", markdown_table(rows(outcome)), *remarks(outcome)]) + "\n"


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, header first, as a table in Markdown."""
    header, *body = cells
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def remarks(outcome: Outcome) -> list[str]:
    """Return paragraphs below the table: the choice with its reason, and notes on how to read the numbers."""
    texts = []
    if outcome.results:
        chosen = next((e.title for e in outcome.experiments if e.name == outcome.choice.name), "none")
        texts.append(f"Chosen: **{chosen}** ({outcome.choice.reason}).")
    if partial := [e.title for e in outcome.experiments if set(e.classes) < set(outcome.classes)]:
        texts.append(
            f"{', '.join(partial)}: each generates only some of the classes and is measured against real images of these"
            " classes, as in the paper. They cannot be chosen; compare them with the rows of single classes, at"
            " equal numbers of images."
        )
    if first := next(iter(outcome.results.values()), None):
        lengths = sorted({result.kimg for result in outcome.results.values()})
        texts.append(
            f"Trained for {' or '.join(f'{kimg:,.4g}' for kimg in lengths)} kimg. Fréchet"
            " distance (FD, in the space inception the FID), KID, P and R in the feature space"
            f" {_space(first)[0]}, intervals of 95 %; s/kimg: seconds of training for a thousand images."
        )
    done = {e.title: outcome.results[e.name] for e in outcome.experiments if e.name in outcome.results}
    tests = {title: _space(result)[1].get("copies", {}).get("memorising") for title, result in done.items()}
    if memorising := [f"{title} {test['p_value']:.2g}" for title, test in tests.items() if test]:
        texts.append(f"p of the test for memorising (below 0.001: the generator memorises): {', '.join(memorising)}.")
    if sources := sorted({e.source for e in outcome.experiments if e.reported}):
        texts.append(
            f"Reported: {'; '.join(sources)}. Those numbers were measured with other images, another length of training, and"
            " another feature space, unless Inception is used here."
        )
    return texts
