"""Progress bars on stderr, or the caller's own function.

Each context manager takes the `progress` argument of a public method and yields a function that reports progress: the
caller's function, that of a progress bar (True), or one that does nothing (False).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ParamSpec, TypeVar

from dermis_client._downloads import DownloadProgress
from dermis_client._untrusted import one_line
from dermis_client.latent import Projection
from dermis_client.models import DatasetRecord

P = ParamSpec("P")
R = TypeVar("R", bound=DatasetRecord)


@contextmanager
def _reporting(
    progress: bool | Callable[P, None], bar: Callable[[], AbstractContextManager[Callable[P, None]]]
) -> Iterator[Callable[P, None]]:
    """Yield the function for a `progress` argument; `bar` shows a progress bar and yields the function that updates it."""
    if callable(progress):
        yield progress
    elif progress:
        with bar() as update:
            yield update
    else:

        def ignore(*_args: P.args, **_kwargs: P.kwargs) -> None:
            pass

        yield ignore


def dataset_progress(progress: bool | Callable[[R], None]) -> AbstractContextManager[Callable[[R], None]]:
    """Report records of a dataset."""
    return _reporting(progress, _dataset_bar)


def projection_progress(
    progress: bool | Callable[[Projection], None],
) -> AbstractContextManager[Callable[[Projection], None]]:
    """Report records of a projection."""
    return _reporting(progress, _projection_bar)


def download_progress(
    progress: bool | Callable[[DownloadProgress], None],
) -> AbstractContextManager[Callable[[DownloadProgress], None]]:
    """Report files and bytes of a download."""
    return _reporting(progress, _download_bar)


def count_progress(
    progress: bool | Callable[[int, int], None], label: str
) -> AbstractContextManager[Callable[[int, int], None]]:
    """Report (done, total); `label` is shown before the bar."""
    return _reporting(progress, lambda: _count_bar(label))


@contextmanager
def _dataset_bar() -> Iterator[Callable[[DatasetRecord], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        console=Console(stderr=True),
    ) as bars:
        task = bars.add_task("waiting", total=None, speed="")

        def update(record: DatasetRecord) -> None:
            done = record.progress
            bars.update(
                task,
                description=one_line(f"{record.id} {record.state}", 80),
                completed=done.samples_done,
                total=done.samples_total or None,
                speed=_speed(record),
            )

        yield update


@contextmanager
def _projection_bar() -> Iterator[Callable[[Projection], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("waiting", total=None)

        def update(record: Projection) -> None:
            done = record.progress
            bars.update(
                task,
                description=one_line(f"{record.id} {record.state}", 80),
                completed=done.steps_done,
                total=done.steps_total or None,
            )

        yield update


@contextmanager
def _download_bar() -> Iterator[Callable[[DownloadProgress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    with Progress(
        TextColumn("downloading {task.fields[files]}"),
        BarColumn(),
        DownloadColumn(),
        SpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        task = bars.add_task("", total=None, files="")

        def update(done: DownloadProgress) -> None:
            files = f"{done.files_done} of {done.files_total} files"
            bars.update(task, completed=done.bytes_done, total=done.bytes_total, files=files)

        yield update


@contextmanager
def _count_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _speed(record: DatasetRecord) -> str:
    done = record.progress
    rate = f"{done.images_per_second:.1f} images/s" if done.images_per_second else ""
    if not done.eta_seconds or record.finished:
        return rate
    minutes, seconds = divmod(round(done.eta_seconds), 60)
    left = f"{minutes} min {seconds:02d} s left" if minutes else f"{seconds} s left"
    return f"{rate}, {left}" if rate else left
