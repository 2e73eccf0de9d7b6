"""One run: from real images to the folder of a calibrated and measured copy detector."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis import __version__
from dermis.authenticity.copy_detector import (
    Describe,
    calibrate,
    describer,
    first_margins,
    scores_of,
    second_margins,
)
from dermis.authenticity.copy_network import network_from, to_bytes
from dermis.authenticity.copy_references import MIN_REFERENCES, CopySearch, packed, unpacked
from dermis.authenticity.verdict import FALSE_ALARMS
from dermis.bundle.copies import WEIGHTS, CopiesDescription, Thresholds, write_copies_folder
from dermis.cpus import available_cpus
from dermis.devices import describe_hardware, resolve_device
from dermis.errors import TrainingError
from dermis.imaging import Images
from training.copies.config import CopiesConfig
from training.copies.loop import CopiesProgress, train
from training.copies.measure import measure
from training.copies.references import references_of, with_ordered_descriptors
from training.data.images import ImageDataset

FOLDER = "copies"
MEASURED = 500
MIN_CALIBRATION = 200
"""Images without which a share of 1 % of false alarms cannot be set: two images."""


@dataclass(frozen=True)
class TrainedCopyDetector:
    """The result of a finished run."""

    folder: Path
    description: CopiesDescription
    progress: CopiesProgress


def train_copy_detector(
    real: ImageDataset,
    calibration: ImageDataset,
    config: CopiesConfig,
    out: Path,
    *,
    held_out: ImageDataset | None = None,
    measured: int = MEASURED,
    device: str = "auto",
    resume: bool = False,
    loggers: Sequence[str] = (),
    progress_bar: bool = True,
) -> TrainedCopyDetector | None:
    """Train, calibrate and measure a copy detector.

    Args:
        real: The training images of the generator, which are to be recognised.
        calibration: Real images of other patients, for the threshold.
        config: Hyper-parameters.
        out: Folder of the run. It gets the files of `train`, and the folder `copies`, which is replaced.
        held_out: Real images of other patients than both, to measure with. Without them the detector is measured with the
            images of the calibration, whose share of false alarms is 1 % by construction.
        measured: Changed copies of each kind to measure with.
        device: Device of the network.
        resume: Continue the run that is in `out`.
        loggers: Where curves go besides log.jsonl (`training.loggers`).
        progress_bar: Show a progress bar.

    Returns:
        The result; None if the user stopped the training.

    Raises:
        TrainingError: There are too few images, images are in two of the sets, or the training failed.
    """
    if len(real.ids) < 5 * MIN_REFERENCES:
        raise TrainingError(f"data: {len(real.ids)} images; a copy detector needs at least {5 * MIN_REFERENCES}")
    if len(calibration.ids) < MIN_CALIBRATION:
        raise TrainingError(f"calibration: {len(calibration.ids)} images; at least {MIN_CALIBRATION} are needed")
    sets = {"--data": real, "--calibration": calibration, "--held-out": held_out}
    _check_disjoint({name: images for name, images in sets.items() if images is not None})
    target = resolve_device(device)
    network, progress = train(
        real.images,
        config,
        out,
        identity=real.sha256,
        device=target,
        resume=resume,
        loggers=loggers,
        progress_bar=progress_bar,
    )
    if progress.stopped:
        return None
    network = with_ordered_descriptors(network, describer(network, config.size), real.images)
    weights = to_bytes(network)
    describe = describer(network_from(weights, config.dim, WEIGHTS), config.size)
    detector = _calibrated(describe, real.images, calibration.images, config.seed)
    others = calibration if held_out is None else held_out
    metrics: dict[str, Any] = {
        "measured_on": "calibration" if held_out is None else "held_out",
        "false_alarms_of_calibration": FALSE_ALARMS,
        "training": measure(detector.scores, real.images, others.images, count=measured),
    }
    if held_out is not None:
        # The network was not trained on these. The thresholds are set with the images of the calibration again.
        other = _calibrated(describe, held_out.images, calibration.images, config.seed)
        metrics["other_references"] = measure(other.scores, held_out.images, calibration.images, count=measured)
    description = CopiesDescription(
        size=config.size,
        dim=config.dim,
        references=len(real.ids),
        thresholds=detector.thresholds,
        provenance={
            "images": {"count": len(real.ids), "sha256": real.sha256, "resolution": real.resolution},
            "calibration": {"count": len(calibration.ids), "sha256": calibration.sha256},
            "held_out": None if held_out is None else {"count": len(held_out.ids), "sha256": held_out.sha256},
            "configuration": asdict(config),
            "schedules": [list(schedule) for schedule in progress.lengths],
            "hours": round(progress.seconds / 3600, 3),
            "hardware": describe_hardware(target),
            "code_version": __version__,
        },
        metrics=metrics,
    )
    folder = out / FOLDER
    file = io.BytesIO()
    np.save(file, detector.stored, allow_pickle=False)
    description = write_copies_folder(folder, description, weights, file.getvalue(), replace=folder.exists())
    return TrainedCopyDetector(folder, description, progress)


@dataclass(frozen=True)
class _Detector:
    """A calibrated detector that is not in a folder yet."""

    describe: Describe
    stored: NDArray[np.uint8]
    search: CopySearch
    thresholds: Thresholds

    def scores(self, images: Images) -> NDArray[np.float32]:
        return scores_of(self.describe, self.search, self.thresholds, images)


def _calibrated(describe: Describe, references: Images, others: Images, seed: int) -> _Detector:
    """Make a detector of `references`, with thresholds that 1 % of the other images reach."""
    stored = packed(references_of(describe, references, seed))
    dim = stored.shape[1] * 2 // 3
    search = CopySearch(unpacked(stored, dim), available_cpus())
    thresholds = calibrate(first_margins(describe, search, others), second_margins(describe, search, others))
    return _Detector(describe, stored, search, thresholds)


def _check_disjoint(sets: Mapping[str, ImageDataset]) -> None:
    """Raise TrainingError if two sets have images in common."""
    for name, other in combinations(sets, 2):
        if both := set(sets[name].contents) & set(sets[other].contents):
            raise TrainingError(f"{other}: {len(both)} of its files are also in {name}; choose other images")
