"""What a run has measured: one JSON line a number in results.jsonl, written at once, and one line on standard output."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dermis.devices import describe_hardware

FILE = "results.jsonl"
PROJECTED_IMAGES = 12_000
# What is wanted of an H100 or faster; other machines are measured against the same numbers.
TARGETS = {
    "share_of_bf16_limit": 0.30,
    "training_256_seconds_per_kimg": 5.0,
    "projection_hours": 2.0,
}


@dataclass(frozen=True)
class Results:
    """Where a part of the run writes its numbers, and the machine that they are of."""

    out: Path
    part: str
    device: torch.device
    tiny: bool = False

    def number(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        **details: Any,
    ) -> None:
        """One measured number, beside its target where it has one."""
        card = describe_hardware(self.device)
        line: dict[str, Any] = {"part": self.part, "name": name, "value": value, "unit": unit, "device": card}
        shown = f"{name}: {_short(value)} {unit} [{card}]"
        target = at_least if at_most is None else at_most
        if target is not None:
            met = value >= target if at_most is None else value <= target
            bound = "at least" if at_most is None else "at most"
            line |= {"target": target, "bound": bound, "met": met}
            shown += f" (target {bound} {_short(target)}: {'met' if met else 'missed'})"
        if self.tiny:
            line["tiny"] = True
            shown += " (tiny sizes: says nothing about speed)"
        append(self.out, line | details)
        print(shown, flush=True)

    def note(self, name: str, reason: str, **details: Any) -> None:
        """Something that was not measured, or that is no number."""
        append(self.out, {"part": self.part, "name": name, "note": reason} | details)
        print(f"{name}: {reason}", flush=True)


def append(out: Path, line: dict[str, Any]) -> None:
    """Add a line that survives whatever happens to this process next."""
    with (out / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(out: Path) -> list[dict[str, Any]]:
    """All lines of a run."""
    path = out / FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
