"""The inference services: BentoML services that run the models of the bundles, and the clients that call them.

A backend consists of a BentoML service (`generator`, ...), a client (`client`) and the format between the two (`samples`,
`pixels`, ...). The gateway and the jobs use the clients only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.settings import Settings


def worker_counts(settings: Settings) -> Mapping[str, int]:
    """The number of processes of each inference service, by its BentoML name."""
    if not settings.inference:
        return {}
    return {
        "Generator": settings.generator_workers,
        "Classifier": settings.classifier_workers,
        "Authenticity": settings.authenticity_workers,
        "Explainer": settings.explainer_workers,
        "Projector": 1,
    }
