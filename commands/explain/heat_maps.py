"""`dermis explain heat-maps`: a page with heat maps of images, edge cases first."""

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
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer

from commands.classify import image_files, threshold_value
from commands.options import (
    DEMO_BUNDLE,
    ClassifierOption,
    DeviceOption,
    MetadataOption,
    OptionalDataOption,
    OutFolderOption,
    ThresholdOption,
)
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
_SAME = 2e-3  # rounding differs less between machines; probabilities of another classifier differ more


@dataclass(frozen=True)
class _Case:
    """One image: how to read it, its true class ("" if unknown), and its probability (NaN until it is known)."""

    name: str
    read: Callable[[], bytes]
    label: str
    probability: float = math.nan


def heat_maps(
    images: Annotated[list[Path] | None, typer.Argument(help="Image files, or folders of them.")] = None,
    classifier: ClassifierOption = DEMO_BUNDLE,
    out: OutFolderOption = Path("heat-maps"),
    method: Annotated[
        Literal["xrai", "integrated-gradients"], typer.Option(help="How heat maps are computed.")
    ] = "xrai",
    data: OptionalDataOption = None,
    metadata: MetadataOption = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="predictions.csv of the classifier's training: use its test part, with its probabilities."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images on the page; edge cases first.")] = 24,
    threshold: ThresholdOption = "default",
    pictures: Annotated[bool, typer.Option("--pictures", help="Also write each heat map as a PNG.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Write a page of heat maps: which parts of an image raise the probability of the positive class, and which lower it.

    Images are files, or those of --data, whose true classes are known: then wrong predictions come first, followed by the
    images nearest to the threshold. Ctrl-C loses at most one heat map; run the same command again to continue. The page
    shows the images. Not a medical device.
    """
    from tqdm import tqdm

    from dermis.bundle.classifier import NOTICE
    from dermis.classifier.onnx_session import find_classifier
    from dermis.explain.attribution import Explainer, require_packages

    if bool(images) == (data is not None):
        raise RequestError("IMAGES", "give image files or folders, or --data FOLDER, and not both")
    if data is None and (predictions or metadata):
        raise RequestError("--predictions" if predictions else "--metadata", "needs --data, the folder with the images")
    require_packages()
    description, _ = find_classifier(classifier)
    limit = description.threshold(threshold_value(threshold))
    _check_out(out, classifier)

    files = images or []
    cases = _cases_of_files(files) if data is None else _cases_of_source(data, metadata, predictions, description)
    unreadable: list[tuple[str, str]] = []
    if predictions is None:
        cases = _scored(cases, classifier, description.input.size, unreadable)
    chosen = sorted(cases, key=lambda case: _edge_order(case, description, limit))[:count]
    explainer: Explainer | None = None
    entries = []
    for case in tqdm(chosen, unit="img", disable=None):
        image = _read(case, description.input.size, unreadable)
        if image is None:
            continue
        file = out / _NUMBERS / f"{_file_name(case.name)}-{_key(description, method, image)}.npz"
        attribution = _load(file, method, image)
        if attribution is None:
            explainer = explainer or Explainer(classifier, device=device)
            attribution = explainer.attribute(image, method)
            _save(file, attribution)
        entries.append(_entry(case, description, limit, attribution, predictions))
    if not entries:
        raise DataError("no image could be read; " + "; ".join(f"{name}: {reason}" for name, reason in unreadable[:3]))
    if pictures:
        _write_pictures(out / _PICTURES, entries)
    from dermis.explain.page import heat_map_page

    page = heat_map_page(description, method, (threshold, limit), entries, len(cases))
    write_file(out / _PAGE, page.encode())
    for name, reason in unreadable:
        typer.echo(f"{name}: {reason}", err=True)
    typer.echo(f"{out / _PAGE}: {len(entries):,} heat maps; the page shows the images", err=True)
    typer.echo(NOTICE, err=True)
    if unreadable:
        raise DataError(f"{len(unreadable):,} images could not be read and are left out")


def _cases_of_files(images: Sequence[Path]) -> list[_Case]:
    """Name files by their paths below their common folder, so that the page does not contain absolute paths."""
    files = image_files(images)
    common = os.path.commonpath([path.absolute().parent for path in files])
    return [_Case(path.absolute().relative_to(common).as_posix(), path.read_bytes, "") for path in files]


def _cases_of_source(
    data: Path, metadata: Path | None, predictions: Path | None, description: ClassifierDescription
) -> list[_Case]:
    """Images of a source with the classifier's class names; with `predictions` those of the test part, with probabilities."""
    from training.data.sources import read_source

    source = read_source(data, metadata=metadata, binary=True)
    scores = None if predictions is None else _read_predictions(predictions)
    if scores is not None:
        source = source.select(scores)
    records = [record for record in source.records if record.image is not None]
    if not records:
        raise DataError(f"{data}: has no images")
    unknown = {record.class_name for record in records} - {*description.class_names, ""}
    if unknown:
        raise DataError(
            f"{data}: has the class {min(unknown)}; the classifier has {' and '.join(description.class_names)}"
        )
    return [_case_of_record(record, scores[record.id] if scores else math.nan) for record in records]


def _case_of_record(record: Record, probability: float) -> _Case:
    return _Case(record.id, record.read_bytes, record.class_name, probability)


def _read_predictions(path: Path) -> dict[str, float]:
    """Read the probability of each image of the test part."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            probabilities = {row["isic_id"]: float(row["probability"]) for row in rows if row["part"] == "test"}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--predictions: {path}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"--predictions: {path}: needs isic_id, part and probability, as `dermis train classifier` writes them"
        ) from None
    if not probabilities:
        raise DataError(f"--predictions: {path}: has no image of the part test")
    return probabilities


def _scored(cases: Sequence[_Case], classifier: str, size: int, unreadable: list[tuple[str, str]]) -> list[_Case]:
    """Classify the cases that can be read; the others are added to `unreadable`."""
    from tqdm import tqdm

    from dermis.classifier.onnx_session import Classifier

    scored: list[_Case] = []
    # On the CPU: it is as exact as a GPU, and fast compared with the heat maps.
    with Classifier(classifier, device="cpu") as session, tqdm(total=len(cases), unit="img", disable=None) as bar:
        for start in range(0, len(cases), _CHUNK):
            chunk = cases[start : start + _CHUNK]
            read = [(case, image) for case in chunk if (image := _read(case, size, unreadable)) is not None]
            scores = session.classify([image for _, image in read], features=False)
            pairs = zip(read, scores.probabilities.tolist(), strict=True)
            scored += [replace(case, probability=probability) for (case, _), probability in pairs]
            bar.update(len(chunk))
    return scored


def _read(case: _Case, size: int, unreadable: list[tuple[str, str]]) -> Images | None:
    """Read an image at the classifier's size; if that fails, add the reason to `unreadable` and return None."""
    from dermis.image_reading import ImageError, read_training_image

    try:
        return read_training_image(case.read(), size=size)
    except (ImageError, DataError, OSError) as error:
        unreadable.append((case.name, getattr(error, "strerror", None) or str(error)))
        return None


def _calibrated(probability: float, description: ClassifierDescription) -> float:
    from dermis.classifier.scores import sigmoid

    return float(sigmoid(np.array(_logit(probability) / description.temperature)))


def _logit(probability: float) -> float:
    inside = min(max(probability, 1e-9), 1 - 1e-9)
    return math.log(inside / (1 - inside))


def _edge_order(case: _Case, description: ClassifierDescription, limit: float) -> tuple[bool, float, str]:
    """Sort key: wrong predictions first, the most certain ones before others; then by distance from the threshold."""
    calibrated = _calibrated(case.probability, description)
    distance = abs(_logit(calibrated) - _logit(limit))
    wrong = bool(case.label) and description.class_at(calibrated, limit) != case.label
    return (not wrong, -distance if wrong else distance, case.name)


def _entry(
    case: _Case, description: ClassifierDescription, limit: float, attribution: Attribution, predictions: Path | None
) -> Entry:
    """Entry of the page for one image, with the probability of the logit that the heat map explains."""
    from dermis.classifier.scores import scores_of
    from dermis.explain.page import Entry

    scores = scores_of([attribution.logit], description.temperature)
    probability, calibrated = float(scores.probabilities[0]), float(scores.calibrated[0])
    if abs(probability - case.probability) > _SAME:
        where = predictions or "the classifier"
        raise DataError(
            f"{where}: gives {case.name} the probability {case.probability:.4f}, this classifier gives it {probability:.4f};"
            " give the predictions of this classifier, and the images that it was measured on"
        )
    name = description.class_at(calibrated, limit)
    return Entry(case.name, probability, calibrated, name, case.label or None, attribution)


def _key(description: ClassifierDescription, method: str, image: Images) -> str:
    """Hash of everything that an attribution depends on."""
    from dermis.explain.attribution import STEPS, VERSION

    options = f"{description.digest} {method} {VERSION} {STEPS} {image.shape}".encode()
    return hashlib.sha256(options + image.tobytes()).hexdigest()[:16]


def _file_name(name: str) -> str:
    """Last part of a name, limited to characters that every file system accepts."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", Path(name).stem)[:80] or "image"


def _load(path: Path, method: Method, image: Images) -> Attribution | None:
    """Load the attribution of an earlier run; None if there is none or it is damaged."""
    from dermis.explain.attribution import Attribution

    try:
        with np.load(path, allow_pickle=False) as kept:
            values, logit, baseline = kept["values"], float(kept["logit"]), float(kept["baseline"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if values.shape != image.shape[:2] or values.dtype != np.float32:
        return None
    return Attribution(method, image, values, logit, baseline)


def _save(path: Path, attribution: Attribution) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, values=attribution.values, logit=attribution.logit, baseline=attribution.baseline)
    write_file(path, buffer.getvalue())


def _write_pictures(folder: Path, entries: Sequence[Entry]) -> None:
    """Write one PNG for each image, in the order of the page, and remove those of an earlier run."""
    from dermis.explain.rendering import MIN_SIDE, heat_map, to_png

    with suppress(OSError):
        for old in folder.glob("[0-9][0-9][0-9][0-9]-*.png"):
            old.unlink()
    for place, entry in enumerate(entries):
        side = max(MIN_SIDE, len(entry.attribution.image))
        write_file(folder / f"{place:04d}-{_file_name(entry.name)}.png", to_png(heat_map(entry.attribution, side)))


def _check_out(out: Path, classifier: str) -> None:
    """Refuse a folder with other files, and a folder inside a bundle, since bundles are shared."""
    if "://" not in classifier and out.resolve().is_relative_to(Path(classifier).resolve()):
        raise StorageError(
            f"--out: {out} lies inside {classifier}; the page shows images, so write it outside of the bundle"
        )
    try:
        others = {path.name for path in out.iterdir()} - {_PAGE, _NUMBERS, _PICTURES}
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"--out: {out}: {error.strerror}") from None
    if others:
        raise StorageError(f"--out: {out} has other files in it, such as {min(others)}; choose a new folder")
