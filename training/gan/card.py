"""The model card of a trained generator: what it was really trained on, how long, on what, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def model_card(name: str, provenance: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Markdown for MODEL_CARD.md. Says nothing that is not in the provenance or in the metrics."""
    data, run = provenance["dataset"], provenance["training"]
    options = run["configuration"]
    classes = ", ".join(f"{cls} ({count:,})" for cls, count in data["classes"].items())
    rows = "\n".join(f"| `{key}` | {value} |" for key, value in options.items())
    return f"""# {name}

A StyleGAN2-ADA generator of {options["resolution"]} px dermoscopy images, {_kind(options["c_dim"])}.

![Samples](samples.png)

{_order(data["classes"], options["c_dim"])}

## Use

For research on synthetic dermoscopy. **Not a medical device**: images are synthetic, carry the biases of the training
data (body sites, skin types, black frames and rulers that go with a class) and must not be used for diagnosis. Whether
a sample is a copy of a training image has not been proved by this card; test it before you share a data set.

## Training data

| | |
| --- | --- |
| folder | {data["name"]} |
| images | {data["images"]:,}: {classes} |
| licence | {provenance["licence"]} |
| attribution | {provenance["attribution"] or "not stated"} |
| sha256 of ids, classes and files | `{data["sha256"]}` |

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
## Measured

{_metrics(metrics)}
"""


def _kind(c_dim: int) -> str:
    return f"conditional on {c_dim} classes" if c_dim else "unconditional"


def _start(source: Mapping[str, Any]) -> str:
    if not source:
        return ""
    shares = f"{source['share_of_G']:.0%} of the generator, {source['share_of_D']:.0%} of the discriminator"
    return f"| began with the weights of | {source['name']} (`{source['digest'][:16]}`): {shares} |\n"


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
Options that were changed on the way:

| at kimg | option | before | after |
| --- | --- | --- | --- |
{table}
"""


def _order(classes: Mapping[str, int], c_dim: int) -> str:
    rows = f"Rows from top to bottom: {', '.join(classes)}. " if c_dim else ""
    return f"{rows}The first samples of seed 0 at truncation_psi 1, not selected."


def _metrics(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return "Nothing has been measured on this bundle yet: run `dermis evaluate`."
    space = metrics["extractor"]
    rows = [f"| all | {metrics['images']:,} | {_row(metrics)} |"]
    rows += [f"| {cls} | {part['images']:,} | {_row(part)} |" for cls, part in metrics.get("classes", {}).items()]
    table = "\n".join(rows)
    real, psi = f"{metrics['real_images']:,} training images", f"{metrics['truncation_psi']:g}"
    return f"""Distances between {real} and generated ones (truncation_psi {psi}, seed {metrics["seed"]}) in
the feature space `{space}`. They compare with numbers of the same space only, never with a plain FID,
and a distance to the training set does not tell a good generator from one that memorises.

| class | images | FID@{space} | KID@{space} x 1000 |
| --- | --- | --- | --- |
{table}
"""


def _row(part: Mapping[str, Any]) -> str:
    return f"{part['fid']:.1f} | {1000 * part['kid']:.2f} ± {1000 * part['kid_std']:.2f}"
