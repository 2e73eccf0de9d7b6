"""Tests of the division of a worker's time between tenants."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dermis.bundle import Bundle
from dermis.dataset.manifest import ARCHIVE
from dermis.dataset.store import Store
from service_kit import PATIENCE_SECONDS, service, wait_for
from services.gateway.auth.keys import KeyTable
from services.jobs.turns import Turns, _Share, _Waiting


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Shards(threading.Thread):
    """A shard of a tenant in its own thread, which ends a batch for each call of `end_batch`."""

    def __init__(self, turns: Turns, tenant: str) -> None:
        super().__init__(daemon=True)
        self._turns, self._tenant = turns, tenant
        self.works = threading.Event()
        self.batches = 0
        self._ended = threading.Semaphore(0)
        self._last = False
        self.start()

    def run(self) -> None:
        with self._turns.of(self._tenant, lambda: None) as offer:
            while True:
                self.works.set()
                self.batches += 1
                self._ended.acquire()
                self.works.clear()
                if self._last:
                    return
                offer()

    def end_batch(self, *, last: bool = False) -> None:
        assert self.works.wait(60)
        self._last = last
        self._ended.release()


def test_tenant_with_many_shards_waits_for_every_batch_of_another() -> None:
    clock = Clock()
    turns, order = Turns(1, clock), []
    large = [Shards(turns, "large") for _ in range(4)]
    wait_for(lambda: len(turns._waiting) == 3)
    clock.now = 1000.0  # time that it used while nobody else had work
    small = Shards(turns, "small")
    wait_for(lambda: len(turns._waiting) == 4)
    for number in range(12):
        wait_for(lambda: sum(each.batches for each in (*large, small)) == number + 1)  # noqa: B023
        working = next(each for each in (*large, small) if each.works.is_set())
        order.append("small" if working is small else "large")
        clock.now += 1.0
        working.end_batch()
    assert order[:2] == ["large", "small"]
    assert 5 <= order.count("small") <= 6


def test_tenant_that_is_ahead_leaves_a_place_free_but_keeps_one() -> None:
    clock = Clock()
    turns = Turns(3, clock)
    first, second, other = Shards(turns, "large"), Shards(turns, "large"), Shards(turns, "small")
    assert all(each.works.wait(60) for each in (first, second, other))
    clock.now = 10.0  # the large one has had 20 seconds
    first.end_batch()
    wait_for(lambda: len(turns._waiting) == 1)
    assert turns._next() is None
    second.end_batch()
    wait_for(lambda: first.batches + second.batches == 3)
    wait_for(lambda: len(turns._waiting) == 1)
    assert turns._next() is None
    other.end_batch(last=True)
    assert first.works.wait(60)
    assert second.works.wait(60)


def test_place_goes_to_the_next_tenant_if_the_first_one_is_ahead() -> None:
    turns = Turns(3, Clock())
    turns._shares = {
        "least": _Share(0.0, 0.0, places=1, shards=1),
        "ahead": _Share(5.0, 0.0, places=1, shards=2),
        "without a place": _Share(9.0, 0.0, shards=1),
    }
    turns._waiting = [_Waiting("ahead"), _Waiting("without a place")]
    assert turns._next() is turns._waiting[1]


def test_one_shard_at_a_time_works_a_quarter_of_the_time_while_jobs_yield_to_calls() -> None:
    clock = Clock()
    yields = threading.Event()
    turns = Turns(2, clock, must_yield=yields.is_set)
    first, second = Shards(turns, "a"), Shards(turns, "b")
    assert first.works.wait(60) and second.works.wait(60)
    yields.set()
    clock.now = 2.0
    first.end_batch()
    wait_for(lambda: len(turns._waiting) == 1)
    assert turns._next() is None
    clock.now = 2.5
    second.end_batch()
    wait_for(lambda: len(turns._waiting) == 2)
    clock.now = 9.9  # three times the two and a half seconds of the last batch
    assert turns._next() is None
    clock.now = 10.1
    wait_for(lambda: first.batches + second.batches == 3)
    assert turns._next() is None
    clock.now = 20.2  # the one that works waits for something
    wait_for(lambda: first.batches + second.batches == 4)


def test_error_while_waiting_leaves_the_queue() -> None:
    turns = Turns(1)
    holder = Shards(turns, "a")
    assert holder.works.wait(60)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError), turns.of("b", stop):
        pass
    assert turns._waiting == []
    holder.end_batch()
    assert holder.works.wait(60)


@pytest.mark.full
def test_queued_jobs_of_one_tenant_do_not_delay_another(tiny_bundle: Bundle, tmp_path: Path) -> None:
    values: dict[str, Any] = {"auth": "keys", "shard_concurrency": 1, "max_active_datasets": 12}
    with service(tiny_bundle.location, tmp_path / "data", **values) as running:
        table = KeyTable(running.settings.jobs_url)
        scopes = ("datasets:read", "datasets:write")
        keys = {
            tenant: table.create(tenant=tenant, name="n", scopes=scopes, created_by="test")[1]
            for tenant in ("large", "small")
        }
        table.close()
        running.generator.gate.clear()
        headers = {"Authorization": f"Bearer {keys['large']}"}
        queued = [running.ask({"classes": {"benign": 40}, "seed": seed}, **headers) for seed in range(12)]
        running.client.headers["Authorization"] = f"Bearer {keys['small']}"
        asked = running.ask({"classes": {"benign": 40}})
        running.generator.gate.set()
        assert running.wait(asked)["state"] == "succeeded"
        jobs = [running.ctx.table.get(each["id"]) for each in (asked, *queued)]
        small, *others = [(job and job.finished_at) or float("inf") for job in jobs]
        assert sum(ended < small for ended in others) < 8


@pytest.mark.full
def test_datasets_write_no_more_archives_at_once_than_there_are_places(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, open_archives, counts = Store.writing, set[str](), list[int]()
    others_wait = threading.Event()

    @contextmanager
    def writing(store: Store, name: str) -> Iterator[Path]:
        with original(store, name) as path:
            if name == ARCHIVE:
                open_archives.add(store.location)
                counts.append(len(open_archives))
                assert others_wait.wait(PATIENCE_SECONDS)
            yield path
        open_archives.discard(store.location)

    monkeypatch.setattr(Store, "writing", writing)
    with service(tiny_bundle.location, tmp_path / "data", shard_concurrency=1) as running:
        large = running.ask({"classes": {"benign": 24}, "shard_size": 2})
        wait_for(lambda: open_archives)
        small = [running.ask({"classes": {"benign": 2}, "seed": seed}) for seed in range(3)]
        wait_for(lambda: len(running.ctx.finish_turns._waiting) == len(small))
        others_wait.set()
        assert {running.wait(each)["state"] for each in (large, *small)} == {"succeeded"}
    assert counts == [1, 1, 1, 1]
