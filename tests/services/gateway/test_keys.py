"""Tests of the table of API keys, the copy that requests use, and `dermis keys`."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from benchmarks.components.postgres import Postgres
from commands.main import app
from dermis.bundle import Bundle
from real_servers import running_postgres
from service_kit import service
from services.errors import DatabaseUnavailableError
from services.gateway.auth import keys as keys_module
from services.gateway.auth.keys import (
    ApiKey,
    KeyCache,
    KeyEndedError,
    KeyRefusedError,
    KeyTable,
    UnknownKeyError,
    key_id,
    new_key,
    read_key_file,
)
from services.gateway.auth.principal import DEFAULT_SCOPES
from services.jobs.database import writing
from services.jobs.table import JobTable
from services.settings import SettingsError


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    location = f"sqlite:///{tmp_path}/jobs.sqlite"
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        location = server.url
    jobs = JobTable(location)
    jobs.open()
    jobs.close()
    return location


@pytest.fixture
def table(url: str) -> Iterator[KeyTable]:
    table = KeyTable(url)
    with writing(table._engine) as connection:
        connection.execute(sa.delete(keys_module._keys))  # all tests use one PostgreSQL
    yield table
    table.close()


class Clock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def create(table: KeyTable, **values: Any) -> tuple[ApiKey, str]:
    return table.create(**{"tenant": "a", "name": "n", "scopes": ["images"], "created_by": "test"} | values)


def test_keys_are_random_and_have_their_id(table: KeyTable) -> None:
    texts = {new_key() for _ in range(100)}
    assert len(texts) == 100 and all(key_id(text) == text[10:22] and len(text) == 66 for text in texts)
    key, text = create(table)
    assert (key.prefix, text.startswith(f"{key.prefix}_")) == (f"dermis_sk_{key.id}", True)
    for wrong in (text[:-1], f"{text}x", text.upper(), f" {text}", f"{text}\n", ""):
        assert key_id(wrong) is None


@pytest.mark.parametrize(
    "values",
    [
        {"tenant": "A"},
        {"tenant": "../a"},
        {"tenant": "a\n"},
        {"name": ""},
        {"name": "a\x1b[2J"},
        {"scopes": []},
        {"scopes": ["all"]},
        {"lifetime_seconds": 0.0},
        {"lifetime_seconds": float("nan")},
        {"lifetime_seconds": float("inf")},
    ],
    ids=str,
)
def test_values_that_are_not_valid_are_refused(table: KeyTable, values: dict[str, Any]) -> None:
    with pytest.raises(KeyRefusedError):
        create(table, **values)
    assert table.all() == []


@pytest.mark.parametrize("text", ["\0", "a\0b", "a" * 3000, "A" * 12])
def test_text_that_is_no_id_or_tenant_is_unknown_in_every_database(table: KeyTable, text: str) -> None:
    create(table)
    assert table.all(text) == []
    for call in (table.get, table.revoke, lambda identifier: table.rotate(identifier, created_by="test")):
        with pytest.raises(UnknownKeyError):
            call(text)


def test_rotation_overlaps_and_revocation_is_final(table: KeyTable) -> None:
    old, _ = create(table, lifetime_seconds=1000.0)
    new, text = table.rotate(old.id, created_by="test", overlap_seconds=60.0)
    assert (new.tenant, new.name, new.scopes, new.replaces) == (old.tenant, old.name, old.scopes, old.id)
    assert key_id(text) == new.id != old.id
    assert new.expires_at == pytest.approx(time.time() + 1000, abs=30)
    assert table.get(old.id).expires_at == pytest.approx(time.time() + 60, abs=30)
    with pytest.raises(KeyEndedError, match=f"was replaced by {new.id}"):
        table.rotate(old.id, created_by="test")
    last, _ = table.rotate(new.id, created_by="test", overlap_seconds=1e6)
    assert table.get(new.id).expires_at == new.expires_at  # an overlap does not extend a key
    moment = table.revoke(last.id).revoked_at
    assert table.revoke(last.id).revoked_at == moment
    with pytest.raises(KeyEndedError, match="is revoked"):
        table.rotate(last.id, created_by="test")
    for unknown in (table.revoke, table.get, lambda name: table.rotate(name, created_by="test")):
        with pytest.raises(UnknownKeyError):
            unknown("nobody")


def test_one_of_several_rotations_at_once_succeeds(url: str, table: KeyTable) -> None:
    old, _ = create(table)
    barrier, outcomes = threading.Barrier(4), list[object]()

    def rotate() -> None:
        own = KeyTable(url)
        barrier.wait(60)
        try:
            outcomes.append(own.rotate(old.id, created_by="test")[0].id)
        except KeyEndedError as error:
            outcomes.append(error)
        own.close()

    threads = [threading.Thread(target=rotate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(outcome, str) for outcome in outcomes) == 1 and len(table.all()) == 2


def test_revocation_reaches_every_replica_within_seconds(url: str, table: KeyTable) -> None:
    clock = Clock()

    async def run() -> None:
        first, second = KeyCache(table, clock), KeyCache(KeyTable(url), clock)
        key, text = create(table)
        for cache in (first, second):
            found = await cache.find(text)
            assert found is not None and found.state() == "active"
        table.revoke(key.id)
        clock.seconds += 2.1
        for cache in (first, second):
            found = await cache.find(text)
            assert found is not None and found.state() == "revoked"

    asyncio.run(run())


def test_rows_are_read_again_only_after_a_change_or_a_minute(table: KeyTable, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, reads = Clock(), 0
    read = table.usable

    def count() -> dict[str, ApiKey]:
        nonlocal reads
        reads += 1
        return read()

    monkeypatch.setattr(table, "usable", count)

    async def reads_after(change: Callable[[], object], seconds: float = 3.0) -> int:
        nonlocal reads
        reads = 0
        change()
        clock.seconds += seconds
        await cache.find(text)
        return reads

    key, text = create(table)
    cache = KeyCache(table, clock)

    async def run() -> None:
        assert await reads_after(lambda: None) == 1
        assert await reads_after(lambda: None) == 0
        assert await reads_after(lambda: create(table)) == 1
        assert await reads_after(lambda: table.rotate(key.id, created_by="test")) == 1
        assert await reads_after(lambda: table.revoke(key.id)) == 1
        assert await reads_after(lambda: None, seconds=61.0) == 1

    asyncio.run(run())


def test_only_the_right_secret_finds_a_key(table: KeyTable) -> None:
    async def run() -> None:
        cache = KeyCache(table)
        _, text = create(table)
        other = new_key()
        assert await cache.find(text) is not None
        assert await cache.find(text[:23] + other[23:]) is None
        assert await cache.find(other) is None
        assert await cache.find("nonsense") is None
        _, later = create(table)  # it works at once, although the copy of the table is new
        assert await cache.find(later) is not None

    asyncio.run(run())


def test_requests_with_invented_keys_cause_few_queries(table: KeyTable, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = 0
    read = table.changes

    def count() -> tuple[int, int]:
        nonlocal queries
        queries += 1
        return read()

    monkeypatch.setattr(table, "changes", count)
    monkeypatch.setattr(keys_module, "_UNKNOWN_SECONDS", 0.05)

    async def run() -> None:
        cache = KeyCache(table)
        await cache.find(new_key())
        found = await asyncio.gather(*(cache.find(new_key()) for _ in range(200)))
        assert set(found) == {None}

    asyncio.run(run())
    assert queries == 2


def test_last_copy_is_used_while_the_database_cannot_be_reached(
    table: KeyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, attempts = Clock(), 0

    def fail() -> tuple[int, int]:
        nonlocal attempts
        attempts += 1
        raise DatabaseUnavailableError("no database")

    async def run() -> None:
        cache = KeyCache(table, clock)
        _, text = create(table)
        assert await cache.find(text) is not None
        monkeypatch.setattr(table, "changes", fail)
        clock.seconds += 10.0
        for _ in range(5):
            assert await cache.find(text) is not None
        assert attempts == 1  # each request would otherwise wait for a connection
        clock.seconds += 60.0
        with pytest.raises(DatabaseUnavailableError):
            await cache.find(text)
        assert await cache.find(text, however_old=True) is not None
        with pytest.raises(DatabaseUnavailableError):  # whether there is such a key is not known
            await cache.find(new_key(), however_old=True)

    asyncio.run(run())


def test_last_use_is_written_at_most_once_a_minute(table: KeyTable, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = 0
    write = table.record_uses

    def count(uses: dict[str, float]) -> None:
        nonlocal writes
        writes += 1
        write(uses)

    monkeypatch.setattr(table, "record_uses", count)

    async def run() -> None:
        cache = KeyCache(table)
        key, text = create(table)
        for _ in range(20):
            found = await cache.find(text)
            assert found is not None
            cache.record_use(found)
            await asyncio.sleep(0)
        await cache.close()
        assert table.get(key.id).last_used_at == pytest.approx(time.time(), abs=60)

    asyncio.run(run())
    assert writes == 1


def test_bootstrap_key_is_stored_once_and_stays_revoked(table: KeyTable, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{new_key()}\n")
    text = read_key_file(file)
    assert [table.add_bootstrap_key(text) for _ in range(2)] == [True, False]
    (key,) = table.all()
    assert (key.tenant, key.scopes, key.name) == ("default", ("admin",), "bootstrap")
    table.revoke(key.id)
    assert not table.add_bootstrap_key(text) and table.get(key.id).state() == "revoked"
    with pytest.raises(SettingsError, match="another key"):
        table.add_bootstrap_key(text[:23] + new_key()[23:])


@pytest.mark.parametrize("content", [b"secret", b"", b"\xff\xfe", None])
def test_file_without_key_is_refused_without_its_content(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(SettingsError, match="DERMIS_BOOTSTRAP_KEY_FILE") as caught:
        read_key_file(tmp_path / "key")
    assert "secret" not in str(caught.value)


@pytest.fixture
def restored_umask() -> Iterator[None]:
    """The command sets the umask of its process, which is that of the tests here."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.mark.usefixtures("restored_umask")
def test_command_creates_lists_rotates_and_revokes(tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, ["keys", *arguments, "--data-dir", str(tmp_path / "data")])
        assert result.exit_code == 0, result.output
        return result

    text = run("create", "--tenant", "lab", "--name", "notebook", "--expires-days", "30").stdout.strip()
    identifier = key_id(text)
    assert identifier is not None
    (shown,) = json.loads(run("list", "--json").stdout)
    assert (shown["tenant"], shown["state"], set(shown["scopes"])) == ("lab", "active", set(DEFAULT_SCOPES))
    assert text[23:] not in run("list").stdout and f"dermis_sk_{identifier}" in run("list").stdout
    rotated = json.loads(run("rotate", f"dermis_sk_{identifier}", "--overlap-hours", "0", "--json").stdout)
    assert rotated["replaces"] == identifier and key_id(rotated["key"]) == rotated["id"]
    run("revoke", rotated["id"])
    assert [each["state"] for each in json.loads(run("list", "--json").stdout)] == ["revoked", "expired"]
    assert (tmp_path / "data" / "jobs.sqlite").stat().st_mode & 0o077 == 0


def test_anonymous_use_has_every_scope_but_cannot_make_keys_for_later(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with service(tiny_bundle.location, tmp_path) as running:
        assert running.client.get("/metrics").status_code == 200
        assert running.client.get("/v1/models", headers={"Authorization": "Bearer anything"}).status_code == 200
        made = running.client.post("/v1/admin/keys", json={"name": "later", "scopes": ["admin"]})
        assert (made.status_code, running.client.get("/v1/admin/keys").status_code) == (403, 403)
        assert running.client.app.state.context.auth.keys.all() == []  # type: ignore[attr-defined]
        document = json.loads(running.client.get("/openapi.json").text)
        assert document["paths"]["/v1/images"]["post"]["security"] == [{}]


def test_metrics_are_read_however_long_the_database_cannot_be_reached(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the alert about the database would end a minute after it began."""

    def fail(*_: object, **__: object) -> None:
        raise DatabaseUnavailableError("no database")

    quotas = {"a": {"requests_per_minute": 3}}
    with service(tiny_bundle.location, tmp_path, auth="keys", quotas=quotas, lease_seconds=3600) as running:
        auth = running.client.app.state.context.auth  # type: ignore[attr-defined]
        reader, other = (create(auth.keys, scopes=[scope])[1] for scope in ("metrics:read", "models:read"))

        def status(path: str, text: str) -> int:
            return running.client.get(path, headers={"Authorization": f"Bearer {text}"}).status_code

        assert [status("/metrics", reader) for _ in range(5)] == [200] * 5  # no quota counts them
        assert (status("/v1/models", other), status("/metrics", other)) == (200, 403)
        for place, name in (
            (auth.keys, "changes"),
            (running.ctx.table, "statistics"),
            (running.ctx.table, "count_use"),
        ):
            monkeypatch.setattr(place, name, fail)
        monkeypatch.setattr(auth.cache, "_clock", lambda: time.monotonic() + 3600.0)
        wrong = reader[:-1] + ("B" if reader.endswith("A") else "A")
        assert (status("/metrics", reader), status("/metrics", wrong)) == (200, 401)
        assert (status("/v1/models", other), status("/metrics", other)) == (503, 403)
        assert status("/metrics", new_key()) == 503
