"""The paper's experiment with black frames: latents are moved so that the generated images have no frame.

arXiv 2208.11702 moves latents of framed images along a direction until the frame disappears, trains its classifier on 10,000
such images of each class and reports 87 % accuracy on real ones. Here three arms are trained on generated images of the same
latents and tested on real images:

    plain     the latents unchanged
    framed    the same latents moved towards the frame; the detector finds a frame in every image
    removed   the same latents moved in the opposite direction; the detector finds no frame

Only latents for which both moves succeed are used, so that the arms have the same latents and differ only in the frame and in
what else the direction changes.

    plan.json           options and digests. Running the same command again continues the experiment; a command with other
                        options is refused
    drawn/              the images of each arm and class
    ARM-SEED/           a run, with predictions.csv of the test part when it is finished
    results.json, table.md
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.artefacts import THRESHOLDS, detect_artefacts
from dermis.bundle import Bundle
from dermis.bundle.classifier import NOTICE
from dermis.classifier.preprocess import batch as squares
from dermis.directions.edit import Edit, bundle_offset
from dermis.errors import TrainingError
from dermis.files import write_file
from dermis.imaging import Images
from dermis.metrics import classification as metrics
from dermis.network_config import DEFAULT_NOISE_MODE
from dermis.synthesizer import Synthesizer
from training.classifier.config import ClassifierConfig
from training.classifier.data import CLASS_NAMES, RealData, RealPart
from training.classifier.synthetic import SyntheticImages
from training.data.cache import new_array, read_array
from training.data.diagnoses import is_melanoma
from training.distributed import Ranks
from training.experiments.edge_case_runs import RunTrainer, TrainedRun

ARMS = ("plain", "framed", "removed")
PLAN, RESULTS, TABLE = "plan.json", "results.json", "table.md"
PAPER_ACCURACY = 0.87
METRICS = ("auc", "accuracy", "balanced_accuracy")
_TITLES = {"auc": "AUC", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
_CHUNK = 64
_MAX_TRIES = 50  # maximum number of latents that are tried for each one that is used

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class FramePlan:
    """Options of the experiment other than the images, the bundle and the classifier's configuration.

    Attributes:
        direction: Name of the direction in the bundle.
        framing: Strength that adds a frame.
        removing: Strength that removes it.
        per_class: Images of each class in each arm.
        seeds: Runs of each arm.
    """

    direction: str
    framing: float
    removing: float
    per_class: int = 10_000
    truncation_psi: float = 1.0
    synthetic_seed: int = 0
    seeds: int = 3

    def __post_init__(self) -> None:
        for name, low in (("per_class", 10), ("seeds", 1), ("synthetic_seed", 0)):
            if getattr(self, name) < low:
                raise TrainingError(f"{name}: must be at least {low}; got {getattr(self, name)}")


@dataclass(frozen=True)
class FrameRemovalResults:
    """The finished experiment.

    Attributes:
        runs: Finished runs by arm, in the order of the seeds.
        test_framed: Mask of the test images that have a frame, bool [N].
        tried: Number of latents that were tried.
    """

    runs: Mapping[str, Sequence[TrainedRun]]
    test_framed: NDArray[np.bool_]
    tried: int


def run_frame_removal(
    real: RealData,
    bundle: Bundle,
    config: ClassifierConfig,
    plan: FramePlan,
    out: Path,
    *,
    weights: str,
    device: str,
    target: torch.device,
    cache: Path,
    progress_bar: bool = True,
) -> FrameRemovalResults | None:
    """Run what is not finished.

    Args:
        real: Real images.
        bundle: The generator with its directions.
        config: Options of the classifiers.
        plan: Options of the experiment.
        out: Its folder.
        weights: Weights that the classifiers start from.
        device: Device of the generator.
        target: Device of the classifiers.
        cache: Folder for features.
        progress_bar: Show progress bars.

    Returns:
        The results; None if the user stopped a training, which the next call continues.

    Raises:
        TrainingError: `out` was started with other options or images.
        RequestError: The bundle does not have the direction.
    """
    _check_or_write_plan(out, real, bundle, config, plan, weights)
    generated, tried = _generate(bundle, plan, config.size, out / "drawn", device, progress_bar)
    trainer = RunTrainer(real, config, out, weights, Ranks(device=target), cache, progress_bar)
    runs: dict[str, list[TrainedRun]] = {arm: [] for arm in ARMS}
    for seed in range(plan.seeds):
        for arm in ARMS:
            run = trainer.run(arm, seed, generated[arm], synthetic_only=True)
            if run is None:
                return None
            runs[arm].append(run)
    images = tqdm(real.test.images, "frames of test images", unit="img", disable=not progress_bar or None)
    framed = np.array([detect_artefacts(image).frame >= THRESHOLDS["frame"] for image in images])
    return FrameRemovalResults(runs, framed, tried)


def _generate(
    bundle: Bundle, plan: FramePlan, size: int, folder: Path, device: str, progress_bar: bool
) -> tuple[dict[str, SyntheticImages], int]:
    """Return the images of each arm and the number of latents that were tried. They are kept in `folder` for the next call."""
    numbers = [[k for k, name in enumerate(bundle.class_names) if is_melanoma(name) == bool(label)] for label in (0, 1)]
    shape = (plan.per_class, size, size, 3)
    files = {(arm, label): folder / f"{arm}-{CLASS_NAMES[label]}.npy" for arm in ARMS for label in (0, 1)}
    note = folder / "drawn.json"
    tried = json.loads(note.read_text()) if note.exists() else {}
    for label in (0, 1):
        if CLASS_NAMES[label] in tried and all(files[arm, label].exists() for arm in ARMS):
            continue
        with ExitStack() as stack:
            arrays = [stack.enter_context(new_array(files[arm, label], shape, np.uint8)) for arm in ARMS]
            tried[CLASS_NAMES[label]] = _generate_class(bundle, plan, numbers[label], arrays, device, progress_bar)
        write_file(note, json.dumps(tried).encode())
    options = {
        "noise_mode": DEFAULT_NOISE_MODE,
        **{name: value for name, value in asdict(plan).items() if name != "seeds"},
    }
    origin = {"name": bundle.name, "digest": bundle.digest, "plan": options}
    arms = {}
    for arm in ARMS:
        images = [read_array(files[arm, label], shape, mapped=True) for label in (0, 1)]
        if images[0] is None or images[1] is None:
            raise TrainingError(f"{folder}: contains damaged files of images; remove the folder to generate them again")
        labels = [0] * plan.per_class + [1] * plan.per_class
        arms[arm] = SyntheticImages((images[0], images[1]), tuple(labels), ({**origin, "arm": arm},))
    return arms, sum(tried.values())


def _generate_class(
    bundle: Bundle,
    plan: FramePlan,
    numbers: Sequence[int],
    arrays: Sequence[NDArray[np.uint8]],
    device: str,
    progress_bar: bool,
) -> int:
    """Fill the arms' arrays of one class; returns the number of latents that were tried."""
    moves = [bundle_offset(bundle, [Edit(plan.direction, by)]) for by in (plan.framing, plan.removing)]
    size, count, done, index = arrays[0].shape[1], len(arrays[0]), 0, 0
    with (
        Synthesizer(bundle, device=device) as synthesizer,
        tqdm(
            total=count, desc=CLASS_NAMES[int(is_melanoma(bundle.class_names[numbers[0]]))], disable=not progress_bar
        ) as bar,
    ):

        def draw(ws: NDArray[np.float32], indices: Sequence[int]) -> Images:
            """Generate images of ws, each with the noise of its sample, so that the arms differ in the moves only."""
            seeds = [plan.synthetic_seed] * len(indices)
            return synthesizer.images_from_ws(ws, DEFAULT_NOISE_MODE, seeds=seeds, indices=indices)

        while done < count:
            if index >= _MAX_TRIES * count:
                raise TrainingError(
                    f"direction: {plan.direction} at {plan.framing:g} and {plan.removing:g} adds and removes a frame in only "
                    f"{done:,} of {index:,} images; choose another direction or other strengths (measure them with "
                    "`dermis directions measure --framed`)"
                )
            indices = range(index, index + _CHUNK)
            labels = [numbers[i % len(numbers)] for i in indices]
            ws = synthesizer.ws([plan.synthetic_seed] * _CHUNK, indices, labels, truncation_psi=plan.truncation_psi)
            index += _CHUNK
            framed = draw(ws + moves[0], indices)
            with_frame = [i for i, image in enumerate(framed) if detect_artefacts(image).frame >= THRESHOLDS["frame"]]
            if not with_frame:
                continue
            removed = draw(ws[with_frame] + moves[1], [indices[i] for i in with_frame])
            both = [k for k, image in enumerate(removed) if detect_artefacts(image).frame < THRESHOLDS["frame"]]
            both = both[: count - done]
            if not both:
                continue
            chosen = [with_frame[k] for k in both]
            plain = draw(ws[chosen], [indices[i] for i in chosen])
            for array, images in zip(arrays, (plain, framed[chosen], removed[both]), strict=True):
                array[done : done + len(both)] = squares(images, size)
            done += len(both)
            bar.update(len(both))
    return index


def compare(test: RealPart, measured: FrameRemovalResults, *, replicates: int = metrics.REPLICATES) -> dict[str, Any]:
    """Compare the arms on subsets of the real test images: all, with a frame, without.

    Numbers are means over the seeds; intervals (95 %) are by a bootstrap over patients, with the same patients in both arms
    of a difference.

    Args:
        test: The test images.
        measured: The finished experiment.
        replicates: Number of bootstrap replicates.

    Returns:
        By subset: numbers of "images" and "malignant" images, and estimates under "METRIC ARM" and
        "METRIC removed - ARM". Subsets without both classes are left out.
    """
    subsets = {
        "all": np.ones(len(test.labels), bool),
        "with a frame": measured.test_framed,
        "without": ~measured.test_framed,
    }
    compared: dict[str, Any] = {}
    for name, chosen in subsets.items():
        labels = test.labels[chosen]
        if len(set(labels.tolist())) < 2:
            continue
        groups = [group for group, one in zip(test.groups, chosen, strict=True) if one]
        estimated: dict[str, metrics.Metric] = {}
        for metric in METRICS:
            means = {arm: _mean_over(measured.runs[arm], metric, chosen) for arm in ARMS}
            estimated |= {f"{metric} {arm}": means[arm] for arm in ARMS}
            for other in ("framed", "plain"):
                estimated[f"{metric} removed - {other}"] = _difference(means["removed"], means[other])
        scores = measured.runs["plain"][0].calibrated[chosen]
        estimates = metrics.bootstrap(labels, scores, estimated, groups=groups, replicates=replicates)
        compared[name] = {
            "images": len(labels),
            "malignant": int(labels.sum()),
            **{key: asdict(estimate) for key, estimate in estimates.items()},
        }
    return compared


def write_results(out: Path, test: RealPart, measured: FrameRemovalResults, plan: FramePlan) -> str:
    """Write results.json and table.md; returns the table."""
    compared = compare(test, measured)
    document = {
        "plan": asdict(plan),
        "latents_looked_at": measured.tried,
        "paper_accuracy": PAPER_ACCURACY,
        "subsets": compared,
        "notice": NOTICE,
    }
    write_file(out / RESULTS, (json.dumps(document, indent=2) + "\n").encode())
    lines = [
        f"Classifiers were trained on {plan.per_class:,} generated images of each class, no real images, with {plan.seeds} "
        f"seeds, and tested on real images. Both moves along {plan.direction} ({plan.framing:+g} adds the frame, "
        f"{plan.removing:+g} removes it) succeeded with {2 * plan.per_class:,} of {measured.tried:,} latents. In brackets 95 % "
        "intervals.",
        "",
        "| real images | metric | plain | framed | removed | removed - framed | removed - plain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, values in compared.items():
        for metric in METRICS:
            cells = [_cell(values[f"{metric} {arm}"]) for arm in ARMS]
            cells += [_cell(values[f"{metric} removed - {other}"], sign=True) for other in ("framed", "plain")]
            subset = f"{name}: {values['images']:,}, {values['malignant']:,} malignant" if metric == METRICS[0] else ""
            lines.append(f"| {subset} | {_TITLES[metric]} | {' | '.join(cells)} |")
    lines += ["", f"The paper reports {PAPER_ACCURACY:.0%} accuracy with 10,000 images of each class. {NOTICE}", ""]
    text = "\n".join(lines)
    write_file(out / TABLE, text.encode())
    return text


def _cell(estimate: Mapping[str, float], sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def _mean_over(runs: Sequence[TrainedRun], metric: str, chosen: NDArray[np.bool_]) -> metrics.Metric:
    def mean(labels: Labels, _scores: Floats, weights: Floats) -> Floats:
        value: Floats = np.mean([_value(metric, labels, run, chosen, weights) for run in runs], axis=0)
        return value

    return mean


def _value(metric: str, labels: Labels, run: TrainedRun, chosen: NDArray[np.bool_], weights: Floats) -> Floats:
    scores = run.calibrated[chosen]
    if metric == "auc":
        return metrics.auc(labels, scores, weights)
    if metric == "accuracy":
        return metrics.accuracy(labels, scores, weights)
    return metrics.balanced_accuracy(labels, scores, weights, threshold=run.threshold)


def _difference(a: metrics.Metric, b: metrics.Metric) -> metrics.Metric:
    def difference(labels: Labels, scores: Floats, weights: Floats) -> Floats:
        return a(labels, scores, weights) - b(labels, scores, weights)

    return difference


def _check_or_write_plan(
    out: Path, real: RealData, bundle: Bundle, config: ClassifierConfig, plan: FramePlan, weights: str
) -> None:
    """Write plan.json, or compare the plan with the stored one.

    Raises:
        TrainingError: An option other than `seeds` differs; the message names it.
    """
    if not bundle.class_names or len({is_melanoma(name) for name in bundle.class_names}) < 2:
        raise TrainingError(f"{bundle.location}: the experiment needs a generator of benign and malignant images")
    bundle_offset(bundle, [Edit(plan.direction, 1.0)])  # RequestError if there is no direction of this name
    plan_content = {
        "data": {name: part.sha256 for name, part in real.parts.items()},
        "bundle": bundle.digest,
        "weights": weights,
        "config": {name: value for name, value in config.to_dict().items() if name != "seed"},
        "plan": {name: value for name, value in asdict(plan).items() if name != "seeds"},
        "noise_mode": DEFAULT_NOISE_MODE,
    }
    digest = hashlib.sha256(json.dumps(plan_content, sort_keys=True).encode()).hexdigest()
    file = out / PLAN
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name in plan_content if stored.get(name) != plan_content[name]]
        if differing:
            raise TrainingError(
                f"{out}: was started with other settings ({', '.join(differing)}); use the same, or choose another --out"
            )
        return
    write_file(file, (json.dumps({**plan_content, "sha256": digest}, indent=2) + "\n").encode())
