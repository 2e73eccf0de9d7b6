"""The choice between generators, as in the paper: by the lowest FID and KID, and among generators of equal quality by speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Interval = tuple[float, float]


@dataclass(frozen=True)
class Candidate:
    """FID and KID with their 95 % intervals (low, high), in one feature space, and seconds of training for one kimg."""

    name: str
    fid: float
    fid_interval: Interval
    kid: float
    kid_interval: Interval
    seconds_per_kimg: float


@dataclass(frozen=True)
class Choice:
    """The name of the chosen generator, or None if there are no candidates; and the reason for the choice."""

    name: str | None
    reason: str


def choose(candidates: Sequence[Candidate], distance: str = "FID") -> Choice:
    """Choose between candidates.

    1. Keep those whose FID interval overlaps that of the lowest FID: the others are worse by more than chance.
    2. Of these, keep those whose KID interval overlaps that of the lowest KID among them.
    3. Of these, whose quality is equal as far as it was measured, choose the one that trained fastest.

    Args:
        candidates: The generators of all classes, with their numbers in one feature space.
        distance: Name of the Fréchet distance in that space, for the reason: FID or FD.
    """
    if not candidates:
        return Choice(None, "no generator makes all classes")
    near_fid = _overlapping(candidates, lambda c: (c.fid, c.fid_interval))
    equal = _overlapping(near_fid, lambda c: (c.kid, c.kid_interval))
    best = min(equal, key=lambda c: (c.seconds_per_kimg, c.fid))
    return Choice(best.name, "; ".join(_reasons(best, candidates, near_fid, equal, distance)))


def _overlapping(
    candidates: Sequence[Candidate], metric: Callable[[Candidate], tuple[float, Interval]]
) -> list[Candidate]:
    """Return the candidates whose interval overlaps that of the lowest, which is included."""
    low, high = min(map(metric, candidates))[1]
    return [c for c in candidates if metric(c)[1][0] <= high and metric(c)[1][1] >= low]


def _reasons(
    best: Candidate,
    candidates: Sequence[Candidate],
    near_fid: Sequence[Candidate],
    equal: Sequence[Candidate],
    distance: str,
) -> list[str]:
    if len(candidates) == 1:
        return ["the only one that makes all classes"]
    reasons = []
    if len(near_fid) < len(candidates):
        reasons.append(_excluded(distance, candidates, near_fid))
    if len(equal) < len(near_fid):
        reasons.append(_excluded("KID", near_fid, equal))
    if len(equal) > 1:
        others = ", ".join(f"{c.name} {c.seconds_per_kimg:.3g}" for c in equal if c is not best)
        reasons.append(
            f"of equal quality are {', '.join(c.name for c in equal)} (their intervals of {distance} and KID overlap); it"
            f" trained fastest of them: {best.seconds_per_kimg:.3g} s/kimg ({others})"
        )
    lowest_kid = min(candidates, key=lambda c: c.kid)
    if lowest_kid not in near_fid:
        reasons.append(f"{lowest_kid.name} has the lowest KID, but {distance} counts first")
    return reasons


def _excluded(metric: str, before: Sequence[Candidate], after: Sequence[Candidate]) -> str:
    worse = ", ".join(c.name for c in before if c not in after)
    return f"the {metric} of {worse} is higher, and the intervals do not overlap"
