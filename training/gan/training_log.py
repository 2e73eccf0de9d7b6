"""The log of a run: log.jsonl with one line for each step, and loggers such as TensorBoard on request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TextIO

from training.checkpoint import drop_after
from training.gan.state import GanProgress
from training.loggers import Loggers

POINT_EVERY = 20  # steps between two points of a curve


class TrainingLog:
    """Log of the run in the folder `out`: log.jsonl and loggers. It continues after `nimg` images.

    Later lines, which a run wrote before it crashed, are removed. Nothing is written unless `enabled`.
    """

    def __init__(self, out: Path, nimg: int, *, loggers: Loggers | None = None, enabled: bool = True) -> None:
        self.log: TextIO | None = None
        self.loggers = loggers or Loggers({}, print)
        self.last: tuple[int, float] | None = None  # images and seconds at the last point
        if enabled:
            drop_after(out / "log.jsonl", nimg)
            self.log = (out / "log.jsonl").open("a", encoding="utf-8")

    def write(self, progress: GanProgress, stats: Mapping[str, float]) -> None:
        """Write the statistics of one step. Values that are not finite are left out, since JSON has none."""
        if self.log is not None:
            finite = {name: value for name, value in stats.items() if math.isfinite(value)}
            line = {"nimg": progress.nimg, "seconds": round(progress.seconds, 2), **finite}
            self.log.write(json.dumps(line) + "\n")
        if self.loggers and progress.step % POINT_EVERY == 0:
            self._point(progress)

    def _point(self, progress: GanProgress) -> None:
        now = (progress.nimg, progress.seconds)
        points: dict[str, float] = {}
        if self.last is not None:
            images, seconds = now[0] - self.last[0], now[1] - self.last[1]
            points["speed/images per second"] = images / max(seconds, 1e-9)
        self.last = now
        for name, value in progress.stats.items():  # phases that do not run in every step show their latest value
            group = "augmentation" if name in ("r_t", "p") else "gradient" if name.endswith("_gradient") else "loss"
            group = "privacy" if name == "epsilon" else group
            points[f"{group}/{name.removesuffix('_gradient')}"] = value
        self.loggers.scalars(points, progress.nimg)

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
