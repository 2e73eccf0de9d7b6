"""What the latent space's part of the client returns: verdicts, directions, edited images, projections."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Base64Bytes, Field

from dermis_client._writing import write_whole
from dermis_client.errors import IntegrityError
from dermis_client.images import decode, sheet
from dermis_client.models import Answer, Count, ModelRef, Problem

_SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


class AuthenticityModel(ModelRef):
    """Whose training images were compared with, and by which index (SHA-256 of its authenticity.json)."""

    index: str


class Verdict(Answer):
    """How near one image is to the nearest training image.

    index: its place in the list that was given; name: its path, or files[index]. authentic: whether it is farther from that
    image than that one is from its own nearest other one. distance: rounded. percentile: 0..100, the share of training images
    whose own nearest other one is nearer than that.
    """

    index: Count
    name: str = ""
    authentic: bool
    distance: float
    percentile: Count


class AuthenticityResult(Answer):
    """One Verdict an image, in order. A sequence of them."""

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
        """0..1: the share of authentic images."""
        return sum(verdict.authentic for verdict in self.data) / len(self.data) if self.data else 0.0


class Direction(Answer):
    """A direction of a model's latent space. scale: standard deviation of w along it, what a strength of 1 moves by."""

    name: str
    method: str
    layers: list[Count] = Field(min_length=2)
    scale: float
    facts: dict[str, Any] = Field(default_factory=dict)


class EditedImage(Answer):
    """One image after its edits. sample: place of the sample or projection in the request; strength: of the sweep."""

    sample: Count
    strength: float | None = None
    media_type: str
    sha256: str
    content: Base64Bytes = Field(alias="b64", repr=False)  # the encoded file, as it would be written to disk

    @property
    def image(self) -> Image.Image:
        """The image, RGB, decoded anew at every access."""
        return decode(self.content, f"image {self.file_name}")

    @property
    def file_name(self) -> str:
        """A name that tells sample and strength, such as 0002_+1.50.png."""
        told = "" if self.strength is None else f"_{self.strength:+.2f}"
        return f"{self.sample:04d}{told}.{_SUFFIXES.get(self.media_type, 'bin')}"

    def check(self) -> None:
        """Raise IntegrityError unless the content has the SHA-256 that the service named."""
        actual = hashlib.sha256(self.content).hexdigest()
        if actual != self.sha256:
            raise IntegrityError(
                f"image {self.file_name}: arrived with SHA-256 {actual[:12]}..., expected {self.sha256[:12]}...",
                name=self.file_name,
                expected=self.sha256,
                actual=actual,
            )


class EditsResult(Answer):
    """The images of one call, sample after sample, strength after strength. A sequence of EditedImage."""

    model: ModelRef
    data: list[EditedImage]

    def __iter__(self) -> Iterator[EditedImage]:  # type: ignore[override]  # pydantic's own iterates over fields
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> EditedImage:
        return self.data[position]

    def strip(self, *, gap: int = 2) -> Image.Image:
        """A sheet with a row for each sample and a column for each strength; gap in pixels between images."""
        rows = len({item.sample for item in self.data})
        return sheet([item.image for item in self.data], -(-len(self.data) // max(rows, 1)), gap)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every image as it came, under its file_name; returns the paths. Raises DownloadError."""
        paths = [Path(folder) / item.file_name for item in self.data]
        for path, item in zip(paths, self.data, strict=True):
            write_whole(path, item.content)
        return paths


class ProjectionProgress(Answer):
    """How far a projection is; steps are of all images together."""

    images_done: Count = 0
    images_total: Count = 0
    steps_done: Count = 0
    steps_total: Count = 0
    eta_seconds: float | None = None

    @property
    def fraction(self) -> float:
        """Done over total, 0..1."""
        return min(1.0, self.steps_done / self.steps_total) if self.steps_total else 0.0


class ProjectedImage(Answer):
    """One image's projection. distance: in the space of distance_name; pixel_error: 0..255. files: paths by kind."""

    index: Count
    distance: float
    distance_name: str
    pixel_error: float
    steps: Count
    start: str
    space: str
    files: dict[str, str] = Field(default_factory=dict)


class Projection(Answer):
    """A projection job at one moment. data: one entry for each image, None before it has succeeded."""

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

    @property
    def finished(self) -> bool:
        """Whether the state will not change any more: succeeded or failed."""
        return self.state in {"succeeded", "failed"}
