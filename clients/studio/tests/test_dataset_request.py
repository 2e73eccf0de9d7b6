"""Tests of the fields of the page Datasets, of the request that they ask for, and of the estimate."""

from __future__ import annotations

import asyncio
import inspect
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from dermis_client import Model
from dermis_client.resources.datasets import Datasets
from dermis_studio.access import Visitor
from dermis_studio.pages import dataset_request as page
from dermis_studio.pages import dataset_view as view
from dermis_studio.samples import SampleRef
from dermis_studio.studio import AddressField, address_script

from dermis.dataset.request import DatasetRequest

SCHEMAS = json.loads((Path(__file__).parents[3] / "tests" / "golden" / "openapi.json").read_text())["schemas"]
NO_DATASETS: tuple[Any, ...] = ()
PARTS = {
    "classifier": "ClassifierOptions",
    "edits": "EditOption",
    "privacy": "PrivacyOptions",
    "provenance": "ProvenanceOptions",
}
FULL = {
    "name": "demo",
    "digest": "d" * 64,
    "resolution": 128,
    "num_ws": 12,
    "classes": ["benign", "malignant"],
    "classifier": {"digest": "c" * 64, "thresholds": {"default": 0.4, "sensitivity_90": 0.2}},
    "authenticity": {"uploads": False},
    "directions": ["sefa-1", "sefa-2"],
}
DEMO = Model.model_validate(FULL)
EVERYTHING = {
    "seed": 7,
    "format": "webdataset",
    "image_format": "jpeg",
    "image_quality": 80,
    "truncation_psi": 0.7,
    "truncation_cutoff": 6,
    "noise_mode": "const",
    "shard_size": 100,
    "directions": ["sefa-2", "sefa-1"],
    "layers": "custom",
    "first_layer": 2,
    "last_layer": 8,
    "strengths": [2.5, -20, None],
    "gate": "min_distance",
    "percentile": 5,
    "copies": False,
    "rejected": "resample",
    "gate_tries": 16,
    "keep": "agreeing",
    "threshold": "sensitivity_90",
    "min_probability": 0.1,
    "max_probability": 0.9,
    "classifier_tries": 4,
    "signing": "unsigned",
}


@pytest.fixture(scope="module")
def fields() -> page.RequestFields:
    with gr.Blocks():
        return page.RequestFields()


def body_of(fields: page.RequestFields, model: Model = DEMO, **changed: Any) -> dict[str, Any]:
    """The request of a page on which some fields were changed."""
    given = fields.named([field.value for field in fields.inputs])
    assert given.keys() >= changed.keys()
    return page.body_of(model, given | changed)


def paths(body: dict[str, Any]) -> set[str]:
    """The names of the fields of a request, such as privacy.gate."""
    found: set[str] = set()
    for name, value in body.items():
        inner = value if isinstance(value, list) else [value]
        found |= {f"{name}.{key}" for each in inner for key in each} if name in PARTS else {name}
    return found


def test_page_offers_every_field_of_a_request(fields: page.RequestFields) -> None:
    properties = SCHEMAS["DatasetRequest"]["properties"]
    of_api = properties.keys() - PARTS.keys()
    of_api |= {f"{part}.{name}" for part, schema in PARTS.items() for name in SCHEMAS[schema]["properties"]}
    everything, unscored = body_of(fields, **EVERYTHING), body_of(fields, score=False)
    assert paths(everything) | paths(unscored) == of_api
    arguments = inspect.signature(Datasets.create).parameters.keys() - {"self", "idempotency_key", "extra_body"}
    assert arguments == properties.keys()
    for body in (everything, unscored):  # with the types of the API
        assert DatasetRequest.model_validate(body).model_dump(include=set(body), exclude_unset=True) == body
    assert everything["edits"] == [
        {"direction": "sefa-2", "strength": 2.5, "layers": [2, 8]},
        {"direction": "sefa-1", "strength": -20.0, "layers": [2, 8]},
    ]


def test_request_without_changes_names_nothing_but_model_classes_and_seed(fields: page.RequestFields) -> None:
    plain = {"model": "demo", "classes": {"benign": 50, "malignant": 50}, "seed": 0}
    assert body_of(fields) == plain
    assert body_of(fields, directions=["sefa-1"], strengths=[0]) == plain
    lacking = Model.model_validate(FULL | {"classifier": None, "authenticity": None})
    of_lacking = {"gate": "authentic", "keep": "agreeing", "min_probability": 0.5, "score": False}
    assert body_of(fields, lacking, **of_lacking) == plain


def test_limits_and_defaults_are_those_of_the_service() -> None:
    def schema(name: str, field: str) -> tuple[Any, ...]:
        found = SCHEMAS[name]["properties"][field]
        return found.get("default"), found.get("maximum")

    assert schema("DatasetRequest", "shard_size") == (page.SHARD_SIZE, page.MAX_SHARD_SIZE)
    assert schema("PrivacyOptions", "percentile") == (page.PERCENTILE, 100)
    assert schema("PrivacyOptions", "tries") == (page.GATE_TRIES, page.MAX_GATE_TRIES)
    assert schema("ClassifierOptions", "tries") == (1, page.MAX_CLASSIFIER_TRIES)
    assert schema("ClassifierOptions", "threshold") == (page.THRESHOLD, None)
    assert schema("EditOption", "strength") == (None, page.MAX_STRENGTH)
    assert SCHEMAS["DatasetRequest"]["properties"]["edits"]["anyOf"][0]["maxItems"] == page.MAX_EDITS


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"counts": [0, None]}, "ask for at least one image"),
        ({"shard_size": None}, "Images in a shard: the field is empty; enter 1 to 10,000"),
        ({"shard_size": 20_000}, "Images in a shard: 20,000 is not allowed"),
        ({"truncation_cutoff": 13}, "Truncated layers: 13 is not allowed; enter 0 to 12"),
        ({"directions": ["sefa-2"], "strengths": [20.5]}, "Strength of sefa-2: 20.5 is not allowed; enter -20 to 20"),
        ({"directions": ["sefa-2"], "strengths": [None]}, "Strength of sefa-2: the field is empty"),
        ({"gate": "min_distance", "percentile": 101}, "Least distance (percentile): 101 is not allowed"),
        ({"gate": "authentic", "gate_tries": 17}, "Rejected images before one is missing: 17 is not allowed"),
        ({"min_probability": float("nan")}, "Least probability: nan is not allowed"),
        ({"min_probability": 0.9, "max_probability": 0.5}, "Least probability: 0.9 is above the greatest, 0.5"),
        ({"keep": "agreeing", "classifier_tries": 65}, "Tries of the classifier's filter: 65 is not allowed"),
        ({"keep": "agreeing", "score": False}, "Score images with the classifier: a filter needs the scores"),
        ({"keep": "agreeing", "classifier_tries": 58, "gate": "authentic"}, "together more than 65"),
    ],
)
def test_value_that_is_not_allowed_is_named_as_on_the_page(
    fields: page.RequestFields, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        body_of(fields, **changed)
    assert message in str(refused.value)


def test_number_of_an_option_that_is_not_used_is_not_checked(fields: page.RequestFields) -> None:
    unused = {"percentile": None, "gate_tries": None, "classifier_tries": None, "strengths": [None], "layers": "custom"}
    assert paths(body_of(fields, **unused, last_layer=99)) == {"model", "classes", "seed"}
    flagged = body_of(fields, **unused, gate="authentic", rejected="flag")
    assert flagged["privacy"] == {"gate": "authentic", "on_reject": "flag"}


def test_direction_that_stays_chosen_keeps_its_strength() -> None:
    former, layers, *strengths = page.strength_fields(["b", "c"], "a\nb", 3.0, -1.5)
    assert former == "b\nc" and layers["visible"]
    assert [(each["label"], each["value"]) for each in strengths[:2]] == [
        ("Strength of b", -1.5),
        ("Strength of c", 1.0),
    ]
    assert len(strengths) == page.MAX_EDITS and not any(each["visible"] for each in strengths[2:])


def test_page_offers_what_the_model_has(fields: page.RequestFields) -> None:
    def shown(model: Model, other: bool = False) -> dict[Any, Any]:
        return dict(zip(fields.outputs, fields.updates(model, None, other=other), strict=True))

    full = shown(DEMO)
    choices = full[fields.inputs[list(fields.named([None] * len(fields.inputs))).index("threshold")]]["choices"]
    assert choices == [("Default threshold (0.400)", "default"), ("Sensitivity 90 % (0.200)", "sensitivity_90")]
    bare = Model.model_validate(FULL | {"classifier": None, "authenticity": None, "directions": []})
    hidden = [
        component
        for component, update in shown(bare, other=True).items()
        if isinstance(update, dict) and full[component].get("visible") and update.get("visible") is False
    ]
    assert len(hidden) == 4  # gate, filter, numbers of the filter, edits
    assert [each["visible"] for each in page.gate_visibility("min_distance", "resample")] == [True, True, True, True]
    assert [each["visible"] for each in page.gate_visibility("authentic", "drop")] == [False, True, True, False]
    assert not any(each["visible"] for each in page.gate_visibility("none", "resample"))


def test_estimate_counts_what_changes_size_time_and_files() -> None:
    measured = view.Measured(size=10_000, seconds=0.5, signed=False)
    body = {"classes": {"benign": 100}}

    def words(options: dict[str, Any], former: float | None = None) -> dict[str, str]:
        return dict(view.estimated(DEMO, body | options, measured, former))

    plain = words({})
    assert (plain["Size"], plain["Images"]) == ("about 1.0 MB", "100 of 128 px")
    assert plain["Time"].startswith("about 50 s (2 images/s, measured on")
    assert plain["Files"] == "one zip, made in 1 shard of up to 100 images"
    assert words({"format": "parquet", "shard_size": 30})["Files"] == "4 shards of up to 30 images, a file each"
    assert words({"edits": [{"direction": "sefa-1", "strength": 1.0}], "classifier": {"score": False}}) == plain
    assert words({"privacy": {"gate": "authentic", "on_reject": "flag"}}) == plain
    assert "or more" in words({"privacy": {"gate": "authentic", "on_reject": "resample"}}, 4.0)["Time"]
    dropped = words({"privacy": {"gate": "authentic", "on_reject": "drop"}})
    assert dropped["Size"] == "up to 1.0 MB" and "or more" not in dropped["Time"]
    assert words({"classifier": {"keep": "agreeing"}})["Images"] == "up to 100 of 128 px"
    unknown = dict(view.estimated(DEMO, body, None, None))
    assert (unknown["Size"], unknown["Time"]) == ("not known", "not known before the first dataset")


def test_estimate_measures_again_for_options_that_change_the_size() -> None:
    asked: list[dict[str, Any]] = []

    class Client:
        """A service that signs images unless the request says otherwise."""

        def __init__(self) -> None:
            self.images = self.datasets = self

        async def generate(self, classes: dict[str, int], **options: Any) -> Any:
            asked.append(options)
            signed = None if options.get("provenance") == {"c2pa": False} else "5" * 64
            return [SimpleNamespace(content=b"x" * 100, canonical_sha256=signed)] * sum(classes.values())

        async def list(self, **_: Any) -> AsyncIterator[Any]:
            for dataset in NO_DATASETS:
                yield dataset

    model = Model.model_validate(FULL | {"digest": "e" * 64})
    body = {"classes": {"benign": 10}}

    def signs(options: dict[str, Any], scopes: frozenset[str] | None = None) -> bool | None:
        client: Any = Client()
        return asyncio.run(view.estimate(client, model, body | options, Visitor(None, "t", scopes))).signs

    assert signs({}) is True
    assert (
        signs({"privacy": {"gate": "authentic", "on_reject": "drop"}, "truncation_psi": 0.5, "shard_size": 5}) is True
    )
    assert len(asked) == 1
    assert signs({"image_format": "jpeg", "image_quality": 80}) is True
    assert signs({"noise_mode": "none"}) is True
    assert signs({"provenance": {"c2pa": False}}) is None  # the field stays as it is
    assert signs({}, frozenset({"datasets:write"})) is None
    assert [{**options, "model": ""} for options in asked[1:]] == [
        {"model": "", "image_format": "jpeg", "image_quality": 80},
        {"model": "", "image_format": "png", "noise_mode": "none"},
        {"model": "", "image_format": "png", "provenance": {"c2pa": False}},
    ]


def filled(query: str, values: list[Any], *fields: AddressField) -> list[Any]:
    """Run the script that fills fields from an address, with Node.js in the place of a browser."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")
    script = address_script(fields)
    program = f"globalThis.window = {{ location: {{ search: {json.dumps(query)} }} }};\n"
    program += f"console.log(JSON.stringify(({script})(...{json.dumps(values)})));"
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_dataset_begins_with_the_options_of_the_sample_that_the_address_names() -> None:
    with gr.Blocks():
        fields = page.RequestFields()
    named = [
        AddressField("seed", fields.seed),
        AddressField("truncation", fields.truncation),
        AddressField("noise", fields.noise),
    ]
    sample = SampleRef("demo", "benign", 7, 12, 0.0, "const")
    assert filled(f"?{sample.query}", [1, 1.0, "random"], *named) == [7, 0, "const"]
    for bad in ("?seed=x&truncation=9&noise=loud", "?seed=-1&truncation=-1", "?truncation=1e9&noise=", ""):
        assert filled(bad, [1, 0.75, "none"], *named) == [1, 0.75, "none"]
    assert filled("?projection=pr_1", ["sample"], AddressField("projection", fields.noise, "given")) == ["given"]
