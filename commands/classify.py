"""`dermis classify`: classify image files without a service."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.options import ClassifierOption, DeviceOption, ThreadsOption, ThresholdOption
from dermis.errors import DataError, RequestError
from dermis.files import write_file

if TYPE_CHECKING:
    from dermis.classifier.onnx_session import Classifier
    from dermis.image_reading import ImageError
    from dermis.imaging import Images

_COLUMNS = ("file", "probability", "calibrated", "class")
_CHUNK = 64  # images in memory at a time, at the classifier's size


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    classifier: ClassifierOption,
    out: Annotated[Path | None, typer.Option(help="File to write, .csv or .json; default: CSV on stdout.")] = None,
    threshold: ThresholdOption = "default",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Score images: probability, calibrated probability and class. Not a medical device.

    Images that cannot be read are named and left out, and the exit status is 1.
    """
    from tqdm import tqdm

    from dermis.bundle.classifier import NOTICE
    from dermis.classifier.onnx_session import Classifier
    from dermis.cpus import available_cpus

    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise RequestError("--out", f"{out.name} must end in .csv or .json")
    files = image_files(images)
    rows: list[dict[str, Any]] = []
    unreadable: list[tuple[Path, str]] = []
    with Classifier(classifier, device=device, threads=threads) as session:
        limit = session.description.threshold(threshold_value(threshold))
        with (
            ThreadPoolExecutor(threads or available_cpus()) as pool,
            tqdm(total=len(files), unit="img", disable=None) as bar,
        ):
            for start in range(0, len(files), _CHUNK):
                chunk = files[start : start + _CHUNK]
                rows += _scores(session, limit, chunk, pool, unreadable)
                bar.update(len(chunk))
        document = {
            "classifier": session.description.digest,
            "positive_class": session.description.positive_class,
            "threshold": {"name": threshold if threshold in session.description.thresholds else None, "value": limit},
            "data": rows,
            "notice": NOTICE,
        }
    for path, reason in unreadable:
        typer.echo(f"{path}: {reason}", err=True)
    if out is None:
        typer.echo(_csv(rows), nl=False)
    else:
        is_json = out.suffix.lower() == ".json"
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n" if is_json else _csv(rows)
        write_file(out, text.encode())
        typer.echo(f"{out}: {len(rows):,} images, {document['positive_class']} from {limit:g} calibrated", err=True)
    typer.echo(NOTICE, err=True)
    if unreadable:
        raise DataError(f"{len(unreadable):,} of {len(files):,} images could not be read and are left out")


def image_files(paths: Sequence[Path]) -> list[Path]:
    """List image files, each once; a folder stands for the images below it, in order of their names.

    Files below a folder that look like images but cannot be read are named on stderr.
    """
    from training.data.files import list_files

    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        listing = list_files(path)
        for name, reason in listing.unreadable.items():
            typer.echo(f"{path / name}: left out: {reason}", err=True)
        if not listing.images:
            raise DataError(f"{path}: has no images (PNG, JPEG, WebP, TIFF, ...)")
        files += [file.path for file in listing.images.values()]
    return list(dict.fromkeys(files))


def _scores(
    session: Classifier,
    limit: float,
    files: Sequence[Path],
    pool: ThreadPoolExecutor,
    unreadable: list[tuple[Path, str]],
) -> Iterator[dict[str, Any]]:
    """Classify the files that can be read and yield their rows; the others are added to `unreadable`."""
    description = session.description

    def read(path: Path) -> Images | ImageError | OSError:
        from dermis.image_reading import ImageError, read_training_image

        try:
            return read_training_image(path.read_bytes(), size=description.input.size)
        except (ImageError, OSError) as error:
            return error

    paths: list[Path] = []
    inputs: list[Images] = []
    for path, image in zip(files, pool.map(read, files), strict=True):
        if isinstance(image, Exception):
            unreadable.append((path, getattr(image, "strerror", None) or str(image)))
        else:
            paths.append(path)
            inputs.append(image)
    scores = session.classify(inputs, features=False)
    pairs = zip(paths, scores.probabilities.tolist(), scores.calibrated.tolist(), strict=True)
    for path, probability, calibrated in pairs:
        class_name = description.class_at(calibrated, limit)
        yield dict(zip(_COLUMNS, (str(path), probability, calibrated, class_name), strict=True))


def threshold_value(text: str) -> str | float:
    """Parse `--threshold`: a number, or the name of a threshold."""
    try:
        return float(text)
    except ValueError:
        return text


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
