"""Tests that changed copies of an uploaded image get one answer, so that many queries say no more than one about an image."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dermis.authenticity.transformations import blur, compress, mirror, quarter_turn, relight, resized
from dermis.imaging import Images
from dermis.metrics.classification import auc
from dermis.perceptual_hash import fingerprints
from lesions import lesion
from services.gateway.compared import Answers, ComparedImages
from services.problems import ProblemError

DAY = 86_400.0
CHANGES = (mirror, quarter_turn, relight, blur, compress)


def copies(image: Images, count: int, seed: int) -> list[Images]:
    """The image and changed copies of it."""
    rng = np.random.default_rng(seed)
    changed = [CHANGES[k % len(CHANGES)](image, rng) for k in range(count - 1)]
    return [image, *(np.ascontiguousarray(copy) for copy in changed)]


def answered(
    kept: ComparedImages, images: list[Images], distances: list[float], tenant: str = "a", index: str = "a"
) -> Answers:
    numbers = np.array(distances, np.float32)
    return kept.answer((tenant, index), fingerprints(images), numbers, numbers + 1)


def test_copies_get_the_first_answer_and_other_images_their_own() -> None:
    kept = ComparedImages(DAY, 100)
    answers = answered(kept, copies(lesion(0), 11, 0), [0.1 * k for k in range(11)])
    assert answers.repeated.tolist() == [False] + 10 * [True]
    assert set(answers.distances) == {0} and set(answers.radii) == {1}
    assert answered(kept, copies(lesion(0), 2, 1), [5, 5]).distances.tolist() == [0, 0]  # in a later call, too
    others = answered(kept, [lesion(seed) for seed in range(1, 20)], list(range(1, 20)))
    assert not others.repeated.any() and others.distances.tolist() == list(range(1, 20))
    assert answered(kept, [lesion(0)], [7], index="another").distances.tolist() == [7]
    assert answered(kept, [lesion(0)], [8], tenant="another").repeated.tolist() == [False]


def test_answers_are_kept_for_a_time_and_not_beyond_the_capacity() -> None:
    now = [0.0]
    kept = ComparedImages(60, 2, lambda: now[0])
    answered(kept, [lesion(0)], [0])
    now[0] = 20.0
    answered(kept, [lesion(1)], [1])
    with pytest.raises(ProblemError) as full:
        answered(kept, [lesion(2)], [2])
    assert full.value.kind == "too-many-requests" and int(full.value.headers["Retry-After"]) == 41
    with pytest.raises(ProblemError):  # all indexes of the tenant together
        answered(kept, [lesion(2)], [2], index="another")
    assert answered(kept, [lesion(2)], [2], tenant="another").distances.tolist() == [2]
    assert answered(kept, [lesion(0)], [9]).distances.tolist() == [0]
    now[0] = 60.5
    assert answered(kept, [lesion(0), lesion(1)], [9, 9]).distances.tolist() == [9, 1]
    now[0] = 200.0
    answered(kept, [lesion(3)], [3], tenant="a third")
    assert [len(each) for each in kept._of_tenant.values()] == [0, 0, 1]  # also if the others do not come back


def queried(kept: ComparedImages) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ask for 12 copies of each of 50 images. The distance of a member is a little smaller; a copy changes it at random."""
    rng = np.random.default_rng(0)
    members = np.arange(50) % 2
    images = [resized(lesion(k), (48, 48)) for k in range(50)]
    rows = [
        answered(kept, copies(image, 12, k), list(rng.normal(0.4 - 0.03 * members[k], 0.05, 12)))
        for k, image in enumerate(images)
    ]
    return members, np.stack([row.distances for row in rows]).astype(np.float64)


def test_average_over_copies_finds_no_more_members_than_one_answer() -> None:
    members, without = queried(ComparedImages(0, 1000))
    _, protected = queried(ComparedImages(DAY, 1000))
    single = auc(members, -without[:, 0])
    assert auc(members, -without.mean(axis=1)) > single + 0.2
    assert abs(auc(members, -protected.mean(axis=1)) - single) < 0.03
    assert abs(auc(members, -protected.min(axis=1)) - single) < 0.03
