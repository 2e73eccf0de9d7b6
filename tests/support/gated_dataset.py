"""A dataset of the tiny bundle with a filter, a gate and an edit, as the library makes it without a service."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from dermis.authenticity.attack import exposure
from dermis.authenticity.checker import Checker
from dermis.bundle import Bundle
from dermis.classifier.onnx_session import Classifier
from dermis.dataset.manifest import finalize
from dermis.dataset.plan import plan_for
from dermis.dataset.privacy import examiner
from dermis.dataset.request import DatasetRequest
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.directions.edit import bundle_offset

REQUEST: dict[str, Any] = {
    "model": "tiny",
    "classes": {"benign": 300, "malignant": 200},
    "seed": 11,
    "shard_size": 25,
    "format": "webdataset",
    "classifier": {"keep": "agreeing", "tries": 2},
    "edits": [{"direction": "axis-1", "strength": 0.5, "layers": [0, 3]}],
    "privacy": {"gate": "min_distance", "percentile": 50.0, "tries": 2},
}


def make_directly(bundle: Bundle, folder: Path, body: dict[str, Any] = REQUEST) -> dict[str, bytes]:
    """The dataset as the library makes it in this process."""
    from dermis.synthesizer import Synthesizer

    request = DatasetRequest.model_validate(body)
    planned = plan_for(request, bundle)
    store = Store(folder)
    offset = bundle_offset(bundle, request.moves)
    with Synthesizer(bundle) as synthesizer, Classifier(bundle) as classifier, Checker(bundle) as checker:
        identity = {**synthesizer.identity, **classifier.identity, **checker.identity}

        def synthesize(indices: Any, labels: Any) -> Any:
            return synthesizer.images([request.seed] * len(indices), indices, labels, offset=offset)

        def score(images: Any) -> Any:
            return classifier.classify(images).calibrated

        for shard in range(planned.shards):
            options: dict[str, Any] = {"score": score, "examine": examiner(planned, checker), "identity": identity}
            write_shard(planned, shard, synthesize, store, **options)
        finalize(planned, store, bundle, identity, partial(exposure, checker.index))
    return {path.name: path.read_bytes() for path in folder.iterdir()}
