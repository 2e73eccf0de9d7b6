"""`dermis explain heat-maps`: an image set to one page of heat maps, edge cases first."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from commands.classify import image_files, threshold_value
from dermis.errors import DataError, RequestError, StorageError
from dermis.files import write_file

if TYPE_CHECKING:
    from dermis.bundle.classifier import ClassifierDescription
    from dermis.explain.attribution import Attribution, Explainer, Method
    from dermis.explain.page import Entry
    from dermis.imaging import Images
    from training.data.sources import Record

_PAGE, _NUMBERS, _PICTURES = "index.html", "attributions", "heat-maps"
_CHUNK = 64  # images in memory at a time, at the classifier's size
_SAME = 2e-3  # a probability of another classifier is farther away; other machines round otherwise


@dataclass(frozen=True)
class _Case:
    """One image: how to read it, its true class ("" if unknown), and its probability once it is known."""

    name: str
    read: Callable[[], bytes]
    label: str
    probability: float = math.nan


def heat_maps(
    images: Annotated[list[Path] | None, typer.Argument(help="Image files, or folders of them.")] = None,
    classifier: Annotated[
        str, typer.Option(help="Bundle with a classifier, or a classifier's folder, or fsspec URL.")
    ] = "bundles/demo",
    out: Annotated[Path, typer.Option(help="Folder of the page. One that was begun is continued.")] = Path("heat-maps"),
    method: Annotated[str, typer.Option(help="xrai, or integrated-gradients.")] = "xrai",
    data: Annotated[
        Path | None, typer.Option(help="Instead of images: a source with classes, as `dermis data` reads it.")
    ] = None,
    metadata: Annotated[Path | None, typer.Option(help="The CSV of --data, such as one part of a split.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="predictions.csv of the classifier's training: its test part, not scored again.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images on the page; edge cases first.")] = 24,
    threshold: Annotated[str, typer.Option(help="Name of one of the classifier's thresholds, or 0 to 1.")] = "default",
    pictures: Annotated[bool, typer.Option("--pictures", help="Also write each heat map as a PNG.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Write a page of heat maps: what of each image speaks for the positive class, and what against it.

    Mistakes come first where the true classes are known (--data), then the images nearest to the threshold. Ctrl-C loses at
    most one heat map; the same command goes on. The page shows the images. Not a medical device.
    """
    from tqdm import tqdm

    from dermis.bundle.classifier import NOTICE
    from dermis.classifier.onnx_session import find_classifier
    from dermis.explain.attribution import METHODS, Explainer, require_packages

    if method not in METHODS:
        raise RequestError("--method", f"{method!r} is none of {', '.join(METHODS)}")
    if bool(images) == (data is not None):
        raise RequestError("IMAGES", "give image files or folders, or --data FOLDER, and not both")
    if data is None and (predictions or metadata):
        raise RequestError("--predictions" if predictions else "--metadata", "needs --data, the folder with the images")
    require_packages()
    described, _ = find_classifier(classifier)
    limit = described.threshold(threshold_value(threshold))
    _check_out(out, classifier)

    cases = _of_files(images) if images else _of_source(data, metadata, predictions, described)  # type: ignore[arg-type]
    bad: list[tuple[str, str]] = []
    if predictions is None:
        cases = _scored(cases, classifier, described.input.size, bad)
    chosen = sorted(cases, key=lambda case: _edge(case, described, limit))[:count]
    explainer: Explainer | None = None
    entries = []
    for case in tqdm(chosen, unit="img", disable=None):
        image = _read(case, described.input.size, bad)
        if image is None:
            continue
        kept = out / _NUMBERS / f"{_file_name(case.name)}-{_key(described, method, image)}.npz"
        found = _load(kept, method, image)
        if found is None:
            explainer = explainer or Explainer(classifier, device=device)
            found = explainer.attribute(image, method)
            _save(kept, found)
        entries.append(_entry(case, described, limit, found, predictions))
    if not entries:
        raise DataError("no image could be read; " + "; ".join(f"{name}: {why}" for name, why in bad[:3]))
    if pictures:
        _write_pictures(out / _PICTURES, entries)
    from dermis.explain.page import heat_map_page

    page = heat_map_page(described, method, (threshold, limit), entries, len(cases))
    write_file(out / _PAGE, page.encode())
    for name, why in bad:
        typer.echo(f"{name}: {why}", err=True)
    typer.echo(f"{out / _PAGE}: {len(entries):,} heat maps; the page shows the images", err=True)
    typer.echo(NOTICE, err=True)
    if bad:
        raise DataError(f"{len(bad):,} images could not be read and are left out")


def _of_files(images: Sequence[Path]) -> list[_Case]:
    """Called by their paths below the folder that holds them all: where that is concerns no reader of the page."""
    files = image_files(images)
    common = os.path.commonpath([path.absolute().parent for path in files])
    return [_Case(path.absolute().relative_to(common).as_posix(), path.read_bytes, "") for path in files]


def _of_source(
    data: Path, metadata: Path | None, predictions: Path | None, described: ClassifierDescription
) -> list[_Case]:
    """The images of a source under the classifier's class names; with `predictions` those of its test part, scored."""
    from training.data.sources import read_source

    source = read_source(data, metadata=metadata, binary=True)
    scores = None if predictions is None else _read_predictions(predictions)
    if scores is not None:
        source = source.select(scores)
    records = [record for record in source.records if record.image is not None]
    if not records:
        raise DataError(f"{data}: has no images")
    unknown = {record.class_name for record in records} - {*described.class_names, ""}
    if unknown:
        raise DataError(
            f"{data}: has the class {min(unknown)}; the classifier tells {' from '.join(described.class_names)}"
        )
    return [_of_record(record, scores[record.id] if scores else math.nan) for record in records]


def _of_record(record: Record, probability: float) -> _Case:
    return _Case(record.id, record.read_bytes, record.class_name, probability)


def _read_predictions(path: Path) -> dict[str, float]:
    """The probability of each image of the test part."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            found = {row["isic_id"]: float(row["probability"]) for row in rows if row["part"] == "test"}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--predictions: {path}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"--predictions: {path}: needs isic_id, part and probability, as `dermis train classifier` writes them"
        ) from None
    if not found:
        raise DataError(f"--predictions: {path}: has no image of the part test")
    return found


def _scored(cases: Sequence[_Case], classifier: str, size: int, bad: list[tuple[str, str]]) -> list[_Case]:
    """The cases that can be read, each with its probability."""
    from tqdm import tqdm

    from dermis.classifier.onnx_session import Classifier

    scored: list[_Case] = []
    # On the CPU: as exact as a GPU, and quick beside the heat maps.
    with Classifier(classifier, device="cpu") as session, tqdm(total=len(cases), unit="img", disable=None) as bar:
        for start in range(0, len(cases), _CHUNK):
            chunk = cases[start : start + _CHUNK]
            read = [(case, image) for case in chunk if (image := _read(case, size, bad)) is not None]
            scores = session.classify([image for _, image in read], features=False)
            pairs = zip(read, scores.probabilities.tolist(), strict=True)
            scored += [replace(case, probability=probability) for (case, _), probability in pairs]
            bar.update(len(chunk))
    return scored


def _read(case: _Case, size: int, bad: list[tuple[str, str]]) -> Images | None:
    """The image at the classifier's size, or None; the reason then goes to `bad`."""
    from dermis.image_reading import ImageError, read_training_image

    try:
        return read_training_image(case.read(), size=size)
    except (ImageError, DataError, OSError) as error:
        bad.append((case.name, getattr(error, "strerror", None) or str(error)))
        return None


def _calibrated(probability: float, described: ClassifierDescription) -> float:
    from dermis.classifier.scores import sigmoid

    return float(sigmoid(np.array(_logit(probability) / described.temperature)))


def _logit(probability: float) -> float:
    inside = min(max(probability, 1e-9), 1 - 1e-9)
    return math.log(inside / (1 - inside))


def _edge(case: _Case, described: ClassifierDescription, limit: float) -> tuple[bool, float, str]:
    """Sorts mistakes before the others, sure mistakes before unsure ones, and the others by nearness to the threshold."""
    calibrated = _calibrated(case.probability, described)
    distance = abs(_logit(calibrated) - _logit(limit))
    wrong = bool(case.label) and described.class_at(calibrated, limit) != case.label
    return (not wrong, -distance if wrong else distance, case.name)


def _entry(
    case: _Case, described: ClassifierDescription, limit: float, found: Attribution, predictions: Path | None
) -> Entry:
    """What the page says of one image, by the logit that the heat map explains."""
    from dermis.classifier.scores import scores_of
    from dermis.explain.page import Entry

    scores = scores_of([found.logit], described.temperature)
    probability, calibrated = float(scores.probabilities[0]), float(scores.calibrated[0])
    if abs(probability - case.probability) > _SAME:
        where = predictions or "the classifier"
        raise DataError(
            f"{where}: gives {case.name} the probability {case.probability:.4f}, this classifier gives it {probability:.4f};"
            " give the predictions of this classifier, and the images that it was measured on"
        )
    name = described.class_at(calibrated, limit)
    return Entry(case.name, probability, calibrated, name, case.label or None, found)


def _key(described: ClassifierDescription, method: str, image: Images) -> str:
    """What an attribution depends on."""
    from dermis.explain.attribution import STEPS, VERSION

    told = f"{described.digest} {method} {VERSION} {STEPS} {image.shape}".encode()
    return hashlib.sha256(told + image.tobytes()).hexdigest()[:16]


def _file_name(name: str) -> str:
    """The last part of a name, of characters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", Path(name).stem)[:80] or "image"


def _load(path: Path, method: Method, image: Images) -> Attribution | None:
    """What an earlier run left, or None."""
    from dermis.explain.attribution import Attribution

    try:
        with np.load(path, allow_pickle=False) as kept:
            values, logit, baseline = kept["values"], float(kept["logit"]), float(kept["baseline"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if values.shape != image.shape[:2] or values.dtype != np.float32:
        return None
    return Attribution(method, image, values, logit, baseline)


def _save(path: Path, found: Attribution) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, values=found.values, logit=found.logit, baseline=found.baseline)
    write_file(path, buffer.getvalue())


def _write_pictures(folder: Path, entries: Sequence[Entry]) -> None:
    """One PNG an image, in the order of the page; those of an earlier run go."""
    from dermis.explain.rendering import LEAST_SIDE, heat_map, to_png

    with suppress(OSError):
        for old in folder.glob("[0-9][0-9][0-9][0-9]-*.png"):
            old.unlink()
    for place, entry in enumerate(entries):
        side = max(LEAST_SIDE, len(entry.attribution.image))
        write_file(folder / f"{place:04d}-{_file_name(entry.name)}.png", to_png(heat_map(entry.attribution, side)))


def _check_out(out: Path, classifier: str) -> None:
    """Refuse, before anything is computed, a folder that is something else's, or lies in a bundle: bundles are shared."""
    if "://" not in classifier and out.resolve().is_relative_to(Path(classifier).resolve()):
        raise StorageError(f"--out: {out} lies inside {classifier}; the page shows images, keep it apart")
    try:
        others = {path.name for path in out.iterdir()} - {_PAGE, _NUMBERS, _PICTURES}
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"--out: {out}: {error.strerror}") from None
    if others:
        raise StorageError(f"--out: {out} has other files in it, such as {min(others)}; name a new folder")
