"""The report as one HTML page without scripts and without other files. All text of requests and bundles is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence

from dermis.report.content import NOT_MEASURED, DatasetReport, ReportAudit, ReportNumber, ReportQuestion, ReportSection

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)
"""What the page may load: nothing but its own style. Services send it as a header too."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 1.5rem auto; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.5rem; margin: 0 0 .4rem; } h2 { font-size: 1.15rem; margin: 1.8rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #d5dae1; vertical-align: top; }
td, p, li { overflow-wrap: break-word; }
.card { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .7rem; }
.card section { border: 1px solid #d5dae1; border-radius: .4rem; padding: .5rem .7rem; }
.card h3 { font-size: 1rem; margin: 0; text-transform: capitalize; }
.card table { font-size: .85rem; width: 100%; } .card p { margin: .15rem 0; }
.note { color: #55606e; font-size: .87rem; max-width: 56rem; }
.missing { color: #8a5300; font-weight: 600; }
.warning { background: #fdeaea; border-left: .4rem solid #b3261e; padding: .5rem .9rem; }
svg { vertical-align: middle; }
"""
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
    sections = "".join(_section(_TITLES[name], getattr(report, name)) for name in _TITLES)
    limits = "".join(f"<li>{html.escape(limit)}</li>" for limit in report.limits)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{html.escape(CONTENT_SECURITY_POLICY)}">
<title>Report of a synthetic dataset</title><style>{_STYLE}</style></head><body>
<h1>Report of a synthetic dataset</h1>
<p class="warning">Every image is synthetic. <strong>Not for diagnosis.</strong> Numbers without a reference were not compared
with real images. "Not measured" is not a result.</p>
<table>{_rows(facts.items())}</table>
<h2>Scorecard</h2>
<div class="card">{"".join(_question(question) for question in report.scorecard)}</div>
<p class="note">Seven criteria after Zamzmi et al., Communications Engineering 4, 130 (2025). There is no total score and no
threshold for passing: whether a number is good enough depends on the use. In brackets: 95 % interval.</p>
{sections}{_audit(report.audit)}
<h2>Limits</h2><ul>{limits}</ul>
<h2>Request</h2><p><code>{html.escape(json.dumps(report.request.options, sort_keys=True, ensure_ascii=False))}</code></p>
</body></html>
"""


def _rows(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in pairs)


def _question(question: ReportQuestion) -> str:
    notes = " ".join(question.notes)
    return f"""<section><h3>{html.escape(question.id)}</h3><p>{html.escape(question.question)}</p>
{_status(question.status)}{_table(question.numbers, bars=False)}<p class="note">{html.escape(notes)}</p></section>
"""


def _section(title: str, section: ReportSection) -> str:
    images = "" if section.images is None else f" Measured on {section.images:,} images."
    notes = html.escape(" ".join(section.notes) + images)
    problem = ""
    if section.reason is not None:
        problem = f'<p><span class="missing">{html.escape(section.status)}</span>: {html.escape(section.reason)}. '
        problem += f"To measure it: {html.escape(section.remedy or '')}.</p>"
    return f'<h2>{title}</h2>{problem}{_table(section.numbers, bars=True)}<p class="note">{notes}</p>\n'


def _audit(audit: ReportAudit) -> str:
    if audit.verdict == NOT_MEASURED:
        remedy = html.escape(audit.remedy or "")
        missing = f'<span class="missing">{NOT_MEASURED}</span>. To measure it: {remedy}.'
        return f"<h2>Privacy audit of the {audit.scope}</h2><p>{missing}</p>\n"
    rules = "".join(
        f"<tr><td>{html.escape(rule.id)}</td><td>{html.escape(rule.status)}</td><td>{html.escape(rule.text)}</td></tr>"
        for rule in audit.rules
    )
    return f"""<h2>Privacy audit of the {audit.scope}</h2><p>Verdict: <strong>{html.escape(audit.verdict)}</strong></p>
<table><tr><th>rule</th><th>result</th><th></th></tr>{rules}</table>
"""


def _status(status: str) -> str:
    return "" if status == "measured" else f'<p class="missing">{html.escape(status)}</p>'


def _table(numbers: Sequence[ReportNumber], *, bars: bool) -> str:
    """Make a table with a row for each class and number, and a column for the reference if one is known."""
    if not numbers:
        return ""
    by_class = any(number.class_name is not None for number in numbers)
    compared = any(number.reference is not None for number in numbers)
    head = "<th>number</th>" + ("<th>class</th>" if by_class else "") + "<th>these images</th>"
    head += "<th>real</th>" if compared else ""
    rows = []
    for number in numbers:
        cells = f"<td>{html.escape(number.name)}</td>"
        if by_class:
            cells += f"<td>{html.escape(number.class_name or 'all')}</td>"
        cells += f"<td>{_value(number)}{_bar(number.value) if bars and number.unit == 'share' else ''}</td>"
        if compared:
            real = "" if number.reference is None else _text(number.reference, number.unit)
            bar = _bar(number.reference) if bars and number.unit == "share" else ""
            cells += f"<td>{real}{bar}</td>"
        rows.append(f"<tr>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _value(number: ReportNumber) -> str:
    if number.value is None:
        return f'<span class="missing">{NOT_MEASURED}</span>'
    text = _text(number.value, number.unit)
    if number.low is not None and number.high is not None:
        text += f" ({_text(number.low, number.unit)} to {_text(number.high, number.unit)})"
    return text


def _text(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value:.1%}".replace("%", " %")
    if unit == "images":
        return f"{value:,.0f}"
    return f"{value:.1f}°" if unit == "degrees" else f"{value:.4g}"


def _bar(value: float | None) -> str:
    """Draw a share as a bar. Attributes of SVG need no inline style."""
    if value is None:
        return ""
    width = round(_BAR * min(max(value, 0.0), 1.0), 1)
    return (
        f' <svg width="{_BAR}" height="8" role="img" aria-hidden="true"><rect width="{_BAR}" height="8" fill="#e4e8ee"/>'
        f'<rect width="{width}" height="8" fill="#3b6ea5"/></svg>'
    )
