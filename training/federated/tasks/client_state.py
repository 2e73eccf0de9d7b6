"""What a member keeps to itself between rounds: optimizers, and for a network that is not exchanged its weights.

One file a round, `round-000012.safetensors`, so that a round which is asked for again begins where it began before. The
last two are kept.
"""

from __future__ import annotations

import re
from pathlib import Path

from training.federated.site import Site

_KEPT = 2
_PATTERN = re.compile(r"round-(\d{6})\.safetensors")


def path_of(site: Site, run: str, round_number: int) -> Path:
    """Where the state after a round lies."""
    folder = site.state / run
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"round-{round_number:06d}.safetensors"


def latest_before(site: Site, run: str, round_number: int) -> Path | None:
    """The state after the last round that this member took part in before `round_number`; None if there is none."""
    earlier = [(number, path) for number, path in _states(site, run) if number < round_number]
    return max(earlier)[1] if earlier else None


def forget_old(site: Site, run: str, round_number: int) -> None:
    """Keep the states after this round and the ones before it that could be asked for again."""
    kept = sorted(number for number, _ in _states(site, run) if number <= round_number)[-_KEPT:]
    for number, path in _states(site, run):
        if number not in kept:
            path.unlink(missing_ok=True)


def _states(site: Site, run: str) -> list[tuple[int, Path]]:
    folder = site.state / run
    if not folder.is_dir():
        return []
    found = [(_PATTERN.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)
