"""The generator, the classifier, the index, the explainer and the projector as the gateway calls them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.attack import Attack, Exposure
from dermis.authenticity.index import Nearest
from dermis.bundle import Bundle
from dermis.errors import RequestError
from dermis.explain.attribution import Method
from services import pixels
from services.connection import Connection
from services.errors import InferenceFailedError, InferenceUnavailableError, NotInstalledError
from services.heat_maps import HeatMap
from services.metrics import (
    heat_maps_made,
    images_classified,
    images_compared,
    images_generated,
    images_projected,
)
from services.models import Models
from services.projections import Projected, Task
from services.samples import Image, Samples, to_bytes

# Rows of one call: what a shard asks for at a time, so that a large request of one user does not hold up the others.
_PIECE = 32


class RemoteGenerator:
    """The generator service. Use it on one event loop."""

    def __init__(self, client: Any, models: Models) -> None:
        self._connection = Connection(client, "the generator")
        self._models = models

    async def images(self, rows: Samples) -> list[Image]:
        """Images of rows, in their order. InferenceUnavailableError or InferenceFailedError."""
        pieces = [rows[start : start + _PIECE] for start in range(0, len(rows), _PIECE)]
        made = [item for part in await asyncio.gather(*map(self._images, pieces)) for item in part]
        for item in made:
            if isinstance(item, str):
                raise InferenceUnavailableError(item)
        for bundle in self._models.bundles:
            count = int((rows["model"] == bundle.digest.encode("ascii")).sum())
            if count:
                images_generated.labels(bundle.name).inc(count)
        return made

    async def _images(self, rows: Samples) -> list[Any]:
        made: list[Any] = await self._connection.call("generate", to_bytes(rows))
        if len(made) != len(rows):
            raise InferenceFailedError(f"the generator gave {len(made)} images for {len(rows)} samples")
        return made

    async def draw(self, bundle: Bundle, ws: NDArray[np.float32], noise_mode: str) -> list[Image]:
        """Images of style vectors [N, num_ws, w_dim]. Errors as in `images`."""
        made = await self._connection.call("draw", bundle.digest, ws, noise_mode)
        if isinstance(made, str):
            raise InferenceUnavailableError(made)
        images_generated.labels(bundle.name).inc(len(made))
        return list(made)

    async def identity(self, digest: str) -> Mapping[str, str]:
        """What draws the images of this bundle, for manifests. Errors as in `images`."""
        described = await self._connection.describe()
        found = described["identities"].get(digest)
        if found is None:
            reasons = "; ".join(described["problems"]) or "restart the service to load it"
            raise InferenceUnavailableError(f"the generator has no model with digest {digest[:12]}: {reasons}")
        return dict(found)

    async def not_ready(self) -> str | None:
        """Why the generator cannot draw every served model now; None if it can."""
        wanted = {bundle.digest: bundle.name for bundle in self._models.bundles}
        return await _not_ready(self._connection, wanted)

    async def not_alive(self) -> str | None:
        """Why only a restart can help; None if the generator answers or may yet."""
        return None if await self.not_ready() is None else self._connection.not_alive


class RemoteClassifier:
    """The classifier service. Use it on one event loop. It is asked only where a served bundle has a classifier."""

    def __init__(self, client: Any, models: Models) -> None:
        self._connection = Connection(client, "the classifier")
        self._models = models
        self._wanted = {b.classifier.digest: b.name for b in models.bundles if b.classifier is not None}
        self._row_bytes = pixels.row_bytes(b.classifier.input.size for b in models.bundles if b.classifier)

    async def logits(self, bundle: Bundle, inputs: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [N] of uint8 inputs [N, S, S, 3] at the size of the bundle's classifier, which it must have.

        InferenceUnavailableError or InferenceFailedError.
        """
        assert bundle.classifier is not None
        rows = pixels.pack(bundle.classifier.digest, inputs, self._row_bytes)
        pieces = [rows[start : start + _PIECE] for start in range(0, len(rows), _PIECE)]
        found = [item for part in await asyncio.gather(*map(self._logits, pieces)) for item in part]
        for item in found:
            if isinstance(item, str):
                raise InferenceUnavailableError(item)
        images_classified.labels(bundle.name).inc(len(found))
        return np.array(found, dtype=np.float32)

    async def _logits(self, rows: NDArray[np.uint8]) -> list[Any]:
        found: list[Any] = await self._connection.call("classify", rows)
        if len(found) != len(rows):
            raise InferenceFailedError(f"the classifier gave {len(found)} numbers for {len(rows)} images")
        return found

    async def identity(self, bundle: Bundle) -> Mapping[str, str]:
        """What runs the bundle's classifier, for manifests. Errors as in `logits`."""
        assert bundle.classifier is not None
        described = await self._connection.describe()
        found = described["identities"].get(bundle.classifier.digest)
        if found is None:
            reasons = "; ".join(described["problems"]) or "restart the service to load it"
            raise InferenceUnavailableError(f"the classifier service does not have that of {bundle.name}: {reasons}")
        return dict(found)

    async def not_ready(self) -> str | None:
        """Why the classifier cannot score for every served model that has one; None if it can, or if none has."""
        return await _not_ready(self._connection, self._wanted) if self._wanted else None

    async def not_alive(self) -> str | None:
        """Why only a restart can help; None if the classifier answers, may yet, or is not needed."""
        return None if await self.not_ready() is None else self._connection.not_alive


class RemoteAuthenticity:
    """The authenticity service. Use it on one event loop. It is asked only where a served bundle has an index."""

    def __init__(self, client: Any, models: Models) -> None:
        self._connection = Connection(client, "the authenticity service")
        self._wanted = {b.authenticity.digest: b.name for b in models.bundles if b.authenticity is not None}
        self._row_bytes = pixels.row_bytes(b.authenticity.resolution for b in models.bundles if b.authenticity)

    async def nearest(self, bundle: Bundle, inputs: NDArray[np.uint8]) -> Nearest:
        """Of uint8 inputs [N, R, R, 3] at the resolution of the bundle's index, which it must have.

        InferenceUnavailableError or InferenceFailedError.
        """
        described = bundle.authenticity
        assert described is not None
        rows = pixels.pack(described.digest, inputs, self._row_bytes)
        pieces = [rows[start : start + _PIECE] for start in range(0, len(rows), _PIECE)]
        found = [item for part in await asyncio.gather(*map(self._nearest, pieces)) for item in part]
        for item in found:
            if isinstance(item, str):
                raise InferenceUnavailableError(item)
        images_compared.labels(bundle.name).inc(len(found))
        table = np.array(found, dtype=np.float32).reshape(len(found), 2 + described.dim)
        return Nearest(table[:, 0], table[:, 1], table[:, 2:])

    async def _nearest(self, rows: NDArray[np.uint8]) -> list[Any]:
        found: list[Any] = await self._connection.call("nearest", rows)
        if len(found) != len(rows):
            raise InferenceFailedError(f"the authenticity service gave {len(found)} results for {len(rows)} images")
        return found

    async def expose(self, bundle: Bundle, embeddings: NDArray[np.float32]) -> Exposure:
        """What a dataset's embeddings [N, dim] tell of the training set. Errors as in `nearest`."""
        assert bundle.authenticity is not None
        found = await self._connection.call("expose", bundle.authenticity.digest, embeddings)
        if "problem" in found:
            raise InferenceUnavailableError(found["problem"])
        attack = found["attack"]
        return Exposure(found["identifiability"], None if attack is None else Attack(**attack))

    async def identity(self, bundle: Bundle) -> Mapping[str, str]:
        """What compares the bundle's images, for manifests. Errors as in `nearest`."""
        assert bundle.authenticity is not None
        described = await self._connection.describe()
        found = described["identities"].get(bundle.authenticity.digest)
        if found is None:
            reasons = "; ".join(described["problems"]) or "restart the service to load it"
            raise InferenceUnavailableError(f"the authenticity service does not have that of {bundle.name}: {reasons}")
        return dict(found)

    async def not_ready(self) -> str | None:
        """Why images cannot be compared for every served model that has an index; None if they can, or if none has."""
        return await _not_ready(self._connection, self._wanted) if self._wanted else None

    async def not_alive(self) -> str | None:
        """Why only a restart can help; None if the service answers, may yet, or is not needed."""
        return None if await self.not_ready() is None else self._connection.not_alive


class RemoteExplainer:
    """The explainer service. Use it on one event loop. It is asked only where a served bundle has a classifier."""

    def __init__(self, client: Any, models: Models) -> None:
        self._connection = Connection(client, "the explainer")
        self._wanted = {b.classifier.digest: b.name for b in models.bundles if b.classifier is not None}

    async def heat_map(self, bundle: Bundle, method: Method, image: NDArray[np.uint8]) -> HeatMap:
        """The heat map of uint8 [S, S, 3] at the size of the bundle's classifier, which it must have.

        InferenceUnavailableError, InferenceFailedError or NotInstalledError.
        """
        assert bundle.classifier is not None
        found = await self._connection.call("explain", bundle.classifier.digest, method, image)
        if "missing" in found:
            raise NotInstalledError(found["missing"])
        if "problem" in found:
            raise InferenceUnavailableError(found["problem"])
        heat_maps_made.labels(bundle.name, method).inc()
        return HeatMap(**found)

    async def not_ready(self) -> str | None:
        """Why heat maps cannot be made for every served model with a classifier; None if they can, or if none has one."""
        return await _not_ready(self._connection, self._wanted) if self._wanted else None

    async def not_alive(self) -> str | None:
        """Why only a restart can help; None if the explainer answers, may yet, or is not needed."""
        return None if await self.not_ready() is None else self._connection.not_alive


class RemoteProjector:
    """The projector service. Use it on one event loop."""

    def __init__(self, client: Any, models: Models) -> None:
        self._connection = Connection(client, "the projector")
        self._wanted = {bundle.digest: bundle.name for bundle in models.bundles}

    async def project(
        self, bundle: Bundle, images: NDArray[np.uint8], labels: Sequence[int | None], task: Task, ticket: str
    ) -> list[Projected]:
        """Projections of uint8 [N, R, R, 3]. InferenceUnavailableError, InferenceFailedError or RequestError."""
        numbers = [-1 if label is None else label for label in labels]
        found = await self._connection.call("project", bundle.digest, images, numbers, task.to_dict(), ticket)
        if "refused" in found:
            raise RequestError(found.get("field", "projection"), found["refused"])
        if "problem" in found:
            raise InferenceUnavailableError(found["problem"])
        images_projected.labels(bundle.name).inc(len(images))
        return [Projected(**each) for each in found["projected"]]

    async def steps(self, ticket: str) -> int:
        """Steps that a call in work has done. Errors as in `project`."""
        return int(await self._connection.call("steps", ticket))

    async def cancel(self, ticket: str) -> None:
        """End a call. Errors as in `project`."""
        await self._connection.call("cancel", ticket)

    async def not_ready(self) -> str | None:
        """Why not every served model can be projected to; None if it can."""
        return await _not_ready(self._connection, self._wanted)

    async def not_alive(self) -> str | None:
        """Why only a restart can help; None if the projector answers or may yet."""
        return None if await self.not_ready() is None else self._connection.not_alive


async def _not_ready(connection: Connection, wanted: Mapping[str, str]) -> str | None:
    """Why a service lacks one of `wanted` (name of the model by digest); None if it has all."""
    described = await connection.describe_soon()
    if described is None:
        return f"{connection.name} is starting or does not answer"
    missing = [name for digest, name in wanted.items() if digest not in described["identities"]]
    if missing:
        reasons = "; ".join(described["problems"]) or "restart the service to load them"
        return f"{connection.name} did not load {', '.join(missing)}: {reasons}"
    return None
