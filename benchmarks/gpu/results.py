"""The results of a run: each number is written immediately, as a JSON line of results.jsonl and on standard output."""

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
# Targets for an H100 or faster. Other machines are compared with the same numbers.
TARGETS = {
    "share_of_bf16_limit": 0.30,
    "training_256_seconds_per_kimg": 5.0,
    "projection_hours": 2.0,
}


@dataclass(frozen=True)
class Results:
    """The file to which a part of the run writes its numbers, and the device that they were measured on."""

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
        """Write a measured number, with its target if it has one."""
        hardware = describe_hardware(self.device)
        line: dict[str, Any] = {"part": self.part, "name": name, "value": value, "unit": unit, "device": hardware}
        text = f"{name}: {_short(value)} {unit} [{hardware}]"
        target = at_least if at_most is None else at_most
        if target is not None:
            met = value >= target if at_most is None else value <= target
            bound = "at least" if at_most is None else "at most"
            line |= {"target": target, "bound": bound, "met": met}
            text += f" (target {bound} {_short(target)}: {'met' if met else 'missed'})"
        if self.tiny:
            line["tiny"] = True
            text += " (tiny sizes: says nothing about speed)"
        append(self.out, line | details)
        print(text, flush=True)

    def note(self, name: str, reason: str, **details: Any) -> None:
        """Write a result that is not a number, or the reason why something was not measured."""
        append(self.out, {"part": self.part, "name": name, "note": reason} | details)
        print(f"{name}: {reason}", flush=True)


def append(out: Path, line: dict[str, Any]) -> None:
    """Add a line and write it to the disk, so that it is kept if this process crashes."""
    with (out / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(out: Path) -> list[dict[str, Any]]:
    """Read all lines of a run."""
    path = out / FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
