"""The report as one HTML page without scripts and without other files. All text of requests and bundles is escaped."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence

from dermis.html_page import Section, facts_table, html_page, table
from dermis.report.content import NOT_MEASURED, DatasetReport, ReportAudit, ReportNumber, ReportQuestion, ReportSection

_TITLES = {
    "classes": "Class balance",
    "fidelity": "Fidelity",
    "variety": "Variety",
    "utility": "Utility",
    "privacy": "Privacy",
    "artefacts": "Artefacts",
    "skin_tone": "Skin tone",
}
_BAR = 90  # width of a bar, px


def report_page(report: DatasetReport) -> str:
    """Make the page of a report. The same report gives the same page."""
    origin = report.origin
    training = "not stated" if origin.training_images is None else f"{origin.training_images:,} images"
    facts = {
        "asked for": report.request.text,
        "delivered": f"{report.images:,} of {report.requested:,} images, {origin.resolution} x {origin.resolution} px",
        "made by": f"{origin.bundle}, SHA-256 {origin.digest}",
        "trained on": training,
        "licence": origin.licence,
        "attribution": origin.attribution,
        "sample": f"{report.sample:,} images, evenly spaced, for artefacts and skin tone",
    }
    cards = f"""<div class="cards">{"".join(_question(question) for question in report.scorecard)}</div>
<p class="note">Seven criteria after Zamzmi et al., Communications Engineering 4, 130 (2025). There is no total score and no
threshold for passing: whether a number is good enough depends on the use. In brackets: 95 % interval.</p>"""
    limits = "".join(f"<li>{_prose(limit)}</li>" for limit in report.limits)
    options = html.escape(json.dumps(report.request.options, sort_keys=True, ensure_ascii=False))
    return html_page(
        "Report of a synthetic dataset",
        [
            Section("scorecard", "Scorecard", cards),
            *(Section(name, title, _section(title, getattr(report, name))) for name, title in _TITLES.items()),
            Section("audit", f"Privacy audit of the {report.audit.scope}", _audit(report.audit)),
            Section("limits", "Limits", f"<ul>{limits}</ul>"),
            Section("request", "Request", f"<p><code>{options}</code></p>"),
        ],
        introduction=facts_table((name, html.escape(text)) for name, text in facts.items()),
        warnings=[
            "Every image is synthetic. <strong>Not for diagnosis.</strong> Numbers without a reference were not compared with "
            "real images. &quot;Not measured&quot; is not a result."
        ],
        interactive=False,
    )


def _question(question: ReportQuestion) -> str:
    notes = _prose(" ".join(question.notes))
    numbers = _table(f"Numbers of {question.id}", question.numbers, bars=False)
    return f"""<article class="card"><h3>{html.escape(question.id.capitalize())}</h3><p>{html.escape(question.question)}</p>
{_status(question.status)}{numbers}<p class="note">{notes}</p></article>
"""


def _section(title: str, section: ReportSection) -> str:
    images = "" if section.images is None else f" Measured on {section.images:,} images."
    notes = _prose(" ".join(section.notes) + images)
    problem = ""
    if section.reason is not None:
        problem = f'<p><span class="missing">{html.escape(section.status)}</span>: {_prose(section.reason)}. '
        problem += f"To measure it: {_prose(section.remedy or '')}.</p>"
    return f'{problem}{_table(title, section.numbers, bars=True)}<p class="note">{notes}</p>\n'


def _audit(audit: ReportAudit) -> str:
    if audit.verdict == NOT_MEASURED:
        remedy = _prose(audit.remedy or "")
        missing = f'<span class="missing">{NOT_MEASURED}</span>. To measure it: {remedy}.'
        return f"<p>{missing}</p>\n"
    rules = ([html.escape(rule.id), html.escape(rule.status), html.escape(rule.text)] for rule in audit.rules)
    verdict = f"<p>Verdict: <strong>{html.escape(audit.verdict)}</strong></p>"
    return verdict + table("Rules of the audit", ["rule", "result", "meaning"], rules)


def _status(status: str) -> str:
    return "" if status == "measured" else f'<p class="missing">{html.escape(status)}</p>'


def _table(name: str, numbers: Sequence[ReportNumber], *, bars: bool) -> str:
    """Make a table with a row for each class and number, and a column for the reference if one is known."""
    if not numbers:
        return ""
    by_class = any(number.class_name is not None for number in numbers)
    compared = any(number.reference is not None for number in numbers)
    head = ["number", *(["class"] if by_class else []), "these images", *(["real"] if compared else [])]
    rows = []
    for number in numbers:
        cells = [html.escape(number.name)]
        if by_class:
            cells.append(html.escape(number.class_name or "all"))
        drawn = bars and number.unit == "share"
        cells.append(_with_bar(_value(number), number.value if drawn else None))
        if compared:
            real = "" if number.reference is None else _text(number.reference, number.unit)
            cells.append(_with_bar(real, number.reference if drawn else None))
        rows.append(cells)
    return table(name, head, rows)


def _value(number: ReportNumber) -> str:
    if number.value is None:
        return f'<span class="missing">{NOT_MEASURED}</span>'
    text = _text(number.value, number.unit)
    if number.low is not None and number.high is not None:
        text += f" ({_text(number.low, number.unit)} to {_text(number.high, number.unit)})"
    return text


def _prose(text: str) -> str:
    """A text as HTML; what is between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _text(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.1f}&nbsp;%"
    if unit == "images":
        return f"{value:,.0f}"
    return f"{value:.1f}°" if unit == "degrees" else f"{value:.4g}"


def _with_bar(text: str, value: float | None) -> str:
    """The text of a number, and a bar for it if it is a share."""
    if value is None:
        return text
    width = round(_BAR * min(max(value, 0.0), 1.0), 1)
    return (
        f'<div class="measured"><span>{text}</span>'
        f'<svg width="{_BAR}" height="8" viewBox="0 0 {_BAR} 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="bar-whole" width="{_BAR}" height="8"/><rect class="bar-part" width="{width}" height="8"/></svg></div>'
    )
