"""Pieces of HTML that several pages use. Every text from outside is escaped here."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dermis_client import APIConnectionError, APIStatusError, DermisError
from dermis_client.models import Problem

_MEDIA_TYPES = frozenset({"image/png", "image/jpeg", "image/webp", "image/gif", "application/zip"})
# For screen readers: a result has no text that they read by themselves when it replaces the progress.
READY = '<p class="ds-hidden" role="status">The result is ready.</p>'


def data_url(content: bytes, media_type: str) -> str:
    """Return a file as a URL that contains it: an image, or a zip to be saved."""
    kind = media_type if media_type in _MEDIA_TYPES else "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def file_link(href: str, words: str, *, kind: str = "") -> str:
    """Return a link to a file of the service, which the browser saves.

    It opens a tab, which closes at once, or shows why there is no file. In the own tab of the page it would end its connection:
    Gradio closes it as soon as a browser begins to leave the page, also for a file.

    Args:
        href: Address of the file.
        words: Text of the link; HTML.
        kind: Class of the look.
    """
    look = f' class="{kind}"' if kind else ""
    return f'<a{look} href="{href}" target="_blank" rel="noopener">{words}</a>'


def attribute(value: Any) -> str:
    """Return a value as JSON that can be the text of an attribute."""
    return escape(json.dumps(value, separators=(",", ":")), quote=True)


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Return a list of names and values. The values are HTML."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'<dl class="ds-facts">{items}</dl>'


def short_digest(digest: str) -> str:
    """Return a SHA-256 in its first characters, with the whole one as its title."""
    return f'<code title="{escape(digest)}">{escape(digest[:12])}</code>'


def empty_state(title: str, text: str) -> str:
    """Return what a page shows before there is anything to show."""
    return f'<div class="ds-empty"><h2>{escape(title)}</h2><p>{escape(text)}</p></div>'


def progress(text: str, fraction: float | None) -> str:
    """Return a progress bar with a text.

    Args:
        text: What is being done.
        fraction: The share that is done, 0 to 1; None if it is not known.
    """
    if fraction is None:
        bar = '<div class="ds-bar ds-unknown" role="progressbar" aria-label="In progress"><i></i></div>'
    else:
        percent = round(100 * min(max(fraction, 0.0), 1.0))
        bar = (
            f'<div class="ds-bar" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{percent}"><i style="width:{percent}%"></i></div>'
        )
    return f'<div class="ds-progress"><p role="status">{escape(text)}</p>{bar}</div>'


def success(text: str) -> str:
    """Return a message that something has been done."""
    return f'<p class="ds-done" role="status">{escape(text)}</p>'


_REMEDIES: Mapping[int, str] = {
    401: "Sign out and sign in with a key that is valid.",
    403: "Ask the operator of the service for a key with this scope, or to allow the operation.",
    404: "It may have been deleted, have expired, or belong to another tenant. Choose another one.",
    408: "Send fewer or smaller images, or use a faster connection.",
    409: "Wait until it is ready, then try again.",
    413: "Choose a smaller image.",
    415: "Choose a PNG, JPEG or WebP image.",
    422: "Change the values that are named here, then try again.",
    501: "The operator of the service has to install the package that is named here.",
    507: "The operator of the service has to free space. Delete datasets that are not needed.",
}
_AGAIN = "Try again. If it happens again, tell the operator the request id."


def remedy(status: int, retry_after: float | None = None) -> str:
    """Return what to do after an answer of the service with this status.

    Args:
        status: The status.
        retry_after: Seconds after which to try again, if the service named them.
    """
    wait = f" in {duration(retry_after)}" if retry_after else " in a moment"
    if status == 429:
        return f"Try again{wait}, or ask for less."
    if status == 503:
        busy = "The service is busy." if retry_after else "The service is starting or busy."
        less = ", or ask for fewer images" if retry_after else ""
        return f"{busy} Try again{wait}{less}."
    return _REMEDIES.get(status, _AGAIN)


class ExplainedError(DermisError):
    """An error that says what to do.

    Attributes:
        title: Its title.
        detail: What is wrong.
        what_to_do: What to do.
    """

    def __init__(self, title: str, detail: str, what_to_do: str) -> None:
        super().__init__(f"{title}: {detail} {what_to_do}")
        self.title = title
        self.detail = detail
        self.what_to_do = what_to_do


def explained(error: DermisError) -> ExplainedError:
    """Return title, detail and what to do of an error.

    Args:
        error: The error. A message that no answer of the service caused has both parts, separated by a semicolon.
    """
    if isinstance(error, ExplainedError):
        return error
    if isinstance(error, APIStatusError):
        title = error.problem.title or "The service refused this"
        detail = error.problem.detail or str(error)
        return ExplainedError(title, detail, remedy(error.status_code, error.retry_after))
    if isinstance(error, APIConnectionError):
        return ExplainedError(
            "The service does not respond", str(error), "It may be restarting. Try again in a moment."
        )
    return ExplainedError("This cannot be done", *_parts(str(error)))


def _parts(message: str, otherwise: str = "Change the values of the page, then try again.") -> tuple[str, str]:
    """Return what is wrong and what to do: the parts of a message before and after its last semicolon.

    Args:
        message: The message.
        otherwise: What to do if the message does not say it.
    """
    detail, _, what = message.rpartition("; ")
    if not detail:
        return message, otherwise
    return detail, f"{what[:1].upper()}{what[1:]}."


def problem(error: Exception) -> str:
    """Return an error: what is wrong, and what to do."""
    if isinstance(error, DermisError):
        found = explained(error)
        answer = error if isinstance(error, APIStatusError) else None
        fields = [] if answer is None else [(item.field, item.message) for item in answer.errors]
        request_id = None if answer is None else answer.request_id
        return described_problem(found.title, found.detail, found.what_to_do, fields=fields, request_id=request_id)
    what = "Load the page again. The log of the studio has the reason."
    return described_problem("The studio failed", type(error).__name__, what)


def described_problem(
    title: str, detail: str, what_to_do: str, *, fields: Sequence[tuple[str, str]] = (), request_id: str | None = None
) -> str:
    """Return a problem as HTML.

    Args:
        title: Its title.
        detail: What is wrong.
        what_to_do: What to do.
        fields: Names and messages of the fields that are not valid.
        request_id: Id of the request.
    """
    items = "".join(f"<li><code>{escape(field)}</code> {escape(message)}</li>" for field, message in fields)
    listed = f"<ul>{items}</ul>" if items else ""
    number = f'<p class="ds-muted">Request id <code>{escape(request_id)}</code></p>' if request_id else ""
    return (
        f'<div class="ds-problem" role="alert"><h2>{escape(title)}</h2><p>{escape(detail)}</p>{listed}'
        f'<p class="ds-remedy">{escape(what_to_do)}</p>{number}</div>'
    )


# What to do about a job that has failed, by the kind of its problem; others by the status. Then the job is begun again.
_FAILURES: Mapping[str, str] = {
    "internal": "Tell the operator the id of the {name}: the log of the service has the reason.",
    "model-unavailable": "Ask the operator whether the model is served again.",
    "overloaded": "Wait until the service is less busy.",
    "quota-exceeded": "Wait until the quota is free again, or ask the operator for a larger one.",
    "storage-full": "Delete what is not needed, and ask the operator to free space.",
    "unknown-model": "Choose another model.",
    "unusable-image": "Choose another image.",
}
_FAILED: Mapping[int, str] = {
    422: "Change the values that are named here.",
    501: "Ask the operator to install the package that is named here.",
    507: "Delete what is not needed, and ask the operator to free space.",
}


def failure(found: Problem | None, name: str, begin: str) -> str:
    """Return why a job has failed and what to do.

    Args:
        found: The problem that the service keeps of it.
        name: What it is, such as "dataset".
        begin: How to begin it again, such as "create the dataset".
    """
    found = found or Problem(type="urn:dermis:problem:internal", detail="The service gave no reason.")
    first = _FAILURES.get(found.kind) or _FAILED.get(found.status or 0) or _FAILURES["internal"]
    fields = [(item.field, item.message) for item in found.errors]
    what = f"{first.format(name=name)} Then {begin} again."
    return described_problem(found.title or f"The {name} failed", found.detail, what, fields=fields)


def failure_in_words(message: str, title: str, name: str, begin: str) -> str:
    """Return why something has failed of which the service keeps a message only.

    Args:
        message: The message: what is wrong and, after its last semicolon, what to do.
        title: A title.
        name: What it is, such as "study".
        begin: How to begin it again.
    """
    detail, what = _parts(message, "Correct what is named here.")
    if what == "See the log.":  # which the operator can read
        what = _FAILURES["internal"].format(name=name)
    return described_problem(title, detail or "The service gave no reason.", f"{what} Then {begin} again.")


def code_block(label: str, text: str) -> str:
    """Return a text to copy, with a button."""
    return (
        f'<div class="ds-code"><div><span>{escape(label)}</span><button type="button" class="ds-quiet" data-ds-copy '
        f'aria-label="Copy as {escape(label)}">Copy</button></div><pre tabindex="0" aria-label="{escape(label)}">'
        f"<code>{escape(text)}</code></pre></div>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Return a table. The cells are HTML."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="ds-table" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def number(value: float, digits: int = 3) -> str:
    """Return a number with some significant digits, and whole numbers with separators of thousands."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def counted(count: float, singular: str, plural: str | None = None, digits: int = 3) -> str:
    """Return a number and the word of what is counted, such as "1 image" and "2 images".

    Args:
        count: The number.
        singular: The word or words after 1; a verb can be among them.
        plural: The words after another number; the singular with an s by default.
        digits: As of `number`.
    """
    shown = number(count, digits)
    return f"{shown} {singular if shown == '1' else plural or f'{singular}s'}"


def size(count: float) -> str:
    """Return a number of bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Return a duration in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{round(minutes)} min" if minutes < 90 else f"{minutes / 60:.1f} h"
