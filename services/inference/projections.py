"""The format between the projector and its client: squares of pixels in, files of projections out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dermis.projection.schedule import Schedule

if TYPE_CHECKING:
    from dermis.projection.projector import ImageProjector, ProjectionState

PREVIEW_PIXELS = 256
"""Largest side of the preview of a running projection; larger images are reduced."""
PREVIEW_DISTANCES = 100
"""Number of distances that a preview has at most."""
_PREVIEW_SECONDS = 0.5  # at least this long between two previews,
_PREVIEW_SHARE = 0.01  # and long enough that making them takes at most this share of the time
_VIDEO_FRAMES = 40
_REPEATED_LAST_FRAMES = 10


@dataclass(frozen=True)
class ProjectionFiles:
    """The files of one projected image.

    Attributes:
        result: safetensors, see `dermis.projection.result`.
        image: PNG of the generator's image.
        video: GIF of the images between start and result; None if the task has no video.
    """

    result: bytes
    image: bytes
    video: bytes | None


@dataclass(frozen=True)
class ProjectionPreview:
    """A projection that is running.

    Attributes:
        number: Position of the image in the call.
        step: Steps that it has done.
        distances: (step, distance) of steps so far, evenly spaced; the last one is that of the image.
        image: PNG of the generator's image.
    """

    number: int
    step: int
    distances: list[tuple[int, float]]
    image: bytes


@dataclass(frozen=True)
class ProjectionTask:
    """The options that all images of a call share."""

    schedule: Schedule
    video: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The task as it is sent."""
        return {"schedule": asdict(self.schedule), "video": self.video}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ProjectionTask:
        """The inverse of `to_dict`."""
        return cls(Schedule(**fields["schedule"]), fields["video"])


def project_images(
    projector: ImageProjector,
    images: NDArray[np.uint8],
    labels: Sequence[int | None],
    task: ProjectionTask,
    on_steps: Callable[[int], None],
    on_previews: Callable[[list[ProjectionPreview]], None] | None = None,
) -> list[ProjectionFiles]:
    """Project the images of a call.

    Args:
        projector: The projector.
        images: uint8 [N, R, R, 3] at the resolution of the generator.
        labels: Class number of each image, if it is known.
        task: The options.
        on_steps: Called with the sum of the steps that all images have done.
        on_previews: Called now and then with the current images. Making them takes about a hundredth of the time.

    Returns:
        The files of each image, in their order.
    """
    from dermis.image_metadata import origin_of
    from dermis.imaging import encode
    from dermis.projection.projector import Target
    from dermis.projection.result import to_bytes
    from dermis.video import encode_video

    targets = [Target(image, label) for image, label in zip(images, labels, strict=True)]
    steps = task.schedule.steps
    files: dict[int, ProjectionFiles] = {}
    origin = origin_of(projector.bundle, "compositeWithTrainedAlgorithmicMedia")  # its input is a photograph

    def on_step(progress: Sequence[tuple[int, int]]) -> None:
        on_steps(len(files) * steps + sum(step for _, step in progress))

    frame_every = max(1, steps // _VIDEO_FRAMES) if task.video else None
    previews = None if on_previews is None else _Previews(steps, partial(encode, origin=origin), on_previews)
    projected = projector.project(
        targets,
        task.schedule,
        on_step=on_step,
        on_state=previews,
        frame_every=frame_every,
        at_once=len(targets),  # a step of one image alone takes less than half of the time of a step of eight
    )
    for number, result in projected:
        video = None
        if result.frames is not None:
            last_frames = np.repeat(result.frames[-1:], _REPEATED_LAST_FRAMES, axis=0)
            video = encode_video(np.concatenate([result.frames, last_frames]), "gif", origin=origin)
        provenance = {"bundle": projector.bundle.digest}
        files[number] = ProjectionFiles(to_bytes(result, provenance), encode(result.image, origin=origin), video)
    return [files[number] for number in range(len(targets))]


class _Previews:
    """Makes previews of the images of a call, so seldom that they cost little."""

    def __init__(
        self,
        steps: int,
        encode: Callable[[NDArray[np.uint8]], bytes],
        send: Callable[[list[ProjectionPreview]], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._every = max(1, -(-steps // (PREVIEW_DISTANCES - 1)))
        self._encode, self._send, self._clock = encode, send, clock
        self._distances: dict[int, list[tuple[int, float]]] = {}
        self._next = float("-inf")

    def __call__(self, state: ProjectionState) -> None:
        for number, step, distance in zip(state.numbers, state.steps, state.distances, strict=True):
            if step == 1 or step % self._every == 0:
                self._distances.setdefault(number, []).append((step, distance))
        began = self._clock()
        if began < self._next:
            return
        previews = []
        rows = zip(state.numbers, state.steps, state.distances, state.images(), strict=True)
        for number, step, distance, image in rows:
            known = self._distances.setdefault(number, [])
            last = [] if known and known[-1][0] == step else [(step, distance)]
            previews.append(
                ProjectionPreview(number, step, [*known, *last][-PREVIEW_DISTANCES:], self._encode(_reduced(image)))
            )
        self._send(previews)
        taken = self._clock() - began
        self._next = began + max(_PREVIEW_SECONDS, taken / _PREVIEW_SHARE)


def _reduced(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image with at most `PREVIEW_PIXELS` a side."""
    from PIL import Image

    if len(image) <= PREVIEW_PIXELS:
        return image
    small = Image.fromarray(image).resize((PREVIEW_PIXELS, PREVIEW_PIXELS), Image.Resampling.BOX)
    return np.asarray(small, np.uint8)
