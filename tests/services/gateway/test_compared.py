"""Tests that changed copies of an uploaded image get one answer, so that many queries say no more than one about an image."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dermis.authenticity.transformations import blur, compress, mirror, quarter_turn, relight, resized
from dermis.imaging import Images
from dermis.metrics.classification import auc
from dermis.perceptual_hash import fingerprints
from lesions import lesion
from services.compared_answers import remove_answers
from services.errors import DatabaseUnavailableError
from services.gateway.compared import Answers, ComparedImages
from services.jobs.database import make_engine, writing
from services.jobs.table import JobTable
from services.problems import ProblemError

DAY = 86_400.0
CHANGES = (mirror, quarter_turn, relight, blur, compress)


def copies(image: Images, count: int, seed: int) -> list[Images]:
    """The image and changed copies of it."""
    rng = np.random.default_rng(seed)
    changed = [CHANGES[k % len(CHANGES)](image, rng) for k in range(count - 1)]
    return [image, *(np.ascontiguousarray(copy) for copy in changed)]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A jobs database."""
    url = f"sqlite:///{tmp_path}/jobs.db"
    table = JobTable(url)
    table.open()
    table.close()
    return url


def answered(
    kept: ComparedImages, images: list[Images], distances: list[float], tenant: str = "a", index: str = "a"
) -> Answers:
    numbers = np.array(distances, np.float32)
    return kept.answer((tenant, index), fingerprints(images), numbers, numbers + 1)


def test_copies_get_the_first_answer_and_other_images_their_own(url: str) -> None:
    kept = ComparedImages(url, DAY, 100)
    answers = answered(kept, copies(lesion(0), 11, 0), [0.1 * k for k in range(11)])
    assert answers.repeated.tolist() == [False] + 10 * [True]
    assert set(answers.distances) == {0} and set(answers.radii) == {1}
    assert answered(kept, copies(lesion(0), 2, 1), [5, 5]).distances.tolist() == [0, 0]  # in a later call, too
    others = answered(kept, [lesion(seed) for seed in range(1, 20)], list(range(1, 20)))
    assert not others.repeated.any() and others.distances.tolist() == list(range(1, 20))
    assert answered(kept, [lesion(0)], [7], index="another").distances.tolist() == [7]
    assert answered(kept, [lesion(0)], [8], tenant="another").repeated.tolist() == [False]


def test_answer_does_not_depend_on_the_replica_or_a_restart(url: str) -> None:
    """Without a common store, n replicas give n answers on one image, whose mean says more than one of them."""
    replicas = [ComparedImages(url, DAY, 100) for _ in range(2)]
    images = copies(lesion(0), 6, 3)
    for number, image in enumerate(images):
        answers = answered(replicas[number % 2], [image, lesion(10 + number)], [0.5 + number, 20 + number])
        assert answers.distances.tolist() == [0.5, 20 + number] and answers.repeated.tolist() == [number > 0, False]
    assert answered(replicas[0], [lesion(15)], [7]).distances.tolist() == [25]
    restarted = ComparedImages(url, DAY, 100)
    assert answered(restarted, [images[3]], [9]).distances.tolist() == [0.5]
    for kept in (*replicas, restarted):
        kept.close()


def test_copies_at_the_same_moment_get_one_answer(url: str) -> None:
    replicas = [ComparedImages(url, DAY, 100) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(answered, replicas[k % 4], [copy], [float(k)])
            for k, copy in enumerate(copies(lesion(0), 16, 0))
        ]
    answers = [call.result() for call in calls]
    assert len({float(each.distances[0]) for each in answers}) == 1
    assert sum(not each.repeated[0] for each in answers) == 1


def test_no_answer_is_given_that_could_not_be_stored(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ComparedImages(url, DAY, 100)
    answered(kept, [lesion(0)], [0])
    with monkeypatch.context() as patched, pytest.raises(DatabaseUnavailableError):
        patched.setattr("services.gateway.compared.add_answers", fail)
        answered(kept, [lesion(1)], [1])
    assert answered(kept, [lesion(1), lesion(0)], [2, 2]).distances.tolist() == [2, 0]


def fail(*_: object) -> int:
    """A database that is lost before the end of a transaction."""
    raise DatabaseUnavailableError("lost")


def test_expired_answers_are_removed_from_the_database(url: str) -> None:
    now = [0.0]
    kept = ComparedImages(url, 60, 100, lambda: now[0])
    answered(kept, [lesion(0)], [0])
    now[0] = 30.0
    answered(kept, [lesion(1)], [1])
    with writing(make_engine(url)) as connection:
        assert remove_answers(connection, 0.0) == 1
    assert answered(
        ComparedImages(url, 60, 100, lambda: now[0]), [lesion(0), lesion(1)], [5, 5]
    ).distances.tolist() == [5, 1]
    now[0] = 200.0
    with writing(make_engine(url)) as connection:
        remove_answers(connection, now[0])
    # The numbers of removed rows are not used again, or this replica would not notice the row of the other one.
    other = ComparedImages(url, 60, 100, lambda: now[0])
    answered(other, [lesion(2)], [2])
    assert answered(kept, [lesion(2)], [9]).distances.tolist() == [2]


def test_answers_are_kept_for_a_time_and_not_beyond_the_capacity(url: str) -> None:
    now = [0.0]
    kept = ComparedImages(url, 60, 2, lambda: now[0])
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


def test_average_over_copies_finds_no_more_members_than_one_answer(url: str) -> None:
    members, without = queried(ComparedImages(url, 0, 1000))
    _, protected = queried(ComparedImages(url, DAY, 1000))
    single = auc(members, -without[:, 0])
    assert auc(members, -without.mean(axis=1)) > single + 0.2
    assert abs(auc(members, -protected.mean(axis=1)) - single) < 0.03
    assert abs(auc(members, -protected.min(axis=1)) - single) < 0.03
