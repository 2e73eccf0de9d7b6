"""`dermis admin`: the state of a deployment, read from its jobs database and storage."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.console import folding_table, table_console
from commands.keys import DataDir, Json

if TYPE_CHECKING:
    from rich.table import Table

    from services.jobs.statistics import Statistics, Worker
    from services.status import Status

admin_app = typer.Typer(help="State of the service, also while it is not running.", no_args_is_help=True)


@admin_app.callback()
def _group() -> None:
    """State of the service, also while it is not running."""


@admin_app.command()
def status(
    data_dir: DataDir = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="List also N jobs of all tenants that have not ended, oldest first, and N that have failed, latest first: id, "
            "tenant and error. The ids of projections are cut, because whoever knows one can read the projection.",
        ),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Show the workers with versions and leases, the queue, the storage, the schema, and the versions of software and bundles.

    It reads the jobs database and the storage with the settings of the service (`DERMIS_*` and a file `.env`), and changes
    nothing. The versions of the software are those of the environment in which the command runs.
    """
    from services.data_folder import restrict_new_files
    from services.settings import read_settings
    from services.status import read_status

    settings = read_settings(**({} if data_dir is None else {"data_dir": data_dir}))
    restrict_new_files()
    state = read_status(settings, jobs)
    if as_json:
        listed = {"listed_jobs": [_fields(job) for job in state.jobs]} if jobs else {}
        typer.echo(json.dumps({**_document(state), **listed}, indent=2))
    else:
        _print(state)


def _worker_state(worker: Worker, now: float) -> str:
    if worker.lease_until <= 0:
        return "stopped"
    return "alive" if worker.seconds_left(now) >= 0 else "lease expired"


def _document(state: Status) -> dict[str, Any]:
    statistics = state.statistics
    now = statistics.time
    return {
        "time": _time(now),
        "workers": [
            {
                "name": worker.name,
                "role": _role(worker),
                "version": worker.version,
                "state": _worker_state(worker, now),
                "lease_seconds_left": round(worker.seconds_left(now), 1) if worker.lease_until > 0 else None,
                "active_jobs": worker.jobs,
            }
            for worker in statistics.workers
        ],
        "jobs": {
            kind: {
                **counts,
                "oldest_queued_seconds": round(statistics.oldest_age(kind), 1) if kind in statistics.oldest else None,
                "unfinished_shards": statistics.shards_left[kind],
            }
            for kind, counts in statistics.counts.items()
        },
        "running_shards": statistics.shards_begun,
        "storage": {
            "location": state.storage,
            "free_bytes": state.free_bytes,
            "stored_bytes": statistics.stored_bytes,
            "problem": state.storage_problem,
        },
        "database": {"url": state.database, "schema": state.schema, "newest_known_schema": state.known_schema},
        "versions": state.versions,
        "bundles": [vars(bundle) for bundle in state.bundles],
    }


def _fields(job: dict[str, Any]) -> dict[str, str | None]:
    times = {name: None if job[name] is None else _time(job[name]) for name in ("created_at", "finished_at")}
    error = job["error"] and f"{job['error']['type'].rpartition(':')[2]}: {job['error']['detail']}"
    return {**job, **times, "error": error}


def _print(state: Status) -> None:
    console = table_console()
    statistics = state.statistics
    console.print(_workers(statistics), markup=False)
    console.print(_jobs(statistics), markup=False)
    versions = " ".join(f"{name} {number}" for name, number in state.versions.items())
    free = "free space not known" if state.free_bytes is None else f"{_size(state.free_bytes)} free"
    note = ""
    if state.schema != state.known_schema:
        note = f"; this version knows schemas up to {state.known_schema}"
    lines = [
        f"running shards  {statistics.shards_begun}",
        f"storage         {state.storage}: {_size(statistics.stored_bytes)} in finished jobs, "
        f"{state.storage_problem or free}",
        f"database        {state.database}: schema {state.schema or 'none'}{note}",
        f"versions        {versions}",
    ]
    for bundle in state.bundles:
        if bundle.problem is not None:
            lines.append(f"bundle          {bundle.location}: cannot be opened: {bundle.problem}")
        else:
            lines.append(
                f"bundle          {bundle.name} ({bundle.resolution} px, digest {str(bundle.digest)[:12]}) {bundle.location}"
            )
    for job in map(_fields, state.jobs):
        when = job["finished_at"] or job["created_at"]
        lines.append(f"{job['state']:<14}  {when} {job['kind']} {job['id']} of {job['tenant']}: {job['error'] or '-'}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _workers(statistics: Statistics) -> Table:
    table = folding_table("process", "role", "version", "state", "lease ends in", "active jobs")
    for worker in statistics.workers:
        left = f"{worker.seconds_left(statistics.time):.0f} s" if worker.lease_until > 0 else "-"
        version, state = worker.version or "-", _worker_state(worker, statistics.time)
        table.add_row(worker.name, _role(worker), version, state, left, str(worker.jobs))
    if not statistics.workers:
        table.add_row("none", *["-"] * 5)
    return table


def _role(worker: Worker) -> str:
    return "worker" if worker.works else "gateway"


def _jobs(statistics: Statistics) -> Table:
    states = list(next(iter(statistics.counts.values())))
    table = folding_table("jobs", *states, "oldest queued", "unfinished shards")
    for kind, counts in statistics.counts.items():
        oldest = f"{statistics.oldest_age(kind):.0f} s" if kind in statistics.oldest else "-"
        table.add_row(kind, *(str(counts[each]) for each in states), oldest, str(statistics.shards_left[kind]))
    return table


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _size(number: int) -> str:
    """A size for people, such as 1.5 GB."""
    size, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "B" else f"{number} B"
