"""The model card of a trained generator: what it was really trained on, how long, on what, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.evaluation.table import table_rows

MEMORISES_BELOW = 0.001  # p-value of the test; see docs/evaluation.md


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

{_metrics(metrics, options.get("projected", False))}
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


def _metrics(metrics: Mapping[str, Any], projected: bool) -> str:
    if not metrics:
        return "Nothing has been measured on this bundle yet: run `dermis evaluate`."
    space, psi = metrics["extractor"], f"{metrics['truncation_psi']:g}"
    # Of bundles from before this was noted, only training images were ever measured.
    kind = "training images" if metrics.get("real_is_training_set", True) else "real images, not the training set,"
    head, *body = table_rows(metrics)
    rows = [head, ["---"] * len(head), *body]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    level = f", with {metrics['interval_level']:.0%} intervals" if "interval_level" in metrics else ""
    generated = f"{metrics['images']:,} generated images (truncation_psi {psi}, seed {metrics['seed']})"
    return f"""{generated} against {metrics["real_images"]:,} {kind} in the feature
space `{space}`{level}. They compare with numbers of the same space only, never with a plain FID.{_flattery(metrics, projected)}

{table}

{_memorising(metrics)}"""


def _flattery(metrics: Mapping[str, Any], projected: bool) -> str:
    if not (projected and metrics["extractor"] == "lite0"):
        return ""
    return " The generator was trained to please this very space, which flatters it here: see docs/training.md."


def _memorising(metrics: Mapping[str, Any]) -> str:
    if "holdout" not in metrics:
        return (
            "Nothing was held out, so nothing was tested for memorising: a distance to the training set does not tell a "
            "good generator from one that copies."
        )
    held = metrics["holdout"]
    test, patients = held["test"], held.get("patients")
    of_patients = f" of {patients:,} patients or lesions" if patients else ""
    verdict = (
        "This generator memorises: it is nearer to its training images than chance allows."
        if test["p_value"] < MEMORISES_BELOW
        else "No sign of memorising was found; a few copies among many samples can escape the test."
    )
    return f"""{verdict} {test["nearer_train"]:.1%} of the generated images are nearer to a training image than to
any of {held["images"]:,} held-out ones{of_patients}, where {test["expected_nearer_train"]:.1%} are expected of an
honest generator (p = {test["p_value"]:.2g}, {test["permutations"]:,} permutations)."""
