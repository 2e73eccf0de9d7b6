"""The format between the projector and its client: squares of pixels in, files of projections out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dermis.projection.schedule import Schedule

if TYPE_CHECKING:
    from dermis.projection.projector import ImageProjector

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
) -> list[ProjectionFiles]:
    """Project the images of a call.

    Args:
        projector: The projector.
        images: uint8 [N, R, R, 3] at the resolution of the generator.
        labels: Class number of each image, if it is known.
        task: The options.
        on_steps: Called with the sum of the steps that all images have done.

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
    for number, result in projector.project(targets, task.schedule, on_step=on_step, frame_every=frame_every):
        video = None
        if result.frames is not None:
            last_frames = np.repeat(result.frames[-1:], _REPEATED_LAST_FRAMES, axis=0)
            video = encode_video(np.concatenate([result.frames, last_frames]), "gif")
        provenance = {"bundle": projector.bundle.digest}
        files[number] = ProjectionFiles(to_bytes(result, provenance), encode(result.image, origin=origin), video)
    return [files[number] for number in range(len(targets))]
