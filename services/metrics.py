"""Prometheus metrics. The processes of the service share their counts through files (PROMETHEUS_MULTIPROC_DIR).

The metrics of the inference services are in `services.inference.client`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST

request_seconds = Histogram(
    "dermis_http_request_duration_seconds",
    "Time from a request to the last byte of its response.",
    ["method", "route", "status"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)
dataset_samples = Counter("dermis_dataset_samples_total", "Images written into shards of datasets.")


class _Jobs(Collector):
    """Jobs by state, counted in the database at each request, so that every process gives the same numbers."""

    def __init__(self, kind: str, count: Callable[[], Mapping[str, int]]) -> None:
        self._kind, self._count = kind, count

    def collect(self) -> Iterator[Metric]:
        name = f"dermis_{self._kind}_jobs"
        family = GaugeMetricFamily(name, f"{self._kind.capitalize()} jobs by state.", labels=["state"])
        try:
            counts = self._count()
        except Exception:  # the other metrics must be available while the database cannot be reached
            return
        for state, number in counts.items():
            family.add_metric([state], number)
        yield family


def render(datasets: Callable[[], Mapping[str, int]], projections: Callable[[], Mapping[str, int]]) -> bytes:
    """Return the metrics of all processes in the text format of Prometheus.

    Args:
        datasets: Counts the datasets by state.
        projections: Counts the projections by state.
    """
    registry = CollectorRegistry()
    registry.register(_Jobs("dataset", datasets))
    registry.register(_Jobs("projection", projections))
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
    return generate_latest(REGISTRY) + generate_latest(registry)
