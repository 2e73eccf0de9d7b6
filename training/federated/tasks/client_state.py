"""The state that a client keeps between rounds and does not send: optimizers, and the weights of networks not exchanged.

There is one file for each round, `round-000012.safetensors`, so that a repeated round starts from the same state as the
first time. The last two files are kept.
"""

from __future__ import annotations

import re
from pathlib import Path

from training.federated.site import Site

_KEPT = 2
_PATTERN = re.compile(r"round-(\d{6})\.safetensors")


def path_of(site: Site, run: str, round_number: int) -> Path:
    """Return the file of the state after a round. Its folder is created."""
    folder = site.state / run
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"round-{round_number:06d}.safetensors"


def features_of(site: Site, run: str, images: str) -> Path:
    """Return the file of the features of the images with this SHA-256, for a classifier of which the last layer is trained."""
    return site.state / run / f"features-{images[:16]}.npy"


def latest_before(site: Site, run: str, round_number: int) -> Path | None:
    """Return the state after the last round before `round_number` that this client took part in; None if there is none."""
    earlier = [(number, path) for number, path in _states(site, run) if number < round_number]
    return max(earlier)[1] if earlier else None


def delete_old_states(site: Site, run: str, round_number: int) -> None:
    """Delete all states but the one after this round and the one before it, from which the round can be repeated."""
    kept = sorted(number for number, _ in _states(site, run) if number <= round_number)[-_KEPT:]
    for number, path in _states(site, run):
        if number not in kept:
            path.unlink(missing_ok=True)


def _states(site: Site, run: str) -> list[tuple[int, Path]]:
    folder = site.state / run
    if not folder.is_dir():
        return []
    matches = [(_PATTERN.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)
