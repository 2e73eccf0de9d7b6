"""View of a federation in the terminal: its phase, its clients and the latest rounds."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from commands.console import table_console

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHOWN = 12  # latest rounds
_STALE = 600.0  # seconds without an update after which the view says so


def view(out: Path) -> RenderableType:
    """Render the view from status.json and rounds.jsonl.

    Raises:
        TrainingError: The folder has no federation.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from training.federated.server.record import read_rounds

    status, lines = _status(out), read_rounds(out)
    clients = status.get("members", {})
    done, rounds = status.get("round", 0), status.get("rounds", 0)
    finished = {line["round"]: line for line in lines if "seconds" in line}
    recent = [line["seconds"] for line in list(finished.values())[-5:]]
    left = (
        f", about {sum(recent) / len(recent) * (rounds - done) / 60:.0f} min left" if recent and done < rounds else ""
    )
    head = f"{status.get('phase', 'unknown')}: round {done} of {rounds}{left}"
    if (age := time.time() - status.get("time", time.time())) > _STALE and status.get("phase") not in (
        "finished",
        "stopped",
    ):
        head += f"; no update for {age / 60:.0f} min"
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("round", *(f"{name}\n{images:,} images" for name, images in clients.items()), "MB", "s"):
        table.add_column(column, justify="left" if column == "round" else "right")
    for line in lines[-_SHOWN:]:
        cells = [_cell(line, name) for name in clients]
        traffic = (line.get("bytes_down", 0) + line.get("bytes_up", 0)) / 1e6
        seconds = f"{line['seconds']:.0f}" if "seconds" in line else ""
        table.add_row(str(line["round"]), *cells, f"{traffic:.1f}" if traffic else "", seconds)
    parts: list[Any] = [Text(head, style="bold"), table]
    if clients:
        parts.append(
            Text(
                "losses of G / D (or the classifier), then Fréchet distance (or AUC) on the client's validation images",
                "dim",
            )
        )
    if error := status.get("error"):
        parts.append(Text(error, style="red"))
    return Group(*parts)


@contextmanager
def screen(out: Path) -> Iterator[Callable[[str], None]]:
    """Show the federation while the block runs; without a terminal, print one line for each round instead."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        yield lambda text: typer.echo(text, err=True)
        return
    from rich.live import Live

    stopped = threading.Event()
    with Live(console=table_console(stderr=True), refresh_per_second=2) as live:

        def refresh() -> None:
            while not stopped.wait(0.5):
                if (out / "status.json").exists():
                    live.update(view(out))

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield lambda text: live.console.print(text, markup=False)
        finally:
            stopped.set()
            thread.join()
            if (out / "status.json").exists():
                live.update(view(out))


def follow(out: Path, *, once: bool) -> None:
    """Show the view until the federation has ended; only once if `once`, or without a terminal."""
    from rich.live import Live

    console = table_console()
    if once or not console.is_terminal:
        console.print(view(out))
        return
    with Live(view(out), console=console, refresh_per_second=2) as live:
        while _status(out).get("phase") not in ("finished", "stopped"):
            time.sleep(1)
            live.update(view(out))


def _status(out: Path) -> dict[str, Any]:
    from dermis.errors import TrainingError

    try:
        status: dict[str, Any] = json.loads((out / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise TrainingError(f"{out}: has no federation; give the folder that is its `out`") from None
    return status


def _cell(line: dict[str, Any], name: str) -> str:
    if name in line.get("refused", {}):
        return "refused"
    if name in line.get("silent", ()):
        return "no reply"
    numbers, measured = line.get("members", {}).get(name, {}), line.get("measured", {}).get(name, {})
    losses = " / ".join(f"{numbers[key]:.2f}" for key in ("G", "D", "loss") if _is_number(numbers.get(key)))
    distance = next((f"{measured[key]:.4g}" for key in ("fid", "auc") if _is_number(measured.get(key))), "")
    return "  ".join(part for part in (losses, distance) if part)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)  # records of earlier versions can hold lists that a client sent
