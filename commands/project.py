"""`dermis project`: find the latents of real images; an interrupted run can be continued."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from commands.classify import image_files
from commands.options import (
    DEMO_BUNDLE,
    BundleOption,
    DeviceOption,
    OutFolderOption,
    PerceptualOption,
    ScheduleOption,
    StepsOption,
)
from dermis.errors import DataError, DermisError, RequestError, StorageError
from dermis.files import write_file
from dermis.projection.schedule import Space, Start
from dermis.video import VideoFormat

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.imaging import Images
    from dermis.projection.projector import ImageProjector, Target
    from dermis.projection.result import Projection
    from dermis.projection.schedule import Schedule

SETTINGS, TABLE, PAIRS = "projections.json", "projections.csv", "pairs.png"
_COLUMNS = ("file", "result", "distance", "distance_name", "pixel_error", "steps", "start", "space")
_PAIRS = 32
_FRAMES = 40


def project(
    images: Annotated[list[Path], typer.Option(help="Image file, or folder of them; may be repeated.")],
    out: OutFolderOption,
    bundle: BundleOption = DEMO_BUNDLE,
    schedule: ScheduleOption = "fast",
    steps: StepsOption = None,
    space: Annotated[Space | None, typer.Option(help="Latent space; default: that of the schedule.")] = None,
    start: Annotated[
        Start | None,
        typer.Option(help="Initial latent: the mean, or that of the bundle's encoder (default of fast if it has one)."),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="End an image after this many steps without improvement; default: never.")
    ] = None,
    distance: PerceptualOption = "auto",
    class_name: Annotated[
        str | None,
        typer.Option("--class", help="Class of all images; default: for each the class with the nearest mean."),
    ] = None,
    video: Annotated[VideoFormat | None, typer.Option(help="Also write a video of each optimisation.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images that are optimised at one time; default 8 on a CPU, 32 on a GPU.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Find the latents whose images are nearest to real ones. After a stop, run the same command again to continue.

    Writes a .safetensors file (latents, image, distances) and a .png for each image; at the end projections.csv and
    pairs.png, which shows the first images beside their projections. Images that cannot be read are named and skipped, and
    the exit status is 1.
    """
    from dermis.bundle import open_bundle
    from dermis.dataset.request import classes_of
    from dermis.projection.encoder import load_encoder
    from dermis.projection.projector import ImageProjector

    opened = open_bundle(bundle)
    classes = classes_of(opened)
    if class_name is not None and class_name not in classes:
        raise RequestError("--class", f"{class_name!r} is unknown; this bundle has {', '.join(classes)}")
    encoder = load_encoder(opened, device=device)
    settings = _schedule(schedule, steps, space, start, patience, encoder is not None)
    files = image_files(images)
    projector = _projector(ImageProjector, opened, _distance_of(out, distance), device, batch_size, encoder)
    _begin(out, opened, projector, settings, class_name)
    results = _result_files(files, images, out)
    label = None if class_name is None else classes.index(class_name)
    unreadable: list[tuple[Path, str]] = []
    try:
        _run(projector, settings, files, results, label, video, unreadable)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; run the same command again to continue {out}", err=True)
        raise typer.Exit(130) from None
    for path, reason in unreadable:
        typer.echo(f"{path}: {reason}", err=True)
    _summarise(out, files, results, {path for path, _ in unreadable}, opened)
    if unreadable:
        raise DataError(f"{len(unreadable):,} of {len(files):,} images could not be read and are left out")


def _schedule(
    name: str, steps: int | None, space: Space | None, start: Start | None, patience: int | None, encoder: bool
) -> Schedule:
    from dermis.projection.schedule import SCHEDULES

    changes: dict[str, Any] = {"steps": steps, "space": space, "start": start, "patience": patience}
    if start is None and name == "fast" and encoder:
        changes["start"] = "encoder"
    return replace(SCHEDULES[name], **{key: value for key, value in changes.items() if value is not None})


def _distance_of(out: Path, distance: str) -> str:
    """Return the distance that is named, or for auto that of the run in the folder if there is one."""
    try:
        return str(json.loads((out / SETTINGS).read_text())["distance"]) if distance == "auto" else distance
    except (OSError, ValueError, KeyError):
        return distance


def _projector(
    make: type[ImageProjector], bundle: Bundle, distance: str, device: str, batch_size: int | None, encoder: Any
) -> ImageProjector:
    options = {"device": device, "batch_size": batch_size, "encode": encoder}
    if distance != "auto":
        return make(bundle, distance=distance, **options)
    try:
        return make(bundle, distance="vgg16", **options)
    except DermisError as error:
        typer.echo(f"using distance lite0, as vgg16 is not available: {error}", err=True)
        return make(bundle, distance="lite0", **options)


def _begin(out: Path, bundle: Bundle, projector: ImageProjector, schedule: Schedule, class_name: str | None) -> None:
    """Mark the folder with these settings; StorageError if it has other settings or other files."""
    settings: dict[str, Any] = {"bundle": bundle.digest, "distance": projector.distance, "schedule": asdict(schedule)}
    if class_name is not None:  # without it each image has the class whose mean image is nearest
        settings["class"] = class_name
    mark = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if mark.exists():
            if json.loads(mark.read_text()) != settings:
                raise StorageError(f"{out}: has projections with other settings; choose another --out or remove it")
        elif any(out.iterdir()):
            raise StorageError(f"{out}: is not empty and has no projections; choose another --out")
        else:
            write_file(mark, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    except (OSError, ValueError) as error:
        raise StorageError(f"{mark}: cannot be read or written ({error}); choose another --out") from None


def _result_files(files: Sequence[Path], images: Sequence[Path], out: Path) -> list[Path]:
    """Result file of each image: below `out`, in the same place as the image below its folder of --images."""
    results: list[Path] = []
    for file in files:
        root = next((path for path in images if path.is_dir() and file.is_relative_to(path)), file.parent)
        relative = file.relative_to(root)
        results.append(out / relative.with_name(f"{relative.stem}.safetensors"))
    if len(set(results)) < len(results):
        repeated = min(each for each in results if results.count(each) > 1)
        raise RequestError("--images", f"several files are called {repeated.stem}; project their folders one by one")
    return results


def _run(
    projector: ImageProjector,
    schedule: Schedule,
    files: Sequence[Path],
    results: Sequence[Path],
    label: int | None,
    video: VideoFormat | None,
    unreadable: list[tuple[Path, str]],
) -> None:
    from tqdm import tqdm

    from dermis.image_metadata import origin_of
    from dermis.image_reading import ImageError, read_training_image
    from dermis.imaging import encode
    from dermis.projection.projector import Target
    from dermis.projection.result import to_bytes
    from dermis.video import encode_video

    size = projector.bundle.generator.img_resolution
    waiting = [place for place in range(len(files)) if not _is_done(results[place], files[place])]
    begun: list[tuple[int, str]] = []  # place and file hash of each target

    def targets() -> Iterator[Target]:
        for place in waiting:
            try:
                data = files[place].read_bytes()
                image = read_training_image(data, size=size)
            except (ImageError, OSError) as error:
                unreadable.append((files[place], getattr(error, "strerror", None) or str(error)))
                bar.update()
                continue
            begun.append((place, hashlib.sha256(data).hexdigest()))
            yield Target(image, label)

    with tqdm(total=len(files), initial=len(files) - len(waiting), unit="img", disable=None) as bar:

        def show(progress: Sequence[tuple[int, int]]) -> None:
            bar.set_postfix_str(f"step {min((step for _, step in progress), default=0)} of {schedule.steps}")

        every = max(1, schedule.steps // _FRAMES) if video else None
        for number, projection in projector.project(targets(), schedule, on_step=show, frame_every=every):
            place, file_hash = begun[number]
            origin = {"bundle": projector.bundle.digest, "file": files[place].name, "sha256": file_hash}
            results[place].parent.mkdir(parents=True, exist_ok=True)
            made_by = origin_of(projector.bundle, "compositeWithTrainedAlgorithmicMedia")
            picture = encode(projection.image, origin=made_by)
            write_file(results[place].with_suffix(".png"), picture)
            if projection.frames is not None and video is not None:
                frames = np.concatenate([projection.frames, np.repeat(projection.frames[-1:], 10, axis=0)])
                write_file(results[place].with_suffix(f".{video}"), encode_video(frames, video, origin=made_by))
            write_file(results[place], to_bytes(projection, origin))  # written last: it marks the image as done
            bar.update()


def _is_done(result: Path, file: Path) -> bool:
    """Check whether there is a complete result for the content of this file."""
    try:
        return _read(result)[1].get("sha256") == hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, DataError):
        return False


def _read(result: Path) -> tuple[Projection, dict[str, str]]:
    from dermis.projection.result import from_bytes

    return from_bytes(result.read_bytes(), str(result))


def _summarise(out: Path, files: Sequence[Path], results: Sequence[Path], left_out: set[Path], bundle: Bundle) -> None:
    """Write the table and the sheet of pairs, and print a summary."""
    from dermis.image_metadata import origin_of
    from dermis.image_reading import read_training_image
    from dermis.imaging import contact_sheet, encode
    from dermis.projection.result import fields_of

    size = bundle.generator.img_resolution
    rows: list[dict[str, Any]] = []
    pairs: list[Images] = []
    for file, result in zip(files, results, strict=True):
        if file in left_out:
            continue
        projection, _ = _read(result)
        rows.append({"file": str(file), "result": result.relative_to(out).as_posix(), **fields_of(projection)})
        if len(pairs) < 2 * _PAIRS:
            pairs += [read_training_image(file.read_bytes(), size=size), projection.image]
    if not rows:
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / TABLE, text.getvalue().encode())
    write_file(
        out / PAIRS, encode(contact_sheet(np.stack(pairs), columns=8), origin=origin_of(bundle, "compositeSynthetic"))
    )
    distances = np.array([row["distance"] for row in rows])
    name, errors = rows[0]["distance_name"], np.mean([row["pixel_error"] for row in rows])
    typer.echo(
        f"{out}: {len(rows):,} projections, {name} distance {distances.mean():.3f} "
        f"({distances.min():.3f} to {distances.max():.3f}), pixel error {errors:.1f} of 255"
    )
