"""A gateway and workers on a real PostgreSQL and a real S3 server, which are reached through proxies that disturb them."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import httpx
import numpy as np
import psycopg

from benchmarks.cluster import NO_TLS, Caller, Replica
from benchmarks.components import free_port
from benchmarks.components.postgres import Postgres, running_postgres
from benchmarks.components.proxies import S3Proxy, TcpProxy, s3_proxy, tcp_proxy
from benchmarks.components.s3 import ACCESS_KEY, SECRET_KEY, running_s3
from dermis.bundle import open_bundle

# The bundle and the files to compare with are made by the code of the tests, which is not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
from gated_dataset import make_directly  # type: ignore[import-not-found]
from tiny_index import make_complete_bundle  # type: ignore[import-not-found]

LEASE_SECONDS = 3.0
PATIENCE_SECONDS = 600.0
# botocore waits for a minute by default; the proxy stalls for 8 seconds.
_S3_OPTIONS = {"config_kwargs": {"read_timeout": 4, "connect_timeout": 4, "retries": {"max_attempts": 2}}}
_TAKEOVERS = "dermis_lease_takeovers_total"

Phase = Literal["queueing", "running", "finishing", "ended"]
PHASES: tuple[Phase, ...] = ("queueing", "running", "finishing", "ended")


@dataclass(frozen=True)
class Progress:
    """A job as its row in the jobs database shows it."""

    state: str
    samples_done: int
    shards_done: int
    shards_total: int

    @property
    def phase(self) -> Phase:
        """Where the job is: no shard has begun, shards are made, the files are collected, or it has ended."""
        if self.state == "queued":
            return "queueing"
        if self.state != "running":
            return "ended"
        return "finishing" if self.shards_done == self.shards_total else "running"


class Database:
    """The jobs database, read past the service and the proxy."""

    def __init__(self, postgres: Postgres) -> None:
        self._url = postgres.url.replace("+psycopg", "")
        self._connection: psycopg.Connection[Any] | None = None

    def progress(self, dataset: Mapping[str, Any]) -> Progress:
        """The progress of a job."""
        query = "SELECT state, samples_done, shards_done, shards_total FROM dermis_jobs WHERE id = %s"
        return Progress(*self._rows(query, dataset["id"])[0])

    def rows_of(self, dataset: Mapping[str, Any]) -> int:
        """The number of rows of a job, its shards and its workflows."""
        query = (
            "SELECT (SELECT count(*) FROM dermis_jobs WHERE id = %s) + (SELECT count(*) FROM dermis_shards WHERE job_id = %s) "
            "+ (SELECT count(*) FROM dbos.workflow_status WHERE starts_with(workflow_uuid, %s))"
        )
        return int(self._rows(query, *[dataset["id"]] * 3)[0][0])

    def busy_workers(self) -> set[str]:
        """Names of the workers that have begun a workflow and not ended it."""
        rows = self._rows("SELECT DISTINCT executor_id FROM dbos.workflow_status WHERE status = %s", "PENDING")
        return {row[0] for row in rows}

    def clock_difference(self, worker: str) -> float | None:
        """By how many seconds the clock of a worker was ahead when it last renewed its lease; None if it has none."""
        query = "SELECT lease_until - extract(epoch FROM clock_timestamp()) FROM dermis_workers WHERE executor_id = %s"
        rows = self._rows(query, worker)
        return float(rows[0][0]) - LEASE_SECONDS if rows else None

    def _rows(self, query: str, *values: object) -> list[Any]:
        """The rows of a query, as soon as the database answers."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if self._connection is None:
                    self._connection = psycopg.connect(self._url, autocommit=True, connect_timeout=5)
                return self._connection.execute(query.encode(), values).fetchall()
            except psycopg.OperationalError:
                self.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None


class Cluster:
    """One gateway without models and two workers. The database and the bucket are reached through proxies."""

    def __init__(self, bundle: Path, folder: Path, stack: ExitStack, seed: int, images: int) -> None:
        self.random = random.Random(seed)
        self.bundle, self.images = bundle, images
        self.postgres: Postgres = stack.enter_context(running_postgres())
        self._bucket = bucket = stack.enter_context(running_s3())
        self.database = Database(self.postgres)
        stack.callback(self.database.close)
        self.database_proxy: TcpProxy = stack.enter_context(tcp_proxy(self.postgres.port))
        self.s3_proxy: S3Proxy = stack.enter_context(s3_proxy(bucket.endpoint, seed))
        database = self.postgres.url.replace(str(self.postgres.port), str(self.database_proxy.port))
        self._environment = bucket.environment | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_proxy.port}",
            "FSSPEC_S3": json.dumps(_S3_OPTIONS),
            "OMP_NUM_THREADS": "1",
        }
        self._shared = {
            "BUNDLES": str(bundle.parent),
            "DATABASE_URL": f"{database}?connect_timeout=3",
            "STORAGE_URL": bucket.url("datasets"),
            "LEASE_SECONDS": str(LEASE_SECONDS),
            "LOG_LEVEL": "WARNING",
        }
        self._requests = 0
        self.gateway = self._replica(folder, "gateway", ROLE="gateway", INFERENCE="false")
        self.workers = [self._replica(folder, f"worker-{number}", ROLE="worker") for number in (1, 2)]
        self.caller = Caller(self.gateway.url, patience=PATIENCE_SECONDS)
        stack.callback(lambda: [replica.kill() for replica in self.replicas])
        for replica in self.replicas:
            replica.start()
        for replica in self.replicas:
            replica.wait_until_ready()

    def _replica(self, folder: Path, name: str, **settings: str) -> Replica:
        return Replica(name, folder / name, free_port(), self._shared | settings, self._environment)

    @property
    def replicas(self) -> list[Replica]:
        """The gateway and the workers."""
        return [self.gateway, *self.workers]

    def request(self, file_format: str, seed: int) -> dict[str, Any]:
        """Request a dataset, with an idempotency key, twice: a client cannot know whether its first request arrived."""
        body = request_of(file_format, seed, self.images)
        self._requests += 1
        headers = {"Idempotency-Key": f"request-{self._requests}"}
        first = self.caller.request("POST", "/v1/datasets", json=body, headers=headers)
        again = self.caller.request("POST", "/v1/datasets", json=body, headers=headers)
        if first.status_code != 202 or again.status_code not in (200, 202):
            raise RuntimeError(f"not accepted: {first.status_code} {first.text}; {again.status_code}")
        record: dict[str, Any] = first.json()
        if again.json()["id"] != record["id"]:
            raise RuntimeError("one idempotency key made two datasets")
        return record

    def stored(self, dataset: Mapping[str, Any]) -> list[str]:
        """The files of a job in the bucket, listed past the proxy."""
        options = {"endpoint_url": self._bucket.endpoint, "key": ACCESS_KEY, "secret": SECRET_KEY}
        storage = fsspec.filesystem("s3", use_listings_cache=False, **options)
        folder = f"{self._bucket.bucket}/datasets/{dataset['id']}"
        return [
            name for name in storage.find(folder) if name.rstrip("/") != folder
        ]  # SeaweedFS also lists empty folders

    def restart_ended(self) -> None:
        """Start replicas whose supervisor has ended, as Kubernetes does."""
        for replica in self.replicas:
            if replica.has_ended:
                replica.start()

    def takeovers(self, but: Replica) -> int:
        """How many workflows all replicas but one have taken over since they were started."""
        number = 0.0
        for replica in self.replicas:
            if replica is not but:
                metrics = httpx.get(f"{replica.url}/metrics", timeout=30, trust_env=False, verify=NO_TLS).text
                number += sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(_TAKEOVERS))
        return round(number)


def request_of(file_format: str, seed: int, images: int) -> dict[str, Any]:
    """The body of a request for a gated dataset."""
    benign = images * 6 // 10
    return {
        "model": "tiny",
        "classes": {"benign": benign, "malignant": images - benign},
        "seed": seed,
        "shard_size": 25,
        "format": file_format,
        "classifier": {"keep": "agreeing", "tries": 2},
        "privacy": {"gate": "min_distance", "percentile": 50.0, "tries": 2},
    }


class Undisturbed:
    """The files of datasets as the library makes them in one process."""

    def __init__(self, bundle: Path, folder: Path, images: int) -> None:
        self._bundle, self._folder, self._images = bundle, folder, images
        self._made: dict[tuple[str, int], dict[str, bytes]] = {}

    def files(self, file_format: str, seed: int) -> dict[str, bytes]:
        """The files by name."""
        key = (file_format, seed)
        if key not in self._made:
            out = self._folder / "-".join(map(str, key))
            self._made[key] = make_directly(open_bundle(self._bundle), out, request_of(*key, self._images))
        return self._made[key]


@contextmanager
def small_bundle() -> Iterator[Path]:
    """A complete bundle of 16 px with a classifier and an index, made by the tests' own code."""
    with tempfile.TemporaryDirectory(prefix="dermis-chaos-") as folder:
        training = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
        made = Path(make_complete_bundle(Path(folder) / "made", training).location)
        (Path(folder) / "bundles").mkdir()
        yield made.rename(Path(folder) / "bundles" / "tiny")


@contextmanager
def running_cluster(seed: int, images: int) -> Iterator[tuple[Cluster, Undisturbed]]:
    """A cluster with a small bundle, and the files to compare with.

    Args:
        seed: Of the random moments and faults.
        images: Images of each dataset.

    Raises:
        MissingComponentError: PostgreSQL or the S3 server is not installed.
    """
    with ExitStack() as stack:
        bundle = stack.enter_context(small_bundle())
        folder = bundle.parent.parent
        cluster = Cluster(bundle, folder / "replicas", stack, seed, images)
        yield cluster, Undisturbed(bundle, folder, images)
