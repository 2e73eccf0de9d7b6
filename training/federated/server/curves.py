"""Curves of a federation for loggers: one point for each round, from its record."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from training.federated.config import FederationConfig

_GROUPS = {"members": "loss", "measured": "measured"}
_OF_ROUND = {"seconds": "round/seconds", "epsilon": "privacy/epsilon"}
_BYTES = {"bytes_down": "traffic/MB to clients", "bytes_up": "traffic/MB from clients"}


def curves(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the point of each curve from the record of a round.

    The numbers of the clients' trainings are under "loss", those of their measurements under "measured": the mean of the
    clients as "loss/G", and each client as "loss/G/client-1", the name in the record.
    """
    points: dict[str, float] = {}
    for entry, group in _GROUPS.items():
        values: dict[str, list[float]] = defaultdict(list)
        for client, numbers in line.get(entry, {}).items():
            for name, value in numbers.items():
                if _is_finite(value):
                    points[f"{group}/{name}/{client}"] = float(value)
                    values[name].append(float(value))
        points |= {f"{group}/{name}": math.fsum(each) / len(each) for name, each in values.items()}
    if "members" in line:
        points["round/clients"] = float(len(line["members"]))
        points["round/refused updates"] = float(len(line.get("refused", {})))
    points |= {curve: float(line[name]) for name, curve in _OF_ROUND.items() if _is_finite(line.get(name))}
    points |= {curve: line[name] / 1e6 for name, curve in _BYTES.items() if _is_finite(line.get(name))}
    return points


def logged_options(federation: FederationConfig) -> dict[str, Any]:
    """Return the options of a federation that loggers get: without paths."""
    return {name: value for name, value in asdict(federation).items() if name != "start"}


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
