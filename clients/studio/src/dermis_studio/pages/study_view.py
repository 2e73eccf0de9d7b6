"""How the page Reader study shows studies: the list, one of them in each of its states, its results."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from urllib.parse import urlsplit

from dermis_client import Invitation, NewInvitation, ReaderResults, Study, StudyRate, StudyRates, StudyResults

from dermis_studio import markup
from dermis_studio.pages.dataset_view import when
from dermis_studio.site import is_local

_STATES = {
    "collecting": ("Collecting images", "ds-wait", "○"),
    "preparing": ("Being prepared", "ds-run", "◐"),
    "open": ("Open", "ds-good", "●"),
    "closed": ("Closed", "ds-wait", "■"),
    "failed": ("Failed", "ds-bad", "✕"),
}
NOTHING = markup.empty_state(
    "No study selected", "Create a study, or open one of the list below. Readers need only a link, no key."
)
_LINKS = (
    "Whoever has a link can see the images and answer in the place of its reader. Send each link to one person only, by a way "
    "that you trust with images of patients. It is shown once."
)
_LOCAL_LINK = (
    "The link works on this machine only. For readers elsewhere, open the studio under the public address of the service, or "
    "start dermis studio with --public-url, and create another link."
)


def state(study: Study) -> str:
    """Return the state in words, with a mark that does not depend on colours."""
    words, kind, mark = _STATES.get(study.state, (study.state, "ds-wait", "○"))
    return f'<span class="ds-state {kind}"><i aria-hidden="true">{mark}</i>{escape(words)}</span>'


def table(studies: Sequence[Study], opened: str | None) -> str:
    """Return the list of studies.

    Args:
        studies: The studies, newest first.
        opened: Id of the one that is shown above the list.
    """
    if not studies:
        return markup.empty_state("No studies yet", "Those that you and others of your tenant create appear here.")
    rows = []
    for study in studies:
        here = ' aria-current="true"' if study.id == opened else ""
        button = _action("show", study.id, study.name, kind="ds-link", more=here)
        rows.append((state(study), button, f"{study.images:,}", f"{study.readers:,}", f"{study.answers:,}"))
    return markup.table(
        ("State", "Study", "Images", "Readers", "Answers"), rows, "Studies of your tenant, newest first"
    )


def described(
    study: Study,
    invitations: Sequence[Invitation] = (),
    results: StudyResults | None = None,
    invited: NewInvitation | None = None,
    message: str = "",
) -> str:
    """Return everything about one study.

    Args:
        study: The study.
        invitations: Its invitations.
        results: Its results, once there are answers.
        invited: An invitation that was just created, with its link.
        message: HTML that is shown first.
    """
    buttons = ""
    if study.state == "open":
        question = "Close the study? Its readers cannot answer any more, and it cannot be opened again."
        buttons += _action("refresh", study.id, "Refresh") + _action(
            "close", study.id, "Close study", question=question
        )
    question = "Delete this study with its images, invitations and answers? This cannot be undone."
    words = "Cancel and delete" if study.state == "preparing" else "Delete"
    buttons += _action("delete", study.id, words, kind="ds-button ds-danger", question=question)
    top = (
        f'<div class="ds-top"><h2>{escape(study.name)}</h2><div class="ds-actions">{state(study)}{buttons}</div></div>'
    )
    progress = ""
    if study.state == "failed":
        title = "The images of the study cannot be made"
        progress = markup.failure_in_words(study.error or "", title, "study", "create the study")
    elif study.state == "preparing":
        text = f"{study.prepared:,} of {markup.counted(study.images, 'image is', 'images are')} ready"
        progress = markup.progress(text, study.prepared / max(1, study.images))
    elif study.state == "collecting":
        progress = _collection(study)
    shown = ""
    if results is not None and results.answers:
        shown = _results(study, results)
    elif study.state in ("open", "closed"):
        shown = "<h3>Results</h3><p>There are no answers yet. Results appear here as soon as a reader has answered.</p>"
    invite = _invite(study, invited) if study.state in ("preparing", "open") else ""
    # Each part has its place in every state. The page is shown again while somebody uses it, and elements that are at another
    # place then are replaced, with what was entered into them.
    parts = (top, message, progress, invite, _invitations(study, invitations), shown, _facts(study))
    places = "".join(f"<div>{part}</div>" for part in parts)
    return f'<div class="ds-study" data-address="studies?study={escape(study.id)}">{places}</div>'


def _facts(study: Study) -> str:
    classes = "; ".join(
        f"{escape(name or 'all')}: {images.real} real, {images.generated} generated"
        for name, images in study.classes.items()
        if images.real is not None
    )
    rows = [
        ("Images", f"{study.images:,}, half of them real, {study.size} x {study.size} px"),
        ("Real images", "uploaded for this study" if study.real_images == "uploads" else "folder of the service"),
        ("Model", f"{escape(study.model.name)} {markup.short_digest(study.model.digest)}"),
        ("Created", escape(when(study.created_at))),
        ("Deleted on", f"{escape(when(study.expires_at))}, with its images and answers"),
        ("Id", f"<code>{escape(study.id)}</code>"),
    ]
    if classes:
        rows.insert(1, ("Classes", classes))
    return f'<details class="ds-more"><summary>About this study</summary>{markup.facts(rows)}</details>'


def _collection(study: Study) -> str:
    need = study.images // 2
    got = sum(images.uploaded or 0 for images in study.classes.values())
    fields = ""
    for number, (name, images) in enumerate(study.classes.items()):
        label = f"Real images: {name}" if name else "Real images"
        fields += (
            f'<div class="ds-collect"><label for="study-files-{number}">{escape(label)}</label>'
            f'<span class="ds-muted">{images.uploaded or 0:,} uploaded</span>'
            f'<input type="file" id="study-files-{number}" multiple accept="image/png,image/jpeg,image/webp" '
            f'data-study-upload="{escape(study.id)}" data-class="{escape(name)}"></div>'
        )
    ready = got >= need
    button = _action(
        "open", study.id, "Choose the images and open the study", kind="ds-button ds-strong", disabled=not ready
    )
    text = (
        f"{markup.counted(got, 'real image is', 'real images are')} uploaded; "
        f"{markup.counted(need, 'of them is', 'of them are')} chosen, and as many are generated with the same classes."
        if ready
        else f"{markup.counted(need, 'real image is', 'real images are')} needed; {markup.counted(got, 'is', 'are')} uploaded. "
        f"Upload {need - got:,} more."
    )
    return (
        '<div class="ds-kept"><h3>What is kept, and who sees it</h3><ul>'
        f"<li>The largest centred square of each image, at {study.size} px, until the study is deleted.</li>"
        "<li>Everybody with a link of the study sees the chosen images. Names of files and metadata are not sent.</li>"
        "<li>Upload only images that may be shown to the readers.</li></ul></div>"
        f'{fields}<p data-study-status role="status" class="ds-line">{escape(text)}</p>'
        f'<progress data-study-progress class="ds-upload" hidden aria-label="Uploaded images"></progress>'
        f'<div class="ds-actions">{button}'
        '<button type="button" class="ds-button" data-study-cancel hidden>Stop the upload</button></div>'
    )


def _invite(study: Study, invited: NewInvitation | None) -> str:
    shown = ""
    if invited is not None:
        shown = (
            markup.success(f"The link for {invited.label} is below. It is not shown again.")
            + markup.code_block("Link", invited.url)
            + f'<p class="ds-muted">{escape(_LINKS)}</p>'
            + (
                f'<p class="ds-alert">{escape(_LOCAL_LINK)}</p>'
                if is_local(urlsplit(invited.url).hostname or "")
                else ""
            )
        )
    made = "" if invited is None else f' data-made="{escape(invited.id)}"'
    return (
        f"<h3>Invite a reader</h3><div>{shown}</div>"
        f'<form class="ds-invite" data-form="invite" data-id="{escape(study.id)}"{made}>'
        '<label>Name or code<input name="label" required maxlength="100" autocomplete="off"></label>'
        '<label>Link works for (days)<input name="days" type="number" min="1" max="3650" value="30" required></label>'
        '<button class="ds-button ds-strong" type="submit">Create link</button></form>'
    )


def _invitations(study: Study, invitations: Sequence[Invitation]) -> str:
    if not invitations:
        return ""
    rows = []
    for invitation in invitations:
        share = f"{invitation.answered:,} of {study.images:,}"
        bar = (
            f'<progress max="{study.images}" value="{invitation.answered}" aria-label="{escape(invitation.label)}"></progress> '
            f"{share}"
        )
        revoke = ""
        if invitation.state == "active":
            question = f"Revoke the link of {invitation.label}? It stops working at once; the answers are kept."
            revoke = _action(
                "revoke", study.id, "Revoke", question=question, more=f' data-name="{escape(invitation.id)}"'
            )
        rows.append(
            (
                escape(invitation.label),
                escape(invitation.state),
                bar,
                escape(when(invitation.last_used_at)) or "never",
                escape(when(invitation.expires_at)),
                revoke,
            )
        )
    head = ("Reader", "Link", "Answered", "Last used", "Works until", "Action")
    return markup.table(head, rows, "Readers")


def _results(study: Study, results: StudyResults) -> str:
    rows = [("All readers", results.rates, results.answers)]
    rows += [(name, rates, rates.accuracy.total) for name, rates in results.classes.items()]
    intervals = [("All readers", results.rates.accuracy)]
    intervals += [(f"Class {name}", rates.accuracy) for name, rates in results.classes.items()]
    intervals += [(reader.label, reader.rates.accuracy) for reader in results.readers]
    overall = markup.table(
        ("", "Right", "Sensitivity", "Specificity", 'Called "generated"', "Answers"),
        [(escape(name), *(_rate(rate) for rate in _four(rates)), f"{count:,}") for name, rates, count in rows],
        "All readers together, with 95 % intervals",
    )
    readers = markup.table(
        ("Reader", "Right", "Sensitivity", "Specificity", "AUC", "d'", "Median time", "Answers"),
        [_reader_row(reader) for reader in results.readers],
        "Each reader",
    )
    p_value = "" if results.p_value is None else f" Test against chance: p = {results.p_value:.2g}."
    exports = "".join(
        markup.file_link(f"study-answers/{study.id}.{kind}", f"Answers as {kind.upper()}", kind="ds-button")
        for kind in ("csv", "json")
    )
    return (
        f"<h3>Results so far</h3>{interval_plot(intervals)}"
        f'<p class="ds-line">Chance is 50 %. Sensitivity: generated images that were called generated. Specificity: real ones '
        f"that were called real.{p_value}</p>{overall}{readers}{_agreement(results)}"
        f'<div class="ds-actions">{exports}</div>'
    )


def _four(rates: StudyRates) -> tuple[StudyRate, StudyRate, StudyRate, StudyRate]:
    return rates.accuracy, rates.sensitivity, rates.specificity, rates.called_generated


def _reader_row(reader: ReaderResults) -> tuple[str, ...]:
    rates = reader.rates
    return (
        escape(reader.label),
        _rate(rates.accuracy),
        _rate(rates.sensitivity),
        _rate(rates.specificity),
        "" if reader.auc is None else f"{reader.auc:.2f}",
        f"{reader.d_prime:.2f}",
        f"{reader.median_seconds:.1f} s",
        f"{reader.answered:,}",
    )


def _rate(rate: StudyRate) -> str:
    if rate.share is None or rate.low is None or rate.high is None:
        return "no answers"
    return f"{100 * rate.share:.0f} % <small>[{100 * rate.low:.0f}, {100 * rate.high:.0f}]</small>"


def _agreement(results: StudyResults) -> str:
    agreement = results.agreement
    if agreement is None:
        return '<p class="ds-line">Agreement is shown once two readers have answered.</p>'
    rows = [
        ("Images that all answered", f"{agreement.images:,}"),
        (
            "Same answer",
            "" if agreement.observed is None else f"{100 * agreement.observed:.0f} % of the pairs of readers",
        ),
        ("Fleiss' kappa", _kappa(agreement.fleiss_kappa)),
        *((f"{pair.first} and {pair.second}", f"Cohen's kappa {_kappa(pair.kappa)}") for pair in agreement.pairs),
    ]
    return f"<h3>Agreement</h3>{markup.facts(rows)}"


def _kappa(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"


def interval_plot(rows: Sequence[tuple[str, StudyRate]]) -> str:
    """Draw shares of right answers with their intervals, and the line of chance.

    Args:
        rows: Name and share of each row; those without answers are left out.
    """
    known = [(name, rate) for name, rate in rows if rate.share is not None]
    left, width, step = 150, 300, 24
    bottom = step * len(known)
    drawn = ""
    for number, (name, rate) in enumerate(known):
        y = step * number + step / 2
        x = [left + width * (value or 0.0) for value in (rate.low, rate.share, rate.high)]
        short = name if len(name) <= 20 else f"{name[:19]}…"
        drawn += (
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(short)}</text>'
            f'<line x1="{x[0]:.1f}" x2="{x[2]:.1f}" y1="{y}" y2="{y}" stroke="var(--ds-accent)" stroke-width="3"/>'
            f'<circle cx="{x[1]:.1f}" cy="{y}" r="5" fill="var(--ds-mark)"/>'
        )
    scale = "".join(
        f'<text x="{left + width * share / 100}" y="{bottom + 18}" text-anchor="middle">{share} %</text>'
        for share in (0, 25, 50, 75, 100)
    )
    return (
        f'<div class="ds-scale ds-intervals"><svg viewBox="0 0 {left + width + 24} {bottom + 24}" role="img" '
        f'aria-label="Shares of right answers with 95 % intervals; the table below has the numbers">'
        f'<line x1="{left + width / 2}" x2="{left + width / 2}" y1="0" y2="{bottom}" stroke="var(--ds-control)" '
        f'stroke-dasharray="4 4"/><line x1="{left}" x2="{left + width}" y1="{bottom}" y2="{bottom}" '
        f'stroke="var(--ds-control)"/>{drawn}{scale}</svg></div>'
    )


def _action(
    act: str,
    study_id: str,
    words: str,
    *,
    kind: str = "ds-button",
    question: str = "",
    more: str = "",
    disabled: bool = False,
) -> str:
    confirm = f' data-confirm="{escape(question, quote=True)}"' if question else ""
    off = " disabled" if disabled else ""
    return (
        f'<button type="button" class="{kind}" data-act="{act}" data-id="{escape(study_id)}"{confirm}{more}{off}>'
        f"{escape(words)}</button>"
    )
