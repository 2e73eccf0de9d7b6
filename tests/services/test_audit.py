"""Tests of the audit trail: one chain for all replicas, and a check that finds every kind of tampering."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from benchmarks.components.postgres import Postgres
from commands.main import app
from real_servers import running_postgres
from services.audit import trail as trail_module
from services.audit.trail import GENESIS, AuditTable, Event, Head, NothingToCutError, read_key, sign
from services.audit.verification import Verification, verify
from services.audit.writer import AuditWriter
from services.errors import DatabaseUnavailableError
from services.jobs.database import writing
from services.jobs.table import JobTable
from services.settings import SettingsError

KEY = b"k" * 32


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    create_tables(url)
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, sqlite: str) -> str:
    if request.param == "sqlite":
        return sqlite
    server: Postgres = request.getfixturevalue("postgres")
    name = f"trail{time.monotonic_ns()}"
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    create_tables(server.url_of(name))
    return server.url_of(name)


def create_tables(url: str) -> None:
    jobs = JobTable(url)
    jobs.open()
    jobs.close()


def event(number: int, **values: Any) -> Event:
    moment = f"2026-01-{1 + number // 24:02d}T{number % 24:02d}:00:00.000000Z"
    return Event(
        **{"time": moment, "action": "dataset.create", "outcome": 202, "subject": "key:a", "tenant": "a"} | values
    )


def filled(url: str, count: int = 10, key: bytes | None = None) -> AuditTable:
    table = AuditTable(url, key)
    table.append([event(i, object=f"ds_{i:032d}") for i in range(count)])
    return table


def checked(table: AuditTable, **options: Any) -> Verification:
    with table.snapshot() as snapshot:
        return verify(snapshot, **options)


def change(table: AuditTable, *statements: str) -> None:
    with writing(table._engine) as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


def rewrite(table: AuditTable, first: int) -> None:
    """Write the chain anew from an entry on, as someone who can write to the database, but has no key."""
    entries = trail_module._entries
    with writing(table._engine) as connection:
        where = entries.c.number == first - 1
        previous = connection.scalar(sa.select(entries.c.hash).where(where)) or GENESIS
        rows = connection.execute(sa.select(entries).where(entries.c.number >= first).order_by(entries.c.number)).all()
        for row in rows:
            previous = trail_module.Entry(**row._mapping).chained_hash(previous)
            connection.execute(sa.update(entries).where(entries.c.number == row.number).values(hash=previous))
        connection.execute(sa.update(trail_module._head).values(number=rows[-1].number, hash=previous))


def test_replicas_write_one_chain(url: str) -> None:
    """Each thread has connections of its own, as a replica has."""
    barrier, failures = threading.Barrier(4), list[BaseException]()

    def replica(name: int) -> None:
        table = AuditTable(url)
        try:
            barrier.wait(60)
            for i in range(10):
                table.append([event(i, subject=f"key:{name}"), event(i, subject=f"key:{name}")])
        except BaseException as error:
            failures.append(error)
        finally:
            table.close()

    threads = [threading.Thread(target=replica, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table = AuditTable(url)
    result = checked(table)
    assert failures == [] and result.intact, result.problems
    assert (result.entries, result.first, result.last) == (80, 1, table.head())
    pairs = [entry.subject for entry in reversed(table.page(80))]
    assert pairs[::2] == pairs[1::2]  # what is appended together stays together
    table.close()


REMOVE_LAST = "DELETE FROM dermis_audit WHERE number > 8"
RENUMBER = [f"UPDATE dermis_audit SET number = {i - 1} WHERE number = {i}" for i in range(6, 11)]
COPY = (
    "INSERT INTO dermis_audit (number, time, action, outcome, subject, hash) "
    "SELECT 11, time, action, outcome, 'key:b', hash FROM dermis_audit WHERE number = 10"
)


@pytest.mark.parametrize(
    ("statements", "finding"),
    [
        (["UPDATE dermis_audit SET subject = 'key:b' WHERE number = 5"], "entry 5 does not match"),
        (["UPDATE dermis_audit SET tenant = NULL WHERE number = 1"], "entry 1 does not match"),
        (["UPDATE dermis_audit SET time = '2026-02-01T00:00:00.000000Z' WHERE number = 10"], "entry 10 does not match"),
        (["UPDATE dermis_audit SET client = '' WHERE number = 3"], "entry 3 does not match"),
        (["DELETE FROM dermis_audit WHERE number = 5"], "entry 5 is missing"),
        (["DELETE FROM dermis_audit WHERE number IN (4, 5)"], "entries 4 to 5 are missing"),
        (["DELETE FROM dermis_audit WHERE number = 5", *RENUMBER], "entry 5 does not match"),
        (["DELETE FROM dermis_audit WHERE number < 4"], "entries 1 to 3 are missing at the beginning"),
        ([REMOVE_LAST], "entries 9 to 10 are missing at the end"),
        (["DELETE FROM dermis_audit"], "entries 1 to 10 are missing at the end"),
        (
            [
                "UPDATE dermis_audit SET number = -1 WHERE number = 4",
                "UPDATE dermis_audit SET number = 4 WHERE number = 7",
                "UPDATE dermis_audit SET number = 7 WHERE number = -1",
            ],
            "entry 4 does not match",
        ),
        ([COPY], "entry 11 does not match"),
        (["UPDATE dermis_audit SET number = 12 WHERE number = 10"], "entries 10 to 11 are missing"),
        (["DELETE FROM dermis_audit_head"], "the head of the trail was removed"),
        (["UPDATE dermis_audit_head SET number = 9"], "entry 10 was added after the head"),
        (["UPDATE dermis_audit_head SET hash = 'x'"], "the head has another hash"),
        (["UPDATE dermis_audit SET action = 'audit.cut', object = '1-9' WHERE number = 10"], "entry 10 does not match"),
    ],
)
def test_check_finds_tampering(sqlite: str, statements: list[str], finding: str) -> None:
    table = filled(sqlite)
    assert checked(table).intact
    change(table, *statements)
    assert any(finding in problem for problem in checked(table).problems), checked(table).problems
    table.close()


@pytest.mark.parametrize("last", [10, 8])
def test_chain_that_was_written_anew_is_found_with_a_kept_head_or_a_key(sqlite: str, last: int) -> None:
    table = filled(sqlite, key=KEY)
    head = table.head()
    assert head is not None and checked(table, key=KEY, known=[head]).intact
    if last == 10:
        change(table, "UPDATE dermis_audit SET subject = 'key:b' WHERE number = 5")
        rewrite(table, 5)
        assert "signature of entry 5 does not match" in checked(table, key=KEY).problems[0]
        change(table, "UPDATE dermis_audit SET signature = NULL")
        assert "entry 1 is not signed" in checked(table, key=KEY).problems[0]
        assert checked(table, key=KEY, unsigned_until=10).intact
    else:  # nothing but a head that was kept elsewhere shows that the end was removed
        change(table, REMOVE_LAST, "UPDATE dermis_audit_head SET number = 8")
        rewrite(table, 8)
    assert checked(table).intact
    assert not checked(table, known=[head]).intact
    table.close()


def test_entries_before_the_key_are_unsigned(sqlite: str) -> None:
    filled(sqlite, 3).close()
    table = AuditTable(sqlite, KEY)
    (entry,) = table.append([event(4)])
    assert entry.signature == sign(KEY, entry.hash)
    assert not checked(table, key=KEY).intact and not checked(table, key=KEY, unsigned_until=2).intact
    assert checked(table, key=KEY, unsigned_until=3).intact
    assert not checked(table, key=b"x" * 32, unsigned_until=3).intact
    table.close()


def test_cut_leaves_a_mark_and_an_intact_trail(url: str) -> None:
    table = filled(url, key=KEY)
    kept = [Head(entry.number, entry.hash) for entry in table.page(10)]
    mark = table.cut(event(4).time, event(20, subject="command:root"))
    assert (mark.number, mark.object, mark.detail) == (11, "1-4", kept[-4].hash)
    result = checked(table, key=KEY, known=kept)
    assert result.intact and (result.first, result.entries) == (5, 7), result.problems
    assert result.cut is not None and result.cut.subject == "command:root"
    with pytest.raises(NothingToCutError):
        table.cut(event(4).time, event(20))
    assert table.cut("9999", event(21)).object == "5-11"
    assert (checked(table, key=KEY).intact, checked(table).first) == (True, 12)
    table.append([event(22), event(23)])
    assert checked(table, key=KEY).intact
    assert "entry 12 has another hash" in checked(table, known=[Head(12, GENESIS)]).problems[0]
    change(table, "DELETE FROM dermis_audit WHERE number = 12")  # the mark itself
    assert "entries 1 to 12 are missing at the beginning" in checked(table).problems[0]
    table.close()


class Cutting(AuditTable):
    """A trail to which another replica appends after a cut has removed entries and before it has written its mark."""

    def _append(self, connection: sa.Connection, events: Any) -> list[trail_module.Entry]:
        other = AuditTable(self._engine.url.render_as_string(hide_password=False), KEY)
        other.append([event(30)])
        other.close()
        return super()._append(connection, events)


@pytest.mark.parametrize("before", [event(4).time, "9999"])
@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_others_append_while_entries_are_cut(url: str, before: str) -> None:
    filled(url, key=KEY).close()
    table = Cutting(url, KEY)
    mark = table.cut(before, event(31))
    assert (mark.number, mark.object) == (12, "1-4" if before != "9999" else "1-10")
    result = checked(table, key=KEY)
    assert result.intact and result.last == Head(12, mark.hash), result.problems
    table.close()


def test_nothing_is_appended_to_a_trail_without_head(sqlite: str) -> None:
    table = filled(sqlite)
    change(table, "DELETE FROM dermis_audit_head")
    with pytest.raises(trail_module.HeadMissingError):
        table.append([event(11)])
    assert len(table.page(100)) == 10
    table.close()


class Interrupted(AuditTable):
    """A trail whose database cannot be reached at first."""

    failures = 0

    def append(self, events: Any) -> list[trail_module.Entry]:
        if self.failures:
            self.failures -= 1
            raise DatabaseUnavailableError("no database")
        return super().append(events)


def test_writer_loses_nothing_and_reports_what_it_cannot_store(
    sqlite: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("services.audit.writer._RETRY_SECONDS", 0.01)
    table, lines = Interrupted(sqlite), io.StringIO()

    async def run(failures: int) -> None:
        writer = AuditWriter(table, lines)
        writer.start()
        await asyncio.gather(*(writer.write_later(event(i)) for i in range(299)))
        await writer.write(event(299))
        table.failures = failures
        with pytest.raises(DatabaseUnavailableError):
            await asyncio.gather(writer.write(event(400)), writer.write_later(event(401)))
        await writer.write_later(event(402))
        writer.close()

    asyncio.run(run(3))
    stored = [entry.time for entry in table.page(1000)]
    assert set(stored) == {event(i).time for i in (*range(300), 401, 402)} and len(stored) == 302
    printed = [json.loads(line)["audit"] for line in lines.getvalue().splitlines()]
    assert [document["number"] for document in printed] == list(range(1, 303))
    assert checked(table, known=[Head(each["number"], each["hash"]) for each in printed]).intact
    asyncio.run(run(10**6))  # the database does not come back
    assert caplog.text.count("audit entry lost") == 2
    table.close()


def test_one_failed_attempt_answers_all_who_wait(
    sqlite: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if more entries are kept than a transaction has new ones, and if the service stops."""
    monkeypatch.setattr("services.audit.writer._RETRY_SECONDS", 0.01)
    attempts: list[int] = []

    class Away(AuditTable):
        def append(self, events: Any) -> list[trail_module.Entry]:
            attempts.append(len(events))
            time.sleep(0.05)
            raise DatabaseUnavailableError("no database")

    async def run() -> None:
        writer = AuditWriter(Away(sqlite))
        writer.start()
        await asyncio.gather(*(writer.write_later(event(i)) for i in range(300)))
        while not attempts or attempts[-1] < 300:
            await asyncio.sleep(0.01)
        before = len(attempts)
        answers = await asyncio.gather(*(writer.write(event(i)) for i in range(50)), return_exceptions=True)
        assert all(isinstance(answer, DatabaseUnavailableError) for answer in answers)
        assert len(attempts) <= before + 3
        await asyncio.gather(*(writer.write_later(event(i)) for i in range(500)))
        before = len(attempts)
        await asyncio.to_thread(writer.close)
        assert len(attempts) <= before + 4

    asyncio.run(run())
    assert caplog.text.count("audit entry lost") == 800


def test_key_file_is_checked(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("short-secret")
    for path in (tmp_path / "key", tmp_path / "none"):
        with pytest.raises(SettingsError, match="DERMIS_AUDIT_KEY_FILE") as caught:
            read_key(path)
        assert "short-secret" not in str(caught.value)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Any]:
    def run(*arguments: str, status: int = 0, folder: bool = True) -> Any:
        data = ["--data-dir", str(tmp_path / "data")] if folder else []
        result = CliRunner().invoke(app, [*arguments, *data])
        assert result.exit_code == status, (result.output, result.exception)
        return result

    return run


def test_commands_record_export_verify_and_cut(command: Callable[..., Any], tmp_path: Path) -> None:
    secret = command("keys", "create", "--tenant", "lab").stdout.strip()
    command("keys", "rotate", secret[:22])
    file = tmp_path / "trail.jsonl"
    command("audit", "export", "--output", str(file))
    exported = [json.loads(line) for line in file.read_text().splitlines()]
    assert [each["action"] for each in exported] == ["key.create", "key.rotate", "audit.export"]
    assert exported[0]["detail"].startswith("tenant lab: authenticity:generated classify datasets:read")
    assert exported[1]["detail"] == f"replaces {exported[0]['object']}" and exported[0]["subject"].startswith(
        "command:"
    )
    assert secret[23:] not in file.read_text()
    head = f"3:{exported[-1]['hash']}"
    assert f"head {head}\nintact\n" in command("audit", "verify", "--head", head, "--against", str(file)).stdout
    assert "as far as these entries show" in command("audit", "verify", "--file", str(file)).stdout
    later = [
        json.loads(line) for line in command("audit", "export", "--since", exported[1]["time"]).stdout.splitlines()
    ]
    assert [each["number"] for each in later] == [2, 3, 4] and later[0]["previous"] == exported[0]["hash"]
    assert "entries 2 to 4" in command("audit", "verify", "--since", exported[1]["time"]).stdout
    file.write_text(file.read_text().replace("lab", "lob"))
    assert "entry 1 does not match" in command("audit", "verify", "--file", str(file), status=1).stdout
    assert "entry 1 differs from the line" in command("audit", "verify", "--against", str(file), status=1).stdout
    assert "has another hash" in command("audit", "verify", "--head", f"3:{'0' * 64}", status=1).stdout
    assert "entries 1-4 are removed" in command("audit", "cut", "--before", "2999-01-01").stdout
    result = json.loads(command("audit", "verify", "--json").stdout)
    assert (result["intact"], result["first"], result["cut"]["object"]) == (True, 5, "1-4")
    table = AuditTable(f"sqlite:///{tmp_path}/data/jobs.sqlite")
    change(table, "UPDATE dermis_audit SET subject = 'x'")
    table.close()
    assert "not intact" in str(command("audit", "cut", "--before", "2999-01-01", status=1).exception)


def test_commands_write_no_entries_that_the_key_of_the_service_would_refute(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"key": KEY, "other": b"x" * 40}.items():
        (tmp_path / name).write_bytes(text)
    secret = command("keys", "create").stdout.strip()  # unsigned
    monkeypatch.setenv("DERMIS_AUDIT_KEY_FILE", str(tmp_path / "key"))
    command("keys", "create")
    count = len(json.loads(command("keys", "list", "--json").stdout))
    for wrong, reason in (("", "is signed; set it"), (str(tmp_path / "other"), "signed with another key")):
        monkeypatch.setenv("DERMIS_AUDIT_KEY_FILE", wrong) if wrong else monkeypatch.delenv("DERMIS_AUDIT_KEY_FILE")
        for arguments in (["keys", "create"], ["keys", "revoke", secret], ["audit", "export"]):
            assert reason in str(command(*arguments, status=1).exception)
        assert reason in str(command("audit", "cut", "--before", "2999-01-01", status=1).exception)
    monkeypatch.delenv("DERMIS_AUDIT_KEY_FILE")
    assert "signatures not checked" in command("audit", "verify").stdout
    keys = json.loads(command("keys", "list", "--json").stdout)
    assert (len(keys), {key["state"] for key in keys}) == (count, {"active"})
    monkeypatch.setenv("DERMIS_AUDIT_KEY_FILE", str(tmp_path / "key"))
    assert "signatures not" not in command("audit", "verify", "--unsigned-until", "1").stdout


def test_forged_entries_are_not_removed_under_a_signed_mark(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_bytes(KEY)
    monkeypatch.setenv("DERMIS_AUDIT_KEY_FILE", str(tmp_path / "key"))
    command("keys", "create", "--name", "one")
    command("keys", "create", "--name", "two")
    table = AuditTable(f"sqlite:///{tmp_path}/data/jobs.sqlite", KEY)
    change(table, "UPDATE dermis_audit SET subject = 'x' WHERE number = 1")
    rewrite(table, 1)
    table.append([event(3)])
    assert checked(table).intact and not checked(table, key=KEY).intact
    assert "not intact" in str(command("audit", "cut", "--before", "2999-01-01", status=1).exception)
    table.close()


def test_an_export_without_the_hash_before_it_is_not_taken_for_a_checked_one(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    for _ in range(3):
        command("keys", "create")
    file = tmp_path / "part.jsonl"
    lines = [json.loads(line) for line in command("audit", "export").stdout.splitlines()]
    for each in lines[1:]:
        del each["previous"]
    lines[1]["subject"] = "key:b"
    file.write_text("".join(f"{json.dumps(each)}\n" for each in lines[1:]))
    assert "not checked: 1 entry" in command("audit", "verify", "--file", str(file)).stdout
    del lines[0]["previous"]
    file.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    assert "entry 2 does not match" in command("audit", "verify", "--file", str(file), status=1).stdout
    lines[0]["subject"] = "key:b"
    file.write_text(f"{json.dumps(lines[0])}\n")
    assert "entry 1 does not match" in command("audit", "verify", "--file", str(file), status=1).stdout
