"""The card of a trained classifier: its use, training data, training and measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dermis.bundle.classifier import NOTICE, ClassifierDescription
from training.classifier.evaluate import MIN_GROUP_IMAGES

_METRICS = {
    "auc": "area under the ROC curve",
    "accuracy": "accuracy at 0.5",
    "balanced_accuracy": "balanced accuracy at the default threshold",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity, on the test part's own ROC curve",
    "brier": "Brier score",
    "calibration_error": "expected calibration error, 15 bins",
}
_ATTRIBUTES = {
    "source": "Source",
    "sex": "Sex",
    "age": "Age (years)",
    "site": "Site",
    "skin_type": "Skin type",
    "skin_tone": "Skin tone",
}


def classifier_card(name: str, description: ClassifierDescription) -> str:
    """Markdown for CLASSIFIER_CARD.md, from the description alone."""
    origin, measured = description.provenance, description.metrics
    test, validation, run = measured["test"], measured["validation"], origin["training"]
    raw = test["uncalibrated"]
    alone = f"; {test['without_ids']:,} of these are images without an id" if test.get("without_ids") else ""
    options = "\n".join(f"| `{key}` | {value} |" for key, value in run["configuration"].items())
    return f"""# {name}

**{NOTICE}**

Distinguishes malignant (melanoma) from benign (any other diagnosis) in dermoscopy images: {description.architecture} on
{description.input.size} px, {description.feature_dim} features, weights stored as {description.weights_dtype}.

## Use

For research on dermoscopy and on the value of synthetic data. Not for diagnosis, triage or any decision about a person.
It was trained on dermoscopy of single lesions. For anything else (clinical photographs, other skin types, other devices, no
lesion at all) its numbers mean nothing, and it gives no warning. It can depend on what is next to the lesion (frame,
ruler, ink) if that occurs more often with one class in the training images.

Melanoma is only one of the cancers: basal cell carcinoma and others count as benign here.

## Trained on

{_data(origin)}

## Training

| | |
| --- | --- |
| scenario | {origin["scenario"]} |
| first weights | {_start(run["weights"])} |
{_length(run)}| hardware | {run["hardware"]} |
| wall time | {origin["hours"]:,.2f} hours |
| dermis | {origin["code_version"]} |

| option | value |
| --- | --- |
{options}

## Measured

On {test["images"]:,} real images of {test["patients"]:,} patients (or lesions, if patients are not known{alone}) that were
not used in training, {test["positive"]:,} of them malignant. Intervals are 95 %, by bootstrap over patients. They do not
cover differences between this collection and others.

| metric | value | 95 % |
| --- | --- | --- |
{_rows(_METRICS, test["metrics"])}

Probabilities are calibrated by temperature scaling on the validation part, T = {measured["temperature"]:.3f}; without it
the calibration error is {raw["calibration_error"]["value"]:.3f}, the Brier score {raw["brier"]["value"]:.3f}.
They are valid where malignant images are as frequent as here ({test["positive"] / test["images"]:.1%}).

## Thresholds

On the calibrated probability, chosen on {validation["images"]:,} validation images ({validation["positive"]:,} malignant); the
default is `{measured["default_threshold"]}`. On the test part:

| threshold | value | sensitivity | specificity | accuracy |
| --- | --- | --- | --- | --- |
{_thresholds(measured)}

## By group

On the test part; sensitivity and specificity at the default threshold. A group with fewer than {MIN_GROUP_IMAGES} images of
either class is too small for numbers.

{_breakdown(test["breakdown"])}
"""


def with_interval(estimate: Mapping[str, float]) -> str:
    """A number with its interval, as in "0.912 (0.88 to 0.94)"."""
    return f"{estimate['value']:.3f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def _data(origin: Mapping[str, Any]) -> str:
    data = origin["dataset"]
    rows = [
        f"| {part} | {counts['benign']:,} | {counts['malignant']:,} | {_identity(counts)} |"
        for part, counts in data["parts"].items()
    ]
    lines = [
        "| | |",
        "| --- | --- |",
        f"| images | {data['name']}, divided {data['split']} |",
        f"| licence | {origin['licence']} |",
        f"| attribution | {origin['attribution'] or 'not stated'} |",
        "",
        "| real part | benign | malignant | sha256 of ids, classes and files |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "Weights trained on these images carry the same licence conditions.",
    ]
    if data["configuration"] == "synthetic":
        lines.append(
            "The classifier was trained on the synthetic images below, and on no real image of the training part."
        )
    if data["synthetic"]:
        lines += ["", "| synthetic images | class | number | identity |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {source['kind']} {source['name']} | {source['class']} | {source['images']:,} | `{source['digest'][:16]}` |"
            for source in data["synthetic"]
        ]
        lines += ["", _warning(data["generator_saw_training_part_only"])]
    return "\n".join(lines)


def _identity(counts: Mapping[str, Any]) -> str:
    return f"`{counts['sha256'][:16]}`" if "sha256" in counts else "not known here"


def _length(run: Mapping[str, Any]) -> str:
    if "epochs" not in run:  # a federation has rounds instead
        return ""
    return (
        f"| epochs | {run['epochs']}, the best by {run['configuration']['monitor']} on validation was "
        f"{run['best_epoch']} |\n"
    )


def _warning(training_part_only: bool) -> str:
    if training_part_only:
        return "The generators were trained on exactly the real training part above, and on no test image."
    return (
        "**The generators were not trained on exactly the training part above, or their training images are not known. If "
        "these include images of the test part, the numbers below are too high.**"
    )


def _start(weights: str) -> str:
    return {"imagenet": "weights of ImageNet", "none": "random weights"}.get(weights, f"the weights {weights}")


def _rows(names: Mapping[str, str], estimates: Mapping[str, Mapping[str, float]]) -> str:
    return "\n".join(
        f"| {title} | {estimates[key]['value']:.3f} | {estimates[key]['low']:.3f} to {estimates[key]['high']:.3f} |"
        for key, title in names.items()
    )


def _thresholds(measured: Mapping[str, Any]) -> str:
    rows = []
    for name, estimates in measured["test"]["at_thresholds"].items():
        rates = " | ".join(with_interval(estimates[rate]) for rate in ("sensitivity", "specificity", "accuracy"))
        rows.append(f"| `{name}` | {measured['thresholds'][name]:.4f} | {rates} |")
    return "\n".join(rows)


def _breakdown(groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    tables = []
    for attribute, group_rows in groups.items():
        rows = [
            f"| {_ATTRIBUTES.get(attribute, attribute)} | images | malignant | AUC | sensitivity | specificity |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for value, row in group_rows.items():
            rates = ["too few", "", ""]
            if "too_few" not in row:
                rates = [with_interval(row[rate]) for rate in ("auc", "sensitivity", "specificity")]
            rows.append(f"| {value} | {row['images']:,} | {row['positive']:,} | {' | '.join(rates)} |")
        tables.append("\n".join(rows))
    return "\n\n".join(tables)
