"""How the page Datasets shows datasets: the list, one of them with its progress and its files, the estimate of a new one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Any

from dermis_client import (
    AsyncDataset,
    AsyncDermisClient,
    DatasetFile,
    DatasetRecord,
    DatasetReport,
    Model,
    ReportNumber,
    Usage,
)
from dermis_client.models import ImageFormat

from dermis_studio import markup
from dermis_studio.access import Visitor

SHOWN = 25  # datasets in the list
PROBE_IMAGES = 8  # images of the measurement of size and speed

_STATES = {
    "queued": ("Waiting", "ds-wait"),
    "running": ("Running", "ds-run"),
    "cancelling": ("Stopping", "ds-wait"),
    "succeeded": ("Finished", "ds-good"),
    "failed": ("Failed", "ds-bad"),
    "cancelled": ("Cancelled", "ds-wait"),
}
_MARKS = {"ds-wait": "○", "ds-run": "◐", "ds-good": "●", "ds-bad": "✕"}
_LAYOUTS = {"imagefolder": "folder", "webdataset": "WebDataset", "parquet": "Parquet"}
_MEASURED: dict[
    tuple[str, str, int], tuple[float, float]
] = {}  # digest, format, quality -> bytes and seconds of an image
_MAX_MEASURED = 200


async def recent(client: AsyncDermisClient) -> list[AsyncDataset]:
    """Return the newest datasets of the tenant."""
    return [dataset async for dataset in client.datasets.list(limit=SHOWN, page_size=SHOWN)]


def state(dataset: DatasetRecord) -> str:
    """Return the state in words, with a mark that does not depend on colours."""
    words, kind = _STATES.get(dataset.state, (dataset.state, "ds-wait"))
    return f'<span class="ds-state {kind}"><i aria-hidden="true">{_MARKS[kind]}</i>{escape(words)}</span>'


def request_words(dataset: DatasetRecord) -> str:
    """Return what was asked for in a line."""
    request = dataset.request
    classes = ", ".join(f"{count:,} {name}" for name, count in request.classes.items())
    return f"{classes}; seed {request.seed}; {_LAYOUTS.get(request.format, request.format)}, {request.image_format.upper()}"


def when(moment: datetime | None) -> str:
    """Return a time."""
    return "" if moment is None else f"{moment:%d %b %Y, %H:%M} UTC"


def table(datasets: Sequence[DatasetRecord], opened: str | None) -> str:
    """Return the list of datasets.

    Args:
        datasets: The datasets, newest first.
        opened: Id of the one that is shown above the list.
    """
    if not datasets:
        return markup.empty_state("No datasets yet", "Those that you and others of your tenant create appear here.")
    rows = []
    for dataset in datasets:
        here = ' aria-current="true"' if dataset.id == opened else ""
        button = (
            f'<button type="button" class="ds-link" data-act="open" data-id="{escape(dataset.id)}"{here}>'
            f"{escape(request_words(dataset))}</button>"
        )
        total = sum(dataset.request.classes.values())
        rows.append((state(dataset), button, f"{total:,}", escape(when(dataset.created_at))))
    return markup.table(
        ("State", "Dataset", "Images", "Created"), rows, f"Datasets of your tenant, newest first (up to {SHOWN})"
    )


def described(dataset: DatasetRecord, writes: bool, about: str = "") -> str:
    """Return everything about one dataset.

    Args:
        dataset: The dataset.
        writes: Whether the visitor may stop and delete it.
        about: What there is of a finished one; HTML.
    """
    done, number = dataset.progress, markup.number
    lines = ""
    if not dataset.finished:
        text = f"{done.samples_done:,} of {done.samples_total:,} images"
        if done.images_per_second:
            text += f", {number(done.images_per_second)} images/s"
        if done.eta_seconds is not None:
            text += f", {markup.duration(done.eta_seconds)} left"
        lines = markup.progress(text, done.fraction if dataset.state == "running" else None)
    elif dataset.error is not None:
        lines = (
            f'<div class="ds-problem" role="alert"><h2>{escape(dataset.error.title)}</h2><p>{escape(dataset.error.detail)}</p>'
            '<p class="ds-remedy">Correct the cause, then create the dataset again.</p></div>'
        )
    buttons = ""
    if writes and not dataset.finished and dataset.state != "cancelling":
        buttons = _button("cancel", dataset.id, "Cancel", "Stop this dataset? Its files are removed.")
    elif writes and dataset.finished:
        question = "Delete this dataset with its files? This cannot be undone."
        buttons = _button("delete", dataset.id, "Delete", question)
    rows = [
        ("Request", escape(request_words(dataset))),
        ("Id", f"<code>{escape(dataset.id)}</code>"),
        ("Created", escape(when(dataset.created_at))),
    ]
    if dataset.finished_at is not None and dataset.started_at is not None:
        seconds = (dataset.finished_at - dataset.started_at).total_seconds()
        rate = f", {number(done.images_per_second)} images/s" if done.images_per_second else ""
        rows.append(("Time", escape(markup.duration(seconds) + rate)))
    if dataset.expires_at is not None:
        rows.append(("Deleted on", escape(when(dataset.expires_at))))
    if dataset.model is not None:
        rows.append(("Model", f"{escape(dataset.model.name)} {markup.short_digest(dataset.model.digest)}"))
    return (
        f'<div class="ds-panel"><div class="ds-top"><h2>{state(dataset)}</h2><div class="ds-actions">{buttons}</div></div>'
        f"{lines}{about}{markup.facts(rows)}</div>"
    )


def _button(act: str, dataset_id: str, words: str, question: str) -> str:
    return (
        f'<button type="button" class="ds-button ds-danger" data-act="{act}" data-id="{escape(dataset_id)}" '
        f'data-confirm="{escape(question)}">{words}</button>'
    )


async def results(client: AsyncDermisClient, dataset: AsyncDataset) -> str:
    """Return preview, files and report of a finished dataset; nothing for one that did not succeed."""
    if dataset.state != "succeeded":
        return ""
    files, report = await asyncio.gather(
        client.datasets.files(dataset.id), client.datasets.report(dataset.id), return_exceptions=True
    )
    if isinstance(files, BaseException):
        return markup.problem(files) if isinstance(files, Exception) else ""
    names = {file.name for file in files}
    at = f"files/{escape(dataset.id)}"
    preview = ""
    if "preview.png" in names:
        preview = (
            f'<figure class="ds-figure"><div class="ds-preview"><img src="{at}/preview.png" alt="The first images of '
            f'the dataset" '
            "></div><figcaption>The first images of each class (contact sheet of the dataset).</figcaption></figure>"
        )
    links = ""
    if "report.html" in names:
        links += (
            f'<a class="ds-button ds-strong" href="report/{escape(dataset.id)}" target="_blank" '
            f'rel="noopener">Open the report</a>'
        )
    if "manifest.json" in names:
        links += f'<a class="ds-button" href="{at}/manifest.json" download>Manifest</a>'
    scorecard = _scorecard(report) if isinstance(report, DatasetReport) else ""
    return f'<div class="ds-actions">{links}</div>{preview}{scorecard}{_files(files, at)}'


def _files(files: Sequence[DatasetFile], at: str) -> str:
    rows = [
        (
            f'<a href="{at}/{escape(file.name)}" download>{escape(file.name)}</a>',
            markup.size(file.bytes),
            markup.short_digest(file.sha256),
        )
        for file in files
    ]
    total = sum(file.bytes for file in files)
    return markup.table(("File", "Size", "SHA-256"), rows, f"Files to download, {markup.size(total)} together")


def _scorecard(report: DatasetReport) -> str:
    rows = []
    for question in report.scorecard:
        of_all = [number for number in question.numbers if number.class_name is None]
        numbers = "<br>".join(map(_number, (of_all or question.numbers)[:3]))
        rows.append((escape(question.question), escape(question.status), numbers))
    verdict = {"pass": "passed", "warn": "with warnings", "fail": "failed"}.get(
        report.audit.verdict, report.audit.verdict
    )
    audit = f"<p>Privacy audit of the {escape(report.audit.scope)}: <b>{escape(verdict)}</b>.</p>"
    return markup.table(("Question", "Status", "Numbers (of real images)"), rows, "Report in short") + audit


def _number(number: ReportNumber) -> str:
    if number.value is None:
        return f"{escape(number.name)} not measured"
    of_class = f" of {number.class_name}" if number.class_name else ""
    shown = f"{escape(number.name + of_class)} {markup.number(number.value)}"
    return shown if number.reference is None else f"{shown} ({markup.number(number.reference)})"


async def estimate(client: AsyncDermisClient, model: Model, body: dict[str, Any], visitor: Visitor) -> str:
    """Return the expected size and time of a dataset, from a few images in the same format and from former datasets."""
    total = sum(body["classes"].values())
    image_format, quality = body.get("image_format", "png"), int(body.get("image_quality", 95))
    per_image = per_second = None
    if visitor.may("images"):
        size, seconds = await _measure(client, model, next(iter(body["classes"])), image_format, quality)
        per_image, per_second = size, 1 / seconds
    source = f"measured on {PROBE_IMAGES} images"
    former = [
        dataset.progress.images_per_second
        async for dataset in client.datasets.list(state="succeeded", limit=10, page_size=10)
        if dataset.model is not None and dataset.model.digest == model.digest and dataset.progress.samples_done >= 20
    ]
    if former and former[0]:
        per_second, source = former[0], "the rate of your last dataset of this model"
    rows = [("Images", f"{total:,} of {model.resolution} px")]
    rows.append(("Size", "not known" if per_image is None else f"about {markup.size(total * per_image)}"))
    if per_second is None:
        rows.append(("Time", "not known before the first dataset"))
    else:
        tries = " or more: rejected images are made again" if "privacy" in body or "classifier" in body else ""
        rows.append(
            (
                "Time",
                f"about {markup.duration(total / per_second)}{tries} ({markup.number(per_second, 2)} images/s, {source})",
            )
        )
    return "<h3>Estimate</h3>" + markup.facts([(name, escape(value)) for name, value in rows])


async def _measure(
    client: AsyncDermisClient, model: Model, class_name: str, image_format: ImageFormat, quality: int
) -> tuple[float, float]:
    """Bytes and seconds of one image."""
    key = (model.digest, image_format, quality if image_format != "png" else 0)
    if key not in _MEASURED:
        started = time.perf_counter()
        result = await client.images.generate(
            {class_name: PROBE_IMAGES}, model=model.name, image_format=image_format, image_quality=quality
        )
        seconds = (time.perf_counter() - started) / PROBE_IMAGES
        if len(_MEASURED) >= _MAX_MEASURED:
            _MEASURED.clear()
        _MEASURED[key] = (sum(len(image.content) for image in result) / len(result), seconds)
    return _MEASURED[key]


def quotas(usage: Usage) -> str:
    """Return what is left of the quotas that a dataset uses; nothing if there are no limits."""
    left = [
        f"{markup.number(quota.remaining)} {quota.unit} left of {markup.number(quota.limit)} ({quota.name.replace('_', ' ')})"
        for quota in usage.quotas
        if quota.limit is not None and quota.remaining is not None and quota.name in {"images_per_day", "stored_bytes"}
    ]
    return "".join(f'<p class="ds-muted">{escape(text)}</p>' for text in left)
