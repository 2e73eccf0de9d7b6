"""Tests that latents depend only on (seed, index), and do not change between releases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dermis.latents import MAX_INDEX, MAX_SEED, mixed_seed, noise_for, noise_vectors, z_for

seeds = st.integers(0, MAX_SEED)
indices = st.integers(0, MAX_INDEX)


@settings(max_examples=50, deadline=None)
@given(seeds, st.lists(indices, min_size=1, max_size=8), st.integers(1, 64))
def test_latent_depends_only_on_its_own_index(seed: int, chosen: list[int], z_dim: int) -> None:
    together = z_for(seed, np.array(chosen), z_dim)
    assert together.shape == (len(chosen), z_dim) and together.dtype == np.float32
    for row, index in zip(together, chosen, strict=True):
        assert np.array_equal(row, z_for(seed, [index], z_dim)[0])


def test_latents_and_noise_of_seeds_and_indices_do_not_overlap() -> None:
    rows = [z_for(seed, range(64), 256).ravel() for seed in (0, 1, MAX_SEED)]
    rows += [noise_for(0, index, [16])[0].ravel() for index in range(64)]
    values = np.concatenate(rows)
    # float32 normals have 23 random bits, so a few equal values are chance; an overlap would repeat hundreds.
    assert len(np.unique(values)) > 0.99 * len(values)


def test_latents_are_standard_normal() -> None:
    z = z_for(3, range(2000), 64)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert abs(np.corrcoef(z[:-1].ravel(), z[1:].ravel())[0, 1]) < 0.01


def test_noise_of_more_layers_begins_with_noise_of_fewer_layers() -> None:
    long, short = noise_for(5, 9, [4, 8, 8, 16]), noise_for(5, 9, [4, 8])
    assert [n.shape for n in long] == [(4, 4), (8, 8), (8, 8), (16, 16)]
    assert all(np.array_equal(a, b) for a, b in zip(long, short, strict=False))
    assert not np.array_equal(long[1], long[2])


def test_noise_vectors_equal_noise_images_of_each_sample() -> None:
    sizes = [4, 8, 8, 16]
    vectors = noise_vectors([5, 6, 5], [9, 9, 1], sum(size**2 for size in sizes))
    for vector, (seed, index) in zip(vectors, ((5, 9), (6, 9), (5, 1)), strict=True):
        assert np.array_equal(vector, np.concatenate([image.ravel() for image in noise_for(seed, index, sizes)]))


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (MAX_SEED + 1, 0), (0, -1), (0, MAX_INDEX + 1)])
def test_seed_or_index_out_of_range_is_refused(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        z_for(seed, [index], 4)
    with pytest.raises(ValueError, match="must lie in"):
        noise_for(seed, index, [4])


def test_latents_and_noise_equal_those_of_earlier_releases() -> None:
    """Manifests rely on it: a change here means that old datasets cannot be made again."""
    expected = [[-0.293339, 1.7038306, 1.5391918, 0.63675386], [-1.0433505, 1.1358026, -0.39963192, 1.7852352]]
    assert np.array_equal(z_for(7, [0, 1], 4), np.array(expected, dtype=np.float32))
    assert np.array_equal(
        noise_for(7, 0, [2])[0], np.array([[-0.59347034, 1.547825], [-0.5029522, -0.8528061]], dtype=np.float32)
    )


def test_every_number_of_a_mixed_seed_changes_the_random_numbers_of_torch() -> None:
    seeds = [mixed_seed(*numbers) for numbers in itertools.product(range(4), range(4), range(4))]
    drawn = {float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in seeds}
    assert len(drawn) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
