"""How routes document their answers in OpenAPI: every status that a route may give, and none that it may not."""

from __future__ import annotations

from typing import Any

from dermis.reading import FORMATS
from services.problems import KINDS, PROBLEM_MEDIA_TYPE

Responses = dict[int | str, dict[str, Any]]

PROBLEM_CONTENT = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_HEADERS = {
    "Location": "Path of the dataset or projection.",
    "Retry-After": "Seconds after which to try again.",
    "ETag": "Hash of the file, in quotes.",
    "Accept-Ranges": "bytes",
    "Content-Range": "Which bytes of how many.",
    "Content-Disposition": "A name to save the file under.",
    "X-Dermis-Model": "Name and digest of the model, as name@digest.",
    "X-Dermis-Classification": "Class, calibrated probability and threshold of the image that a picture is of.",
    "X-Dermis-Notice": "What the classifier is not for.",
}


def problems(*kinds: str) -> Responses:
    """Documentation of the problems that a route may answer with; `internal` is always among them."""
    responses: Responses = {}
    for kind in (*kinds, "internal"):
        status, title = KINDS[kind]
        known = responses.setdefault(status, {"description": "", "content": PROBLEM_CONTENT})
        known["description"] = "; ".join(filter(None, (known["description"], f"{title} (`{kind}`)")))
        if status in (429, 503):
            known["headers"] = headers("Retry-After")
    return responses


def headers(*names: str) -> dict[str, Any]:
    """Documentation of answer headers."""
    return {name: {"description": _HEADERS[name], "schema": {"type": "string"}} for name in names}


def content(*media_types: str) -> dict[str, Any]:
    """Documentation of an answer that is a file of one of these types."""
    binary = {"type": "string", "format": "binary"}
    return {kind: {"schema": {} if kind == "application/json" else binary} for kind in media_types}


def json_body(model: str) -> dict[str, Any]:
    """Documentation of a body that the route reads by itself, as the component `model`."""
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def image_body(field: str) -> dict[str, Any]:
    """Documentation of a body that is one or more uploaded images: parts called `field`, or one image by itself."""
    image = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "properties": {field: {"type": "array", "items": image, "minItems": 1, "description": "PNG, JPEG or WebP."}},
        "required": [field],
        "additionalProperties": False,
    }
    # The content of a part is what counts, not its name; the type says of what kinds it may be.
    encoding = {field: {"contentType": ", ".join(FORMATS.values())}}
    kinds = {
        "multipart/form-data": {"schema": form, "encoding": encoding},
        **{kind: {"schema": image} for kind in FORMATS.values()},
    }
    return {"requestBody": {"required": True, "content": kinds}}


def image_or_json_body(field: str, model: str) -> dict[str, Any]:
    """Documentation of a body that is either: uploaded images, or the component `model`."""
    body = image_body(field)
    body["requestBody"]["content"].update(json_body(model)["requestBody"]["content"])
    return body
