"""Sending DICOM files to a server by DICOMweb (STOW-RS)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dermis.addresses import is_loopback, is_loopback_url
from dermis.errors import DermisError, RequestError, escape

AUTHORIZATION = "DERMIS_DICOMWEB_AUTHORIZATION"
"""Environment variable with the value of the Authorization header, such as `Bearer ...` or `Basic ...`."""
_BATCH_FILES, _BATCH_BYTES = 50, 32 << 20
_BOUNDARY = "dermis-dicom-part"
_TIMEOUT = 120.0  # seconds
_MAX_ANSWER_BYTES = 8 << 20
_FAILED, _REASON = "00081198", "00081197"  # Failed SOP Sequence, Failure Reason
_STORED = "00081199"  # Referenced SOP Sequence


@dataclass(frozen=True)
class StowTarget:
    """A DICOMweb server.

    Attributes:
        url: Address of the service, such as http://127.0.0.1:8042/dicom-web.
        authorization: Value of the Authorization header; it is never in a message.
    """

    url: str
    authorization: str | None = None

    def __repr__(self) -> str:
        """Return a text without the credentials."""
        return f"StowTarget({self.url!r})"


def stow_target(url: str, authorization: str | None) -> StowTarget:
    """Check the address of a server.

    Args:
        url: Its address.
        authorization: Value of the Authorization header, or None.

    Raises:
        RequestError: It is not an http(s) address, contains credentials, or would send credentials without encryption.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise RequestError("--to", "must be the address of a DICOMweb service, such as http://127.0.0.1:8042/dicom-web")
    if parts.username is not None or parts.password is not None:
        raise RequestError("--to", f"must not contain credentials; put them into {AUTHORIZATION}")
    if authorization is not None and parts.scheme != "https" and not is_loopback(host):
        raise RequestError("--to", f"with {AUTHORIZATION} the address must begin with https://")
    return StowTarget(url.rstrip("/"), authorization)


def store_instances(target: StowTarget, files: Iterable[tuple[str, bytes]]) -> int:
    """Send DICOM files. A server replaces or keeps objects that it has already, so that sending can be repeated.

    Args:
        target: The server.
        files: Name and content of each file.

    Returns:
        Number of files that the server has stored.

    Raises:
        DermisError: The server cannot be reached, refuses files or sends another answer. Files sent before stay there.
    """
    import httpx

    headers = {
        "Accept": "application/dicom+json",
        "Accept-Encoding": "identity",
        "Content-Type": f'multipart/related; type="application/dicom"; boundary={_BOUNDARY}',
    }
    if target.authorization is not None:
        headers["Authorization"] = target.authorization
    stored = 0
    context = httpx.create_ssl_context()  # with the authorities of SSL_CERT_FILE, if it is set
    # A proxy of the environment is for other machines: it would see the credentials for this one.
    through_proxy = not is_loopback_url(target.url)
    with httpx.Client(timeout=_TIMEOUT, headers=headers, verify=context, trust_env=through_proxy) as client:
        for names, body in _batches(files):
            try:
                with client.stream("POST", f"{target.url}/studies", content=body) as response:
                    _check(target, response, names)
            except httpx.HTTPError as error:
                raise DermisError(
                    f"{target.url}: cannot be reached ({escape(error)}); {stored:,} files were stored before. "
                    "Send them again when the server works: objects that it has already are not stored twice"
                ) from None
            stored += len(names)
    return stored


def _batches(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[list[str], bytes]]:
    names: list[str] = []
    body = bytearray()
    for name, data in files:
        names.append(name)
        body += f"--{_BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode() + data + b"\r\n"
        if len(names) >= _BATCH_FILES or len(body) >= _BATCH_BYTES:
            yield names, bytes(body) + f"--{_BOUNDARY}--\r\n".encode()
            names, body = [], bytearray()
    if names:
        yield names, bytes(body) + f"--{_BOUNDARY}--\r\n".encode()


def _check(target: StowTarget, response: Any, names: list[str]) -> None:
    """Raise DermisError unless the server has stored every file."""
    status = response.status_code
    if status in (401, 403):
        raise DermisError(f"{target.url}: refuses access (status {status}); set {AUTHORIZATION}")
    content = bytearray()
    for piece in response.iter_bytes():
        content += piece
        if len(content) > _MAX_ANSWER_BYTES:
            raise DermisError(
                f"{target.url}: sent an answer of more than {_MAX_ANSWER_BYTES:,} bytes (status {status}) for the files from "
                f"{names[0]} to {names[-1]}; is this the address of a DICOMweb service?"
            )
    failed, stored = _outcomes(bytes(content))
    if not failed and (status == 200 or (status == 202 and stored == len(names))):  # 202: stored, with warnings
        return
    reason = f"; first failure reason {escape(failed[0], 100)}" if failed else ""
    what = f"{len(failed)} of {len(names)}" if failed else f"{len(names)}"
    raise DermisError(
        f"{target.url}: did not store {what} files from {names[0]} to {names[-1]} (status {status}{reason}); "
        "the log of the server has the cause"
    )


def _outcomes(content: bytes) -> tuple[list[str], int]:
    """Return the reasons of the failed objects in an answer, and the number of the stored ones."""
    try:
        document = json.loads(content)
        if not isinstance(document, dict):
            return [], 0
        failed, stored = (document.get(tag, {}).get("Value", []) for tag in (_FAILED, _STORED))
        return [str(item.get(_REASON, {}).get("Value", ["unknown"])[0]) for item in failed], len(stored)
    except (ValueError, AttributeError, TypeError, IndexError, KeyError, RecursionError):
        return [], 0
