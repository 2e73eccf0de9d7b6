"""Check arguments and build paths and request bodies. Pure functions; the service validates everything else."""

from __future__ import annotations

import ipaddress
import math
import operator
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, SupportsIndex
from urllib.parse import quote, urlsplit

import httpx

from dermis_client._response_body import MAX_BYTES
from dermis_client._untrusted import MAX_DEPTH, one_line
from dermis_client.errors import InvalidRequestError
from dermis_client.params import EditParams

_MAX_IMAGE_BYTES = 20 << 20  # an image of 2048 x 2048 px that does not compress, as base64
_MAX_BITS = 1024  # of a whole number: Python cannot print one of more than 4300 digits
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{1,16384}=*")  # RFC 6750, section 2.1
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,200}")  # RFC 9110, section 5.6.2
_HEADER_VALUE = re.compile(r"(?! )[\x20-\x7e]{0,8192}(?<! )")
_OWN_HEADERS = {
    "authorization": "give api_key or token_provider",
    "idempotency-key": "give idempotency_key to the call",
    **dict.fromkeys(
        ("accept", "accept-encoding", "connection", "content-length", "content-type", "host", "transfer-encoding"),
        "it depends on the request",
    ),
}
_NUMBERS = {"truncation_psi", "distance", "keep_days"}
_WHOLE_NUMBERS = {"truncation_cutoff", "image_quality", "shard_size", "start_index"}
_ID_PREFIX = {"dataset": "ds", "projection": "pr", "webhook": "wh", "message": "msg", "study": "st"}


def base_url_from(url: str) -> str:
    """Return the base URL without a trailing slash.

    Raises:
        InvalidRequestError: It is not http(s)://host[:port][/prefix].
    """
    usable = isinstance(url, str) and url.isprintable() and " " not in url  # urlsplit would leave line breaks out
    with_password = isinstance(url, str) and "@" in url
    if usable:
        try:
            httpx.URL(url)
            parts = urlsplit(url)
            usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
            usable = usable and not parts.query and not parts.fragment
            with_password = "@" in (parts.netloc if usable else url)
        except (ValueError, httpx.InvalidURL):
            usable = False
    if with_password:
        raise InvalidRequestError(
            "base_url: must not contain a user name or password; give api_key, or your own http_client"
        )
    if not usable:
        raise InvalidRequestError(f"base_url: {url!r} is not an address such as http://127.0.0.1:3000")
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    """Return whether a URL leads to this machine only."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def checked_token(field: str, token: object) -> str:
    """Return an API key or access token that can be sent in a header.

    Raises:
        InvalidRequestError: It cannot; the message does not contain it.
    """
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise InvalidRequestError(
            f"{field}: must be an API key or access token: letters, digits and -._~+/=, without spaces or line breaks"
        )
    return token


def whole(field: str, value: SupportsIndex) -> int:
    """Return an int from any whole number, NumPy's included.

    Raises:
        InvalidRequestError: The value is not a whole number; the message names the field.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidRequestError(f"{field}: must be a whole number, not {value!r}")
    return operator.index(value)


def finite(field: str, value: float) -> float:
    """Return a finite float.

    Raises:
        InvalidRequestError: The value is not a finite number; the message names the field.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool | str) or not math.isfinite(number):
        raise InvalidRequestError(f"{field}: must be a finite number, not {value!r}")
    return number


def counts(classes: Mapping[str, SupportsIndex]) -> dict[str, int]:
    """Return the field `classes`, in the caller's order.

    Raises:
        InvalidRequestError: There is no class, or a count is not a whole number.
    """
    if not isinstance(classes, Mapping) or not classes:
        raise InvalidRequestError('classes: give at least one class and its count, such as {"malignant": 500}')
    return {str(name): whole(f"classes.{name}", count) for name, count in classes.items()}


def generation_body(
    classes: Mapping[str, SupportsIndex], seed: SupportsIndex, extra_body: Mapping[str, Any] | None, **options: Any
) -> dict[str, Any]:
    """Return the JSON body of a request that generates images.

    Args:
        classes: Number of images of each class.
        seed: The seed.
        extra_body: Further fields, which replace options of the same name.
        **options: Further fields; see `optional_fields`.

    Raises:
        InvalidRequestError: A number is not valid.
    """
    return {"classes": counts(classes), "seed": whole("seed", seed)} | optional_fields(extra_body, **options)


def optional_fields(extra_body: Mapping[str, Any] | None, **options: Any) -> dict[str, Any]:
    """Return fields of a JSON body.

    Args:
        extra_body: Further fields, which replace options of the same name.
        **options: The fields. None leaves a field out, so that the service's default applies.

    Raises:
        InvalidRequestError: A number is not valid.
    """
    if options.get("edits") is not None:
        options["edits"] = edit_options(options["edits"])
    result: dict[str, Any] = {}
    for name, value in (options | dict(extra_body or {})).items():
        if value is None:
            continue
        if name in _NUMBERS:
            result[name] = finite(name, value)
        elif name in _WHOLE_NUMBERS:
            result[name] = whole(name, value)
        else:
            result[name] = dict(value) if isinstance(value, Mapping) else value
    return result


def edit_options(edits: Sequence[EditParams] | Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the field `edits` as the API expects it.

    Args:
        edits: {"direction": strength}, or a list of {"direction", "strength", "layers"}.

    Raises:
        InvalidRequestError: A strength is not a finite number.
    """
    if isinstance(edits, Mapping):
        return [{"direction": name, "strength": finite(f"edits.{name}", strength)} for name, strength in edits.items()]
    return [{**option, "strength": finite("edits.strength", option.get("strength", math.nan))} for option in edits]


def json_body(value: Any, field: str = "", depth: int = 0) -> Any:
    """Return a value with the types of JSON only; numbers of NumPy and PyTorch become those of Python.

    Args:
        value: The value.
        field: Its place in the body, such as "privacy.percentile"; "" for the whole body.
        depth: Number of the values that contain it.

    Raises:
        InvalidRequestError: JSON cannot hold it; the message names the field.
    """
    name = one_line(field or "json", 100)
    if depth > MAX_DEPTH:
        raise InvalidRequestError(f"{name}: must not be nested more than {MAX_DEPTH} times")
    if isinstance(value, Mapping):
        for key in value:
            if not (key is None or isinstance(key, str | int | float)):
                raise InvalidRequestError(f"{name}: its names must be text, not {type(key).__name__}")
        return {
            json_body(key, name): json_body(item, f"{field}.{key}" if field else str(key), depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [json_body(item, f"{name}[{position}]", depth + 1) for position, item in enumerate(value)]
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()
    elif not isinstance(value, bool) and hasattr(value, "__index__"):
        with suppress(TypeError):  # an array of several numbers
            value = operator.index(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not _is_unicode(value):
            raise InvalidRequestError(f"{name}: has characters that cannot be sent")
        return value
    if isinstance(value, int):
        if value.bit_length() > _MAX_BITS:
            raise InvalidRequestError(f"{name}: is too large a number")
        return value
    if isinstance(value, float):
        return finite(name, value)
    raise InvalidRequestError(
        f"{name}: must be text, a number, a boolean, None, a list or a dictionary, not {type(value).__name__}"
    )


def _is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def max_response_bytes(images: int) -> int:
    """Return the size limit of a response that contains this number of images."""
    return MAX_BYTES + max(images, 0) * _MAX_IMAGE_BYTES


def idempotency_header(key: str | None) -> dict[str, str]:
    """Return the header with an idempotency key, by default a new one.

    Raises:
        InvalidRequestError: The key is not one that the service accepts.
    """
    if key is None:
        return {"Idempotency-Key": uuid.uuid4().hex}
    if not isinstance(key, str) or not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequestError("idempotency_key: must be 1 to 255 visible ASCII characters, without spaces")
    return {"Idempotency-Key": key}


def checked_headers(headers: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return headers by their names in lower case.

    Raises:
        InvalidRequestError: A header cannot be sent, or the client sets it itself. The message contains no value.
    """
    result: dict[str, str | None] = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise InvalidRequestError(f"headers: {name!r} is not the name of a header")
        if name.lower() in _OWN_HEADERS:
            raise InvalidRequestError(f"headers: {name} is set by the client: {_OWN_HEADERS[name.lower()]}")
        if value is not None and not (isinstance(value, str) and _HEADER_VALUE.fullmatch(value)):
            raise InvalidRequestError(f"headers: the value of {name} must be a line of printable ASCII characters")
        result[name.lower()] = value
    return result


def job_path(kind: Literal["dataset", "projection", "webhook", "study"], identifier: str, *rest: str) -> str:
    """Return /v1/datasets/{id}[/...], and the same for projections, webhooks and studies.

    Raises:
        InvalidRequestError: The id is not valid; the path could lead to another resource.
    """
    plural = "studies" if kind == "study" else f"{kind}s"
    return "/".join([f"/v1/{plural}", checked_id(kind, identifier), *(quote(part, safe="") for part in rest)])


def checked_id(kind: Literal["dataset", "projection", "webhook", "message", "study"], identifier: str) -> str:
    """Return an id that can be part of a path.

    Raises:
        InvalidRequestError: It cannot.
    """
    if not isinstance(identifier, str) or not _ID.fullmatch(identifier):
        raise InvalidRequestError(
            f"{kind} id: {identifier!r} is not valid (ids look like {_ID_PREFIX[kind]}_0123456789abcdef...)"
        )
    return identifier
