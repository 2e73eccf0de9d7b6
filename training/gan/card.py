"""The model card of a trained generator: its training data, training and measurements."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dermis.bundle import trained_on
from training.evaluation.record import discriminator_space, read_metrics
from training.evaluation.table import copies, held_out_text, path_length_text, space_tables
from training.gan.private.record import privacy_section

# Ends at the next section, or at the comment with which a section of `dermis.bundle.card` begins.
_MEASURED = re.compile(r"^## Measured\n.*?(?=^## |^<!-- |\Z)", re.MULTILINE | re.DOTALL)


def model_card(name: str, provenance: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Markdown for MODEL_CARD.md, from the provenance and the metrics alone."""
    data, run = provenance["dataset"], provenance["training"]
    options = run["configuration"]
    classes = ", ".join(f"{cls} ({count:,})" for cls, count in data["classes"].items())
    rows = "\n".join(f"| `{key}` | {value} |" for key, value in options.items())
    return f"""# {name}

A StyleGAN2-ADA generator of {options["resolution"]} px dermoscopy images, {_kind(options["c_dim"])}.

![Samples](samples.webp)

{_order(data["classes"], options["c_dim"])}

## Use

For research on synthetic dermoscopy. **Not a medical device**: images are synthetic, carry the biases of the training
data (body sites, skin types, black frames and rulers that go with a class) and must not be used for diagnosis. This
card does not show whether samples are copies of training images; test that before you share a dataset.

## Training data

| | |
| --- | --- |
| folder | {data["name"]} |
| images | {data["images"]:,}: {classes} |
| licence | {provenance["licence"]} |
| attribution | {provenance["attribution"] or "not stated"} |
{_identity(data)}
Weights trained on these images carry the same licence conditions.

## Training

| | |
| --- | --- |
| shown to the discriminator | {provenance["kimg"]:,.1f} thousand images |
| hardware | {run["hardware"]} |
| wall time | {run["hours"]:,.2f} hours |
| final augmentation strength p | {run["augment_p"]:.3f} |
{_start(run.get("started_from", {}))}| dermis | {provenance["code_version"]} |

| option | value |
| --- | --- |
{rows}
{_changes(run.get("changes", ()))}
{_privacy(provenance)}{_measured(metrics, provenance)}"""


def renewed_card(card: str, provenance: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Replace the section "Measured" of a card, or add it. The rest of the card is kept, also if it was edited by hand."""
    section = _measured(metrics, provenance)
    old = _MEASURED.search(card)
    if old is None:
        return f"{card.rstrip()}\n\n{section}"
    after = card[old.end() :]
    return card[: old.start()] + section + ("\n" + after if after else "")


def _section(provenance: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    # In bundles of other programs the section can be missing or of another type.
    section = provenance.get(key)
    return section if isinstance(section, Mapping) else {}


def _identity(data: Mapping[str, Any]) -> str:
    # The images of a federation are not known in one place, so they have no digest.
    return f"| sha256 of ids, classes and files | `{data['sha256']}` |\n" if "sha256" in data else ""


def _privacy(provenance: Mapping[str, Any]) -> str:
    return f"{privacy_section(provenance['privacy'])}\n" if "privacy" in provenance else ""


def _kind(c_dim: int) -> str:
    return f"conditional on {c_dim} classes" if c_dim else "unconditional"


def _start(source: Mapping[str, Any]) -> str:
    if not source:
        return ""
    shares = f"{source['share_of_G']:.0%} of the generator, {source['share_of_D']:.0%} of the discriminator"
    return f"| started with the weights of | {source['name']} (`{source['digest'][:16]}`): {shares} |\n"


def _changes(changes: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"| {change['kimg']:,.1f} | `{option}` | {before} | {change['after'][option]} |"
        for change in changes
        for option, before in change["before"].items()
    ]
    if not rows:
        return ""
    table = "\n".join(rows)
    return f"""
Options that were changed during training:

| at kimg | option | before | after |
| --- | --- | --- | --- |
{table}
"""


def _order(classes: Mapping[str, int], c_dim: int) -> str:
    rows = f"Rows from top to bottom: {', '.join(classes)}. " if c_dim else ""
    return f"{rows}The first samples of seed 0 at truncation_psi 1 and noise_mode random, not selected."


def _measured(metrics: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    return f"## Measured\n\n{_metrics(metrics, provenance)}\n"


def _metrics(metrics: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    measured = read_metrics(metrics)
    if not measured["spaces"]:
        return "Nothing has been measured on this bundle yet: run `dermis evaluate`."
    # Metrics of training and of early versions do not state it.
    measured.setdefault("real_is_training_set", measured.get("real_sha256") == trained_on(provenance))
    kind = "training images" if measured["real_is_training_set"] else "real images, which are not the training set,"
    level = f" Brackets are {measured['interval_level']:.0%} intervals." if "interval_level" in measured else ""
    parts = [
        f"{measured['images']:,} generated images (truncation_psi {measured['truncation_psi']:g}, seed {measured['seed']}, "
        f"{measured['noise_mode']} noise) and {measured['real_images']:,} {kind} were compared by the features of a "
        f"network, in {_count(measured['spaces'])}.{level} Compare these numbers only with those of the same space and of "
        "the same number of images."
    ]
    if held_out := held_out_text(measured):
        parts += [held_out, _COLUMNS if _has_reference(measured) else ""]
    for table in space_tables(measured, discriminator_space(provenance)):
        parts += [f"### Feature space `{table.space}`", table.remark, _markdown(table.rows)]
        if table.class_rows:
            parts += ["By class:", _markdown(table.class_rows)]
    parts += ["### Copies of training images", *copies(measured)]
    if lengths := path_length_text(measured):
        parts += ["### Smoothness", lengths]
    return "\n\n".join(part for part in parts if part)


_COLUMNS = (
    "Every column compares two sets of the same number of images. The column with real images instead of generated ones "
    "is the reference: it shows what real images score, and a generator cannot be expected to score better."
)


def _has_reference(metrics: Mapping[str, Any]) -> bool:
    return any("training_holdout" in space["comparisons"] for space in metrics["spaces"].values())


def _count(spaces: Mapping[str, Any]) -> str:
    return "one feature space" if len(spaces) == 1 else f"{len(spaces)} feature spaces"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))
