"""Tests of calls on a reader study that come at the same moment, from several replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from dermis.reader_study import Slot
from real_servers import running_postgres
from services.errors import DatabaseUnavailableError
from services.jobs.database import writing
from services.jobs.table import JobTable
from services.quotas import Quota
from services.studies import preparer
from services.studies import table as table_module
from services.studies.preparer import StudyPreparer
from services.studies.table import StudyStateError, StudyTable
from services.studies.tables import Invitation, Study, answers, images, invitations, studies, uploads

SLOTS = [(Slot("generated", 0, 0), "0")]


def opened(url: str) -> StudyTable:
    jobs = JobTable(url)
    jobs.open()
    jobs.close()
    return StudyTable(url)


@pytest.fixture(scope="module")
def table() -> Iterator[StudyTable]:
    """On PostgreSQL: SQLite has one transaction that writes at a time."""
    with running_postgres() as server:
        made = opened(server.url)
        yield made
        made.close()


def create(table: StudyTable) -> Study:
    values = {
        "images": 1,
        "real_source": "uploads",
        "equal_classes": False,
        "size": 16,
        "truncation_psi": 1.0,
        "seed": 1,
    }
    model = {"model_name": "tiny", "model_digest": "0" * 64, "class_names": []}
    return table.create(
        {"tenant": "a", "created_by": "test", "name": "n", "expires_at": time.time() + 1000, **values, **model}, 100
    )


def prepare(table: StudyTable, study: Study) -> None:
    table.prepare(study, SLOTS, [], 1, Quota())


def upload(table: StudyTable, study: Study) -> None:
    table.add_uploads(study, 0, {"0" * 64: 1}, 10, Quota())


def invite(table: StudyTable, study: Study) -> None:
    table.invite(study, "A", time.time() + 1000)


def answer(table: StudyTable, study: Study) -> None:
    (reader,) = table.invitations(study.id)
    table.answer(reader, 0, 0, "real", 3, 1.0)


@pytest.mark.parametrize("call", [prepare, upload, invite, answer])
def test_call_does_not_undo_a_deletion(table: StudyTable, call: Callable[[StudyTable, Study], None]) -> None:
    study = create(table)
    if call is answer:
        invite(table, study)
        prepare(table, study)
        table.record_opened(study.id, 1)
    with ThreadPoolExecutor(1) as pool:
        with writing(table._engine) as deletion:
            deletion.execute(sa.update(studies).where(studies.c.id == study.id).values(state="deleting"))
            called = pool.submit(call, table, study)
            time.sleep(0.3)
        with pytest.raises(StudyStateError):
            called.result(30)
    assert table.get("a", study.id) is None
    table.delete(study.id)


def test_deletion_waits_for_calls_that_add_rows(table: StudyTable, monkeypatch: pytest.MonkeyPatch) -> None:
    study, invited, go_on = create(table), Event(), Event()
    find = table_module._invitation

    def slow(*values: Any) -> Invitation:
        invited.set()
        go_on.wait(30)
        return find(*values)

    monkeypatch.setattr(table_module, "_invitation", slow)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(invite, table, study)]
        assert invited.wait(30)
        calls.append(pool.submit(table.delete, study.id))
        time.sleep(0.3)
        go_on.set()
        for each in calls:
            each.result(30)
    with table._engine.connect() as connection:
        for rows in (answers, images, invitations, uploads):
            assert connection.execute(sa.select(rows).where(rows.c.study == study.id)).all() == []


def test_claim_lasts_as_long_as_the_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (table_module, preparer):
        monkeypatch.setattr(module, "CLAIM_SECONDS", 3.0)
    table = opened(f"sqlite:///{tmp_path}/jobs.sqlite")
    study = create(table)
    prepare(table, study)
    assert table.claim() is not None
    others: list[Study | None] = []

    async def generate_slowly(_study: Study) -> None:
        await asyncio.sleep(4)
        others.append(table.claim())

    working = StudyPreparer(table, None, None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(working, "_prepare", generate_slowly)
    asyncio.run(working._prepare_claimed(study))
    assert others == [None]
    table.release(study.id)
    table.renew(study.id)  # by a process that is stopping
    assert table.claim() is not None
    table.close()


def test_images_that_a_killed_process_has_written_after_the_removal_of_a_study_are_removed(tmp_path: Path) -> None:
    """They are photographs of patients, and no row leads to them."""
    table, storage = opened(f"sqlite:///{tmp_path}/jobs.sqlite"), str(tmp_path / "storage")
    study, kept = create(table), create(table)
    prepare(table, study)
    invite(table, study)
    assert table.claim() is not None
    folder = preparer.study_store(storage, study)
    for _ in range(2):  # two processes at the same moment
        preparer.remove_study(table, storage, study)
    # What the process does that had claimed the study, until it is killed.
    table.renew(study.id)
    table.release(study.id)
    assert not table.record_prepared(study.id, {0: 1})
    folder.write("00000.png", b"real image")
    working = StudyPreparer(table, SimpleNamespace(storage=storage), None, None)  # type: ignore[arg-type]
    working._remove_ended()
    assert folder.size("00000.png") is not None  # it is not removed again each minute
    assert (table.get("a", study.id), table.invitations(study.id), table.to_delete()) == (None, [], [])
    with writing(table._engine) as later:
        hour = {"claimed_until": studies.c.claimed_until - 3601}
        later.execute(sa.update(studies).where(studies.c.id == study.id).values(hour))
    working._remove_ended()
    assert folder.entries() == []
    with table._engine.connect() as connection:
        assert [row.id for row in connection.execute(sa.select(studies))] == [kept.id]
    table.close()


def test_preparation_can_be_stopped_while_the_database_is_away(tmp_path: Path) -> None:
    released: list[str] = []

    class Table:
        closed = False

        def to_delete(self) -> list[Study]:
            return []

        def claim(self) -> Any:
            return SimpleNamespace(id="st_1", tenant="a")

        def record_prepared(self, study_id: str, sizes: object) -> bool:
            time.sleep(0.5)
            return False

        def release(self, study_id: str) -> None:
            released.append(study_id)
            raise DatabaseUnavailableError("away")

        def close(self) -> None:
            self.closed = True

    table = Table()

    async def stop_early() -> None:
        working = StudyPreparer(table, SimpleNamespace(storage=str(tmp_path), max_studies=1), None, None)  # type: ignore[arg-type]
        working.start()
        await asyncio.sleep(0.2)
        await asyncio.wait_for(working.stop(), 10)

    asyncio.run(stop_early())
    assert released == ["st_1"] and table.closed
