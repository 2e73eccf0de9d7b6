"""Tests of the states of jobs that waiting threads share."""

from __future__ import annotations

import threading
from collections.abc import Collection

import pytest

from services.jobs.waiting import JobState, RecentStates

RUNNING, WHOLE = JobState(must_stop=False, is_whole=False), JobState(must_stop=False, is_whole=True)


class Database:
    """States of jobs, which count what is read."""

    def __init__(self) -> None:
        self.time = 0.0
        self.states: dict[str, JobState] = {"a": RUNNING, "b": RUNNING}
        self.reads: list[set[str]] = []
        self.recent = RecentStates(self.read, lambda: self.time)

    def read(self, job_ids: Collection[str]) -> dict[str, JobState]:
        self.reads.append(set(job_ids))
        return {job_id: self.states[job_id] for job_id in job_ids}


def test_one_read_serves_all_that_asked_lately() -> None:
    database = Database()
    assert [database.recent.of(each) for each in "aabb"] == [RUNNING] * 4
    assert database.reads == [{"a"}, {"a", "b"}]  # b was unknown
    database.states["a"] = WHOLE
    assert database.recent.of("a") == RUNNING
    database.time = 0.3
    assert [database.recent.of(each) for each in "abab"] == [WHOLE, RUNNING, WHOLE, RUNNING]
    assert database.reads[2:] == [{"a", "b"}]
    database.time = 6.0
    assert database.recent.of("b") == RUNNING
    assert database.reads[3:] == [{"b"}], "nobody has asked for a in the last five seconds"


def test_slow_read_delays_nobody_else() -> None:
    database = Database()
    database.recent.of("a")
    database.time, entered, go_on = 1.0, threading.Event(), threading.Event()
    read = database.read

    def slow(job_ids: Collection[str]) -> dict[str, JobState]:
        if threading.current_thread() is thread:
            entered.set()
            assert go_on.wait(60)
        return read(job_ids)

    database.recent._read = slow
    thread = threading.Thread(target=database.recent.of, args=["a"])
    thread.start()
    assert entered.wait(60)
    database.states["a"] = WHOLE
    assert database.recent.of("a") == RUNNING  # the last that is known
    assert database.recent.of("b") == RUNNING  # read alone
    database.time = 6.0
    assert database.recent.of("a") == WHOLE, "a read that hangs keeps old states"
    go_on.set()
    thread.join()
    assert database.reads == [{"a"}, {"b"}, {"a"}, {"a"}]
    assert database.recent.of("a") == WHOLE


def test_failed_read_is_repeated_by_the_next_one() -> None:
    database = Database()
    read = database.read

    def fail(_: Collection[str]) -> dict[str, JobState]:
        raise ConnectionError

    database.recent._read = fail
    for _ in range(2):
        with pytest.raises(ConnectionError):
            database.recent.of("a")
    database.recent._read = read
    assert database.recent.of("a") == RUNNING
