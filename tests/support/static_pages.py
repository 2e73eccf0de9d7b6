"""The pages that dermis writes as files, one of each kind, with painted lesions instead of photographs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from starlette.requests import Request

import tiny_classifier
from dermis.image_metadata import ImageOrigin
from lesions import lesion

DEMO = Path(__file__).resolve().parents[2] / "bundles" / "demo"
CLASSES = ("benign", "malignant")
ORIGIN = ImageOrigin("demo", "ab" * 32, "CC-BY-NC-4.0", "HAM10000")


def lesions(count: int, size: int = 64, start: int = 0) -> Any:
    """Painted lesions uint8 [count, size, size, 3]."""
    return np.stack([lesion(start + number, size) for number in range(count)])


def evaluation_report() -> str:
    """The report of `dermis evaluate` with the numbers of the demo bundle."""
    from training.evaluation.pictures import STEPS, Match
    from training.evaluation.report import report_page

    def match(number: int) -> Match:
        distances = np.linspace(3 + number / 10, 5, 5)
        image, neighbours = lesion(number, 64), lesions(5, start=number + 1)
        return Match(number, number % 2, image, neighbours, distances, float(distances[0] / 5))

    metrics = json.loads((DEMO / "metrics.json").read_bytes())
    samples = {name: lesions(16, start=16 * k) for k, name in enumerate(CLASSES)}
    lines = {name: lesions(2 * STEPS, start=30 * k) for k, name in enumerate((*CLASSES, "benign to malignant"))}
    return report_page(ORIGIN, metrics, CLASSES, samples, [match(k) for k in range(4)], [match(9), match(12)], lines)


def dataset_report() -> str:
    """The report of a dataset from the demo bundle, of which no image was compared with real ones."""
    from dermis.bundle import open_bundle
    from dermis.dataset.plan import plan_for
    from dermis.dataset.request import DatasetRequest
    from dermis.dataset.scoring import ClassifierTally
    from dermis.report.appearance import Appearance
    from dermis.report.content import Measurements, make_report
    from dermis.report.page import report_page

    bundle, counts = open_bundle(DEMO), {"benign": 60, "malignant": 40}
    plan = plan_for(DatasetRequest.model_validate({"model": "demo", "classes": counts, "seed": 7}), bundle)
    measured = Measurements(
        {name: [Appearance(("hair",) if k % 4 else (), 15.0 + k) for k in range(20)] for name in counts},
        features_problem="the index cannot be read",
        tallies={name: ClassifierTally(count, count + 9, count - 5) for name, count in counts.items()},
    )
    return report_page(make_report(plan, bundle, counts, measured))


def heat_maps() -> str:
    """The page of `dermis explain heat-maps`, with a misclassified image."""
    from dermis.explain.attribution import Attribution
    from dermis.explain.page import Entry, heat_map_page

    y, x = np.mgrid[:64, :64] / 32 - 1
    values = (np.exp(-4 * ((x - 0.2) ** 2 + y**2)) - 0.6 * np.exp(-6 * ((x + 0.5) ** 2 + y**2))).astype(np.float32)
    entries = [
        Entry(
            f"ISIC_{number:07d}",
            0.6 - number / 10,
            0.55 - number / 10,
            CLASSES[number == 0],
            "benign",
            Attribution("integrated-gradients", lesion(number, 64), values / 300, 0.4, -0.3),
        )
        for number in range(3)
    ]
    return heat_map_page(
        tiny_classifier.describe(digest="ab" * 32), "integrated-gradients", ("default", 0.5), entries, 40
    )


def embeddings() -> str:
    """The page of `dermis explain embeddings`: two clusters of real, generated and projected images."""
    from dermis.explain.embeddings import Embedded, Item
    from dermis.explain.embeddings_page import NEIGHBOURS, embeddings_page
    from dermis.explain.nearest import nearest_by_cosine

    rng, count = np.random.default_rng(0), 240
    kinds = ["projected" if number % 40 == 0 else ("real", "generated")[number % 2] for number in range(count)]
    names = [("benign", "malignant", "")[number % 3] for number in range(count)]
    items = tuple(Item(f"ISIC_{k:07d}", kind, names[k], source="HAM10000") for k, kind in enumerate(kinds))
    features = rng.normal(size=(count, 8)).astype(np.float32)
    features[:, 0] += [3.0 * (number % 3 == 1) for number in range(count)]
    positions = features[:, :3] - features[:, :3].mean(0)
    embedded = Embedded(items, features, rng.uniform(size=count), lesions(24, 48)[np.arange(count) % 24])
    similarities, neighbours = nearest_by_cosine(features, NEIGHBOURS)
    return embeddings_page(
        embedded,
        (positions / np.linalg.norm(positions, axis=1).max()).astype(np.float32),
        similarities,
        neighbours,
        tiny_classifier.describe(digest="ab" * 32),
        title="Embeddings of HAM10000",
        threshold=0.5,
    )


def survey(folder: Path) -> str:
    """The page of `dermis survey create` for experts, with a question for the diagnosis.

    Args:
        folder: Where the survey is written.
    """
    from dermis.bundle import open_bundle
    from training.data.images import ImageDataset
    from training.evaluation.survey import FOR_EXPERTS, create_survey, plan_survey

    class Synthesizer:
        preferred_batch, bundle, identity = 4, open_bundle(DEMO), MappingProxyType({"device": "painted"})

        def images(self, seeds: list[int], indices: list[int], labels: list[int], **_: object) -> Any:
            return np.stack([lesion(100 + index, 64) for index in indices])

    labels = np.arange(12) % 2
    real = ImageDataset(lesions(12), labels, CLASSES, tuple(f"ISIC_{k}" for k in range(12)), "ab" * 32)
    drawn: Any = Synthesizer()
    slots = plan_survey(labels, CLASSES, 6, 1)
    create_survey(slots, real, drawn, folder / "survey", seed=1, size=64, with_diagnosis=True, progress=False)
    return (folder / "survey" / FOR_EXPERTS / "index.html").read_text(encoding="utf-8")


def pairs() -> str:
    """The page of `dermis authenticity check --show`, with a copy and a training image that is elsewhere."""
    from dermis.authenticity.pairs_page import Pair, pairs_page

    numbers = ((0.01, 0.01, 0.0, False, True), (3.2, 3.2, 12.5, True, False), (4.1, 6.0, 30.0, True, None))
    shown = [
        Pair(f"images/new-{k}.png", lesion(k, 64), f"ISIC_{k:07d}", lesion(k + 20, 64), *values)
        for k, values in enumerate(numbers)
    ]
    return pairs_page(shown, checked=40, source="HAM10000", bundle="demo")


def missing_studio() -> str:
    """What a browser gets at /studio of a service without the studio."""
    from services.gateway.studio import _missing

    request = Request({"type": "http", "method": "GET", "path": "/studio", "headers": [(b"accept", b"text/html")]})
    return bytes(_missing(request).body).decode()


PAGES: Mapping[str, Callable[[Path], str]] = MappingProxyType(
    {
        "evaluation report": lambda _: evaluation_report(),
        "dataset report": lambda _: dataset_report(),
        "heat maps": lambda _: heat_maps(),
        "embeddings": lambda _: embeddings(),
        "survey": survey,
        "pairs": lambda _: pairs(),
        "missing studio": lambda _: missing_studio(),
    }
)
