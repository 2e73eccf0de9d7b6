"""Results of `client.authenticity`, `client.edits` and `client.projections`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Base64Bytes, Field

from dermis_client import _notebook
from dermis_client._files import check_sha256, write_atomically
from dermis_client.images import decode, sheet
from dermis_client.models import Count, ModelRef, Problem, ResponseRecord

_SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


class AuthenticityModel(ModelRef):
    """The model whose training images were compared. index: SHA-256 of its authenticity.json."""

    index: str


class Verdict(ResponseRecord):
    """The comparison of one image with its nearest training image.

    Attributes:
        index: Position of the image in the caller's list.
        name: Path of the image, or files[index].
        authentic: Whether the image is farther from its nearest training image than that image is from its own nearest
            neighbour among the training images.
        distance: Distance to the nearest training image, rounded.
        percentile: 0 to 100: percentage of training images whose own nearest neighbour is nearer than `distance`.
        copy_detected: Whether the model's copy detector takes the image for a changed copy of a training image. None for
            uploads, and without a detector.
        repeated: Whether the image resembles one that was uploaded before, so that this is the answer on that image.
    """

    index: Count
    name: str = ""
    authentic: bool
    distance: float
    percentile: Count
    copy_detected: bool | None = None
    repeated: bool = False


class AuthenticityResult(ResponseRecord):
    """The verdict on each image, in order: a sequence of Verdict."""

    model: AuthenticityModel
    data: list[Verdict]

    def __iter__(self) -> Iterator[Verdict]:  # type: ignore[override]  # pydantic's own iterates over fields
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Verdict:
        return self.data[position]

    @property
    def authentic_share(self) -> float:
        """The share of authentic images, 0 to 1."""
        return sum(verdict.authentic for verdict in self.data) / len(self.data) if self.data else 0.0


class Direction(ResponseRecord):
    """A direction of a model's latent space.

    Attributes:
        name: Name of the direction.
        method: Method that computed it, such as "sefa".
        layers: First and last layer that it applies to.
        scale: Standard deviation of w along the direction: the length of a step of strength 1.
        facts: Further properties.
    """

    name: str
    method: str
    layers: list[Count] = Field(min_length=2)
    scale: float
    facts: dict[str, Any] = Field(default_factory=dict)


class EditedImage(ResponseRecord):
    """One edited image.

    Attributes:
        sample: Position of the sample or projection in the request.
        strength: Strength of the sweep, if there is one.
        media_type: Media type of the content.
        sha256: SHA-256 of the content, in hex.
        canonical_sha256: That of the content without its signed manifest (C2PA); None if the image is not signed.
        content: The encoded image file.
    """

    sample: Count
    strength: float | None = None
    media_type: str
    sha256: str
    canonical_sha256: str | None = None
    content: Base64Bytes = Field(alias="b64", repr=False)

    @property
    def image(self) -> Image.Image:
        """The image in RGB, decoded at every access."""
        return decode(self.content, f"image {self.file_name}")

    @property
    def file_name(self) -> str:
        """A name of sample and strength, such as 0002_+1.50.png."""
        strength = "" if self.strength is None else f"_{self.strength:+.2f}"
        return f"{self.sample:04d}{strength}.{_SUFFIXES.get(self.media_type, 'bin')}"

    def check(self) -> None:
        """Compare the content with the SHA-256 that the service sent.

        Raises:
            IntegrityError: They differ.
        """
        check_sha256(self.content, self.sha256, f"image {self.file_name}", self.file_name)

    def _repr_html_(self) -> str:
        """The image in a notebook, at most 128 px large."""
        strength = "" if self.strength is None else f", strength {self.strength:+g}"
        return _notebook.image_html(self.image, f"sample {self.sample}{strength}, synthetic")


class EditsResult(ResponseRecord):
    """The images of one call, by sample and then by strength: a sequence of EditedImage."""

    model: ModelRef
    data: list[EditedImage]

    def __iter__(self) -> Iterator[EditedImage]:  # type: ignore[override]  # pydantic's own iterates over fields
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> EditedImage:
        return self.data[position]

    def strip(self, *, gap: int = 2) -> Image.Image:
        """Arrange the images on a sheet: a row for each sample, a column for each strength.

        Args:
            gap: Pixels between images.

        Returns:
            The sheet in RGB.

        Raises:
            DermisError: There are no images, or the sheet is too large.
            IntegrityError: An image cannot be decoded.
        """
        return sheet([item.image for item in self.data], self._columns, gap)

    @property
    def _columns(self) -> int:
        """Images of each sample."""
        return max(-(-len(self.data) // max(len({item.sample for item in self.data}), 1)), 1)

    def _repr_html_(self) -> str:
        """The first rows of the strip in a notebook."""
        return _notebook.sheet_html(
            [lambda item=item: item.image for item in self.data],  # type: ignore[misc]
            lambda images: sheet(images, self._columns, 2),
            f"{len(self.data):,} edited images of {self.model.name}",
            self._columns,
        )

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every image file, unchanged, under its `file_name`.

        Args:
            folder: The folder, which is created.

        Returns:
            The paths.

        Raises:
            DownloadError: A file cannot be written.
        """
        paths = [Path(folder) / item.file_name for item in self.data]
        for path, item in zip(paths, self.data, strict=True):
            write_atomically(path, item.content)
        return paths


class ProjectionProgress(ResponseRecord):
    """Progress of a projection. Steps are the sum over all images."""

    images_done: Count = 0
    images_total: Count = 0
    steps_done: Count = 0
    steps_total: Count = 0
    eta_seconds: float | None = None

    @property
    def fraction(self) -> float:
        """The share of steps done, 0 to 1."""
        return min(1.0, self.steps_done / self.steps_total) if self.steps_total else 0.0


class ProjectedImage(ResponseRecord):
    """The projection of one image.

    Attributes:
        index: Position of the image in the request.
        distance: Distance between the image and its projection, in the features that `distance_name` names.
        distance_name: Name of the distance.
        pixel_error: Error of a pixel, 0 to 255.
        steps: Optimisation steps.
        start: Where the optimisation started.
        space: Latent space.
        files: Path of each kind of file.
    """

    index: Count
    distance: float
    distance_name: str
    pixel_error: float
    steps: Count
    start: str
    space: str
    files: dict[str, str] = Field(default_factory=dict)


class PreviewDistance(ResponseRecord):
    """The distance after a step of a running projection."""

    step: Count
    distance: float


class ProjectionPreview(ResponseRecord):
    """An image of a running projection at one moment.

    Attributes:
        index: Position of the image in the request.
        step: Steps that have been done for it.
        distance: Distance between the current image and the uploaded one.
        distances: Distances after some of the steps so far.
        file: Path of the current image; `client.projections.preview` fetches it.
    """

    index: Count
    step: Count
    distance: float
    distances: list[PreviewDistance] = Field(default_factory=list)
    file: str


class Projection(ResponseRecord):
    """A projection at one moment.

    Attributes:
        data: The projection of each image; None until the job has succeeded.
        previews: The images that are being projected at the moment; None unless the job is running.
    """

    id: str
    state: str
    schedule: str = ""
    steps: Count = 0
    space: str = ""
    start: str = ""
    model: ModelRef
    progress: ProjectionProgress = ProjectionProgress()
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: datetime | None = None
    error: Problem | None = None
    data: list[ProjectedImage] | None = None
    previews: list[ProjectionPreview] | None = None

    @property
    def finished(self) -> bool:
        """Whether the state is final: succeeded or failed."""
        return self.state in {"succeeded", "failed"}
