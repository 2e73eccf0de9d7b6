"""Does retraining with latent neighbours of edge cases help on edge cases?

1. A scout learns from the real training part, with a seed that no other run has. Its edge cases among the test images are
   what is measured; its edge cases among generated images are what neighbours are made of.
2. Three arms are trained, each with every seed: `real`; `neighbours`, with neighbours of generated edge cases; and
   `random`, with as many other generated images of each class.
3. Arms are compared on the same images, seed by seed.

The scout is no arm: whoever chooses the images on which a run is wrong finds every other run better on them (regression
to the mean). And `neighbours` has to beat `random`, not only `real`: more images may help wherever they lie.

    plan.json        what the folder was begun with; the same command goes on, another is refused
    neighbours/      the images (`dermis.dataset.neighbours`)
    ARM-SEED/        a run as `dermis train classifier` leaves it, with predictions.csv of the test part once it is done
    edge-cases.csv   the test images that are edge cases, with reasons
    results.json, table.md   what came of it (`training.experiments.edge_case_table`)
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
from dermis.latent_neighbours import Anchor, Space
from dermis.synthesizer import Synthesizer
from training.classifier.config import ClassifierConfig
from training.classifier.data import CLASS_NAMES, RealData
from training.classifier.synthetic import SyntheticImages, SyntheticSource, load_synthetic
from training.data.diagnoses import is_melanoma
from training.distributed import Ranks
from training.experiments.edge_case_runs import Learner, Run
from training.experiments.plan import write_beside

ARMS = ("real", "random", "neighbours")
NEIGHBOURS, PLAN = "neighbours", "plan.json"
_POOL_SEED, _RANDOM_SEED = 0, 1  # of generated images: added to --synthetic-seed, so that no image is in both


@dataclass(frozen=True)
class EdgePlan:
    """What decides the experiment beside the images, the bundle and the classifier's configuration.

    generate: images that edge cases are looked for in, half of each class. cases: edge cases at most, spread evenly over
    their ranking; count: neighbours of each. seeds: runs of each arm, with the seeds 1 ... seeds; the scout has 0.
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
class Measured:
    """The finished experiment, on the test images, of which `edge` [N] are the scout's edge cases.

    reasons: how many there are of each. added: images that `random` and `neighbours` have more than `real`, by class. runs
    by arm, in order of the seeds.
    """

    edge: NDArray[np.bool_]
    reasons: Mapping[str, int]
    added: Mapping[str, int]
    runs: Mapping[str, Sequence[Run]]


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
) -> Measured | None:
    """Run what is not done yet; None if the user stopped a training, which the next call goes on with.

    Raises TrainingError if `out` was begun otherwise, and what training and drawing raise.
    """
    _remember(out, real, bundle, config, plan, weights)
    learner = Learner(real, config, out, weights, Ranks(device=target), cache, progress_bar)
    scout = learner.run("scout", 0)
    if scout is None:
        return None
    test = learner.embedded(scout, real.test.images, _items(real))
    scores = _scores(test, real.test.labels, scout.threshold, plan.criteria)
    rows = edge_case_rows(test, scores, CLASS_NAMES, scout.threshold)
    write_beside(out / "edge-cases.csv", to_csv(rows))
    made = _neighbours(learner, scout, bundle, plan, out, device, progress_bar)
    counts = {name: made.labels.count(label) for label, name in enumerate(CLASS_NAMES)}
    other = load_synthetic(
        [SyntheticSource(bundle.location)],
        counts,
        config.size,
        seed=plan.synthetic_seed + _RANDOM_SEED,
        truncation_psi=plan.truncation_psi,
        cache=cache,
        device=device,
        progress=progress_bar,
    )
    added: dict[str, SyntheticImages | None] = {"real": None, "random": other, "neighbours": made}
    runs: dict[str, list[Run]] = {arm: [] for arm in ARMS}
    for seed in range(1, plan.seeds + 1):
        for arm in ARMS:
            found = learner.run(arm, seed, added[arm])
            if found is None:
                return None
            runs[arm].append(found)
    why = {
        "misclassified": int(scores.misclassified.sum()),
        "near the threshold": int(scores.near_threshold.sum()),
        "between clusters": int(scores.between_clusters.sum()),
    }
    return Measured(scores.is_edge, why, counts, runs)


def _neighbours(
    learner: Learner,
    scout: Run,
    bundle: Bundle,
    plan: EdgePlan,
    out: Path,
    device: str,
    progress_bar: bool,
) -> SyntheticImages:
    """The neighbours of the scout's edge cases among generated images, drawn unless they are there."""
    size, folder = learner.config.size, out / NEIGHBOURS
    if not folder.exists():
        wanted = {"benign": plan.generate - plan.generate // 2, "malignant": plan.generate // 2}
        pool = load_synthetic(
            [SyntheticSource(bundle.location)],
            wanted,
            size,
            seed=plan.synthetic_seed + _POOL_SEED,
            truncation_psi=plan.truncation_psi,
            cache=learner.cache,
            device=device,
            progress=progress_bar,
        )
        anchors = _anchors(learner, scout, bundle, plan, pool)
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
    found = read_description(folder)
    melanoma = [is_melanoma(found["bundle"]["class_names"][each["label"]]) for each in found["anchors"]]
    counts = {"benign": melanoma.count(False) * plan.count, "malignant": melanoma.count(True) * plan.count}
    made = load_synthetic([SyntheticSource(str(folder))], counts, size, cache=learner.cache, progress=progress_bar)
    # The folder's files have dates; what was drawn has none, and runs go on where the folder has been moved.
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return replace(made, origin=tuple({**each, "digest": digest} for each in made.origin))


def _anchors(
    learner: Learner,
    scout: Run,
    bundle: Bundle,
    plan: EdgePlan,
    pool: SyntheticImages,
) -> list[Anchor]:
    """Edge cases of the pool, `plan.cases` of them, spread evenly over their ranking."""
    seed = plan.synthetic_seed + _POOL_SEED
    numbers = [[k for k, name in enumerate(bundle.class_names) if is_melanoma(name) == bool(label)] for label in (0, 1)]
    items: list[Item] = []
    for label, array in enumerate(pool.images):  # as `load_synthetic` draws them
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
    parts = [learner.embedded(scout, array, items[: len(array)]) for array in pool.images]
    drawn = Embedded(
        tuple(items),
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.calibrated for part in parts]),
        np.concatenate([part.thumbnails for part in parts]),
    )
    scores = _scores(drawn, np.array(pool.labels, np.int64), scout.threshold, plan.criteria)
    order = scores.order
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(plan.cases, len(order))).round().astype(int))]
    if not len(chosen):
        raise TrainingError(f"generate: there is no edge case among {plan.generate} images; draw more")
    return [Anchor(item.id, int(item.label or 0), seed, int(item.index or 0)) for item in (items[i] for i in chosen)]


def _scores(found: Embedded, labels: NDArray[np.int64], threshold: float, criteria: Criteria) -> EdgeScores:
    groups = [item.group for item in found.items]
    return edge_scores(found.features, labels, found.calibrated, threshold, criteria, groups=groups)


def _items(real: RealData) -> list[Item]:
    test = real.test
    sources = test.attributes["source"]
    return [
        Item(name, REAL, CLASS_NAMES[label], source, "test", group)
        for name, label, source, group in zip(test.ids, test.labels, sources, test.groups, strict=True)
    ]


def _remember(
    out: Path, real: RealData, bundle: Bundle, config: ClassifierConfig, plan: EdgePlan, weights: str
) -> None:
    """Write plan.json, or compare with it. TrainingError names what differs; only `seeds` may grow."""
    if not bundle.class_names or len({is_melanoma(name) for name in bundle.class_names}) < 2:
        raise TrainingError(f"{bundle.location}: the experiment needs a generator of benign and malignant images")
    now: dict[str, Any] = {
        "data": {name: part.sha256 for name, part in real.parts.items()},
        "bundle": bundle.digest,
        "weights": weights,
        "config": {name: value for name, value in config.to_dict().items() if name != "seed"},
        "plan": {name: value for name, value in asdict(plan).items() if name != "seeds"},
    }
    file = out / PLAN
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        for part in ("config", "plan"):
            for name in sorted(now[part].keys() | before[part].keys()):
                if now[part].get(name) != before[part].get(name):
                    raise TrainingError(
                        f"{out}: was begun with {name} {before[part].get(name)}, not {now[part].get(name)}; give the "
                        "same, or another --out"
                    )
        for name in ("data", "bundle", "weights"):
            if now[name] != before[name]:
                raise TrainingError(f"{out}: was begun with another --{name}; give the same, or another --out")
        return
    write_beside(file, json.dumps(now, indent=2) + "\n")
