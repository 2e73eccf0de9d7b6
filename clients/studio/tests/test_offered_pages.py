"""Tests of what is offered: pages and starts by scopes, and what is said of quotas that are used up."""

from __future__ import annotations

from typing import Any

import pytest
from dermis_client import Model, Usage
from dermis_studio import frame, quotas
from dermis_studio.access import Visitor
from dermis_studio.loading import Offer
from dermis_studio.pages.authenticity import sources_of
from dermis_studio.pages.generate import count_update
from dermis_studio.starts import offered


@pytest.mark.parametrize(
    ("scopes", "pages", "of_sample", "of_projection"),
    [
        ("", [], [], []),
        ("images", [], [], []),  # without the names of classes nothing can be generated
        ("studies", ["Reader study"], [], []),
        ("datasets:read", ["Datasets"], [], []),
        ("datasets:write models:read", ["Models"], [], []),
        ("datasets:read datasets:write models:read", ["Datasets", "Models"], ["Dataset"], []),
        ("images models:read", ["Generate", "Models"], [], []),
        ("images classify models:read", ["Generate", "Classify", "Models"], ["Classify"], []),
        ("classify models:read", ["Classify", "Models"], [], []),
        ("edits models:read", ["Explore", "Models"], ["Explore"], []),
        ("edits projections models:read", ["Explore", "Project", "Models"], ["Explore"], ["Explore"]),
        ("authenticity:generated models:read", ["Map", "Models"], ["Map"], []),
        (
            "authenticity:generated images models:read",
            ["Generate", "Authenticity", "Map", "Models"],
            ["Authenticity", "Map"],
            [],
        ),
        ("authenticity:uploads models:read", ["Authenticity", "Models"], [], []),
        ("authenticity:generated projections models:read", ["Project", "Map", "Models"], ["Map"], ["Map"]),
    ],
)
def test_pages_and_starts_that_the_scopes_do_not_allow_are_not_offered(
    scopes: str, pages: list[str], of_sample: list[str], of_projection: list[str]
) -> None:
    visitor = Visitor("key", "ward-3", frozenset(scopes.split()))
    assert [page.name for page in frame.PAGES if not visitor.lacks(page.needs)] == pages
    assert [name for _, name in offered(visitor)] == of_sample
    assert [name for _, name in offered(visitor, projection=True)] == of_projection


def test_everything_is_offered_where_the_scopes_are_not_known() -> None:
    visitor = Visitor(None, "default", None)
    assert all(not visitor.lacks(page.needs) for page in frame.PAGES)
    assert len(offered(visitor)) == 5


def used(name: str, limit: float | None, count: float | None, seconds: int | None = 86_400) -> Any:
    """A quota of a tenant and its use."""
    left = None if limit is None or count is None else max(0.0, limit - count)
    ends = None if seconds is None else "2026-11-30T00:00:00Z"
    numbers = {"limit": limit, "used": count, "remaining": left, "window_seconds": seconds, "resets_at": ends}
    return {"name": name, "unit": "images", **numbers}


def left_of(*uses: Any, asked: dict[str, float] | None = None) -> quotas.Left:
    usage = Usage.model_validate({"tenant": "ward-3", "quotas": list(uses)})
    return quotas.left_of(usage, *(use["name"] for use in uses), asked=asked)


def test_quota_that_is_used_up_is_explained_with_the_time_at_which_it_is_free_again() -> None:
    left = left_of(used(quotas.IMAGES, 500, 500), used(quotas.JOBS, None, None, None))
    assert left.blocks(quotas.IMAGES) and not left.blocks(quotas.JOBS)
    assert "No generated images left today." in left.note
    assert "All 500 are used. They are free again on 30 Nov 2026 at 00:00 UTC." in left.note
    assert "<code>images_per_day</code>" in left.note and quotas.JOBS not in left.note
    free = left_of(used(quotas.IMAGES, 500, 499))
    assert (free.note, free.blocks(quotas.IMAGES), free.remaining(quotas.IMAGES)) == ("", False, 1)


def test_request_that_needs_more_than_is_left_is_explained() -> None:
    use = used(quotas.IMAGES, 500, 480)
    assert left_of(use, asked={quotas.IMAGES: 20}).note == ""
    left = left_of(use, asked={quotas.IMAGES: 21})
    assert left.blocks(quotas.IMAGES)
    assert "This needs 21; 20 of 500 are left." in left.note


@pytest.mark.parametrize(
    ("use", "blocks", "words"),
    [
        (used(quotas.JOBS, 2, 2, None), False, "2 datasets and projections of your tenant are queued or running"),
        (used(quotas.STORED, 2e9, 2e9, None), False, "Your tenant may store 2.0 GB"),
        (used(quotas.JOBS, 0, 0, None), True, "Not allowed: datasets and projections."),
        (used(quotas.UPLOADS, 0, 0, 60), True, "Ask the operator"),
        (used(quotas.UPLOADS, 5, 5, 60), False, ""),  # free again within a minute
    ],
)
def test_button_is_off_only_if_the_visitor_cannot_change_that(use: Any, blocks: bool, words: str) -> None:
    left = left_of(use)
    assert left.blocks(use["name"]) is blocks
    assert (words in left.note) if words else left.note == ""


def test_no_more_images_can_be_chosen_than_are_left() -> None:
    update = count_update(5.0)
    assert (update["maximum"], update["value"]) == (5, 5)
    assert count_update(30.0)["value"] == 16
    for unlimited in (None, 64.0, 0.0):
        assert "maximum" not in count_update(unlimited)


@pytest.mark.parametrize(
    ("scopes", "uploads", "uses", "expected"),
    [
        ("authenticity:generated images", False, (), (True, False)),
        ("authenticity:generated", False, (), (False, False)),  # the picture of a sample could not be shown
        ("authenticity:uploads images", True, (), (False, True)),
        ("authenticity:generated images authenticity:uploads", True, (), (True, True)),
        ("authenticity:generated images authenticity:uploads", True, (used(quotas.IMAGES, 9, 9),), (False, True)),
    ],
)
def test_authenticity_offers_the_images_that_can_be_compared(
    scopes: str, uploads: bool, uses: tuple[Any, ...], expected: tuple[bool, bool]
) -> None:
    model = Model.model_construct(name="demo", classes=["benign"], authenticity={"uploads": uploads})
    visitor = Visitor("key", "ward-3", frozenset(scopes.split()))
    assert sources_of(Offer(model, visitor, left_of(*uses), {}))[:2] == expected
