"""Latents and noise from a counter-based generator: a sample depends on (seed, index) alone.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is keyed with the seed and the stream,
and its 256-bit counter starts at index << 64, so every sample has 2**64 blocks of each stream. No sample depends on
batch size, shard order, the number of workers or a restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MAX_SEED = 2**63 - 1
MAX_INDEX = 2**40 - 1

_Z_STREAM = 0
_NOISE_STREAM = 1
_NEIGHBOUR_STREAM = 2


def _generator(seed: int, index: int, stream: int, number: int = 0) -> np.random.Generator:
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must lie in [0, 2**63 - 1]; got {seed}")
    if not 0 <= index <= MAX_INDEX:
        raise ValueError(f"index must lie in [0, 2**40 - 1]; got {index}")
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, index, number, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def mixed_seed(*numbers: int) -> int:
    """Mix numbers of at least 0 into one seed of 63 bits, such as the seed of a run and the number of a step.

    torch's generator on a CPU uses only the lower 32 bits of a seed, so all numbers must affect these.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def z_for(seed: int, indices: Sequence[int] | npt.NDArray[np.integer], z_dim: int) -> npt.NDArray[np.float32]:
    """Draw standard normal latents.

    Args:
        seed: The seed, from 0 to MAX_SEED.
        indices: Indices [N], from 0 to MAX_INDEX.
        z_dim: Dimensions of z.

    Returns:
        float32 [N, z_dim], one row for each index.

    Raises:
        ValueError: The seed or an index is out of range.
    """
    z = np.empty((len(indices), z_dim), dtype=np.float32)
    for row, index in zip(z, indices, strict=True):
        _generator(int(seed), int(index), _Z_STREAM).standard_normal(dtype=np.float32, out=row)
    return z


def noise_for(seed: int, index: int, resolutions: Sequence[int]) -> list[npt.NDArray[np.float32]]:
    """Draw standard normal noise maps float32 [R, R], one for each R in `resolutions`, from their own stream.

    They are drawn one after the other, so a longer list begins with the maps of a shorter one.

    Raises:
        ValueError: The seed or the index is out of range.
    """
    generator = _generator(int(seed), int(index), _NOISE_STREAM)
    return [generator.standard_normal((size, size), dtype=np.float32) for size in resolutions]


def noise_vectors(
    seeds: Sequence[int], indices: Sequence[int], size: int, out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Draw noise vectors. Row i has the maps of `noise_for`, each flattened, one after the other.

    Args:
        seeds: Seeds [N].
        indices: Indices [N].
        size: Sum of R^2 over all resolutions R.
        out: Array float32 [N, size] to write to; None for a new one.

    Returns:
        float32 [N, size].
    """
    vectors = np.empty((len(seeds), size), dtype=np.float32) if out is None else out
    for row, seed, index in zip(vectors, seeds, indices, strict=True):
        _generator(int(seed), int(index), _NOISE_STREAM).standard_normal(dtype=np.float32, out=row)
    return vectors


def partner_z(seed: int, index: int, number: int, z_dim: int) -> npt.NDArray[np.float32]:
    """Draw the standard normal latent [z_dim] towards which neighbour `number` of sample (seed, index) lies.

    Partners have their own stream: no partner is a sample, and no two neighbours have the same partner.

    Raises:
        ValueError: The seed, the index or the number is out of range.
    """
    if number < 0:
        raise ValueError(f"number must be at least 0; got {number}")
    return _generator(int(seed), int(index), _NEIGHBOUR_STREAM, int(number)).standard_normal(z_dim, dtype=np.float32)
