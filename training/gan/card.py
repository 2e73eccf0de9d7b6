"""The model card of a trained generator: what it was really trained on, how long, on what, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(name: str, provenance: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Markdown for MODEL_CARD.md. Says nothing that is not in the provenance or in the metrics."""
    data, run = provenance["dataset"], provenance["training"]
    classes = ", ".join(f"{cls} ({count:,})" for cls, count in data["classes"].items())
    options = "\n".join(f"| `{key}` | {value} |" for key, value in run["configuration"].items())
    return f"""# {name}

A StyleGAN2-ADA generator of {run["configuration"]["resolution"]} px dermoscopy images, {_kind(data["classes"])}.

![Samples](samples.png)

One row a class, first samples of seed 0, not selected.

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
| shown to the discriminator | {run["kimg"]:,.1f} thousand images |
| hardware | {run["hardware"]} |
| wall time | {run["hours"]:,.2f} hours |
| final augmentation strength p | {run["augment_p"]:.3f} |
| dermis | {provenance["code_version"]} |

| option | value |
| --- | --- |
{options}

## Measured

{_metrics(metrics)}
"""


def _kind(classes: Mapping[str, int]) -> str:
    return f"conditional on {len(classes)} classes" if len(classes) > 1 else "unconditional"


def _metrics(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return "Nothing has been measured on this bundle yet: run `dermis evaluate`."
    space = metrics["extractor"]
    rows = [f"| all | {metrics['images']:,} | {_row(metrics)} |"]
    rows += [f"| {cls} | {part['images']:,} | {_row(part)} |" for cls, part in metrics.get("classes", {}).items()]
    table = "\n".join(rows)
    return f"""Distances between {metrics["real_images"]:,} training images and generated ones in the feature space `{space}` (truncation_psi
{metrics["truncation_psi"]:g}, seed {metrics["seed"]}). They compare with numbers of the same space only, never with a plain FID, and a distance to the
training set does not tell a good generator from one that memorises.

| class | images | FID@{space} | KID@{space} x 1000 |
| --- | --- | --- | --- |
{table}
"""


def _row(part: Mapping[str, Any]) -> str:
    return f"{part['fid']:.1f} | {1000 * part['kid']:.2f} ± {1000 * part['kid_std']:.2f}"
