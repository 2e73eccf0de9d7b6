"""Tests of the gateway's limits: refusal at the limit, release at the end, and separate counts for each gateway."""

from __future__ import annotations

import pytest

from services.gateway.limits import ComparisonLimiter, GatewayLimits, Limiter
from services.problems import ProblemError
from services.settings import Settings


def test_call_above_limit_is_refused_until_another_ends() -> None:
    limiter = Limiter(2, "overloaded", "try again", retry_after=7)
    with limiter.hold():
        with limiter.hold(), pytest.raises(ProblemError, match="try again") as refused, limiter.hold():
            pass
        assert (refused.value.kind, refused.value.headers) == ("overloaded", {"Retry-After": "7"})
        with limiter.hold():
            pass


def test_failed_call_is_released() -> None:
    limiter = Limiter(1, "overloaded", "try again", retry_after=1)
    for _ in range(2):
        with pytest.raises(KeyError), limiter.hold():
            raise KeyError


def test_gateways_of_one_process_count_separately() -> None:
    settings = Settings(_env_file=None, max_waiting_image_calls=1, max_event_streams=1)
    first, second = GatewayLimits.of(settings), GatewayLimits.of(settings)
    first.event_streams.acquire()
    second.event_streams.acquire()
    with first.images.hold(), second.images.hold():
        for limiter in (first.images, second.images, first.event_streams):
            with pytest.raises(ProblemError):
                limiter.acquire()


def test_comparison_limit_counts_accepted_comparisons_per_minute() -> None:
    now = 0.0
    limiter = ComparisonLimiter(10, clock=lambda: now)
    limiter.add(6)
    now = 20.0
    with pytest.raises(ProblemError) as refused:
        limiter.add(5)
    assert refused.value.headers == {"Retry-After": "41"}
    limiter.add(4)
    now = 60.0
    limiter.add(6)
