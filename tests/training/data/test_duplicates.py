"""Tests of near-duplicates: copies and other views of an image are detected, different lesions are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

from dermis.perceptual_hash import fingerprints, mirrored, perceptual_hashes, turned_and_mirrored
from lesions import lesion
from training.data.duplicates import (
    CORRELATION,
    HASH_DISTANCE,
    Pairs,
    confirmed,
    correlation,
    embedding_pairs,
    groups,
    hash_pairs,
    union,
)

Picture = NDArray[np.uint8]


def jpeg(image: Picture) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=50)
    return np.asarray(Image.open(buffer).convert("RGB"))


def crop(image: Picture, share: float) -> Picture:
    cut = round(share * len(image))
    return image[cut:-cut, cut:-cut]


def turn(image: Picture, degrees: float) -> Picture:
    return crop(np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR)), 0.1)


def resize(image: Picture, size: int) -> Picture:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


def brighten(image: Picture) -> Picture:
    return np.clip(image * np.array([1.1, 1.0, 0.95]) + 8, 0, 255).astype(np.uint8)


def bits(a: np.uint64, b: np.uint64) -> int:
    return int(np.bitwise_count(a ^ b))


COPIES = {"jpeg": jpeg, "crop": lambda x: crop(x, 0.01), "resized": lambda x: resize(x, 97), "light": brighten}
VIEWS = {"turned": lambda x: turn(x, 15), "closer": lambda x: crop(x, 0.15), "small": lambda x: resize(x, 100)}


@pytest.mark.parametrize("change", COPIES)
def test_copies_have_nearly_the_same_hash(change: str) -> None:
    images = [lesion(seed) for seed in range(8)]
    for image, copy in zip(perceptual_hashes(images), perceptual_hashes(map(COPIES[change], images)), strict=True):
        assert bits(image, copy) <= HASH_DISTANCE


def test_hash_pairs_are_exactly_the_copies() -> None:
    images = [lesion(seed) for seed in range(20)]
    pairs = hash_pairs(perceptual_hashes([*images, jpeg(images[3]), resize(brighten(images[7]), 301)]), 4)
    assert list(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True)) == [(3, 20), (7, 21)]


@given(arrays(np.uint8, st.tuples(st.integers(1, 70), st.integers(1, 70), st.just(3))))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_perceptual_hash_depends_on_image_alone(image: Picture) -> None:
    other = np.zeros((40, 30, 3), np.uint8)
    hashes = perceptual_hashes([image, other, image])
    assert hashes.dtype == np.uint64
    assert hashes[0] == hashes[2] == perceptual_hashes([image])[0]


def test_mirror_images_are_found_when_asked_for() -> None:
    images = [lesion(seed) for seed in range(8)]
    expected = mirrored(perceptual_hashes(images))
    flips = [lambda x: x, lambda x: x[:, ::-1], lambda x: x[::-1], lambda x: x[::-1, ::-1]]
    for position, flip in enumerate(flips):
        hashes = perceptual_hashes([np.ascontiguousarray(flip(image)) for image in images])
        assert all(bits(a, b) <= 1 for a, b in zip(hashes, expected[:, position], strict=True))
    hashes = perceptual_hashes([*images, np.ascontiguousarray(images[2][:, ::-1])])
    assert len(hash_pairs(hashes)) == 0
    mirrored_pairs = hash_pairs(hashes, mirrors=True)
    assert groups(mirrored_pairs) == [[2, 8]]

    def load(k: int) -> Picture:
        return np.ascontiguousarray(images[2][:, ::-1]) if k == 8 else images[k]

    assert len(confirmed(mirrored_pairs, load, progress=False)) == 0
    assert len(confirmed(mirrored_pairs, load, mirrors=True, progress=False)) == 1


def test_fingerprints_of_turned_images_follow_from_those_of_the_images() -> None:
    images = [lesion(seed) for seed in range(8)]
    expected = turned_and_mirrored(fingerprints(images))
    assert np.array_equal(expected[:, 0], fingerprints(images))
    for quarters in range(4):
        for flip in (1, -1):
            views = [np.ascontiguousarray(np.rot90(image, quarters)[:, ::flip]) for image in images]
            for value, positions in zip(fingerprints(views), expected, strict=True):
                differing = np.bitwise_count(value ^ positions).sum(axis=1)
                assert differing.min() <= 4 and np.median(differing) > 80


@given(arrays(np.uint64, st.integers(0, 40)), st.integers(0, 64), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_hash_pairs_are_all_pairs_within_the_distance(hashes: NDArray[np.uint64], limit: int, mirrors: bool) -> None:
    positions = mirrored(hashes) if mirrors else hashes[:, None]
    expected = {}
    for j in range(len(hashes)):
        for i in range(j):
            distance = min(bits(hashes[i], other) for other in positions[j])
            assert distance == min(bits(hashes[j], other) for other in positions[i])  # symmetric
            if distance <= limit:
                expected[i, j] = distance
    near_pairs = hash_pairs(hashes, limit, mirrors=mirrors)
    pairs = list(zip(near_pairs.i.tolist(), near_pairs.j.tolist(), strict=True))
    assert pairs == sorted(expected)
    assert dict(zip(pairs, near_pairs.distance.tolist(), strict=True)) == expected


def test_pairs_across_blocks_are_found() -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**63, 700, dtype=np.uint64)  # more than two blocks
    hashes[[300, 699]] = hashes[[5, 255]] ^ np.uint64(1)
    assert groups(hash_pairs(hashes, 1)) == [[5, 300], [255, 699]]
    features = random.standard_normal((2100, 8)).astype(np.float32)  # more than two blocks
    features[[1500, 2099]] = features[[3, 1023]] * 2
    assert groups(embedding_pairs(features, 0.99999, components=0)) == [[3, 1500], [1023, 2099]]


def test_whitening_finds_copy_despite_common_component() -> None:
    random = np.random.default_rng(1)
    common = 50 * random.standard_normal((300, 1)) * random.standard_normal((1, 32))  # what all images share
    features = (common + random.standard_normal((300, 32)) + 5).astype(np.float32)
    copy = (features[7:8] + 60 * common[8:9] / np.abs(common[8:9]).max()).astype(np.float32)
    both = np.concatenate([features, copy])
    assert groups(embedding_pairs(both, 0.9)) == [[7, 300]]
    assert len(embedding_pairs(both, 0.9, components=0)) > 1000


@pytest.mark.parametrize("change", VIEWS)
def test_views_of_same_lesion_match(change: str) -> None:
    image = lesion(0)
    view = VIEWS[change](image)
    assert correlation(image, view) >= CORRELATION
    assert correlation(view, image) >= CORRELATION


def test_different_lesions_do_not_match() -> None:
    assert max(correlation(lesion(seed), lesion(seed + 1)) for seed in range(0, 8, 2)) < CORRELATION - 0.1


def test_an_image_matches_itself_and_plain_skin_matches_nothing() -> None:
    assert correlation(lesion(0), lesion(0)) > 0.99
    plain = np.full((80, 80, 3), 200, np.uint8)
    assert correlation(plain, plain) == 0
    assert correlation(plain, lesion(0)) < 0.5


def test_only_confirmed_pairs_are_kept() -> None:
    images = [lesion(0), lesion(1), turn(lesion(0), 6), lesion(2)]
    candidates = Pairs(np.array([0, 0, 1]), np.array([1, 2, 3]), np.array([3.0, 4.0, 5.0]))
    near = confirmed(candidates, lambda k: images[k], progress=False)
    assert groups(near) == [[0, 2]]
    assert 0 <= near.distance[0] <= 1 - CORRELATION


def of(*ends: tuple[int, int]) -> Pairs:
    array = np.array(sorted(ends), dtype=np.int64).reshape(-1, 2)
    return Pairs(array[:, 0], array[:, 1], np.zeros(len(array)))


@given(st.sets(st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(lambda pair: pair[0] < pair[1])))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_groups_are_a_partition_of_the_paired_images(ends: set[tuple[int, int]]) -> None:
    partition = groups(of(*ends))
    assert sorted(member for group in partition for member in group) == sorted({end for pair in ends for end in pair})
    home = {member: k for k, group in enumerate(partition) for member in group}
    assert all(home[i] == home[j] for i, j in ends)
    for group in partition:  # each is connected: some pair leaves every proper part of it
        reached = {group[0]}
        while more := {end for pair in ends if reached & set(pair) for end in pair} - reached:
            reached |= more
        assert sorted(reached) == group


def test_a_union_keeps_each_pair_once() -> None:
    a = Pairs(np.array([0, 2]), np.array([1, 3]), np.array([4.0, 5.0]))
    b = Pairs(np.array([0, 2]), np.array([3, 3]), np.array([0.1, 0.2]))
    both = union(a, b)
    assert list(zip(both.i.tolist(), both.j.tolist(), both.distance.tolist(), strict=True)) == [
        (0, 1, 4.0),
        (0, 3, 0.1),
        (2, 3, 5.0),
    ]
    assert len(union(of(), of())) == 0


def test_empty_input_gives_no_pairs() -> None:
    assert len(hash_pairs(perceptual_hashes([]))) == 0
    assert len(embedding_pairs(np.zeros((0, 4), np.float32))) == 0
    assert groups(of()) == []
    with pytest.raises(ValueError, match="between 0 and 64"):
        hash_pairs(np.zeros(2, np.uint64), 65)
