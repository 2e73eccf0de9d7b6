"""`dermis project`: real images to latents, thousands of them, stopped and gone on with at will."""

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
from dermis.errors import DataError, DermisError, RequestError, StorageError
from dermis.files import write_file

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.imaging import Images
    from dermis.projection.projector import Projector, Target
    from dermis.projection.result import Projection
    from dermis.projection.schedule import Schedule
    from dermis.video import VideoFormat

SETTINGS, TABLE, PAIRS = "projections.json", "projections.csv", "pairs.png"
_COLUMNS = ("file", "result", "distance", "distance_name", "pixel_error", "steps", "start", "space")
_PAIRS = 32
_FRAMES = 40


def project(
    images: Annotated[list[Path], typer.Option(help="Image file, or folder of them; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder of the results. One that was begun is continued.")],
    bundle: Annotated[str, typer.Option(help="Bundle folder or fsspec URL.")] = "bundles/demo",
    schedule: Annotated[str, typer.Option(help="fast, or official (StyleGAN2's: 1,000 steps in w).")] = "fast",
    steps: Annotated[int | None, typer.Option(help="Default: as the schedule has it.")] = None,
    space: Annotated[str | None, typer.Option(help="w or w+. Default: as the schedule has it.")] = None,
    start: Annotated[
        str | None, typer.Option(help="mean or encoder. Default of fast: encoder, where the bundle has one.")
    ] = None,
    patience: Annotated[int | None, typer.Option(help="End an image early after so many steps without gain.")] = None,
    distance: Annotated[
        str, typer.Option(help="vgg16 (LPIPS), lite0, or auto: vgg16 where its weights can be had, else lite0.")
    ] = "auto",
    class_name: Annotated[
        str | None, typer.Option("--class", help="Of all images. Default: for each the class whose mean is nearest.")
    ] = None,
    video: Annotated[str | None, typer.Option(help="gif or mp4: also a video of each image's way.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in work at once. Default 8 on a CPU, 32 on a GPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Find the latents whose images come nearest to real ones. Stopped at any point, the same command goes on.

    Each image gets a .safetensors file (latents, image, distances) and a .png; at the end there are projections.csv and
    pairs.png, the first images beside their projections. Images that cannot be read are named and left out, and the exit
    status is 1.
    """
    from dermis.bundle import open_bundle
    from dermis.dataset.request import classes_of
    from dermis.projection.encoder import load_encoder
    from dermis.projection.projector import Projector

    if video not in (None, "gif", "mp4"):
        raise RequestError("--video", f"{video!r} is none of gif, mp4")
    opened = open_bundle(bundle)
    classes = classes_of(opened)
    if class_name is not None and class_name not in classes:
        raise RequestError("--class", f"{class_name!r} is unknown; this bundle has {', '.join(classes)}")
    encoder = load_encoder(opened, device=device)
    wanted = _schedule(schedule, steps, space, start, patience, encoder is not None)
    files = image_files(images)
    projector = _projector(Projector, opened, _distance_of(out, distance), device, batch_size, encoder)
    _begin(out, opened, projector, wanted)
    results = _names(files, images, out)
    label = None if class_name is None else classes.index(class_name)
    bad: list[tuple[Path, str]] = []
    try:
        _run(projector, wanted, files, results, label, video, bad)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; the same command goes on with {out}", err=True)
        raise typer.Exit(130) from None
    for path, why in bad:
        typer.echo(f"{path}: {why}", err=True)
    _summarise(out, files, results, {path for path, _ in bad}, opened.generator.img_resolution)
    if bad:
        raise DataError(f"{len(bad):,} of {len(files):,} images could not be read and are left out")


def _schedule(
    name: str, steps: int | None, space: str | None, start: str | None, patience: int | None, encoder: bool
) -> Schedule:
    from dermis.projection.schedule import SCHEDULES

    if name not in SCHEDULES:
        raise RequestError("--schedule", f"{name!r} is none of {', '.join(SCHEDULES)}")
    changes: dict[str, Any] = {"steps": steps, "space": space, "start": start, "patience": patience}
    if start is None and name == "fast" and encoder:
        changes["start"] = "encoder"
    return replace(SCHEDULES[name], **{key: value for key, value in changes.items() if value is not None})


def _distance_of(out: Path, distance: str) -> str:
    """The name, or that of the run that is there if it is left open."""
    try:
        return str(json.loads((out / SETTINGS).read_text())["distance"]) if distance == "auto" else distance
    except (OSError, ValueError, KeyError):
        return distance


def _projector(
    make: type[Projector], bundle: Bundle, distance: str, device: str, batch_size: int | None, encoder: Any
) -> Projector:
    options = {"device": device, "batch_size": batch_size, "encode": encoder}
    if distance != "auto":
        return make(bundle, distance=distance, **options)
    try:
        return make(bundle, distance="vgg16", **options)
    except DermisError as error:
        typer.echo(f"distance lite0, as vgg16 cannot be had: {error}", err=True)
        return make(bundle, distance="lite0", **options)


def _begin(out: Path, bundle: Bundle, projector: Projector, schedule: Schedule) -> None:
    """Mark the folder as that of these settings. StorageError if it is another's."""
    settings = {"bundle": bundle.digest, "distance": projector.distance, "schedule": asdict(schedule)}
    mark = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if mark.exists():
            if json.loads(mark.read_text()) != settings:
                raise StorageError(f"{out}: holds projections by other settings; choose another --out or remove it")
        elif any(out.iterdir()):
            raise StorageError(f"{out}: is not empty and no folder of projections; choose another --out")
        else:
            write_file(mark, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    except (OSError, ValueError) as error:
        raise StorageError(f"{mark}: cannot be read or written ({error}); choose another --out") from None


def _names(files: Sequence[Path], given: Sequence[Path], out: Path) -> list[Path]:
    """Where each file's result goes: below `out` as it lies below the folder that was given."""
    names: list[Path] = []
    for file in files:
        root = next((path for path in given if path.is_dir() and file.is_relative_to(path)), file.parent)
        relative = file.relative_to(root)
        names.append(out / relative.with_name(f"{relative.stem}.safetensors"))
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise RequestError("--images", f"several files are called {min(twice).stem}; project their folders one by one")
    return names


def _run(
    projector: Projector,
    schedule: Schedule,
    files: Sequence[Path],
    results: Sequence[Path],
    label: int | None,
    video: str | None,
    bad: list[tuple[Path, str]],
) -> None:
    from tqdm import tqdm

    from dermis.image_reading import ImageError, read_training_image
    from dermis.imaging import encode
    from dermis.projection.projector import Target
    from dermis.projection.result import to_bytes
    from dermis.video import encode_video

    size = projector.bundle.generator.img_resolution
    waiting = [place for place in range(len(files)) if not _is_done(results[place], files[place])]
    begun: list[tuple[int, str]] = []  # of each target: its place, and the hash of its file

    def targets() -> Iterator[Target]:
        for place in waiting:
            try:
                data = files[place].read_bytes()
                image = read_training_image(data, size=size)
            except (ImageError, OSError) as error:
                bad.append((files[place], getattr(error, "strerror", None) or str(error)))
                bar.update()
                continue
            begun.append((place, hashlib.sha256(data).hexdigest()))
            yield Target(image, label)

    with tqdm(total=len(files), initial=len(files) - len(waiting), unit="img", disable=None) as bar:

        def show(progress: Sequence[tuple[int, int]]) -> None:
            bar.set_postfix_str(f"step {min((step for _, step in progress), default=0)} of {schedule.steps}")

        every = max(1, schedule.steps // _FRAMES) if video else None
        for number, found in projector.project(targets(), schedule, on_step=show, frame_every=every):
            place, file_hash = begun[number]
            origin = {"bundle": projector.bundle.digest, "file": files[place].name, "sha256": file_hash}
            results[place].parent.mkdir(parents=True, exist_ok=True)
            write_file(results[place].with_suffix(".png"), encode(found.image))
            if found.frames is not None:
                kind: VideoFormat = "mp4" if video == "mp4" else "gif"
                film = np.concatenate([found.frames, np.repeat(found.frames[-1:], 10, axis=0)])
                write_file(results[place].with_suffix(f".{kind}"), encode_video(film, kind))
            write_file(results[place], to_bytes(found, origin))  # the last: an image with it is done
            bar.update()


def _is_done(result: Path, file: Path) -> bool:
    """Whether there is a whole result of this very file."""
    try:
        return _read(result)[1].get("sha256") == hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, DataError):
        return False


def _read(result: Path) -> tuple[Projection, dict[str, str]]:
    from dermis.projection.result import from_bytes

    return from_bytes(result.read_bytes(), str(result))


def _summarise(out: Path, files: Sequence[Path], results: Sequence[Path], left_out: set[Path], size: int) -> None:
    """The table, the sheet of pairs, and a line on the screen."""
    from dermis.image_reading import read_training_image
    from dermis.imaging import contact_sheet, encode
    from dermis.projection.result import fields_of

    rows: list[dict[str, Any]] = []
    pairs: list[Images] = []
    for file, result in zip(files, results, strict=True):
        if file in left_out:
            continue
        found, _ = _read(result)
        rows.append({"file": str(file), "result": result.relative_to(out).as_posix(), **fields_of(found)})
        if len(pairs) < 2 * _PAIRS:
            pairs += [read_training_image(file.read_bytes(), size=size), found.image]
    if not rows:
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / TABLE, text.getvalue().encode())
    write_file(out / PAIRS, encode(contact_sheet(np.stack(pairs), columns=8)))
    distances = np.array([row["distance"] for row in rows])
    name, errors = rows[0]["distance_name"], np.mean([row["pixel_error"] for row in rows])
    typer.echo(
        f"{out}: {len(rows):,} projections, {name} distance {distances.mean():.3f} "
        f"({distances.min():.3f} to {distances.max():.3f}), pixel error {errors:.1f} of 255"
    )
