"""Patients and noise of each step, from secret random numbers, and the count of all steps that were ever computed.

The guarantee needs two things to be secret: which patients take part in a step, and the noise. Both come from the operating
system's random numbers, which no seed repeats. So a resumed run never adds the same noise twice, and it is not a bit-for-bit
repetition. With a seed (`GanConfig.dp_seed`, for tests) a run can be repeated, and protects nobody.

What a sampled patient contributes follows from (seed of the run, step, name of the patient), never from a position in the
batch. Otherwise one patient more or less would change what the others contribute, by more than the clipping norm.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dermis.errors import TrainingError
from dermis.files import atomic_write
from training.data.images import ImageDataset
from training.gan.config import GanConfig
from training.gan.private.accountant import epsilon_spent, steps_within
from training.gan.private.units import PrivacyUnits, units_of

LEDGER = "privacy.json"  # in the folder of a run
_RESERVED = 16  # number of steps that are written to the disk in advance at a time


@dataclass(frozen=True)
class PatientImages:
    """The images of one sampled patient: uint8 [k, R, R, 3], labels int64 [k], and the seed of their augmentation."""

    images: Tensor
    labels: NDArray[np.int64]
    seed: int


@dataclass(frozen=True)
class PrivateBatch:
    """The patients of one step, none, one or several, and the noise for the sum of their gradients."""

    patients: Sequence[PatientImages]
    randomness: SecretRandomness


class SecretRandomness:
    """Random numbers of one step: from the operating system or, for tests, from (seed, step)."""

    def __init__(self, seed: int | None, step: int) -> None:
        self._rng = None if seed is None else np.random.default_rng([seed, step])

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Numbers in (0, 1] with 53 random bits each."""
        words = np.frombuffer(self._bytes(8 * count), dtype=np.uint64)
        return ((words >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53

    def normal(self, count: int) -> NDArray[np.float32]:
        """Independent standard normal numbers, by the method of Box and Muller."""
        half = (count + 1) // 2
        radius = np.sqrt(-2 * np.log(self.uniform(half)))
        angle = (2 * np.pi) * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].astype(np.float32)

    def _bytes(self, count: int) -> bytes:
        return os.urandom(count) if self._rng is None else self._rng.bytes(count)


class PrivacyLedger:
    """Number of steps that were computed in a run folder, written to the disk before they are computed.

    Steps after the last checkpoint are lost if the program is killed, but log lines and pictures that they led to may have
    been seen. They count. Since steps are written 16 at a time, up to 15 steps more than were computed can then count.

    Args:
        out: Folder of the run.
        saved_steps: Number of steps in the checkpoint that is resumed; None for a new run.

    Raises:
        TrainingError: The ledger of a resumed run is missing, or a new run begins in a folder with one.
    """

    def __init__(self, out: Path, saved_steps: int | None) -> None:
        self.path = out / LEDGER
        self.steps = saved_steps or 0
        if self.path.exists():
            try:
                steps = json.loads(self.path.read_text(encoding="utf-8"))["steps"]
            except (ValueError, KeyError, TypeError):
                steps = None
            if not isinstance(steps, int):
                raise TrainingError(
                    f"{self.path}: is damaged; restore it from a copy, because it states how many steps were computed"
                )
            if saved_steps is None and steps:
                raise TrainingError(
                    f"{self.path}: states {steps:,} steps of an earlier run with differential privacy that saved no "
                    "checkpoint; their epsilon adds to that of a new run. Choose another --out"
                )
            self.steps = max(self.steps, steps)
        elif saved_steps:
            raise TrainingError(
                f"{self.path}: is missing. It states how many steps were computed since the start, also those after the last "
                "checkpoint; restore it to resume this run"
            )
        self._written = self.steps

    def count_step(self) -> None:
        """Add one step. When this returns, the number on the disk is not smaller than `steps`."""
        self.steps += 1
        if self.steps > self._written:
            self._write(self.steps + _RESERVED - 1)

    def settle(self) -> None:
        """Write the exact number of steps, when a checkpoint has been saved."""
        self._write(self.steps)

    def _write(self, steps: int) -> None:
        with atomic_write(self.path) as partial, partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"steps": steps}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._written = steps


class PatientSampler:
    """Draws the patients of each step: each one independently, with probability batch / number of patients.

    Args:
        dataset: Training images.
        config: Hyper-parameters with `dp` and a `dp_noise`.
        out: Folder of the run, for the ledger.
        saved_steps: Number of steps in the checkpoint that is resumed; None for a new run.

    Raises:
        TrainingError: An option does not fit these images, or the ledger is not consistent.
    """

    def __init__(self, dataset: ImageDataset, config: GanConfig, out: Path, saved_steps: int | None) -> None:
        self.dataset, self.config, self.units = dataset, config, units_of(dataset)
        self.cost = PrivacyCost(config, self.units)
        self.ledger = PrivacyLedger(out, saved_steps)
        self.max_steps = self.cost.max_steps

    @property
    def exhausted(self) -> bool:
        """Whether another step would exceed dp_epsilon."""
        return self.max_steps is not None and self.ledger.steps >= self.max_steps

    @property
    def epsilon(self) -> float:
        """Epsilon of all steps so far."""
        return self.cost.epsilon(self.ledger.steps)

    def batches(self, step: int, device: torch.device) -> Generator[PrivateBatch]:
        """Yield the batches of the steps from `step` on. Each is counted before it is drawn."""
        while True:
            self.ledger.count_step()
            randomness = SecretRandomness(self.config.dp_seed, step)
            sampled = np.flatnonzero(randomness.uniform(len(self.units)) <= self.cost.rate)
            yield PrivateBatch([self._images(int(unit), step, device) for unit in sampled], randomness)
            step += 1

    def _images(self, unit: int, step: int, device: torch.device) -> PatientImages:
        """At most dp_images_per_patient images of a unit, chosen by (seed, step, name of the unit)."""
        key = f"{self.config.seed}\t{step}\t{self.units.names[unit]}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:4], "big")  # torch uses 32 bits of a seed on the CPU
        members = self.units.images[unit]
        if len(members) > self.config.dp_images_per_patient:
            members = np.random.default_rng(seed).choice(members, self.config.dp_images_per_patient, replace=False)
        images = torch.from_numpy(np.ascontiguousarray(self.dataset.images[members])).to(device)
        return PatientImages(images, self.dataset.labels[members], seed)


class PrivacyCost:
    """Epsilon of a configuration for a number of steps.

    Raises:
        TrainingError: The batch, the delta or the noise do not fit this number of units.
    """

    def __init__(self, config: GanConfig, units: PrivacyUnits) -> None:
        if config.batch > len(units):
            raise TrainingError(
                f"batch: {config.batch} is more than the {len(units)} units of privacy ({units.unit}); with --dp it is the "
                "expected number of them in a step"
            )
        self.delta = units.default_delta if config.dp_delta is None else config.dp_delta
        if self.delta > 1 / len(units):
            raise TrainingError(
                f"--dp-delta: {self.delta:g} is more than 1 / {len(units)}: even the publication of all images of a random "
                "unit would satisfy it"
            )
        self.rate, self.noise, self._target = config.batch / len(units), config.dp_noise, config.dp_epsilon

    def epsilon(self, steps: int) -> float:
        """Epsilon after this number of steps."""
        if self.noise is None:
            raise TrainingError("dp_noise: is not set; give --dp-noise, or --dp-epsilon to `dermis train gan`")
        return epsilon_spent(steps, self.rate, self.noise, self.delta)

    @property
    def max_steps(self) -> int | None:
        """Number of steps that dp_epsilon allows; None without one. Raises TrainingError if it allows none."""
        self.epsilon(1)
        if self._target is None or not self.noise:
            return None
        steps = steps_within(self._target, self.rate, self.noise, self.delta)
        if steps == 0:
            raise TrainingError(
                f"--dp-epsilon: one step costs {self.epsilon(1):.3g}, more than {self._target:g}; give more --dp-noise or a "
                "smaller --batch"
            )
        return steps
