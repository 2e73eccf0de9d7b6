"""Tests of the sweeps: what a worker resumes, what it leaves to others, and how long a sweep lasts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from dermis.bundle import Bundle
from service_kit import service, wait_for
from services.jobs import execution, workflow
from services.jobs import service as jobs_module
from services.jobs.database import writing

REQUEST: dict[str, Any] = {"classes": {"benign": 70, "malignant": 30}, "seed": 3, "shard_size": 9}


def workflows(state: str, job: str) -> list[str]:
    """Ids of the workflows of a job and of its shards in a state."""
    return [each.workflow_id for each in workflow.DBOS.list_workflows(status=state, workflow_id_prefix=job)]


def test_stopping_worker_claims_no_shards_and_resumes_none(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time until it ends can be minutes, in which other workers can do the work."""
    resumed: list[str] = []
    monkeypatch.setattr(workflow, "_resume", lambda status: resumed.append(status.workflow_id))
    with service(tiny_bundle.location, tmp_path / "data", shard_concurrency=1) as running:
        running.generator.close_after = 2
        job: str = running.ask(REQUEST | {"shard_size": 1})["id"]
        wait_for(lambda: running.generator.calls >= 2)
        wait_for(lambda: len(workflows("ENQUEUED", job)) > 50)
        running.ctx.stopping.set()
        wait_for(lambda: job not in workflow._running)
        time.sleep(0.5)  # a claim that had begun
        before = workflows("ENQUEUED", job)
        time.sleep(1.0)  # five polls of the queue
        for _ in range(workflow._STUCK_SWEEPS + 1):
            workflow.sweep()
        assert len(before) > 50 and workflows("ENQUEUED", job) == before
        assert job in workflows("PENDING", job)
    assert resumed == []


def test_number_of_beginnings_is_kept_when_another_worker_takes_over(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """A shard that ends each process that runs it is not repeated for ever, however many workers there are."""
    with service(tiny_bundle.location, tmp_path / "data", shard_concurrency=1) as running:
        running.generator.gate.clear()
        job: str = running.ask(REQUEST)["id"]
        wait_for(lambda: set(workflows("PENDING", job)) - {job})
        shard = next(iter(set(workflows("PENDING", job)) - {job}))
        lost = "UPDATE workflow_status SET executor_id = 'lost', recovery_attempts = 50 WHERE workflow_uuid = :id"
        with writing(running.ctx.table._engine) as connection:
            connection.execute(sa.text(lost), {"id": shard})
        workflow.sweep()
        status = workflow.DBOS.get_workflow_status(shard)
        assert status is not None
        assert (status.status, status.recovery_attempts) in (("ENQUEUED", 50), ("PENDING", 51))


@pytest.mark.parametrize("read", ["workflows", "jobs"])
def test_process_that_starts_during_a_sweep_is_not_taken_for_dead(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    with service(tiny_bundle.location, tmp_path / "data", lease_seconds=3600) as running:
        table = running.ctx.table
        find, active = workflow.DBOS.list_workflows, table.active

        def begin() -> None:
            table.renew_lease("new", 3600)
            table.create(
                "pr_1",
                {"images": 1},
                kind="projection",
                tenant="default",
                model=("tiny", tiny_bundle.digest),
                samples=1,
                shards=1,
                body_hash="a",
                owner="new",
            )

        def listed(**options: Any) -> Any:
            if read == "workflows" and options.get("status") == "PENDING":
                begin()
            return find(**options)

        def jobs() -> Any:
            if read == "jobs":
                begin()
            return active()

        monkeypatch.setattr(workflow.DBOS, "list_workflows", listed)
        monkeypatch.setattr(table, "active", jobs)
        workflow.sweep()
        job = table.get("pr_1")
        assert job is not None and job.state == "queued"


def test_sweep_removes_expired_jobs_for_a_limited_time(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile nobody would take over the work of lost workers."""
    with service(tiny_bundle.location, tmp_path / "data", lease_seconds=3600) as running:
        made = [running.wait(running.ask({"classes": {"benign": 1}, "seed": seed}))["id"] for seed in range(3)]
        for job in made:
            running.ctx.table.mark_deleted(job)
        monkeypatch.setattr(jobs_module, "_EXPIRY_SECONDS", 0.0)
        for left in (2, 1, 0):
            running.jobs.datasets.remove_expired()
            assert len([job for job in made if running.ctx.table.get(job)]) == left


def test_job_that_another_worker_has_removed_costs_no_further_requests(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(tiny_bundle.location, tmp_path / "data") as running:
        asked = running.wait(running.ask({"classes": {"benign": 1}}))
        job = running.ctx.table.get(asked["id"])
        assert job is not None and workflow.cancel_or_delete(running.ctx, job) is None
        monkeypatch.setattr(execution, "remove_files", lambda *_: pytest.fail("the files were removed again"))
        assert workflow.cancel_or_delete(running.ctx, job) is None


def test_job_whose_owner_is_another_worker_is_ended_by_the_one_that_runs_its_workflow(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """A run that had lost the workflow has written its name late, and waits for the outcome of the other one."""
    with service(tiny_bundle.location, tmp_path / "data", lease_seconds=3600) as running:
        running.generator.gate.clear()
        asked = running.ask(REQUEST)
        wait_for(lambda: set(workflows("PENDING", asked["id"])) - {asked["id"]})
        running.ctx.table.set_owner(asked["id"], "other")
        running.generator.gate.set()
        assert running.wait(asked, seconds=30)["state"] == "succeeded"


def test_shard_that_is_started_again_is_never_without_a_workflow(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may end at any moment, and nothing would enqueue a shard again that has no workflow."""
    failures, lost = [1], list[int]()

    def fail_once(ctx: Any, job: str, shard: int) -> str:
        if shard == 7 and failures:
            failures.pop()
            raise RuntimeError("as DBOS passes it on")
        return run_shard(ctx, job, shard)

    def end(*_arguments: Any, **_options: Any) -> Any:
        lost.append(1)
        raise RuntimeError("the process ends before another transaction")

    run_shard = execution.run_shard
    monkeypatch.setattr(execution, "run_shard", fail_once)
    with service(tiny_bundle.location, tmp_path / "data", lease_seconds=3600) as running:
        asked = running.ask(REQUEST)
        failed = f"{asked['id']}-00007"
        wait_for(lambda: failed in workflows("ERROR", asked["id"]))
        before = workflow.DBOS.get_workflow_status(failed)
        with monkeypatch.context() as patch:
            patch.setattr(workflow, "_enqueue_shard", end)
            workflow.sweep()
        now = workflow.DBOS.get_workflow_status(failed)
        assert before is not None and now is not None and lost == []
        assert (now.priority, now.queue_name) == (before.priority, before.queue_name) == (8, "dermis-tenant-shards")
        ended = running.wait(asked)
        assert ended["state"] == "succeeded", ended["error"]
