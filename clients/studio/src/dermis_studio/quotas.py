"""What is left of a tenant's quotas, so that a page explains what is used up before a visitor begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

from dermis_client import AsyncDermisClient, Usage
from dermis_client.models import QuotaUsage

from dermis_studio import markup

IMAGES = "images_per_day"
PROJECTIONS = "projections_per_day"
COMPARISONS = "authenticity_per_day"
COMPARISONS_NOW = "authenticity_per_minute"
UPLOADS = "upload_megapixels_per_minute"
JOBS = "active_jobs"
STORED = "stored_bytes"

_WHAT: Mapping[str, str] = {
    IMAGES: "generated images",
    PROJECTIONS: "projected images",
    COMPARISONS: "comparisons with the training images",
    COMPARISONS_NOW: "comparisons with the training images",
    UPLOADS: "uploaded images",
    JOBS: "datasets and projections",
    STORED: "stored files",
}
_MINUTE_SECONDS = 60


@dataclass(frozen=True)
class Left:
    """What is left of quotas.

    Attributes:
        quotas: The quotas by name.
        asked: What a request needs of them by name; at least 1 of each.
    """

    quotas: Mapping[str, QuotaUsage]
    asked: Mapping[str, float] = field(default_factory=dict)

    def remaining(self, name: str) -> float | None:
        """What is left of a quota; None if it has no limit."""
        quota = self.quotas.get(name)
        return None if quota is None or quota.limit is None else quota.remaining

    def exceeded(self, name: str) -> bool:
        """Whether a request would exceed a quota. What is free again within a minute is not counted."""
        quota, remaining = self.quotas.get(name), self.remaining(name)
        if quota is None or remaining is None:
            return False
        waits = quota.window_seconds is not None and quota.window_seconds <= _MINUTE_SECONDS
        return remaining < max(1, self.asked.get(name, 1)) and not (waits and quota.limit)

    def blocks(self, *names: str) -> bool:
        """Whether one of these quotas is exceeded, and nothing that the visitor could stop or delete would change that."""
        return any(
            self.exceeded(name) and (self.quotas[name].window_seconds is not None or not self.quotas[name].limit)
            for name in names
        )

    @property
    def note(self) -> str:
        """What is used up, and what to do; HTML, empty if nothing is."""
        return "".join(self._words(name) for name in self.quotas if self.exceeded(name))

    def _words(self, name: str) -> str:
        quota = self.quotas[name]
        what = _WHAT.get(name, quota.unit)
        limit, remaining = quota.limit or 0.0, quota.remaining or 0.0
        number = markup.size(limit) if name == STORED else markup.number(limit)
        if not limit:
            title = f"Not allowed: {what}"
            text = "The quota of your tenant is 0. Ask the operator of the service for another one."
        elif name == JOBS:
            title = "No further job at the moment"
            jobs = markup.counted(limit, "dataset or projection of your tenant is", f"{what} of your tenant are")
            text = f"{jobs} queued or running, its limit. Wait until one has ended, or stop one."
        elif name == STORED:
            title = "No space left"
            text = (
                f"Your tenant may store {number}, which are used. Delete datasets or projections that are not needed."
            )
        else:
            subject = "It is" if number == "1" else "They are"
            when = (
                "" if quota.resets_at is None else f" {subject} free again on {quota.resets_at:%d %b %Y at %H:%M} UTC."
            )
            period = "this minute" if quota.window_seconds == _MINUTE_SECONDS else "today"
            title = f"Too few {what} left {period}" if remaining else f"No {what} left {period}"
            asked = self.asked.get(name, 1)
            need = f"This needs {markup.number(asked)}; " if remaining and asked > 1 else ""
            used_up = "The only one is used." if number == "1" else f"All {number} are used."
            left = f"{markup.counted(remaining, f'of {number} is', f'of {number} are')} left." if remaining else used_up
            text = f"{need}{left}{when} Load the page again then, or ask the operator for a larger quota."
        return (
            f'<div class="ds-notice ds-quota" role="note" aria-label="Quota"><div><p><b>{escape(title)}.</b> {escape(text)} '
            f"<span>Quota <code>{escape(name)}</code>.</span></p></div></div>"
        )


def left_of(usage: Usage, *names: str, asked: Mapping[str, float] | None = None) -> Left:
    """Return what is left of quotas.

    Args:
        usage: The answer of the service.
        names: Names of the quotas.
        asked: What a request needs of them, in the unit of each.
    """
    return Left({quota.name: quota for quota in usage.quotas if quota.name in names}, asked or {})


async def left(client: AsyncDermisClient, *names: str) -> Left:
    """Ask the service what is left of quotas. Every visitor may ask."""
    return left_of(await client.usage.retrieve(), *names)
