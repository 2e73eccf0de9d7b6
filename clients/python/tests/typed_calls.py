"""Calls of the SDK that a type checker must accept or refuse. `make lint` runs mypy on this file; nothing executes it.

A refused line names its error. mypy reports a comment whose error does not occur, so a choice that is no longer checked is
found.
"""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

from dermis_client import (
    AsyncDataset,
    AsyncDermisClient,
    ClassificationsResult,
    Dataset,
    DermisClient,
    PrivacyParams,
    RawResponse,
)

CLASSES = {"benign": 1}
PRIVACY: PrivacyParams = {
    "gate": "min_distance",
    "percentile": 5,
    "detect_copies": False,
    "on_reject": "drop",
    "tries": 2,
}


def accepted(client: DermisClient) -> None:
    client.datasets.create(
        CLASSES,
        classifier={"keep": "agreeing", "threshold": "default", "tries": 8},
        privacy=PRIVACY,
        provenance={"c2pa": None},
        edits=[{"direction": "sefa-1", "strength": 1, "layers": [0, 2]}, {"direction": "sefa-2", "strength": -0.5}],
    )
    client.edits.create(samples=[("benign", 0, 0)], edits=CLASSES, sweep={"direction": "sefa-1", "strengths": (-1, 1)})
    client.images.generate_pixels(CLASSES, privacy={"gate": "min_distance", "percentile": 5})
    client.webhooks.create("https://receiver.example", events=["dataset.succeeded"])
    client.projections.create("a.png", schedule="official", space="w+", start="encoder")
    client.classifications.create(Path("folder").glob("*.png"))
    client.authenticity.check({b"image"})
    client.embeddings.place(file.read_bytes() for file in Path("folder").iterdir())
    client.projections.create(iter(["a.png"]))
    client.studies.add_images("st_1", Path("folder").iterdir())
    response = client.datasets.with_raw_response.create(CLASSES, seed=1)
    assert_type(response, RawResponse[Dataset])
    assert_type(response.parse(), Dataset)
    assert_type(
        client.with_options(timeout=1).classifications.with_raw_response.create("a").parse(), ClassificationsResult
    )


async def accepted_asynchronously(client: AsyncDermisClient) -> None:
    await client.classifications.create(Path("folder").glob("*.png"))
    assert_type(await client.datasets.with_raw_response.create(CLASSES, seed=1), RawResponse[AsyncDataset])
    assert_type((await client.datasets.with_raw_response.delete("ds_1")).parse(), None)


async def refused(client: DermisClient, other: AsyncDermisClient) -> None:
    client.datasets.create(CLASSES, format="zip")  # type: ignore[arg-type]
    client.datasets.create(CLASSES, privacy={"gate": "autentic"})  # type: ignore[arg-type]
    client.datasets.create(CLASSES, privacy={"on_rejection": "drop"})  # type: ignore[arg-type]
    client.images.generate(CLASSES, privacy={"gate": "authentic", "on_reject": "drop"})  # type: ignore[arg-type]
    client.datasets.create(CLASSES, classifier={"keep": "agreed"})  # type: ignore[arg-type]
    client.datasets.create(CLASSES, provenance={"c2pa": "yes"})  # type: ignore[arg-type]
    client.datasets.create(CLASSES, edits=[{"direction": "sefa-1"}])  # type: ignore[typeddict-item]
    client.edits.create(sweep={"direction": "sefa-1", "strength": 1})  # type: ignore[arg-type]
    client.webhooks.create("https://receiver.example", events=["dataset.done"])  # type: ignore[list-item]
    client.projections.create("a.png", schedule="slow")  # type: ignore[arg-type]
    client.classifications.create([1])  # type: ignore[list-item]
    client.datasets.with_raw_response.create(CLASSES, privacy={"gate": "autentic"})  # type: ignore[arg-type]
    await other.datasets.with_raw_response.create(CLASSES, sed=1)  # type: ignore[call-arg]
