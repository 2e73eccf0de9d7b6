"""The record of a federation: `rounds.jsonl` with one line for each round, and `status.json` with its current state.

Clients are numbered there (`client-1`, ...): their own names and addresses are not stored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dermis.files import write_file

ROUNDS = "rounds.jsonl"
STATUS = "status.json"


def write_status(out: Path, phase: str, round_number: int, rounds: int, **more: Any) -> None:
    """Replace `status.json`. `more` are further values."""
    status = {"phase": phase, "round": round_number, "rounds": rounds, "time": time.time(), **more}
    write_file(out / STATUS, json.dumps(status).encode())


def is_finished(out: Path, round_number: int) -> bool:
    """Return whether the federation has finished after this round, its result included."""
    try:
        status = json.loads((out / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(status["phase"] == "finished" and status["round"] == round_number)


def append_round(out: Path, line: Mapping[str, Any]) -> None:
    """Append the record of one round."""
    with (out / ROUNDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def replace_round(out: Path, line: Mapping[str, Any]) -> None:
    """Replace the record of a round, or append it."""
    lines = [each for each in read_rounds(out) if each["round"] != line["round"]]
    _write_rounds(out, [*lines, line])


def record_of(out: Path, round_number: int) -> dict[str, Any]:
    """Return the record of a round; only its number if there is none."""
    return next((line for line in read_rounds(out) if line["round"] == round_number), {"round": round_number})


def read_rounds(out: Path) -> list[dict[str, Any]]:
    """Return the records of all rounds, without lines that are cut off."""
    if not (out / ROUNDS).exists():
        return []
    lines = []
    for text in (out / ROUNDS).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def drop_rounds_after(out: Path, round_number: int) -> None:
    """Remove records of rounds whose state was not saved."""
    if (out / ROUNDS).exists():
        _write_rounds(out, [line for line in read_rounds(out) if line["round"] <= round_number])


def _write_rounds(out: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    write_file(out / ROUNDS, "".join(json.dumps(line) + "\n" for line in lines).encode())


def summary(line: Mapping[str, Any], rounds: int) -> str:
    """Return the record of a round as one line of text.

    Args:
        line: The record.
        rounds: The number of rounds of the federation.
    """
    parts = [f"round {line['round']}/{rounds}"]
    clients = line.get("members", {})
    parts.append(f"{len(clients)} clients")
    for loss in ("G", "D", "loss"):
        values = [numbers[loss] for numbers in clients.values() if loss in numbers]
        if values:
            parts.append(f"{loss} {sum(values) / len(values):.2f}")
    for name, numbers in line.get("measured", {}).items():
        metric = "fid" if "fid" in numbers else "auc"
        if metric in numbers:
            parts.append(f"{metric} of {name} {numbers[metric]:.4g}")
    parts += [f"{name} refused ({reason})" for name, reason in line.get("refused", {}).items()]
    parts += [f"{name} did not reply" for name in line.get("silent", ())]
    if "seconds" in line:
        parts.append(f"{line['seconds']:.0f} s")
    return ", ".join(parts)
