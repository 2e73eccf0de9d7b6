"""What scenarios did and what came of it, and the table of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Result:
    """What one scenario did and what came of it.

    Attributes:
        scenario: What was disturbed.
        file_format: The format of the datasets.
        required: Kinds of faults without which the scenario has not shown what it is for.
        faults: The number of faults that were made, by kind.
        datasets: The number of datasets that were requested.
        lost: Datasets that did not succeed.
        twice: Datasets and rows that are there more than once.
        different: Datasets with other bytes than those of the undisturbed run.
        unclear: What else was wrong.
        recovery_seconds: Times from the beginning of a fault until a dataset had more images or had ended.
        note: What else was counted.
        not_run: Why the scenario was not run; empty if it was.
    """

    scenario: str
    file_format: str
    required: Sequence[str] = ()
    faults: dict[str, int] = field(default_factory=dict)
    datasets: int = 0
    lost: int = 0
    twice: int = 0
    different: int = 0
    unclear: list[str] = field(default_factory=list)
    recovery_seconds: list[float] = field(default_factory=list)
    note: str = ""
    not_run: str = ""

    def missing(self) -> list[str]:
        """Kinds of faults that are required and were not made."""
        return [kind for kind in self.required if not self.faults.get(kind)]

    def failures(self) -> list[str]:
        """What was required and is not met."""
        counts = {"lost": self.lost, "there twice": self.twice, "different": self.different}
        failures = [f"{number} {name}" for name, number in counts.items() if number]
        failures += [*self.unclear, *(f"no fault of the kind {kind!r} was made" for kind in self.missing())]
        return failures if self.faults else [*failures, "no fault was made"]

    @property
    def met(self) -> bool:
        """Whether nothing was lost, made twice or different, every failure had a clear state, and all faults were made."""
        return not self.failures()

    @property
    def recovery(self) -> str:
        """Median and longest time of a recovery."""
        times = self.recovery_seconds
        return f"{statistics.median(times):.1f} / {max(times):.1f} s" if times else "-"

    @property
    def kinds(self) -> str:
        """The faults by kind, required ones in their order."""
        kinds = [*self.required, *(kind for kind in self.faults if kind not in self.required)]
        return ", ".join(f"{kind} {self.faults.get(kind, 0)}" for kind in kinds)


def add_faults(result: Result, made: Mapping[str, int]) -> None:
    """Count faults; kinds without one are left out."""
    for kind, number in made.items():
        if number:
            result.faults[kind] = result.faults.get(kind, 0) + number


def report(results: Iterable[Result]) -> str:
    """The results as Markdown, for docs/benchmarks-cluster.md."""
    lines = [
        "| fault | format | faults by kind | datasets | lost | twice | different | recovery, median / most |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in results:
        if each.not_run:
            lines.append(f"| {each.scenario} | {each.file_format} | not run: {each.not_run} | | | | | |")
            continue
        counts = " | ".join(f"{number}" for number in (each.datasets, each.lost, each.twice, each.different))
        lines.append(f"| {each.scenario} | {each.file_format} | {each.kinds} | {counts} | {each.recovery} |")
    return "\n".join(lines) + "\n"
