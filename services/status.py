"""The state of a deployment, read from its jobs database and storage. The service need not run."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dermis import __version__
from dermis.bundle import open_bundle
from dermis.dataset.store import Store
from dermis.errors import DermisError, StorageError
from services.jobs import schema
from services.jobs.database import make_engine
from services.jobs.statistics import Statistics, read_jobs, read_statistics
from services.logs import without_whole_ids
from services.models import locate, without_place
from services.settings import Settings

_PACKAGES = (
    "bentoml",
    "dbos",
    "fastapi",
    "faiss-cpu",
    "faiss-gpu",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "sqlalchemy",
    "torch",
)
_PASSWORD = re.compile(r"//[^/]*@")
_BUNDLE_ERRORS = (DermisError, OSError)


@dataclass(frozen=True)
class BundleStatus:
    """A bundle that the settings name. The files of its parts were compared with their hashes.

    Attributes:
        location: Where it is.
        name: Its name; None if it cannot be opened.
        digest: Its digest.
        resolution: The size of its images in pixels.
        problem: Why it cannot be opened.
    """

    location: str
    name: str | None = None
    digest: str | None = None
    resolution: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Status:
    """The state of a deployment.

    Attributes:
        database: URL of the jobs database, without its password.
        schema: The schema of its tables; None if there are none.
        known_schema: The newest schema that this version of dermis knows.
        statistics: The queue and the workers.
        jobs: Columns of jobs of all tenants, if they were asked for; ids of projections are cut, as in the log.
        storage: Folder or URL of the datasets and projections.
        free_bytes: Free space of the storage; None if it is not known.
        storage_problem: Why the storage cannot be reached.
        versions: Versions of the software in this environment, by package.
        bundles: The bundles that the settings name.
    """

    database: str
    schema: str | None
    known_schema: str
    statistics: Statistics
    jobs: list[dict[str, Any]]
    storage: str
    free_bytes: int | None
    storage_problem: str | None
    versions: dict[str, str]
    bundles: list[BundleStatus]


def read_status(settings: Settings, jobs: int = 0) -> Status:
    """Read the state. Nothing is written, and no table is created or upgraded.

    Args:
        settings: The settings of the service.
        jobs: How many unfinished and how many failed jobs to list.

    Raises:
        DermisError: The jobs database does not exist, cannot be reached, or has tables that this version cannot read.
    """
    url = sa.make_url(settings.jobs_url)
    shown = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise DermisError(f"there is no jobs database at {url.database}; name the data folder of the service")
    current, statistics, listed = _read_database(settings.jobs_url, shown, jobs)
    free, problem = None, None
    try:
        store = Store(settings.storage)
        store.check()
        free = store.free_bytes()
    except StorageError as error:
        problem = str(error)
    return Status(
        database=shown,
        schema=current,
        known_schema=schema.newest_revision(),
        statistics=statistics,
        jobs=listed,
        storage=_PASSWORD.sub("//***@", settings.storage),
        free_bytes=free,
        storage_problem=problem,
        versions=_versions(),
        bundles=_bundles(settings.bundles),
    )


def _read_database(url: str, shown: str, jobs: int) -> tuple[str | None, Statistics, list[dict[str, Any]]]:
    engine = make_engine(url)
    try:
        with engine.connect() as connection:
            revision = schema.current_revision(connection)
            listed = read_jobs(connection, jobs) if jobs else []
            for job in listed:
                if job["kind"] == "projection":  # whoever of its tenant knows the whole id can read and delete it
                    job["id"] = without_whole_ids(job["id"])
            return revision, read_statistics(connection, revision or ""), listed
    except sa.exc.SQLAlchemyError as error:
        cause = str(error).splitlines()[0]
        # PostgreSQL has a class for missing tables and columns, SQLite only a text.
        if not isinstance(error, sa.exc.ProgrammingError) and "no such" not in cause:
            raise DermisError(f"{shown} cannot be read: {cause}") from None
        raise DermisError(
            f"{shown} has no tables that this version ({__version__}) can read; start the service once, which creates or "
            f"upgrades them ({cause})"
        ) from None
    finally:
        engine.dispose()


def _versions() -> dict[str, str]:
    versions = {"dermis": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _bundles(locations: Sequence[str]) -> list[BundleStatus]:
    statuses = []
    for location in locate(locations):
        shown = _PASSWORD.sub("//***@", location)
        try:
            bundle = open_bundle(location)
        except _BUNDLE_ERRORS as error:
            statuses.append(BundleStatus(shown, problem=without_place(error, location)))
            continue
        resolution = bundle.generator.img_resolution
        statuses.append(BundleStatus(shown, bundle.name, bundle.digest, resolution))
    return statuses
