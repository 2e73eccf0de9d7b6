"""Parsers for option values of `dermis-client`, and the text that it prints."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from dermis_client._status import describe
from dermis_client._untrusted import one_line
from dermis_client.errors import InvalidRequestError
from dermis_client.folders import VerifyReport
from dermis_client.latent import AuthenticityResult, Direction, Projection
from dermis_client.models import ClassificationsResult, DatasetRecord, Model, Usage
from dermis_client.params import EditParams, SweepParams
from dermis_client.report import DatasetReport, ReportNumber


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Print the warnings of the package, which are about requests that are sent again."""
    logger, handler = logging.getLogger("dermis_client"), logging.StreamHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def parse_classes(text: str) -> dict[str, int]:
    """Parse "malignant=500,benign=500" to {"malignant": 500, "benign": 500}. Raises InvalidRequestError."""
    classes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, count = (piece.strip() for piece in part.rpartition("="))
        if not (equals and name and count.removeprefix("-").isdecimal() and count.isascii()):
            raise InvalidRequestError(
                f"--classes: {part!r} does not have the form CLASS=COUNT; write malignant=500,benign=500"
            )
        if name in classes:
            raise InvalidRequestError(f"--classes: {name} occurs twice")
        classes[name] = int(count)
    return classes


def format_of(path: Path) -> str:
    """Return Pillow's name of the format for the path's suffix. Raises InvalidRequestError."""
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    if path.suffix.lower() not in formats:
        raise InvalidRequestError(f"--grid: {path.name} must end in .png, .jpg or .webp")
    return formats[path.suffix.lower()]


def encode(image: Image.Image, path: Path) -> bytes:
    """Encode a sheet in the format of the path's suffix. Saving it writes its XMP."""
    buffer = io.BytesIO()
    image.save(buffer, format_of(path))
    return buffer.getvalue()


# Options whose names differ from the field of the API by more than dots and underscores.
_OPTIONS = {
    "classifier.keep": "keep",
    "classifier.score": "score",
    "classifier.threshold": "threshold",
    "classifier.min_probability": "min-probability",
    "classifier.max_probability": "max-probability",
    "classifier.tries": "tries",
    "privacy": "gate",
    "privacy.gate": "gate",
    "privacy.percentile": "percentile",
    "privacy.on_reject": "on-reject",
    "privacy.tries": "gate-tries",
    "privacy.detect_copies": "detect-copies",
    "edits": "edit",
    "samples": "sample",
    "projections": "projection",
    "heat_map": "method",
}
_PLAIN = (
    "classes", "seed", "model", "format", "image_format", "image_quality", "truncation_psi", "truncation_cutoff", "noise_mode",
    "shard_size", "start_index", "idempotency_key", "sweep", "threshold", "schedule", "steps", "class", "base_url", "timeout",
    "parallel", "limit", "state", "min_probability", "max_probability",
)  # fmt: skip
_FIELD = re.compile(
    r"(?:(?<=^)|(?<=; ))("
    + "|".join(re.escape(name) for name in sorted([*_OPTIONS, *_PLAIN], key=len, reverse=True))
    + r")((?:\.[\w -]+)*)(?=:)"
)
_WORD = re.compile(r"(?<![\w.-])(" + "|".join(name for name in _PLAIN if "_" in name) + r")(?![\w:])")
_FILTER = "--keep, --threshold, --min-probability, --max-probability, --tries"


def in_options(message: str) -> str:
    """Replace the API's field names in a message by options: --min-probability for classifier.min_probability."""

    def option(match: re.Match[str]) -> str:
        name, rest = match[1], match[2].removeprefix(".")
        return f"--{_OPTIONS.get(name, name).replace('_', '-')}" + (f".{rest}" if rest and name == "classes" else "")

    named = re.sub(r"^classifier(?=:)", f"the classifier ({_FILTER})", _FIELD.sub(option, message))
    return _WORD.sub(lambda match: f"--{match[1].replace('_', '-')}", named)


def usage_message(error: Exception) -> str | None:
    """Return the message of a usage error.

    Typer raises exceptions of click, or of its own copy of click, so they are recognised by their attributes.

    Returns:
        The message; "" if help has been printed; None if it is not a usage error.
    """
    format_message = getattr(error, "format_message", None)
    if not callable(format_message):
        return None
    message = str(format_message())
    if not message or "Usage:" in message:  # called without a command
        print(message)
        return ""
    message = re.sub(r"( Did you mean [^?]*\?)\1", r"\1", message)  # some versions of Typer repeat what click says
    program = getattr(getattr(error, "ctx", None), "command_path", None)
    return f"{message.rstrip('.')}; see: {program} --help" if program else message


@contextmanager
def interrupt_message(message: str) -> Iterator[None]:
    """On Ctrl-C, print `message`, which says how to continue, and exit with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(one_line(message), err=True)
        raise typer.Exit(130) from None


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Format lines with aligned columns."""
    cells = [list(header), *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def format_models(models: Sequence[Model]) -> Iterator[str]:
    """Format the list of models."""
    rows = (
        (
            f"{model.name} *" if model.default else model.name,
            f"{model.resolution or '?'}",
            ", ".join(model.classes),
            f"{model.kimg:g}" if model.kimg is not None else "?",
            model.licence or "?",
            model.digest[:12],
        )
        for model in models
    )
    return format_table(("MODEL", "PIXELS", "CLASSES", "KIMG", "LICENCE", "DIGEST"), rows)


def format_usage(usage: Usage) -> Iterator[str]:
    """Format the quotas of a tenant and their use."""

    def number(value: float | None, without: str) -> str:
        return without if value is None else f"{value:,.15g}"

    rows = (
        (
            quota.name,
            number(quota.used, "not counted"),
            number(quota.limit, "no limit"),
            number(quota.remaining, "-"),
            quota.unit,
            "-" if quota.resets_at is None or quota.limit is None else f"{quota.resets_at:%Y-%m-%d %H:%M:%S %Z}",
        )
        for quota in usage.quotas
    )
    yield f"tenant: {usage.tenant}"
    if usage.retention_days is not None:
        yield f"datasets are deleted {usage.retention_days:g} days after their end"
    yield from format_table(("QUOTA", "USED", "LIMIT", "LEFT", "UNIT", "STARTS AGAIN"), rows)


EditOption = Annotated[
    list[str] | None,
    typer.Option("--edit", help="DIRECTION=STRENGTH, or DIRECTION=STRENGTH@FIRST-LAST; can be repeated."),
]


def parse_edits(texts: Sequence[str] | None) -> list[EditParams] | None:
    """Parse the values of --edit to [{"direction", "strength", "layers"}]. Raises InvalidRequestError."""
    edits: list[EditParams] = []
    for text in texts or ():
        match = re.fullmatch(r"([^=]+)=([+-]?[0-9]*\.?[0-9]+)(?:@([0-9]+)-([0-9]+))?", text)
        if match is None:
            raise InvalidRequestError(f"--edit: {text!r} does not have the form DIRECTION=STRENGTH[@FIRST-LAST]")
        layers = None if match[3] is None else [int(match[3]), int(match[4])]
        edits.append({"direction": match[1], "strength": float(match[2]), "layers": layers})
    return edits or None


def parse_sample(text: str) -> tuple[str, int, int]:
    """Parse a value of --sample to (class, seed, index). Raises InvalidRequestError."""
    match = re.fullmatch(r"(.+):([0-9]+):([0-9]+)", text)
    if match is None:
        raise InvalidRequestError(f"--sample: {text!r} does not have the form CLASS:SEED:INDEX")
    return match[1], int(match[2]), int(match[3])


def parse_projection(text: str) -> tuple[str, int]:
    """Parse a value of --projection to (id, position of the image). Raises InvalidRequestError."""
    name, _, image = text.partition(":")
    if not name or not (image or "0").isdecimal():
        raise InvalidRequestError(f"--projection: {text!r} does not have the form ID:IMAGE")
    return name, int(image or 0)


def parse_sweep(text: str | None) -> SweepParams | None:
    """Parse the value of --sweep to {"direction", "strengths"}. Raises InvalidRequestError."""
    if text is None:
        return None
    number = r"([+-]?[0-9]*\.?[0-9]+)"
    match = re.fullmatch(rf"([^=]+)={number}:{number}:([0-9]+)", text)
    if match is None or not 2 <= int(match[4]) <= 256:
        raise InvalidRequestError(
            f"--sweep: {text!r} does not have the form DIRECTION=FROM:TO:STEPS, of 2 to 256 steps"
        )
    first, last, steps = float(match[2]), float(match[3]), int(match[4])
    strengths = [round(first + (last - first) * k / (steps - 1), 6) for k in range(steps)]
    return {"direction": match[1], "strengths": strengths}


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def parse_threshold(text: str | None) -> str | float | None:
    """Return a number if the text is one, otherwise the text, which is a name."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


_CLASSIFICATION = ("file", "probability", "calibrated", "class")


def format_classifications(result: ClassificationsResult) -> Iterator[str]:
    """Format classifications as a table, followed by the threshold and the classifier."""
    rows = ((item.name, f"{item.probability:.4f}", f"{item.calibrated:.4f}", item.class_name) for item in result)
    yield from format_table([name.upper() for name in _CLASSIFICATION], rows)
    name = f" ({result.threshold.name})" if result.threshold.name else ""
    origin = f"{result.model.name}@{result.model.digest[:12]}, classifier {result.model.classifier[:12]}"
    yield one_line(f"{result.positive_class} from {result.threshold.value:g}{name} calibrated; {origin}")


def format_classifications_csv(result: ClassificationsResult) -> Iterator[str]:
    """Format classifications as CSV."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CLASSIFICATION)
    writer.writerows((item.name, item.probability, item.calibrated, item.class_name) for item in result)
    yield buffer.getvalue().removesuffix("\n")


def format_counts(classes: Mapping[str, int]) -> str:
    """Format the number of images of each class."""
    return ",".join(f"{name}={count}" for name, count in classes.items())


def format_datasets(records: Sequence[DatasetRecord]) -> Iterator[str]:
    """Format the list of datasets."""
    rows = (
        (
            dataset.id,
            dataset.state,
            f"{dataset.progress.samples_done}/{dataset.progress.samples_total}",
            format_counts(dataset.request.classes),
            dataset.request.format,
            f"{dataset.created_at:%Y-%m-%d %H:%M}" if dataset.created_at else "?",
        )
        for dataset in records
    )
    return format_table(("DATASET", "STATE", "DONE", "CLASSES", "FORMAT", "CREATED (UTC)"), rows)


def format_dataset(record: DatasetRecord) -> Iterator[str]:
    """Format a dataset with its request."""
    done, model = record.progress, record.model
    yield f"{record.id} {record.state}"
    yield f"samples  {done.samples_done} of {done.samples_total}"
    yield f"shards   {done.shards_done} of {done.shards_total}"
    if model:
        yield f"model    {model.name}@{model.digest[:12]}"
    for name, value in record.request.model_dump(mode="json", exclude={"model"} if model else None).items():
        shown = format_counts(value) if name == "classes" else value
        yield f"{name:<9}{shown}" if len(name) < 9 else f"{name} {shown}"
    for name, moment in (
        ("created", record.created_at),
        ("started", record.started_at),
        ("finished", record.finished_at),
        ("expires", record.expires_at),
    ):
        if moment:
            yield f"{name:<9}{moment.isoformat()}"
    if record.error:
        yield f"error    {describe(record.error)}"


def format_created_dataset(record: DatasetRecord, download: Mapping[str, Any] | None) -> Iterator[str]:
    """Format the state of a dataset, and its download or the next command."""
    yield f"{record.id} {record.state}"
    if download is not None:
        yield from format_download(download)
    elif record.state == "succeeded":
        yield f"fetch it: dermis-client datasets download {record.id} --out DIR"
    elif not record.finished:
        yield f"watch it: dermis-client datasets wait {record.id}"


def format_download(download: Mapping[str, Any]) -> Iterator[str]:
    """Format the result of a download."""
    files, count = download["files"], download["images_count"]
    container = "images.zip" if "images.zip" in files else "data files"
    images = "images" if count is None else f"{count:,} images"
    yield f"{download['folder']}: {images} in {container}, {len(files)} files checked, all hashes match"
    if "images" in download:
        yield f"images unpacked into {download['images']}"
    elif container == "images.zip":
        yield "unpack the images: download again with --extract, or unzip images.zip"


def format_verification(report: VerifyReport) -> Iterator[str]:
    """Format the differences between a folder and its manifest."""
    for difference, names in (("changed", report.changed), ("missing", report.missing), ("extra", report.extra)):
        for name in names:
            yield one_line(f"{difference} {name}")
    if report.ok:
        kind = "images" if report.folder.is_file() else "files"
        yield f"{report.folder}: {report.checked} {kind} checked, all hashes match"


def format_verdicts(result: AuthenticityResult) -> Iterator[str]:
    """Format a line for each image, and the share of authentic images."""
    for verdict in result:
        word = "authentic" if verdict.authentic else "not authentic"
        note = "  (answer on a similar image that was compared before)" if verdict.repeated else ""
        yield one_line(f"{word:<15}{verdict.distance:5.2f}  percentile {verdict.percentile:3}  {verdict.name}{note}")
    yield f"{result.authentic_share:.0%} of {len(result)} authentic"


def format_directions(directions: Sequence[Direction]) -> Iterator[str]:
    """Format a line for each direction."""
    for item in directions:
        yield one_line(f"{item.name:<24}{item.method:<13}layers {item.layers[0]}-{item.layers[1]}")


def format_projection(record: Projection, files: Sequence[Path], kept: bool) -> Iterator[str]:
    """Format a line for each image, and the next command if the projection is kept."""
    for image in record.data or ():
        yield one_line(
            f"{image.index:04d}  {image.distance_name} {image.distance:.3f}  pixel error {image.pixel_error:.1f}  "
            f"{files[image.index] if image.index < len(files) else '?'}"
        )
    if kept:
        yield f"edit it: dermis-client edit --projection {record.id}:0 --sweep DIRECTION=-3:3:7 --strip strip.png"


def format_report(report: DatasetReport) -> Iterator[str]:
    """Describe a report: the request, the scorecard, and the limits."""
    yield one_line(report.request.text, 1000)
    yield f"{report.images:,} of {report.requested:,} images by {one_line(report.origin.bundle)}"
    for question in report.scorecard:
        yield f"{one_line(question.id)}: {one_line(question.question)} ({one_line(question.status)})"
        for number in question.numbers:
            yield f"  {_report_number(number)}"
    yield f"privacy audit of the bundle: {one_line(report.audit.verdict)}"


def _report_number(number: ReportNumber) -> str:
    name = one_line(number.name) + (f" of {one_line(number.class_name)}" if number.class_name is not None else "")
    if number.value is None:
        return f"{name}: not measured"
    line = f"{name}: {number.value:g}"
    if number.low is not None and number.high is not None:
        line += f" ({number.low:g} to {number.high:g})"
    return line + (f", real {number.reference:g}" if number.reference is not None else "")
