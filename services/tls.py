"""TLS of the gateway: a certificate that is read again when its files change, and the options of uvicorn for it."""

from __future__ import annotations

import asyncio
import logging
import resource
import ssl
import time
import weakref
from pathlib import Path
from typing import Any, Self

from uvicorn.loops.auto import auto_loop_factory

from services.settings import Settings, SettingsError, settings_of_process

logger = logging.getLogger("dermis.tls")

_CHECK_SECONDS = 1.0  # time between two looks at the files; they are looked at when a connection is opened
_FILES_KEPT = 256  # open files other than connections


class CertificateError(Exception):
    """The files of the certificate cannot be used; the message says why."""


class ReloadedContext(ssl.SSLContext):
    """A context that uses the certificate in two files for new connections, also after the files were replaced.

    While the files cannot be used, for instance because only one of them was replaced, the last certificate is used.

    Args:
        certificate: PEM file with the certificate and those of the intermediate authorities.
        key: PEM file with the private key.

    Raises:
        CertificateError: The files cannot be used.
    """

    def __new__(cls, certificate: Path, key: Path) -> Self:
        """Create the object; `ssl.SSLContext` takes its arguments here."""
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self, certificate: Path, key: Path) -> None:
        super().__init__()
        self._paths = (certificate, key)
        self._state = self._files_state()
        self._current = _read(certificate, key)
        self._checked = time.monotonic()
        self._connections: weakref.WeakSet[ssl.SSLObject] = weakref.WeakSet()

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Begin the handshake of a connection. The event loop calls this method for each one."""
        if len(self._connections) > _most_connections():  # those in a handshake are not counted elsewhere
            raise ConnectionAbortedError("too many connections are open")
        self._read_if_changed()
        connection = self._current.wrap_bio(*args, **options)
        self._connections.add(connection)
        return connection

    def _read_if_changed(self) -> None:
        now = time.monotonic()
        if now - self._checked < _CHECK_SECONDS:
            return
        self._checked = now
        state = self._files_state()
        if state == self._state:
            return
        self._state = state
        try:
            self._current = _read(*self._paths)
        except CertificateError as error:
            logger.warning("certificate not read again; the last one is used", extra={"problem": str(error)})
        else:
            logger.info("certificate read again", extra={"file": str(self._paths[0])})

    def _files_state(self) -> list[tuple[int, int, int] | None]:
        state: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError:
                state.append(None)
            else:
                state.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return state


def _read(certificate: Path, key: Path) -> ssl.SSLContext:
    for path in (certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise CertificateError(f"{path} cannot be read: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # without it OpenSSL asks on the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(f"the key in {key} is not that of the certificate in {certificate}") from None
        raise CertificateError(
            f"{certificate} and {key} are not a certificate and its key without a password, in PEM format "
            f"({error.reason or 'unknown format'})"
        ) from None
    return context


def _most_connections() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (1 << 30) if limit == resource.RLIM_INFINITY else max(16, (limit - _FILES_KEPT) // 2)


def check_certificate(settings: Settings) -> None:
    """Check that the gateway can use its certificate.

    Raises:
        SettingsError: It cannot.
    """
    if settings.tls_certificate is not None and settings.tls_key is not None:
        try:
            _read(settings.tls_certificate, settings.tls_key)
        except CertificateError as error:
            raise SettingsError(f"DERMIS_TLS_CERTIFICATE, DERMIS_TLS_KEY: {error}") from None


def event_loop() -> asyncio.AbstractEventLoop:
    """An event loop whose connections must complete their TLS handshake in the time that they have for headers."""
    loop = auto_loop_factory()()
    create_server = loop.create_server
    seconds = settings_of_process().header_timeout_seconds

    def create_bounded_server(*args: Any, **options: Any) -> Any:
        if options.get("ssl") is not None:
            options.setdefault("ssl_handshake_timeout", seconds)
        return create_server(*args, **options)

    loop.create_server = create_bounded_server  # type: ignore[method-assign]
    return loop


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """Options of `uvicorn.Config` for the gateway."""
    # uvicorn would believe the proxy headers of all programs on this machine; `services.gateway.proxies` reads them.
    options: dict[str, Any] = {"proxy_headers": False}
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return options
    options["loop"] = "services.tls:event_loop"
    options["ssl_context_factory"] = lambda _config, _default: ReloadedContext(certificate, key)
    if settings.hsts_seconds:
        options["headers"] = [("Strict-Transport-Security", f"max-age={settings.hsts_seconds}")]
    return options
