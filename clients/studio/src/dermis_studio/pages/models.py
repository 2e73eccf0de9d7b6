"""The page Models: what each model is, how it was measured, and what it must not be used for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr
from dermis_client import Model, ModelProvenance

from dermis_studio import markup
from dermis_studio.scales import threshold_name
from dermis_studio.studio import PRIVATE, Studio, chosen_model, heading, html, shows_problems

_NO_INTERVAL = '<small class="ds-muted ds-none">no interval</small>'
_PICTURES = (
    "Pictures of the card are files of the bundle, which the service does not send. The page Generate makes samples."
)


def build(studio: Studio, blocks: gr.Blocks) -> None:
    """Build the page."""
    heading("Models", "Where a model comes from, how it was measured, and its limits.")
    with gr.Row(elem_classes=["ds-work"]):
        with gr.Column(elem_classes=["ds-panel", "ds-side", "ds-long"]):
            model = gr.Dropdown(label="Model", choices=[], visible=False)
            short = html(markup.progress("Loading the models", None))
        with gr.Column():
            numbers = html(elem_classes=["ds-section"])
            html(f'<div class="ds-section"><h2>Model card</h2><p class="ds-muted">{_PICTURES}</p></div>')
            card = gr.Markdown(elem_classes=["ds-panel", "ds-card-text"], sanitize_html=True)

    @shows_problems(4)
    async def load(request: gr.Request) -> Any:
        async with studio.client(request) as client:
            update, chosen = await chosen_model(studio, client, request)
            whole = await client.models.retrieve(chosen.name)
        return summary(whole), measured(whole), text_of(whole), update

    @shows_problems(3)
    async def choose(name: str, request: gr.Request) -> Any:
        if not studio.displays.changed(request, "model", name):
            return gr.skip(), gr.skip(), gr.skip()
        async with studio.client(request) as client:
            whole = await client.models.retrieve(name)
        return summary(whole), measured(whole), text_of(whole)

    blocks.load(load, None, [short, numbers, card, model], **PRIVATE)
    model.input(choose, model, [short, numbers, card], trigger_mode="always_last", **PRIVATE)


def text_of(model: Model) -> str:
    """Return the card without its title and its pictures, which are files of the bundle. Every column gets a name."""
    text = re.sub(r"^# .*\n", "", model.card or "The model has no card.", count=1)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)\n*(?:Rows .*\n+)?", "", text)
    text = re.sub(r"^\|\s*\|\s*\|(?=\n\|[ :-]+\|)", "| Property | Value |", text, flags=re.MULTILINE)
    return re.sub(r"^\|\s*\|(?=.*\n\|[ :-]+\|)", "| Measure |", text, flags=re.MULTILINE)


def summary(model: Model) -> str:
    """Return what a model is, and where it comes from."""
    rows = [
        ("Classes", escape(", ".join(model.classes))),
        ("Resolution", f"{model.resolution} x {model.resolution} px"),
        ("Trained with", f"{model.kimg:,.1f} thousand images shown" if model.kimg else "not known"),
        ("Licence", escape(model.licence or "not stated")),
        ("Digest", markup.short_digest(model.digest)),
        ("Directions", f"{len(model.directions)}"),
    ]
    if model.num_ws is not None:
        rows.append(("Latents", f"z {model.z_dim}, w {model.w_dim}, {markup.counted(model.num_ws, 'layer')}"))
    index, classifier = model.authenticity, model.classifier
    if index is not None:
        rows.append(
            (
                "Training index",
                f"{markup.counted(int(index.get('vectors', 0)), 'image')} {markup.short_digest(str(index.get('digest', '')))}",
            )
        )
    if classifier is not None:
        rows.append(("Classifier", f"{escape(classifier.architecture or '')} {markup.short_digest(classifier.digest)}"))
    rows += _provenance(model.provenance)
    credit = f'<h3>Attribution</h3><p class="ds-muted">{escape(model.attribution)}</p>' if model.attribution else ""
    return f"<h2>{escape(model.name)}</h2>{markup.facts(rows)}{credit}"


def _provenance(provenance: ModelProvenance | None) -> list[tuple[str, str]]:
    """Return names and values of what the bundle states of its origin."""
    if provenance is None:
        return [("Origin", "not stated by this version of the service")]
    dataset, training = provenance.dataset, provenance.training
    rows = []
    if dataset is not None:
        classes = ", ".join(f"{count:,} {name}" for name, count in dataset.classes.items())
        images = "" if dataset.images is None else markup.counted(dataset.images, "image")
        images += f": {classes}" if images and classes else ""
        digest = markup.short_digest(dataset.sha256) if dataset.sha256 else "no digest stated"
        rows.append(("Training set", "<br>".join(filter(None, (escape(dataset.name or ""), escape(images), digest)))))
    else:
        rows.append(("Training set", "not stated"))
    if training is not None:
        hours = "" if training.hours is None else f"{training.hours:,.1f} hours"
        # Models of earlier versions say "1 threads".
        hardware = re.sub(r"\b1 threads\b", "1 thread", training.hardware or "")
        seed = "" if training.seed is None else f"seed {training.seed}"
        rows.append(("Training", escape(", ".join(filter(None, (hardware, hours, seed))) or "not stated")))
    rows.append(("Made with", f"dermis {escape(provenance.code_version)}" if provenance.code_version else "not stated"))
    privacy = provenance.privacy
    if privacy is None:
        rows.append(("Differential privacy", "none"))
    elif privacy.epsilon is None:
        rows.append(("Differential privacy", "nothing is guaranteed"))
    else:
        delta = "" if privacy.delta is None else f", delta {privacy.delta:.2g}"
        of_unit = f" of one {privacy.unit}" if privacy.unit else ""
        rows.append(("Differential privacy", escape(f"epsilon {privacy.epsilon:.3g}{delta}{of_unit}")))
    return rows


def _changes(provenance: ModelProvenance | None) -> str:
    """Return the options that were changed during the training, closed at first."""
    training = None if provenance is None else provenance.training
    if training is None or not training.changes:
        return ""
    rows = [
        (f"{change.kimg:,.1f}", f"<code>{escape(name)}</code>", _option(change.before.get(name)), _option(value))
        for change in training.changes
        for name, value in change.after.items()
    ]
    table = markup.table(("Thousand images", "Option", "Before", "After"), rows, "Options that were changed")
    return f'<details class="ds-more"><summary>Changes during the training ({len(rows)})</summary>{table}</details>'


def _option(value: Any) -> str:
    if value is None:
        return "none"
    return escape(f"{value:g}" if isinstance(value, float) else str(value))


def measured(model: Model) -> str:
    """Return the numbers of generator and classifier with their intervals."""
    parts = []
    for name, space in sorted(_mapping(model.metrics.get("spaces")).items()):
        rows = []
        comparisons = _mapping(_mapping(space).get("comparisons"))
        for words, key in (
            ("Generated, compared with held-out images", "generated_holdout"),
            ("Training images, compared with held-out images (reference)", "training_holdout"),
            ("Generated, compared with training images", "generated_training"),
        ):
            numbers = _mapping(comparisons.get(key))
            if numbers:
                rows.append(
                    (
                        words,
                        *(_with_interval(numbers, key) for key in ("fd", "precision", "recall", "coverage")),
                    )
                )
        if rows:
            head = ("Comparison", "FD [95 % interval]", "Precision", "Recall", "Coverage")
            trained = " (the generator was trained in it, so its numbers are better than its images)"
            known = trained if _mapping(space).get("trained_discriminator") else ""
            parts.append(markup.table(head, rows, f"Images, feature space {name}{known}"))
    at = _mapping(
        _mapping(_mapping(model.classifier.metrics if model.classifier else {}).get("test")).get("at_thresholds")
    )
    thresholds = [
        (
            escape(threshold_name(name)),
            *(_range(_mapping(values).get(key)) for key in ("sensitivity", "specificity", "balanced_accuracy")),
        )
        for name, values in at.items()
    ]
    if thresholds:
        columns = ("Threshold", "Sensitivity [95 %]", "Specificity [95 %]", "Balanced accuracy [95 %]")
        parts.append(markup.table(columns, thresholds, "Classifier, on held-out images of other patients"))
    changes = _changes(model.provenance)
    if not parts:
        return markup.empty_state("Not measured", "The model has no numbers. Its card may say more.") + changes
    note = (
        '<p class="ds-muted">FD is the Fréchet distance of features: lower is better, and the reference shows what real images '
        "score. Numbers of different feature spaces cannot be compared. Where it says <i>no interval</i>, none was computed, "
        "so small differences of such numbers may be chance.</p>"
    )
    return f'<div class="ds-panel">{"".join(parts)}{note}{changes}</div>'


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _with_interval(numbers: Mapping[str, Any], key: str) -> str:
    value, interval = numbers.get(key), numbers.get(f"{key}_interval")
    if not isinstance(value, int | float):
        return ""
    shown = markup.number(float(value), 4)
    if isinstance(interval, list) and len(interval) == 2:
        return f"{shown} [{markup.number(float(interval[0]), 4)}, {markup.number(float(interval[1]), 4)}]"
    return f"{shown} {_NO_INTERVAL}"


def _range(value: Any) -> str:
    numbers = _mapping(value)
    if not isinstance(numbers.get("value"), int | float):
        return ""
    shown = f"{numbers['value']:.3f}"
    if isinstance(numbers.get("low"), int | float) and isinstance(numbers.get("high"), int | float):
        return f"{shown} [{numbers['low']:.3f}, {numbers['high']:.3f}]"
    return f"{shown} {_NO_INTERVAL}"
