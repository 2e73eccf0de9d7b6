"""Prometheus metrics. The processes of the service share their counts through files (PROMETHEUS_MULTIPROC_DIR).

Names follow the conventions of Prometheus: base units, `_total` for counters. No label contains a tenant, an id or a text of a
caller, so that the number of series is bounded. The metrics of single images are in `services.inference.client`.
docs/observability.md lists all of them.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from dermis import __version__

if TYPE_CHECKING:
    from services.jobs.statistics import Statistics
    from services.models import ModelState

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SHARED = "Every replica reads the same number from the jobs database: aggregate with max, not with sum."
_CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
_GPU_SECONDS = 5.0

request_seconds = Histogram(
    "dermis_http_request_duration_seconds",
    "Time from a request to the last byte of its response.",
    ["method", "route", "status"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)
rejected_requests = Counter(
    "dermis_rejected_requests_total",
    "Requests that were answered with a problem document, by its kind.",
    ["reason"],
)
dataset_samples = Counter("dermis_dataset_samples_total", "Images written into shards of datasets.")
job_seconds = Histogram(
    "dermis_job_duration_seconds",
    "Time from the creation of a job to its end, with the time in the queue.",
    ["kind", "outcome"],
    buckets=(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14_400.0, 43_200.0, 86_400.0),
)
shard_retries = Counter(
    "dermis_shard_retries_total",
    "Shards begun again after an interruption or a lost worker, and shards made again at the end of a dataset.",
    ["kind"],
)
lease_takeovers = Counter(
    "dermis_lease_takeovers_total",
    "Workflows of jobs and shards that this worker took over because the lease of their worker had run out.",
)
inference_seconds = Histogram(
    "dermis_inference_call_duration_seconds",
    "Time of a call of an inference service, with the time in its queue.",
    ["inference_service", "method", "outcome"],  # not `service`: a ServiceMonitor adds that label to every series
    buckets=_CALL_BUCKETS,
)
batch_size = Histogram(
    "dermis_inference_batch_size",
    "Images in one batch of an inference service.",
    ["inference_service"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
storage_seconds = Histogram(
    "dermis_storage_operation_duration_seconds",
    "Time of an access to the storage of jobs.",
    ["operation", "outcome"],
    buckets=_CALL_BUCKETS,
)
database_seconds = Histogram(
    "dermis_database_transaction_duration_seconds",
    "Time of a transaction on the jobs database, with the time until it has a connection and a lock.",
    ["access", "outcome"],
    buckets=_CALL_BUCKETS,
)
# Numbers of the whole device, so that the newest one of any process is right, and none of an ended process is added up.
gpu_memory_free = Gauge(
    "dermis_gpu_memory_free_bytes",
    "Free memory of a CUDA device, of all programs, after a recent batch.",
    ["device"],
    multiprocess_mode="mostrecent",
)
gpu_memory_total = Gauge(
    "dermis_gpu_memory_size_bytes", "Memory of a CUDA device.", ["device"], multiprocess_mode="mostrecent"
)

# A series that begins with its first failure would look like one without any: `increase` needs the 0 before it.
for _kind in ("dataset", "projection"):
    shard_retries.labels(_kind)
    for _outcome in ("succeeded", "failed", "cancelled"):
        job_seconds.labels(_kind, _outcome)
for _access in ("read", "write"):
    for _outcome in ("ok", "unavailable"):
        database_seconds.labels(_access, _outcome)

_gpu_read = float("-inf")


def observe_batch(service: str, images: int) -> None:
    """Count a batch of an inference service, and every few seconds read the memory of its CUDA device if it has one."""
    global _gpu_read  # noqa: PLW0603
    batch_size.labels(service).observe(images)
    torch = sys.modules.get("torch")  # not imported here: a service that does not use it has no device
    now = time.monotonic()
    if torch is None or now - _gpu_read < _GPU_SECONDS or not torch.cuda.is_initialized():
        return
    _gpu_read = now
    for device in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(
            device
        ):  # asking for a device that this process does not use would reserve memory
            free, total = torch.cuda.mem_get_info(device)
            gpu_memory_free.labels(str(device)).set(free)
            gpu_memory_total.labels(str(device)).set(total)


@cache
def _versions() -> dict[str, str]:
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "bentoml": version("bentoml"),
    }


class _State(Collector):
    """Numbers that are read at each request: the queue, the storage, the versions and the models."""

    def __init__(
        self,
        statistics: Callable[[], Statistics],
        free_bytes: Callable[[], int | None],
        models: Sequence[ModelState],
    ) -> None:
        self._statistics, self._free_bytes, self._models = statistics, free_bytes, models

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "dermis_build_info", "1, with the versions of the software.", labels=list(_versions())
        )
        build.add_metric(list(_versions().values()), 1)
        yield build
        model = GaugeMetricFamily(
            "dermis_model_info",
            "1 for a bundle that is served, 0 for one that is missing, damaged or was replaced.",
            labels=["model", "digest", "resolution"],
        )
        for each in self._models:
            model.add_metric([each.name, each.digest, each.resolution], int(each.served))
        yield model
        try:
            free = self._free_bytes()
        except Exception:  # the other metrics must be available while the storage cannot be reached
            free = None
        if free is not None:
            yield GaugeMetricFamily("dermis_storage_free_bytes", "Free space of the storage, if it is a folder.", free)
        try:
            statistics = self._statistics()
        except Exception:  # the same for the database
            return
        yield from _of_database(statistics)


def _of_database(statistics: Statistics) -> Iterator[Metric]:
    for kind, counts in statistics.counts.items():
        jobs = GaugeMetricFamily(
            f"dermis_{kind}_jobs", f"{kind.capitalize()} jobs by state. {_SHARED}", labels=["state"]
        )
        for state, number in counts.items():
            jobs.add_metric([state], number)
        yield jobs
    shards = GaugeMetricFamily(
        "dermis_unfinished_shards",
        f"Shards of queued and running jobs that are not finished. {_SHARED}",
        labels=["kind"],
    )
    ending = GaugeMetricFamily(
        "dermis_ending_jobs",
        f"Running jobs whose shards are all finished, and whose files are being completed. {_SHARED}",
        labels=["kind"],
    )
    age = GaugeMetricFamily(
        "dermis_oldest_queued_job_age_seconds",
        f"Time for which the oldest queued job has waited; 0 if none waits. {_SHARED}",
        labels=["kind"],
    )
    for kind, left in statistics.shards_left.items():
        shards.add_metric([kind], left)
        ending.add_metric([kind], statistics.jobs_ending[kind])
        age.add_metric([kind], statistics.oldest_age(kind))
    yield shards
    yield ending
    yield age
    workers = f"Processes that run jobs and whose lease has not run out. {_SHARED}"
    yield GaugeMetricFamily("dermis_live_workers", workers, statistics.live_workers)
    stored = f"Size of the files of jobs that have succeeded. {_SHARED}"
    yield GaugeMetricFamily("dermis_stored_bytes", stored, statistics.stored_bytes)


def render(
    statistics: Callable[[], Statistics], free_bytes: Callable[[], int | None], models: Sequence[ModelState]
) -> bytes:
    """Return the metrics of all processes in the text format of Prometheus.

    Args:
        statistics: Reads the numbers of the jobs database.
        free_bytes: Reads the free space of the storage; None if it is not known.
        models: The bundles that should be served.
    """
    registry = CollectorRegistry()
    registry.register(_State(statistics, free_bytes, models))
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
    return generate_latest(REGISTRY) + generate_latest(registry)
