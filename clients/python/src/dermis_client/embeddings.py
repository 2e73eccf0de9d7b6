"""Results of `client.embeddings`: a map of images beside the training images of a model."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from dermis_client.images import GeneratedImage
from dermis_client.latent import AuthenticityModel, Verdict
from dermis_client.models import Count, ResponseRecord


class Cube(ResponseRecord):
    """A cube of the map. images: number of training images in it, rounded."""

    centre: list[float] = Field(min_length=3, max_length=3)
    images: Count


class TrainingImages(ResponseRecord):
    """Where the training images are on the map.

    Attributes:
        counted: Number of training images that were counted.
        side: Length of the sides of the cubes.
        smallest: Cubes with fewer training images are left out.
        cubes: The others.
        positions: Positions of training images; None unless the operator of the service shows them.
    """

    counted: Count
    side: float
    smallest: Count
    cubes: list[Cube]
    positions: list[list[float]] | None = None


class EmbeddingMap(ResponseRecord):
    """The map of a model.

    Attributes:
        model: The model and its index.
        extractor: The feature space of the index.
        metric: cosine or l2.
        explained: Share of the variance of the training images' embeddings in each component of a position.
        uploads: Whether the service places uploaded images on the map.
        training: Where the training images are.
    """

    model: AuthenticityModel
    extractor: str
    metric: str
    explained: list[float]
    uploads: bool = False
    training: TrainingImages


class Embedding(ResponseRecord):
    """Where one image is on the map.

    Attributes:
        index: Position of the image in the caller's list.
        name: Path of the image, or files[index]; empty for generated images.
        position: Principal components of the image's embedding; the first three are the place on the map.
        verdict: The comparison with the training images; None for uploads and projections.
        image: The image, if it was asked for.
    """

    index: Count
    name: str = ""
    position: list[float] = Field(min_length=1)
    verdict: Verdict | None = None
    image: GeneratedImage | None = None


class EmbeddingsResult(ResponseRecord):
    """The positions of the images of one call, in order: a sequence of Embedding."""

    model: AuthenticityModel
    data: list[Embedding]

    def __iter__(self) -> Iterator[Embedding]:  # type: ignore[override]  # pydantic's own iterates over fields
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Embedding:
        return self.data[position]

    def check(self) -> None:
        """Compare the images with the SHA-256 that the service sent.

        Raises:
            IntegrityError: They differ.
        """
        for item in self.data:
            if item.image is not None:
                item.image.check()
