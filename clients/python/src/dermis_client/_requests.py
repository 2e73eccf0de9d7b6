"""Build requests from arguments, refusing what cannot be sent. Pure functions; the service judges everything else."""

from __future__ import annotations

import math
import operator
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex
from urllib.parse import quote, urlsplit

from dermis_client._answers import MOST_BYTES
from dermis_client._flow import Request
from dermis_client.errors import InvalidRequestError

_MOST_IMAGE_BYTES = 20 << 20  # an image of 2048 x 2048 px that does not compress, as base64
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def base_url_from(url: str) -> str:
    """The base URL without a trailing slash. Raises InvalidRequestError unless it is http(s)://host[:port][/prefix]."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise InvalidRequestError(f"base_url: {url!r} is not an address such as http://127.0.0.1:3000")
    return url.rstrip("/")


def whole(field: str, value: SupportsIndex) -> int:
    """An int from anything that is a whole number (NumPy's too). Raises InvalidRequestError naming the field."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidRequestError(f"{field}: must be a whole number, not {value!r}")
    return operator.index(value)


def finite(field: str, value: float) -> float:
    """A finite float. Raises InvalidRequestError naming the field."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool | str) or not math.isfinite(number):
        raise InvalidRequestError(f"{field}: must be a finite number, not {value!r}")
    return number


def counts(classes: Mapping[str, SupportsIndex]) -> dict[str, int]:
    """The `classes` field, in the order given."""
    if not isinstance(classes, Mapping) or not classes:
        raise InvalidRequestError('classes: give at least one class and its count, such as {"malignant": 500}')
    return {str(name): whole(f"classes.{name}", count) for name, count in classes.items()}


def body(
    classes: Mapping[str, SupportsIndex], seed: SupportsIndex, extra_body: Mapping[str, Any] | None, **options: Any
) -> dict[str, Any]:
    """A request's JSON body. Options that are None are left out: the service's defaults hold."""
    result: dict[str, Any] = {"classes": counts(classes), "seed": whole("seed", seed)}
    for name, value in (options | dict(extra_body or {})).items():
        if value is None:
            continue
        if name == "truncation_psi":
            result[name] = finite(name, value)
        elif name in {"truncation_cutoff", "image_quality", "shard_size", "start_index"}:
            result[name] = whole(name, value)
        else:
            result[name] = value
    return result


def most_bytes(images: int) -> int:
    """Bytes of an answer with so many images in it, at most."""
    return MOST_BYTES + max(images, 0) * _MOST_IMAGE_BYTES


def create_dataset(json: Mapping[str, Any], idempotency_key: str | None) -> Request:
    """POST /v1/datasets with a key, so that a repeated request never makes a second dataset."""
    key = checked_key(idempotency_key or uuid.uuid4().hex)
    return Request("POST", "/v1/datasets", headers={"Idempotency-Key": key}, json=json)


def checked_key(key: str) -> str:
    """An idempotency key. Raises InvalidRequestError if it cannot be one."""
    if not key.isascii() or not key.isprintable() or len(key) > 200:
        raise InvalidRequestError("idempotency_key: must be up to 200 printable ASCII characters")
    return key


def projection_path(projection_id: str, *rest: str) -> str:
    """/v1/projections/{id}[/...]. Raises InvalidRequestError for what can be no id: it would name another path."""
    if not isinstance(projection_id, str) or not _ID.fullmatch(projection_id):
        raise InvalidRequestError(
            f"projection id: {projection_id!r} is not one (they look like pr_0123456789abcdef...)"
        )
    return "/".join(["/v1/projections", projection_id, *(quote(part, safe="") for part in rest)])


def projection(**options: Any) -> dict[str, str]:
    """The query of /v1/projections. Options that are None are left out."""
    params: dict[str, str] = {}
    for name, value in options.items():
        if value is None:
            continue
        if name == "steps":
            params[name] = str(whole(name, value))
        elif name == "video":
            params[name] = "true" if value else "false"
        else:
            params[name] = str(value)
    return params


def edits_body(
    samples: Sequence[tuple[str, int, int]] | None,
    projections: Sequence[tuple[str, int]] | None,
    sweep: Mapping[str, Any] | None,
    extra_body: Mapping[str, Any] | None,
    **options: Any,
) -> dict[str, Any]:
    """The body of /v1/edits. Raises InvalidRequestError unless there are either samples or projections."""
    if bool(samples) == bool(projections):
        raise InvalidRequestError("give samples=[(class, seed, index), ...] or projections=[(id, image), ...]")
    result: dict[str, Any] = {}
    if samples:
        result["samples"] = [
            {"class": str(name), "seed": whole("samples.seed", seed), "index": whole("samples.index", index)}
            for name, seed, index in samples
        ]
    if projections:
        result["projections"] = [
            {"id": name, "image": whole("projections.image", image)} for name, image in projections
        ]
    if sweep is not None:
        strengths = [finite("sweep.strengths", strength) for strength in sweep.get("strengths", ())]
        result["sweep"] = {**sweep, "strengths": strengths}
    for name, value in (options | dict(extra_body or {})).items():
        if value is not None:
            result[name] = finite(name, value) if name == "truncation_psi" else value
    return result


def edit_options(edits: Sequence[Mapping[str, Any]] | Mapping[str, float] | None) -> list[dict[str, Any]] | None:
    """The field `edits`: as the API has it, from a list of options or from {"direction": strength}."""
    if edits is None:
        return None
    if isinstance(edits, Mapping):
        return [{"direction": name, "strength": finite(f"edits.{name}", strength)} for name, strength in edits.items()]
    return [{**option, "strength": finite("edits.strength", option.get("strength", math.nan))} for option in edits]


def dataset_path(dataset_id: str, *rest: str) -> str:
    """/v1/datasets/{id}[/...]. Raises InvalidRequestError for what can be no id: it would name another path."""
    if not isinstance(dataset_id, str) or not _ID.fullmatch(dataset_id):
        raise InvalidRequestError(f"dataset id: {dataset_id!r} is not one (they look like ds_0123456789abcdef...)")
    return "/".join(["/v1/datasets", dataset_id, *(quote(part, safe="") for part in rest)])


def model_path(name: str) -> str:
    """/v1/models/{name}."""
    if not name or name in {".", ".."}:
        raise InvalidRequestError(f"model: {name!r} is no model's name")
    return f"/v1/models/{quote(name, safe='')}"


def classification(model: str | None, threshold: str | float | None, heat_map: str | None = None) -> dict[str, str]:
    """The query of /v1/classifications. Raises InvalidRequestError for a threshold that is neither name nor 0..1."""
    params: dict[str, str] = {}
    if model is not None:
        params["model"] = model
    if heat_map is not None:
        params["heat_map"] = heat_map
    if isinstance(threshold, str):
        params["threshold"] = threshold
    elif threshold is not None:
        number = finite("threshold", threshold)
        if not 0.0 <= number <= 1.0:
            raise InvalidRequestError(f"threshold: must be from 0 to 1, or a name, not {threshold!r}")
        params["threshold"] = repr(number)
    return params


def workers(parallel: int) -> int:
    """How many downloads at a time, 1..32."""
    return min(max(whole("parallel", parallel), 1), 32)
