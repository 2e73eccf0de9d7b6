"""The images per second of a running job, smoothed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.jobs.table import Job

# Weight of the newest measurement, and the shortest time of a measurement.
_WEIGHT = 0.3
_SECONDS = 1.0


def rate_after(job: Job, total: int, now: float) -> dict[str, float | int]:
    """New values of the rate columns: an exponential mean of images/s over intervals of at least a second.

    Args:
        job: The job before its samples are counted.
        total: Its samples that are done.
        now: Seconds since 1970.
    """
    if job.state == "queued" or job.rate_time is None or job.rate_samples is None:
        return {"rate_time": now, "rate_samples": total}
    seconds, images = now - job.rate_time, total - job.rate_samples
    if images < 0:  # a worker died and its half-done shard starts over
        return {"rate_time": now, "rate_samples": total}
    if seconds < _SECONDS or images == 0:
        return {}
    new = images / seconds
    rate = new if job.rate is None else (1 - _WEIGHT) * job.rate + _WEIGHT * new
    return {"rate": rate, "rate_time": now, "rate_samples": total}
