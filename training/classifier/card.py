"""The card of a trained classifier: what it is for, what it was trained on, and every number that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dermis.bundle.classifier import NOTICE, ClassifierDescription
from training.classifier.evaluate import FEWEST

_METRICS = {
    "auc": "area under the ROC curve",
    "accuracy": "accuracy at 0.5",
    "balanced_accuracy": "balanced accuracy at the default threshold",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity, on the test part's own ROC curve",
    "brier": "Brier score",
    "calibration_error": "expected calibration error, 15 bins",
}
_ATTRIBUTES = {"source": "Source", "sex": "Sex", "age": "Age (years)", "site": "Site"}


def classifier_card(name: str, described: ClassifierDescription) -> str:
    """Markdown for CLASSIFIER_CARD.md. Says nothing that is not in the description."""
    origin, measured = described.provenance, described.metrics
    test, validation, run = measured["test"], measured["validation"], origin["training"]
    raw = test["uncalibrated"]
    options = "\n".join(f"| `{key}` | {value} |" for key, value in run["configuration"].items())
    return f"""# {name}

**{NOTICE}**

Tells malignant (melanoma) from benign (any other diagnosis) in dermoscopy images: {described.architecture} on
{described.input.size} px, {described.feature_dim} features, weights stored as {described.weights_dtype}.

## Use

For research on dermoscopy and on what synthetic data is worth. Not for diagnosis, triage or any decision about a person.
It knows dermoscopy of single lesions like those that it was trained on; of anything else (clinical photographs, other
skin types, other devices, no lesion at all) its numbers mean nothing, and it does not say so. It may go by what is beside
the lesion (frame, ruler, ink) where that goes with a class in the training images.

Melanoma is only one of the cancers: basal cell carcinoma and others count as benign here.

## Trained on

{_data(origin)}

## Training

| | |
| --- | --- |
| scenario | {origin["scenario"]} |
| began with | {_start(run["weights"])} |
{_length(run)}| hardware | {run["hardware"]} |
| wall time | {origin["hours"]:,.2f} hours |
| dermis | {origin["code_version"]} |

| option | value |
| --- | --- |
{options}

## Measured

On {test["images"]:,} real images of {test["patients"]:,} patients (or lesions, where patients are not known) that had no
part in training, {test["positive"]:,} of them malignant. Intervals are 95 %, by bootstrap over patients. They do not cover
what another collection would bring.

| metric | value | 95 % |
| --- | --- | --- |
{_rows(_METRICS, test["metrics"])}

Probabilities are calibrated by temperature scaling on the validation part, T = {measured["temperature"]:.3f}; without it
the calibration error is {raw["calibration_error"]["value"]:.3f}, the Brier score {raw["brier"]["value"]:.3f}.
They hold where malignant images are as frequent as here ({test["positive"] / test["images"]:.1%}).

## Thresholds

On the calibrated probability, chosen on {validation["images"]:,} validation images ({validation["positive"]:,} malignant); the
default is `{measured["default_threshold"]}`. On the test part:

| threshold | value | sensitivity | specificity | accuracy |
| --- | --- | --- | --- | --- |
{_thresholds(measured)}

## By group

On the test part; sensitivity and specificity at the default threshold. A group with fewer than {FEWEST} images of either
class is too small for numbers.

{_breakdown(test["breakdown"])}
"""


def shown(estimate: Mapping[str, float]) -> str:
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
        lines.append("No real image of the training part was learnt from: only the synthetic ones below.")
    if data["synthetic"]:
        lines += ["", "| synthetic images | class | number | identity |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {each['kind']} {each['name']} | {each['class']} | {each['images']:,} | `{each['digest'][:16]}` |"
            for each in data["synthetic"]
        ]
        lines += ["", _warning(data["generator_saw_training_part_only"])]
    return "\n".join(lines)


def _identity(counts: Mapping[str, Any]) -> str:
    return f"`{counts['sha256'][:16]}`" if "sha256" in counts else "not known here"


def _length(run: Mapping[str, Any]) -> str:
    """Epochs; a federation has none, and tells of its rounds."""
    if "epochs" not in run:
        return ""
    return (
        f"| epochs | {run['epochs']}, the best by {run['configuration']['monitor']} on validation was "
        f"{run['best_epoch']} |\n"
    )


def _warning(clean: bool) -> str:
    if clean:
        return "The generators were trained on exactly the real training part above: no test image is behind them."
    return (
        "**The generators were trained on other images than exactly the training part above, or that is not known: they "
        "may have seen images of the test part, and then the numbers below are too good.**"
    )


def _start(weights: str) -> str:
    return {"imagenet": "weights of ImageNet", "none": "random weights"}.get(weights, f"the weights {weights}")


def _rows(names: Mapping[str, str], found: Mapping[str, Mapping[str, float]]) -> str:
    return "\n".join(
        f"| {title} | {found[key]['value']:.3f} | {found[key]['low']:.3f} to {found[key]['high']:.3f} |"
        for key, title in names.items()
    )


def _thresholds(measured: Mapping[str, Any]) -> str:
    rows = []
    for name, found in measured["test"]["at_thresholds"].items():
        rates = " | ".join(shown(found[rate]) for rate in ("sensitivity", "specificity", "accuracy"))
        rows.append(f"| `{name}` | {measured['thresholds'][name]:.4f} | {rates} |")
    return "\n".join(rows)


def _breakdown(groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    tables = []
    for attribute, found in groups.items():
        rows = [
            f"| {_ATTRIBUTES.get(attribute, attribute)} | images | malignant | AUC | sensitivity | specificity |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for value, row in found.items():
            rates = ["too few", "", ""]
            if "too_few" not in row:
                rates = [shown(row[rate]) for rate in ("auc", "sensitivity", "specificity")]
            rows.append(f"| {value} | {row['images']:,} | {row['positive']:,} | {' | '.join(rates)} |")
        tables.append("\n".join(rows))
    return "\n\n".join(tables)
