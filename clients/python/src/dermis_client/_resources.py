"""Images and models as flows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dermis_client import _requests
from dermis_client._flow import Api, D, Flow, Request, call, parse
from dermis_client.images import ImagesResult
from dermis_client.models import Answer, Model


class _Models(Answer):
    data: list[Model]


def generate_images(api: Api[D], body: Mapping[str, Any]) -> Flow[ImagesResult]:
    """POST /v1/images; the same request gives the same images, so it may be sent again after any failure."""
    most = _requests.most_bytes(sum(body["classes"].values()))
    response = yield from call(Request("POST", "/v1/images", json=body, most=most), api.max_retries)
    result = parse(response, ImagesResult.model_validate)
    for image in result.data:
        image.check()
    return result


def list_models(api: Api[D]) -> Flow[list[Model]]:
    response = yield from call(Request("GET", "/v1/models"), api.max_retries)
    return parse(response, _Models.model_validate).data


def retrieve_model(api: Api[D], name: str) -> Flow[Model]:
    response = yield from call(Request("GET", _requests.model_path(name)), api.max_retries)
    return parse(response, Model.model_validate)
