"""The clients by which the gateway and the jobs call the inference services.

The methods of a client raise InferenceUnavailableError if the service cannot do its work now, InferenceUnreachableError if it
does not answer, and InferenceFailedError if it fails. Use the clients on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter

from dermis.authenticity.attack import Attack, Exposure
from dermis.authenticity.index import Nearest
from dermis.authenticity.training_map import TrainingMap
from dermis.bundle import Bundle
from dermis.errors import RequestError
from dermis.explain.attribution import Method
from services.errors import InferenceFailedError, InferenceUnavailableError, NotInstalledError
from services.inference import pixels
from services.inference.connection import Connection
from services.inference.heat_maps import EncodedHeatMap
from services.inference.projections import ProjectionFiles, ProjectionPreview, ProjectionTask
from services.inference.samples import Image, Samples, to_bytes
from services.models import ServedModels

images_generated = Counter("dermis_images_generated_total", "Images that the generator has made.", ["model"])
images_classified = Counter("dermis_images_classified_total", "Images that the classifier has scored.", ["model"])
images_compared = Counter("dermis_images_compared_total", "Images compared with the training images.", ["model"])
images_projected = Counter("dermis_images_projected_total", "Images projected to latents.", ["model"])
heat_maps_made = Counter("dermis_heat_maps_total", "Heat maps that the explainer has made.", ["model", "method"])

# Rows of one call, as many as a shard sends at a time, so that a large request of one user does not delay the others.
_ROWS_PER_CALL = 32


class InferenceClient:
    """Base class of the clients.

    Args:
        client: BentoML's asynchronous client of the service; None if this replica does not run it.
        served: Names of the served models that the service must have, by the digest that it knows them by.
    """

    name: ClassVar[str]
    """The name of the service in messages."""
    needed_without_models: ClassVar[bool] = False
    """Whether the service must answer even if no served model needs it."""

    def __init__(self, client: Any, served: Mapping[str, str]) -> None:
        self._connection = Connection(client, self.name)
        self._served = served

    async def not_ready(self, unusable: Container[str] = ()) -> str | None:
        """Why the service cannot do its work for every served model that needs it; None if it can.

        Args:
            unusable: Names of models whose bundle has a problem, and which the service therefore need not have.
        """
        if not self._connection.exists or (not self._served and not self.needed_without_models):
            return None
        description = await self._connection.describe_soon()
        if description is None:
            return f"{self.name} is starting or does not answer"
        loaded = description["identities"]
        missing = [model for digest, model in self._served.items() if digest not in loaded and model not in unusable]
        if missing:
            reasons = "; ".join(description["problems"]) or "restart the service to load them"
            return f"{self.name} did not load {', '.join(missing)}: {reasons}"
        return None

    async def not_alive(self) -> str | None:
        """Why only a restart can help; None if the service answers, may answer later, or is not needed."""
        return None if await self.not_ready() is None else self._connection.not_alive

    async def _identity(self, digest: str, missing: str) -> Mapping[str, str]:
        """The software and the device that run a model, for manifests.

        Args:
            digest: Digest of the model.
            missing: Begin of the message if the service has no such model.

        Raises:
            InferenceUnavailableError: The service has no such model.
        """
        description = await self._connection.describe()
        identity = description["identities"].get(digest)
        if identity is None:
            reasons = "; ".join(description["problems"]) or "restart the service to load it"
            raise InferenceUnavailableError(f"{missing}: {reasons}")
        return dict(identity)

    async def _call_rows(self, method: str, rows: NDArray[np.uint8], results: str, inputs: str) -> list[Any]:
        """Call a method of `batch_api` with all rows, in several calls at the same time.

        Args:
            method: Name of the method.
            rows: One row per input.
            results: Plural noun for the results, for messages.
            inputs: Plural noun for the inputs, for messages.

        Returns:
            One result per row, in their order.
        """

        async def call(part: NDArray[np.uint8]) -> list[Any]:
            response: list[Any] = await self._connection.call(method, part)
            if len(response) != len(part):
                raise InferenceFailedError(f"{self.name} gave {len(response)} {results} for {len(part)} {inputs}")
            return response

        parts = [rows[start : start + _ROWS_PER_CALL] for start in range(0, len(rows), _ROWS_PER_CALL)]
        items = [item for response in await asyncio.gather(*map(call, parts)) for item in response]
        for item in items:
            if isinstance(item, str):
                raise InferenceUnavailableError(item)
        return items


class GeneratorClient(InferenceClient):
    """Client of the generator."""

    name = "the generator"
    needed_without_models = True

    def __init__(self, client: Any, models: ServedModels) -> None:
        super().__init__(client, {bundle.digest: bundle.name for bundle in models.bundles})
        self._models = models

    async def images(self, rows: Samples) -> list[Image]:
        """Images of rows (`samples.pack_rows`), in their order."""
        images = await self._call_rows("generate", to_bytes(rows), "images", "samples")
        for bundle in self._models.bundles:
            count = int((rows["model"] == bundle.digest.encode("ascii")).sum())
            if count:
                images_generated.labels(bundle.name).inc(count)
        return images

    async def draw(
        self, bundle: Bundle, ws: NDArray[np.float32], noise_mode: str, noise_of: tuple[int, int] | None = None
    ) -> list[Image]:
        """Images of style vectors [N, num_ws, w_dim]. With the noise mode "random" all have that of sample `noise_of`."""
        images = await self._connection.call("draw", bundle.digest, ws, noise_mode, *(noise_of or ()))
        if isinstance(images, str):
            raise InferenceUnavailableError(images)
        images_generated.labels(bundle.name).inc(len(images))
        return list(images)

    async def map(
        self,
        bundle: Bundle,
        z: NDArray[np.float32],
        labels: Sequence[int],
        truncation_psi: float,
        truncation_cutoff: int | None,
    ) -> NDArray[np.float32]:
        """Style vectors [N, num_ws, w_dim] of latents z [N, z_dim] of classes."""
        cutoff = -1 if truncation_cutoff is None else truncation_cutoff
        ws = await self._connection.call(
            "map", bundle.digest, z, np.array(labels, np.int64), float(truncation_psi), cutoff
        )
        if isinstance(ws, str):
            raise InferenceUnavailableError(ws)
        return np.asarray(ws, np.float32)

    async def identity(self, bundle: Bundle) -> Mapping[str, str]:
        """The software and the device that generate the images of the bundle, for manifests."""
        return await self._identity(bundle.digest, f"the generator has no model with digest {bundle.digest[:12]}")


class ClassifierClient(InferenceClient):
    """Client of the classifier. The bundles of its methods must have a classifier."""

    name = "the classifier"

    def __init__(self, client: Any, models: ServedModels) -> None:
        super().__init__(client, {b.classifier.digest: b.name for b in models.bundles if b.classifier is not None})
        self._row_bytes = pixels.row_bytes(b.classifier.input.size for b in models.bundles if b.classifier)

    async def logits(self, bundle: Bundle, inputs: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Classify images.

        Args:
            bundle: A bundle with a classifier.
            inputs: uint8 [N, S, S, 3] at the size of the classifier.

        Returns:
            Logits float32 [N].
        """
        assert bundle.classifier is not None
        rows = pixels.pack_rows(bundle.classifier.digest, inputs, self._row_bytes)
        logits = await self._call_rows("classify", rows, "numbers", "images")
        images_classified.labels(bundle.name).inc(len(logits))
        return np.array(logits, dtype=np.float32)

    async def identity(self, bundle: Bundle) -> Mapping[str, str]:
        """The software and the device that run the classifier of the bundle, for manifests."""
        assert bundle.classifier is not None
        return await self._identity(
            bundle.classifier.digest, f"the classifier service does not have that of {bundle.name}"
        )


class AuthenticityClient(InferenceClient):
    """Client of the authenticity service. The bundles of its methods must have an index."""

    name = "the authenticity service"

    def __init__(self, client: Any, models: ServedModels) -> None:
        super().__init__(client, {b.authenticity.digest: b.name for b in models.bundles if b.authenticity is not None})
        self._row_bytes = pixels.row_bytes(b.authenticity.resolution for b in models.bundles if b.authenticity)
        self._maps: dict[str, TrainingMap] = {}  # by digest of the index

    async def nearest(
        self, bundle: Bundle, inputs: NDArray[np.uint8], comparison: pixels.Comparison | None = None
    ) -> Nearest:
        """Compare images with the training images.

        Args:
            bundle: A bundle with an index.
            inputs: uint8 [N, R, R, 3] at the resolution of the index.
            comparison: Options; None for exact results with the copy detector.

        Returns:
            Distances, radii and embeddings, without the numbers of the training images.
        """
        index = bundle.authenticity
        assert index is not None
        comparison = comparison or pixels.Comparison()
        rows = pixels.pack_rows(index.digest, inputs, self._row_bytes, comparison)
        results = await self._call_rows("nearest", rows, "results", "images")
        images_compared.labels(bundle.name).inc(len(results))
        table = np.array(results, dtype=np.float32).reshape(len(results), 3 + index.dim)
        scores = None if bundle.copies is None or not comparison.detect_copies else table[:, 2]
        return Nearest(table[:, 0], table[:, 1], table[:, 3:], copy_scores=scores)

    async def expose(self, bundle: Bundle, embeddings: NDArray[np.float32]) -> Exposure:
        """Measure what the embeddings [N, dim] of a dataset reveal about the training images."""
        assert bundle.authenticity is not None
        response = await self._connection.call("expose", bundle.authenticity.digest, embeddings)
        if "problem" in response:
            raise InferenceUnavailableError(response["problem"])
        attack = response["attack"]
        return Exposure(response["identifiability"], None if attack is None else Attack(**attack))

    async def training_map(self, bundle: Bundle) -> TrainingMap:
        """The map of the training images, which is kept after the first call."""
        assert bundle.authenticity is not None
        digest = bundle.authenticity.digest
        if digest not in self._maps:
            response = await self._connection.call("training_map", digest)
            if "problem" in response:
                raise InferenceUnavailableError(response["problem"])
            self._maps[digest] = TrainingMap(**response)
        return self._maps[digest]

    async def identity(self, bundle: Bundle) -> Mapping[str, str]:
        """The software and the device that compare images with the index of the bundle, for manifests."""
        assert bundle.authenticity is not None
        return await self._identity(
            bundle.authenticity.digest, f"the authenticity service does not have that of {bundle.name}"
        )


class ExplainerClient(InferenceClient):
    """Client of the explainer. The bundles of its methods must have a classifier."""

    name = "the explainer"

    def __init__(self, client: Any, models: ServedModels) -> None:
        super().__init__(client, {b.classifier.digest: b.name for b in models.bundles if b.classifier is not None})

    async def heat_map(self, bundle: Bundle, method: Method, image: NDArray[np.uint8]) -> EncodedHeatMap:
        """Make a heat map.

        Args:
            bundle: A bundle with a classifier.
            method: The method of attribution.
            image: uint8 [S, S, 3] at the size of the classifier.

        Raises:
            NotInstalledError: If the explainer lacks a package.
        """
        assert bundle.classifier is not None
        response = await self._connection.call("explain", bundle.classifier.digest, method, image)
        if "missing" in response:
            raise NotInstalledError(response["missing"])
        if "problem" in response:
            raise InferenceUnavailableError(response["problem"])
        heat_maps_made.labels(bundle.name, method).inc()
        return EncodedHeatMap(**response)


class ProjectorClient(InferenceClient):
    """Client of the projector."""

    name = "the projector"
    needed_without_models = True

    def __init__(self, client: Any, models: ServedModels) -> None:
        super().__init__(client, {bundle.digest: bundle.name for bundle in models.bundles})

    async def project(
        self,
        bundle: Bundle,
        images: NDArray[np.uint8],
        labels: Sequence[int | None],
        task: ProjectionTask,
        ticket: str,
    ) -> list[ProjectionFiles]:
        """Project images.

        Args:
            bundle: The model.
            images: uint8 [N, R, R, 3] at the resolution of the generator.
            labels: Class number of each image, if it is known.
            task: The options.
            ticket: A new name for this call, for `progress` and `cancel`.

        Returns:
            The files of each image, in their order.

        Raises:
            RequestError: If the projector cannot do the task.
        """
        numbers = [-1 if label is None else label for label in labels]
        response = await self._connection.call("project", bundle.digest, images, numbers, task.to_dict(), ticket)
        if "refused" in response:
            raise RequestError(response.get("field", "projection"), response["refused"])
        if "problem" in response:
            raise InferenceUnavailableError(response["problem"])
        images_projected.labels(bundle.name).inc(len(images))
        return [ProjectionFiles(**fields) for fields in response["projected"]]

    async def progress(self, ticket: str) -> tuple[int, list[ProjectionPreview]]:
        """The sum of the steps of all images of a running call of `project`, and previews of its current images."""
        response = await self._connection.call("progress", ticket)
        return int(response["steps"]), [ProjectionPreview(**fields) for fields in response["previews"]]

    async def cancel(self, ticket: str) -> None:
        """End a call of `project` at its next step."""
        await self._connection.call("cancel", ticket)


@dataclass(frozen=True)
class InferenceClients:
    """The clients of all inference services."""

    generator: GeneratorClient
    classifier: ClassifierClient
    authenticity: AuthenticityClient
    explainer: ExplainerClient
    projector: ProjectorClient

    @classmethod
    def connect(cls, client_of: Callable[[str], Any], models: ServedModels) -> InferenceClients:
        """Make the clients.

        Args:
            client_of: BentoML's asynchronous client of a service, by the name of the field above; None if there is none.
            models: The served models.
        """
        return cls(
            generator=GeneratorClient(client_of("generator"), models),
            classifier=ClassifierClient(client_of("classifier"), models),
            authenticity=AuthenticityClient(client_of("authenticity"), models),
            explainer=ExplainerClient(client_of("explainer"), models),
            projector=ProjectorClient(client_of("projector"), models),
        )

    async def not_ready(self, unusable: Container[str] = ()) -> str | None:
        """Why not all services can do their work; None if they can. They need not have the models in `unusable`."""
        return await _join_reasons(client.not_ready(unusable) for client in self._all())

    async def not_alive(self) -> str | None:
        """Why only a restart can help; None if all services answer or may answer later."""
        return await _join_reasons(client.not_alive() for client in self._all())

    def _all(self) -> Sequence[InferenceClient]:
        return [getattr(self, field.name) for field in fields(self)]


async def _join_reasons(reasons: Iterable[Awaitable[str | None]]) -> str | None:
    return "; ".join(filter(None, await asyncio.gather(*reasons))) or None
