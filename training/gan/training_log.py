"""The log of a run: log.jsonl with one line for each step, and TensorBoard's event files on request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from dermis.files import atomic_write
from dermis.imaging import Images
from training.gan.state import GanProgress
from training.tensorboard import open_writer

POINT_EVERY = 20  # steps between two points of a TensorBoard curve


class TrainingLog:
    """Log of the run in the folder `out`: log.jsonl and TensorBoard files. It continues after `nimg` images.

    Later lines, which a run wrote before it crashed, are removed. Nothing is written unless `enabled`.
    """

    def __init__(self, out: Path, nimg: int, *, enabled: bool = True, tensorboard: bool = False) -> None:
        self.log: TextIO | None = None
        self.board: Any = None
        self.last: tuple[int, float] | None = None  # images and seconds at the last point
        if enabled:
            self.board = open_writer(out, purge_step=nimg + 1) if tensorboard else None
            drop_after(out / "log.jsonl", nimg)
            self.log = (out / "log.jsonl").open("a", encoding="utf-8")

    def write(self, progress: GanProgress, stats: Mapping[str, float]) -> None:
        """Write the statistics of one step. Values that are not finite are left out, since JSON has none."""
        if self.log is not None:
            finite = {name: value for name, value in stats.items() if math.isfinite(value)}
            line = {"nimg": progress.nimg, "seconds": round(progress.seconds, 2), **finite}
            self.log.write(json.dumps(line) + "\n")
        if self.board is not None and progress.step % POINT_EVERY == 0:
            self._point(progress)

    def _point(self, progress: GanProgress) -> None:
        now = (progress.nimg, progress.seconds)
        if self.last is not None:
            images, seconds = now[0] - self.last[0], now[1] - self.last[1]
            self.board.add_scalar("speed/images per second", images / max(seconds, 1e-9), progress.nimg)
        self.last = now
        for name, value in progress.stats.items():  # phases that do not run in every step show their latest value
            group = "augmentation" if name in ("r_t", "p") else "gradient" if name.endswith("_gradient") else "loss"
            group = "privacy" if name == "epsilon" else group
            self.board.add_scalar(f"{group}/{name.removesuffix('_gradient')}", value, progress.nimg)

    def flush(self) -> None:
        if self.log is not None:
            self.log.flush()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.log is not None:
            self.log.close()
        if self.board is not None:
            self.board.close()


def show_in_tensorboard(out: Path, grid: Images, nimg: int) -> None:
    """Add a sample grid [H, W, 3] to the TensorBoard files of the run in `out`."""
    board = open_writer(out)
    board.add_image("samples", grid, nimg, dataformats="HWC")
    board.close()


def drop_after(log: Path, nimg: int) -> None:
    """Remove the lines of more than `nimg` images, which a run wrote after its last checkpoint."""
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if position(line) <= nimg]
    if len(kept) < len(lines):
        with atomic_write(log) as partial:
            partial.write_text("".join(kept), encoding="utf-8")


def position(line: str) -> float:
    """Number of images at a line of a log; infinity if the line is incomplete."""
    try:
        return float(json.loads(line)["nimg"])
    except (ValueError, KeyError, TypeError):
        return math.inf
