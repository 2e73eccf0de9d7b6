"""Experiment: does retraining with latent neighbours of edge cases improve the classification of edge cases?

1. A selection classifier is trained on the real training part, with a seed that no other run has. Its edge cases among the
   test images are the images that are measured; its edge cases among generated images are the anchors of the neighbours.
2. Three arms are trained, each with every seed: `real`; `neighbours`, with neighbours of generated edge cases; and
   `random`, with the same number of other generated images of each class.
3. Arms are compared on the same images, seed by seed.

The selection classifier is not an arm: on images that are selected because one run is wrong on them, every other run looks
better (regression to the mean). `neighbours` has to be better than `random`, not only than `real`, since more images can help
wherever they are in latent space.

    plan.json        options and digests. Running the same command again continues the experiment; a command with other
                     options is refused
    scout-0/         the run of the selection classifier
    neighbours/      the images (`dermis.dataset.neighbours`)
    ARM-SEED/        a run, as `dermis train classifier` writes it, with predictions.csv of the test part when it is finished
    edge-cases.csv   the test images that are edge cases, with reasons
    results.json, table.md   results (`training.experiments.edge_case_table`)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dermis.bundle import Bundle, load_generator
from dermis.dataset.neighbours import read_description, write_neighbours
from dermis.errors import TrainingError
from dermis.explain.edge_cases import Criteria, EdgeScores, edge_case_rows, edge_scores, to_csv
from dermis.explain.embeddings import GENERATED, REAL, Embedded, Item
from dermis.files import write_file
from dermis.latent_neighbours import Anchor, Space
from dermis.synthesizer import Synthesizer
from training.classifier.config import ClassifierConfig
from training.classifier.data import CLASS_NAMES, RealData
from training.classifier.synthetic import SyntheticImages, SyntheticSource, load_synthetic
from training.data.diagnoses import is_melanoma
from training.distributed import Ranks
from training.experiments.edge_case_runs import RunTrainer, TrainedRun

ARMS = ("real", "random", "neighbours")
NEIGHBOURS, PLAN = "neighbours", "plan.json"
# Added to --synthetic-seed, so that no generated image is both in the pool and in the arm `random`.
_POOL_SEED, _RANDOM_SEED = 0, 1
# Folder of the selection classifier; the name cannot change, because experiments are continued by it.
_SELECTOR = "scout"


@dataclass(frozen=True)
class EdgePlan:
    """Options of the experiment other than the images, the bundle and the classifier's configuration.

    Attributes:
        generate: Generated images that are searched for edge cases, half of each class.
        cases: Largest number of edge cases, spread evenly over their ranking.
        count: Neighbours of each edge case.
        distance: Distance of a neighbour in latent space.
        synthetic_seed: Seed of the generated images.
        seeds: Runs of each arm, with the seeds 1 ... seeds; the selection classifier has the seed 0.
    """

    generate: int = 1000
    cases: int = 100
    count: int = 5
    distance: float = 0.1
    space: Space = "w"
    truncation_psi: float = 1.0
    synthetic_seed: int = 0
    seeds: int = 5
    criteria: Criteria = field(default_factory=Criteria)

    def __post_init__(self) -> None:
        for name, low in (("generate", 40), ("cases", 2), ("count", 1), ("seeds", 2), ("synthetic_seed", 0)):
            if getattr(self, name) < low:
                raise TrainingError(f"{name}: must be at least {low}; got {getattr(self, name)}")


@dataclass(frozen=True)
class EdgeCaseResults:
    """The finished experiment.

    Attributes:
        edge: Mask of the test images that are edge cases of the selection classifier, bool [N].
        reasons: Number of edge cases by reason.
        added: Images by class that `random` and `neighbours` have in addition to `real`.
        runs: Finished runs by arm, in the order of the seeds.
    """

    edge: NDArray[np.bool_]
    reasons: Mapping[str, int]
    added: Mapping[str, int]
    runs: Mapping[str, Sequence[TrainedRun]]


def run_edge_cases(
    real: RealData,
    bundle: Bundle,
    config: ClassifierConfig,
    plan: EdgePlan,
    out: Path,
    *,
    weights: str,
    device: str,
    target: torch.device,
    cache: Path,
    progress_bar: bool = True,
) -> EdgeCaseResults | None:
    """Run what is not finished.

    Args:
        real: Real images.
        bundle: The generator.
        config: Options of the classifiers.
        plan: Options of the experiment.
        out: Its folder.
        weights: Weights that the classifiers start from.
        device: Device of the generator.
        target: Device of the classifiers.
        cache: Folder for images and features.
        progress_bar: Show progress bars.

    Returns:
        The results; None if the user stopped a training, which the next call continues.

    Raises:
        TrainingError: `out` was started with other options or images.
        DermisError: Training or generating failed.
    """
    _check_or_write_plan(out, real, bundle, config, plan, weights)
    trainer = RunTrainer(real, config, out, weights, Ranks(device=target), cache, progress_bar)
    selector = trainer.run(_SELECTOR, 0)
    if selector is None:
        return None
    test = trainer.embedded(selector, real.test.images, _items(real))
    scores = _scores(test, real.test.labels, selector.threshold, plan.criteria)
    rows = edge_case_rows(test, scores, CLASS_NAMES, selector.threshold)
    write_file(out / "edge-cases.csv", to_csv(rows).encode())
    neighbours = _neighbours(trainer, selector, bundle, plan, out, device, progress_bar)
    counts = {name: neighbours.labels.count(label) for label, name in enumerate(CLASS_NAMES)}
    random_images = load_synthetic(
        [SyntheticSource(bundle.location)],
        counts,
        config.size,
        seed=plan.synthetic_seed + _RANDOM_SEED,
        truncation_psi=plan.truncation_psi,
        cache=cache,
        device=device,
        progress=progress_bar,
    )
    added: dict[str, SyntheticImages | None] = {"real": None, "random": random_images, "neighbours": neighbours}
    runs: dict[str, list[TrainedRun]] = {arm: [] for arm in ARMS}
    for seed in range(1, plan.seeds + 1):
        for arm in ARMS:
            run = trainer.run(arm, seed, added[arm])
            if run is None:
                return None
            runs[arm].append(run)
    reasons = {
        "misclassified": int(scores.misclassified.sum()),
        "near the threshold": int(scores.near_threshold.sum()),
        "between clusters": int(scores.between_clusters.sum()),
    }
    return EdgeCaseResults(scores.is_edge, reasons, counts, runs)


def _neighbours(
    trainer: RunTrainer,
    selector: TrainedRun,
    bundle: Bundle,
    plan: EdgePlan,
    out: Path,
    device: str,
    progress_bar: bool,
) -> SyntheticImages:
    """Return the neighbours of the selection classifier's edge cases among generated images; they are generated once."""
    size, folder = trainer.config.size, out / NEIGHBOURS
    if not folder.exists():
        pool_counts = {"benign": plan.generate - plan.generate // 2, "malignant": plan.generate // 2}
        pool = load_synthetic(
            [SyntheticSource(bundle.location)],
            pool_counts,
            size,
            seed=plan.synthetic_seed + _POOL_SEED,
            truncation_psi=plan.truncation_psi,
            cache=trainer.cache,
            device=device,
            progress=progress_bar,
        )
        anchors = _anchors(trainer, selector, bundle, plan, pool)
        network = load_generator(bundle)
        with Synthesizer(bundle, device=device, generator=network) as synthesizer:
            write_neighbours(
                folder,
                bundle,
                network,
                synthesizer,
                anchors,
                count=plan.count,
                distance=plan.distance,
                space=plan.space,
                truncation_psi=plan.truncation_psi,
            )
    description = read_description(folder)
    class_names = description["bundle"]["class_names"]
    melanoma = [is_melanoma(class_names[each["label"]]) for each in description["anchors"]]
    counts = {"benign": melanoma.count(False) * plan.count, "malignant": melanoma.count(True) * plan.count}
    images = load_synthetic([SyntheticSource(str(folder))], counts, size, cache=trainer.cache, progress=progress_bar)
    # The digest of the description, without dates and paths, so that runs continue after the folder was moved.
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    return replace(images, origin=tuple({**each, "digest": digest} for each in images.origin))


def _anchors(
    trainer: RunTrainer,
    selector: TrainedRun,
    bundle: Bundle,
    plan: EdgePlan,
    pool: SyntheticImages,
) -> list[Anchor]:
    """Return at most `plan.cases` edge cases of the pool, spread evenly over their ranking."""
    seed = plan.synthetic_seed + _POOL_SEED
    numbers = [[k for k, name in enumerate(bundle.class_names) if is_melanoma(name) == bool(label)] for label in (0, 1)]
    items: list[Item] = []
    for label, array in enumerate(pool.images):  # in the order of `load_synthetic`
        items += [
            Item(
                f"GEN_{seed}_{2 * i + label:08d}",
                GENERATED,
                CLASS_NAMES[label],
                source=bundle.name,
                seed=seed,
                index=2 * i + label,
                label=numbers[label][i % len(numbers[label])],
            )
            for i in range(len(array))
        ]
    parts = [trainer.embedded(selector, array, items[: len(array)]) for array in pool.images]
    embedded = Embedded(
        tuple(items),
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.calibrated for part in parts]),
        np.concatenate([part.thumbnails for part in parts]),
    )
    scores = _scores(embedded, np.array(pool.labels, np.int64), selector.threshold, plan.criteria)
    order = scores.order
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(plan.cases, len(order))).round().astype(int))]
    if not len(chosen):
        raise TrainingError(
            f"generate: there are no edge cases among {plan.generate} generated images; use a larger number"
        )
    return [Anchor(item.id, int(item.label or 0), seed, int(item.index or 0)) for item in (items[i] for i in chosen)]


def _scores(embedded: Embedded, labels: NDArray[np.int64], threshold: float, criteria: Criteria) -> EdgeScores:
    groups = [item.group for item in embedded.items]
    return edge_scores(embedded.features, labels, embedded.calibrated, threshold, criteria, groups=groups)


def _items(real: RealData) -> list[Item]:
    test = real.test
    sources = test.attributes["source"]
    return [
        Item(name, REAL, CLASS_NAMES[label], source, "test", group)
        for name, label, source, group in zip(test.ids, test.labels, sources, test.groups, strict=True)
    ]


def _check_or_write_plan(
    out: Path, real: RealData, bundle: Bundle, config: ClassifierConfig, plan: EdgePlan, weights: str
) -> None:
    """Write plan.json, or compare the plan with the stored one.

    Raises:
        TrainingError: An option other than `seeds` differs; the message names it.
    """
    if not bundle.class_names or len({is_melanoma(name) for name in bundle.class_names}) < 2:
        raise TrainingError(f"{bundle.location}: the experiment needs a generator of benign and malignant images")
    plan_content: dict[str, Any] = {
        "data": {name: part.sha256 for name, part in real.parts.items()},
        "bundle": bundle.digest,
        "weights": weights,
        "config": {name: value for name, value in config.to_dict().items() if name != "seed"},
        "plan": {name: value for name, value in asdict(plan).items() if name != "seeds"},
    }
    file = out / PLAN
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        for part in ("config", "plan"):
            for name in sorted(plan_content[part].keys() | stored[part].keys()):
                old, new = stored[part].get(name), plan_content[part].get(name)
                if old != new:
                    raise TrainingError(
                        f"{out}: was started with {name} {old}, not {new}; use the same value, or choose another --out"
                    )
        for name in ("data", "bundle", "weights"):
            if plan_content[name] != stored[name]:
                raise TrainingError(f"{out}: was started with another --{name}; use the same, or choose another --out")
        return
    write_file(file, (json.dumps(plan_content, indent=2) + "\n").encode())
