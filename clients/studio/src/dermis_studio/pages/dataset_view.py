"""How the page Datasets shows datasets: the list, one of them with its progress and its files, the estimate of a new one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
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

from dermis_studio import markup
from dermis_studio.access import Visitor
from dermis_studio.pages.dataset_request import SHARD_SIZE

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
_MEASURED: dict[tuple[str, str], Measured] = {}  # digest of the model, options
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
    done = dataset.progress
    lines = ""
    if not dataset.finished:
        text = f"{done.samples_done:,} of {markup.counted(done.samples_total, 'image')}"
        if done.images_per_second:
            text += f", {markup.counted(done.images_per_second, 'image/s', 'images/s')}"
        if done.eta_seconds is not None:
            text += f", {markup.duration(done.eta_seconds)} left"
        lines = markup.progress(text, done.fraction if dataset.state == "running" else None)
    elif dataset.error is not None:
        lines = markup.failure(dataset.error, "dataset", "create the dataset")
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
        rate = f", {markup.counted(done.images_per_second, 'image/s', 'images/s')}" if done.images_per_second else ""
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
        links += markup.file_link(f"{at}/manifest.json", "Manifest", kind="ds-button")
    scorecard = _scorecard(report) if isinstance(report, DatasetReport) else ""
    return f'<div class="ds-actions">{links}</div>{preview}{scorecard}{_files(files, at)}'


def _files(files: Sequence[DatasetFile], at: str) -> str:
    rows = [
        (
            markup.file_link(f"{at}/{escape(file.name)}", escape(file.name)),
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


@dataclass(frozen=True)
class Estimate:
    """What to expect of a dataset.

    Attributes:
        words: Its size and time; HTML.
        signs: Whether the service signs images; None if this is not known.
    """

    words: str
    signs: bool | None


@dataclass(frozen=True)
class Measured:
    """What generating a few images has shown.

    Attributes:
        size: Bytes of an image.
        seconds: Seconds of an image.
        signed: Whether the images are signed.
    """

    size: float
    seconds: float
    signed: bool


async def estimate(client: AsyncDermisClient, model: Model, body: dict[str, Any], visitor: Visitor) -> Estimate:
    """Return the expected size and time of a dataset, from a few images of the same kind and from former datasets."""
    measured = await _measure(client, model, body) if visitor.may("images") else None
    former = [
        dataset.progress.images_per_second
        async for dataset in client.datasets.list(state="succeeded", limit=10, page_size=10)
        if dataset.model is not None and dataset.model.digest == model.digest and dataset.progress.samples_done >= 20
    ]
    rows = estimated(model, body, measured, next(iter(former), None))
    signs = None if measured is None or "provenance" in body else measured.signed
    return Estimate("<h3>Estimate</h3>" + markup.facts([(name, escape(value)) for name, value in rows]), signs)


def estimated(
    model: Model, body: dict[str, Any], measured: Measured | None, former: float | None
) -> list[tuple[str, str]]:
    """Return names and values of what to expect of a dataset.

    Args:
        model: The model.
        body: The request.
        measured: What a few images have shown; None if the visitor may not generate images.
        former: Images per second of the last dataset of the model; None if there is none.
    """
    total = sum(body["classes"].values())
    privacy, classifier = body.get("privacy", {}), body.get("classifier", {})
    filters = not classifier.keys().isdisjoint({"keep", "min_probability", "max_probability"})
    leaves_out = privacy.get("on_reject") == "drop" or (filters and classifier.get("tries", 1) == 1)
    makes_again = privacy.get("on_reject") == "resample" or classifier.get("tries", 1) > 1
    most = "up to " if leaves_out else ""
    rows = [("Images", f"{most}{total:,} of {model.resolution} px")]
    rows.append(
        ("Size", "not known" if measured is None else f"{most or 'about '}{markup.size(total * measured.size)}")
    )
    source = "the rate of your last dataset of this model"
    if not former and measured is not None:
        former, source = 1 / measured.seconds, f"measured on {markup.counted(PROBE_IMAGES, 'image')}"
    if not former:
        rows.append(("Time", "not known before the first dataset"))
    else:
        again = " or more: rejected images are made again" if makes_again else ""
        rate = markup.counted(former, "image/s", "images/s", 2)
        rows.append(("Time", f"about {markup.duration(total / former)}{again} ({rate}, {source})"))
    shard_size = body.get("shard_size", SHARD_SIZE)
    shards = -(-total // shard_size)
    of_images = f"{markup.counted(shards, 'shard')} of up to {markup.counted(min(shard_size, total), 'image')}"
    zipped = body.get("format", "imagefolder") == "imagefolder"
    rows.append(("Files", f"one zip, made in {of_images}" if zipped else f"{of_images}, a file each"))
    return rows


def is_measured(model: Model, body: dict[str, Any]) -> bool:
    """Whether the size and time of such images are known, so that an estimate generates none."""
    return _measurement_of(model, body)[0] in _MEASURED


def _measurement_of(model: Model, body: dict[str, Any]) -> tuple[tuple[str, str], dict[str, Any]]:
    """Return the key and the options of the measurement for a dataset.

    The options are those on which the size depends most: format, quality, noise and signing. Truncation and edits change it
    by a few percent only.
    """
    options: dict[str, Any] = {
        name: body[name] for name in ("image_format", "image_quality", "noise_mode", "provenance") if name in body
    }
    options.setdefault("image_format", "png")
    return (model.digest, json.dumps(options, sort_keys=True)), options


async def _measure(client: AsyncDermisClient, model: Model, body: dict[str, Any]) -> Measured:
    """Generate a few images, unless such images have been measured."""
    key, options = _measurement_of(model, body)
    if key not in _MEASURED:
        started = time.perf_counter()
        result = await client.images.generate({next(iter(body["classes"])): PROBE_IMAGES}, model=model.name, **options)
        seconds = (time.perf_counter() - started) / PROBE_IMAGES
        if len(_MEASURED) >= _MAX_MEASURED:
            _MEASURED.clear()
        signed = any(image.canonical_sha256 is not None for image in result)
        _MEASURED[key] = Measured(sum(len(image.content) for image in result) / len(result), seconds, signed)
    return _MEASURED[key]


def quotas(usage: Usage) -> str:
    """Return what is left of the quotas that a dataset uses; nothing if there are no limits."""
    left = [
        f"{markup.counted(quota.remaining, quota.unit.removesuffix('s'), quota.unit)} left of {markup.number(quota.limit)} "
        f"({quota.name.replace('_', ' ')})"
        for quota in usage.quotas
        if quota.limit is not None and quota.remaining is not None and quota.name in {"images_per_day", "stored_bytes"}
    ]
    return "".join(f'<p class="ds-muted">{escape(text)}</p>' for text in left)
