"""The format between gateway and projector: squares of pixels in, files of projections out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dermis.projection.schedule import Schedule

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.projection.projector import Projector

FRAMES = 40  # of a video


@dataclass(frozen=True)
class Projected:
    """The files of one projection."""

    result: bytes
    """safetensors, `dermis.projection.result`."""
    image: bytes
    """PNG of the generator's image."""
    video: bytes | None
    """GIF of the way there, if it was asked for."""


@dataclass(frozen=True)
class Task:
    """What the images of one call have in common."""

    schedule: Schedule
    video: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"schedule": asdict(self.schedule), "video": self.video}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        return cls(Schedule(**values["schedule"]), values["video"])


Project = Callable[["Bundle", NDArray[np.uint8], Sequence[int | None], Task, str], Awaitable[list[Projected]]]
"""(bundle, uint8 [N, R, R, 3], class numbers, task, ticket) -> one for each image; the ticket names the call meanwhile."""


def run(
    projector: Projector,
    images: NDArray[np.uint8],
    labels: Sequence[int | None],
    task: Task,
    on_steps: Callable[[int], None],
) -> list[Projected]:
    """The projections of a call, in order. `on_steps` gets the steps done by all images so far."""
    from dermis.imaging import encode
    from dermis.projection.projector import Target
    from dermis.projection.result import to_bytes
    from dermis.video import encode_video

    targets = [Target(image, label) for image, label in zip(images, labels, strict=True)]
    steps = task.schedule.steps
    done: dict[int, Projected] = {}

    def tell(progress: Sequence[tuple[int, int]]) -> None:
        on_steps(len(done) * steps + sum(step for _, step in progress))

    every = max(1, steps // FRAMES) if task.video else None
    for number, found in projector.project(targets, task.schedule, on_step=tell, frame_every=every):
        film = None
        if found.frames is not None:
            film = encode_video(np.concatenate([found.frames, np.repeat(found.frames[-1:], 10, axis=0)]), "gif")
        origin = {"bundle": projector.bundle.digest}
        done[number] = Projected(to_bytes(found, origin), encode(found.image), film)
    return [done[number] for number in range(len(targets))]
