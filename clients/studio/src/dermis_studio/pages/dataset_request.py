"""The fields of the page Datasets that describe a new dataset, and the request that they ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from dermis_client import EditParams, Model

from dermis_studio.pages.explore import CUSTOM, LAYERS, OWN, edits_of
from dermis_studio.samples import NOISE
from dermis_studio.scales import threshold_name
from dermis_studio.studio import PRIVATE

CLASS_FIELDS = 8  # classes with a field of their own; a model with more has one text field for all
# Limits of a request. The page checks them to name its own fields; the service checks them again.
MAX_EDITS = 8
MAX_STRENGTH = 20.0
MAX_SHARD_SIZE = 10_000
MAX_CLASSIFIER_TRIES = 64
MAX_GATE_TRIES = 16
MAX_TRIES = 64  # candidates for one image: the last of the classifier's tries is the first of the gate's
# Defaults of the service.
SHARD_SIZE = 250
PERCENTILE = 1.0
GATE_TRIES = 8
THRESHOLD = "default"

CLASSIFIER_TRIES = 8  # what the page proposes; by default the service makes no other image
STRENGTH = 1.0  # what the page proposes for a direction that was just chosen
FORMATS = (("Folder of images (zip)", "imagefolder"), ("WebDataset (tar shards)", "webdataset"), ("Parquet", "parquet"))
GATES = (
    ("No comparison", "none"),
    ("Nearer than training images usually are to each other", "min_distance"),
    ("Within the radius of its nearest training image (strict)", "authentic"),
)
REJECTED = (("Make another image", "resample"), ("Leave it out", "drop"), ("Keep it, with a flag", "flag"))
FILTERS = (("Keep all images", "all"), ("Keep those that the classifier puts into their class", "agreeing"))
SIGNING = (
    ("Default of the service: signed", "default"),
    ("Signed, or no dataset", "signed"),
    ("Not signed", "unsigned"),
)

_LABELS = {
    "truncation_cutoff": "Truncated layers",
    "shard_size": "Images in a shard",
    "percentile": "Least distance (percentile)",
    "gate_tries": "Rejected images before one is missing",
    "min_probability": "Least probability",
    "max_probability": "Greatest probability",
    "classifier_tries": "Tries of the classifier's filter",
}


class RequestFields:
    """Fields with which a visitor describes a dataset.

    Attributes:
        inputs: The fields, in the order of `request`.
        outputs: The components that `updates` changes.
        model: The field of the model.
        seed: The field of the seed.
        truncation: The field of the truncation.
        noise: The field of the noise.
        signing: The field of signed manifests, which is shown where the service can sign.
    """

    def __init__(self) -> None:
        self.model = gr.Dropdown(label="Model", choices=[], visible=False)
        self._counts = [
            gr.Number(label="Images", value=50, precision=0, minimum=0, visible=False) for _ in range(CLASS_FIELDS)
        ]
        listed = gr.Textbox(
            label="Images of each class", info="One line for each: class = number", lines=6, visible=False
        )
        self.seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
        files = self._build_files()
        generation = self._build_generation()
        self.truncation, self.noise = generation["truncation_psi"], generation["noise_mode"]
        edits = self._build_edits()
        checks = self._build_checks()
        more = self._build_more()
        self._named = (
            {"model": self.model, "listed": listed, "seed": self.seed} | files | generation | edits | checks | more
        )
        self.inputs = [*self._named.values(), *self._counts, *self._strengths]
        self.outputs = [
            *self._counts,
            listed,
            self._gate_fields,
            self._filter_field,
            self._filter_numbers,
            more["threshold"],
            more["truncation_cutoff"],
            self._edit_fields,
            edits["directions"],
            self._layer_fields,
            self._former,
            *self._strengths,
        ]

    def _build_files(self) -> dict[str, Any]:
        with gr.Accordion("Files", open=False):
            kind = gr.Radio(label="Layout", choices=list(FORMATS), value="imagefolder")
            image_format = gr.Radio(
                label="Images", choices=[("PNG, lossless", "png"), ("JPEG", "jpeg"), ("WebP", "webp")], value="png"
            )
            quality = gr.Slider(1, 100, value=95, step=1, label="Quality", visible=False, buttons=[])
        image_format.change(lambda value: gr.update(visible=value != "png"), image_format, quality, **PRIVATE)
        return {"format": kind, "image_format": image_format, "image_quality": quality}

    def _build_generation(self) -> dict[str, Any]:
        with gr.Accordion("Generation", open=False):
            truncation = gr.Slider(
                0.0, 2.0, value=1.0, step=0.05, label="Truncation", info="Lower: more typical, less varied.", buttons=[]
            )
            noise = gr.Radio(
                label="Noise", choices=[(words.capitalize(), mode) for mode, words in NOISE.items()], value="random"
            )
        return {"truncation_psi": truncation, "noise_mode": noise}

    def _build_edits(self) -> dict[str, Any]:
        with gr.Accordion("Edits", open=False, visible=False) as self._edit_fields:
            directions = gr.Dropdown(
                label="Directions of all images",
                choices=[],
                multiselect=True,
                max_choices=MAX_EDITS,
                info=f"Every image is moved along them; up to {MAX_EDITS}. The page Explore shows what they do.",
            )
            self._strengths = [
                gr.Number(
                    label="Strength",
                    info=_range_words(-MAX_STRENGTH, MAX_STRENGTH),
                    value=STRENGTH,
                    step=0.5,
                    visible=False,
                )
                for _ in range(MAX_EDITS)
            ]
            with gr.Column(elem_classes=["ds-fields"], visible=False) as self._layer_fields:
                layers = gr.Radio(
                    label="Layers", choices=list(LAYERS), value=OWN, info="Coarse: form. Fine: colour, texture."
                )
                with gr.Row(visible=False) as ranged:
                    first = gr.Number(label="First layer", value=0, precision=0, min_width=80)
                    last = gr.Number(label="End (not included)", value=4, precision=0, min_width=80)
        self._former = gr.Textbox(visible=False)  # the directions that the strengths were entered for
        layers.change(lambda value: gr.update(visible=value == CUSTOM), layers, ranged, **PRIVATE)
        self._directions = directions
        return {"directions": directions, "layers": layers, "first_layer": first, "last_layer": last}

    def _build_checks(self) -> dict[str, Any]:
        with gr.Accordion("Checks", open=False):
            with gr.Column(elem_classes=["ds-fields"]) as self._gate_fields:
                gate = gr.Radio(
                    label="Reject an image that is ... to a training image", choices=list(GATES), value="none"
                )
                percentile = gr.Number(
                    label=_LABELS["percentile"],
                    info="0 to 100, of the distances between training images. 1: 99 % of these are larger.",
                    value=PERCENTILE,
                    step=0.5,
                    visible=False,
                )
                copies = gr.Checkbox(
                    label="Reject changed copies too",
                    info="Mirrored, cropped or recoloured training images, if the model has a detector of copies.",
                    value=True,
                    visible=False,
                )
                rejected = gr.Radio(label="Rejected image", choices=list(REJECTED), value="resample", visible=False)
                tries = gr.Number(
                    label=_LABELS["gate_tries"],
                    info=_range_words(1, MAX_GATE_TRIES),
                    value=GATE_TRIES,
                    precision=0,
                    visible=False,
                )
            with gr.Column(elem_classes=["ds-fields"]) as self._filter_field:
                keep = gr.Radio(label="Classifier", choices=list(FILTERS), value="all")
        dependent = [percentile, copies, rejected, tries]
        gr.on([gate.change, rejected.change], gate_visibility, [gate, rejected], dependent, **PRIVATE)
        return {
            "gate": gate,
            "percentile": percentile,
            "copies": copies,
            "rejected": rejected,
            "gate_tries": tries,
            "keep": keep,
        }

    def _build_more(self) -> dict[str, Any]:
        with gr.Accordion("More options", open=False):
            cutoff = gr.Number(label=_LABELS["truncation_cutoff"], value=None, precision=0, placeholder="all")
            shard_size = gr.Number(
                label=_LABELS["shard_size"],
                info=f"{_range_words(1, MAX_SHARD_SIZE)} A shard is the unit of work and, except in a zip, a file.",
                value=SHARD_SIZE,
                precision=0,
            )
            self.signing = gr.Radio(
                label="Content Credentials (C2PA)",
                info="A signed statement in each image file that it is synthetic.",
                choices=list(SIGNING),
                value="default",
                visible=False,
            )
            with gr.Column(elem_classes=["ds-fields"]) as self._filter_numbers:
                score = gr.Checkbox(
                    label="Score images with the classifier", info="Adds probabilities to the metadata.", value=True
                )
                with gr.Row():
                    least = gr.Number(label=_LABELS["min_probability"], value=0.0, step=0.05, min_width=100)
                    greatest = gr.Number(label=_LABELS["max_probability"], value=1.0, step=0.05, min_width=100)
                threshold = gr.Dropdown(
                    label="Threshold of the classifier",
                    info="From it on an image counts as the positive class.",
                    choices=[],
                )
                tries = gr.Number(
                    label=_LABELS["classifier_tries"],
                    info=f"{_range_words(1, MAX_CLASSIFIER_TRIES)} Used if the classifier or a probability rejects images.",
                    value=CLASSIFIER_TRIES,
                    precision=0,
                )
        return {
            "truncation_cutoff": cutoff,
            "shard_size": shard_size,
            "signing": self.signing,
            "score": score,
            "min_probability": least,
            "max_probability": greatest,
            "threshold": threshold,
            "classifier_tries": tries,
        }

    def on_change(self, handler: Any, outputs: Sequence[Any]) -> None:
        """Call a handler with `inputs` whenever a visitor changes one of them other than the model."""
        named = self._directions.input(
            strength_fields,
            [self._directions, self._former, *self._strengths],
            [self._former, self._layer_fields, *self._strengths],
            trigger_mode="always_last",
            **PRIVATE,
        )
        named.then(handler, self.inputs, list(outputs), **PRIVATE)
        events = [field.input for field in self.inputs if field not in (self.model, self._directions)]
        gr.on(events, handler, self.inputs, list(outputs), trigger_mode="always_last", **PRIVATE)

    def updates(self, model: Model, asked: str | None, *, other: bool) -> list[Any]:
        """Return updates of `outputs`.

        Args:
            model: The model.
            asked: The class that the address names.
            other: Whether the visitor has just chosen this model, so that directions of another one are taken away.
        """
        thresholds = {} if model.classifier is None else model.classifier.thresholds
        choices = [(f"{threshold_name(name)} ({value:.3f})", name) for name, value in thresholds.items()]
        directions = gr.update(choices=list(model.directions), **({"value": []} if other else {}))
        no_strengths = [gr.update(value=STRENGTH, visible=False)] if other else [gr.skip()]
        layers = f"0 to {model.num_ws}, from the coarsest. Empty: all."
        return [
            *class_updates(model, asked),
            gr.update(visible=model.authenticity is not None),
            gr.update(visible=model.classifier is not None),
            gr.update(visible=model.classifier is not None),
            gr.update(choices=choices, value=THRESHOLD),
            gr.update(info=layers),  # of the truncated layers
            gr.update(visible=bool(model.directions)),
            directions,
            gr.update(visible=False) if other else gr.skip(),  # the layers
            "" if other else gr.skip(),  # the directions that the strengths were entered for
            *no_strengths * MAX_EDITS,
        ]

    def named(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the values of `inputs` by name, with the lists `counts` and `strengths`."""
        split = len(self._named)
        lists = {
            "counts": list(values[split : split + CLASS_FIELDS]),
            "strengths": list(values[split + CLASS_FIELDS :]),
        }
        return dict(zip(self._named, values[:split], strict=True)) | lists

    def request(self, model: Model, values: Sequence[Any]) -> dict[str, Any]:
        """Return the body of the request that the values of `inputs` ask for. Raises as `body_of`."""
        return body_of(model, self.named(values))


def gate_visibility(gate: str, rejected: str) -> list[Any]:
    """Return updates of percentile, copies, what happens to a rejected image, and tries."""
    compared = gate != "none"
    shown = (gate == "min_distance", compared, compared, compared and rejected == "resample")
    return [gr.update(visible=visible) for visible in shown]


def strength_fields(names: Sequence[str] | None, former: str | None, *strengths: float | None) -> list[Any]:
    """Return updates of the former directions, the choice of layers and the strengths after a choice of directions.

    Args:
        names: The directions.
        former: Those before, one a line.
        *strengths: The strengths of those before. A direction that stays keeps its strength.
    """
    names = list(names or [])[:MAX_EDITS]
    kept = dict(zip((former or "").splitlines(), strengths, strict=False))
    shown = [gr.update(label=f"Strength of {name}", value=kept.get(name, STRENGTH), visible=True) for name in names]
    hidden = [gr.update(value=STRENGTH, visible=False)] * (MAX_EDITS - len(names))
    return ["\n".join(names), gr.update(visible=bool(names)), *shown, *hidden]


def class_updates(model: Model, asked: str | None) -> list[Any]:
    """Return updates of the fields of the classes and of the text field."""
    names = model.classes
    fits = len(names) <= CLASS_FIELDS
    updates = []
    for position in range(CLASS_FIELDS):
        if fits and position < len(names):
            value = 50 if asked not in names or asked == names[position] else 0
            updates.append(gr.update(label=f"Images of {names[position]}", value=value, visible=True))
        else:
            updates.append(gr.update(visible=False))
    text = "\n".join(f"{name} = 10" for name in names)
    return [*updates, gr.update(value=text, visible=not fits)]


def body_of(model: Model, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a request, with the options that differ from the defaults of the service.

    Args:
        model: The model. Options that it does not have are left out.
        given: The values of the fields by name (`RequestFields.named`).

    Raises:
        ValueError: There is no image, a line of the text field cannot be read, or a number is not allowed. The message names
            the field as the page does.
    """
    if len(model.classes) <= CLASS_FIELDS:
        classes = {name: int(count or 0) for name, count in zip(model.classes, given["counts"], strict=False)}
    else:
        classes = classes_of_lines(given["listed"] or "")
    classes = {name: count for name, count in classes.items() if count > 0}
    if not classes:
        raise ValueError("no images are asked for; ask for at least one image")
    body: dict[str, Any] = {"model": model.name, "classes": classes, "seed": int(given["seed"] or 0)}
    if given["format"] != "imagefolder":
        body["format"] = given["format"]
    if given["image_format"] != "png":
        body |= {"image_format": given["image_format"], "image_quality": int(given["image_quality"])}
    if given["truncation_psi"] != 1.0:
        body["truncation_psi"] = given["truncation_psi"]
    if given["truncation_cutoff"] is not None:
        body["truncation_cutoff"] = int(_number(given, "truncation_cutoff", 0, model.num_ws or 64))
    if given["noise_mode"] != "random":
        body["noise_mode"] = given["noise_mode"]
    shard_size = int(_number(given, "shard_size", 1, MAX_SHARD_SIZE))
    if shard_size != SHARD_SIZE:
        body["shard_size"] = shard_size
    edits = _edits(model, given)
    privacy = None if given["gate"] == "none" or model.authenticity is None else _privacy(given)
    classifier = None if model.classifier is None else _classifier(given)
    if (classifier or {}).get("tries", 1) + (privacy or {}).get("tries", _default_tries(privacy)) > MAX_TRIES + 1:
        raise ValueError(
            f"{_LABELS['classifier_tries']} and {_LABELS['gate_tries']}: together more than {MAX_TRIES + 1}; lower one of them"
        )
    options = {"classifier": classifier, "edits": edits, "privacy": privacy, "provenance": _provenance(given)}
    return body | {name: value for name, value in options.items() if value}


def _default_tries(privacy: Mapping[str, Any] | None) -> int:
    return GATE_TRIES if privacy is not None and privacy["on_reject"] == "resample" else 1


def _provenance(given: Mapping[str, Any]) -> dict[str, Any]:
    return {} if given["signing"] == "default" else {"c2pa": given["signing"] == "signed"}


def _edits(model: Model, given: Mapping[str, Any]) -> list[EditParams]:
    """The edits. A strength of 0 is none."""
    names = given["directions"] or []
    if not names:
        return []
    strengths = [
        _checked(f"Strength of {name}", value, -MAX_STRENGTH, MAX_STRENGTH)
        for name, value in zip(names, given["strengths"], strict=False)
    ]
    return edits_of(model, [given["layers"], given["first_layer"], given["last_layer"], names, *strengths])


def _privacy(given: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"gate": given["gate"], "on_reject": given["rejected"]}
    if given["gate"] == "min_distance":
        percentile = _number(given, "percentile", 0, 100)
        if percentile != PERCENTILE:
            result["percentile"] = percentile
    if not given["copies"]:
        result["detect_copies"] = False
    if given["rejected"] == "resample":
        tries = int(_number(given, "gate_tries", 1, MAX_GATE_TRIES))
        if tries != GATE_TRIES:
            result["tries"] = tries
    return result


def _classifier(given: Mapping[str, Any]) -> dict[str, Any]:
    least, greatest = _number(given, "min_probability", 0, 1), _number(given, "max_probability", 0, 1)
    if least > greatest:
        raise ValueError(
            f"{_LABELS['min_probability']}: {least:g} is above the greatest, {greatest:g}; enter at most {greatest:g}"
        )
    result: dict[str, Any] = {}
    if given["keep"] != "all":
        result["keep"] = given["keep"]
    if least > 0:
        result["min_probability"] = least
    if greatest < 1:
        result["max_probability"] = greatest
    filters = bool(result)
    if (given["threshold"] or THRESHOLD) != THRESHOLD:
        result["threshold"] = given["threshold"]
    if filters:
        tries = int(_number(given, "classifier_tries", 1, MAX_CLASSIFIER_TRIES))
        if tries != 1:
            result["tries"] = tries
    if not given["score"]:
        if filters:
            raise ValueError(
                "Score images with the classifier: a filter needs the scores; switch it on, or keep images of all probabilities"
            )
        result = {"score": False}
    return result


def _number(given: Mapping[str, Any], name: str, least: float, greatest: float) -> float:
    return _checked(_LABELS[name], given[name], least, greatest)


def _checked(label: str, value: float | None, least: float, greatest: float) -> float:
    """Return the number of a field.

    Raises:
        ValueError: It is empty or not in the range.
    """
    if value is None:
        raise ValueError(f"{label}: the field is empty; enter {least:,g} to {greatest:,g}")
    if not (math.isfinite(value) and least <= value <= greatest):
        raise ValueError(f"{label}: {value:,g} is not allowed; enter {least:,g} to {greatest:,g}")
    return value


def _range_words(least: float, greatest: float) -> str:
    return f"{least:,g} to {greatest:,g}."


def classes_of_lines(text: str) -> dict[str, int]:
    """Read lines of the form `class = number`.

    Raises:
        ValueError: A line cannot be read.
    """
    result: dict[str, int] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, equals, count = line.rpartition("=")
        if not equals or not count.strip().isdigit():
            raise ValueError(f"the line {line[:80]!r} cannot be read; write the class, =, and a number of images")
        result[name.strip()] = int(count)
    return result
