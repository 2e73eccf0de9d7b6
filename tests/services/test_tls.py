"""Tests of HTTPS by the gateway itself, with an authority that the tests make."""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import logging
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason="cryptography is not installed")

import uvicorn
from dermis_client import APIConnectionError, APIResponseError, AsyncDermisClient, DermisClient, InvalidRequestError
from starlette.types import Receive, Scope, Send

from certificates import Authority, make_authority
from service_kit import wait_for
from services import connections, serve, supervisor, tls, worker
from services.connections import BoundedProtocol
from services.settings import Settings, SettingsError, read_settings


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the scheme as JSON, and 413 without reading the body of /refuse."""
    if scope["type"] != "http":
        return
    status = 413 if scope["path"] == "/refuse" else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": json.dumps({"scheme": scope["scheme"]}).encode()})


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "authority.pem")


@pytest.fixture
def header_seconds() -> float:
    return 60.0


@pytest.fixture
def settings(authority: Authority, tmp_path: Path, header_seconds: float) -> Settings:
    authority.issue(tmp_path / "tls.crt", tmp_path / "tls.key")
    return make_settings(tmp_path, header_timeout_seconds=header_seconds)


def make_settings(folder: Path, **values: Any) -> Settings:
    files = {"tls_certificate": folder / "tls.crt", "tls_key": folder / "tls.key"}
    return Settings(**{"_env_file": None, "data_dir": folder / "data", **files, **values})


@pytest.fixture
def port(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Port of a server with the gateway's protocol and options."""
    monkeypatch.setattr(connections, "settings_of_process", lambda: settings)
    monkeypatch.setattr(tls, "settings_of_process", lambda: settings)
    monkeypatch.setattr(tls, "_CHECK_SECONDS", 0.0)
    options = tls.uvicorn_options(settings)
    config = uvicorn.Config(
        app, port=0, log_level="error", http=BoundedProtocol, timeout_graceful_shutdown=1, **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def request(authority: Authority, port: int, method: str = "GET", path: str = "/", body: bytes | None = None) -> Any:
    """The answer and the serial number of the certificate."""
    context = ssl.create_default_context(cafile=str(authority.path))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
    connection.connect()
    certificate = connection.sock.getpeercert()  # type: ignore[union-attr]
    connection.request(method, path, body)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text, int(str(certificate["serialNumber"]), 16)


def test_answers_come_over_tls_with_strict_transport_security(authority: Authority, port: int) -> None:
    answer, text, _ = request(authority, port)
    assert (answer.status, text, answer.getheader("strict-transport-security")) == (
        200,
        '{"scheme": "https"}',
        "max-age=31536000",
    )
    refused, _, _ = request(authority, port, "POST", "/refuse", b"x" * (4 << 20))  # the rest of the body is read
    assert refused.status == 413
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as plain:  # HTTP without TLS is not answered
        plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP/1.1")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asyncio"])
def test_client_of_python_trusts_the_authority_of_the_environment(
    authority: Authority, port: int, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # a proxy is not used for this machine

    def ask() -> None:
        address = f"https://127.0.0.1:{port}"
        if asynchronous:
            asyncio.run(AsyncDermisClient(address, max_retries=0).models.list())
        else:
            DermisClient(address, max_retries=0).models.list()

    with pytest.raises(APIConnectionError, match="certificate .* is not accepted .* set SSL_CERT_FILE"):
        ask()
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
    with pytest.raises(APIResponseError):  # the server of this test has no models
        ask()
    monkeypatch.setenv("SSL_CERT_FILE", "/none.pem")
    with pytest.raises(InvalidRequestError, match="SSL_CERT_FILE"):
        ask()


def test_replaced_certificate_is_used_without_a_restart(
    authority: Authority, port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = request(authority, port)[2]
    after = authority.issue(tmp_path / "tls.crt", tmp_path / "new.key")
    with caplog.at_level(logging.INFO, "dermis.tls"):
        for _ in range(3):  # only one of the two files was replaced
            assert request(authority, port)[2] == before
        assert [record.message for record in caplog.records] == ["certificate not read again; the last one is used"]
        (tmp_path / "new.key").replace(tmp_path / "tls.key")
        assert request(authority, port)[2] == after != before
        (tmp_path / "tls.key").unlink()
        assert request(authority, port)[2] == after
    assert [record.message.split(";")[0] for record in caplog.records[1:]] == [
        "certificate read again",
        "certificate not read again",
    ]


@pytest.mark.parametrize("header_seconds", [1.0])
def test_handshake_has_the_time_limit_of_headers(port: int) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as silent, suppress(ConnectionResetError):
        assert silent.recv(1) == b""
    assert time.monotonic() - began < 25


def test_connections_above_the_limit_of_open_files_are_refused(
    authority: Authority, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "_most_connections", lambda: -1)
    with pytest.raises(OSError):
        request(authority, port)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, _: (folder / "tls.key").unlink(), "tls.key cannot be read: No such file"),
        (lambda folder, _: (folder / "tls.crt").write_text("x"), "are not a certificate and its key"),
        (lambda folder, ca: ca.issue(folder / "tls.crt"), "is not that of the certificate"),
        (lambda folder, ca: ca.issue(folder / "tls.crt", folder / "tls.key", b"secret"), "without a password"),
    ],
)
def test_service_does_not_start_with_files_that_it_cannot_use(
    settings: Settings, authority: Authority, tmp_path: Path, change: Callable[[Path, Authority], Any], message: str
) -> None:
    change(tmp_path, authority)
    with pytest.raises(SettingsError, match=f"DERMIS_TLS_CERTIFICATE, DERMIS_TLS_KEY: .*{message}"):
        supervisor.check_access(settings)


def test_certificate_needs_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERMIS_TLS_CERTIFICATE", "tls.crt")
    with pytest.raises(SettingsError, match="set both DERMIS_TLS_CERTIFICATE and DERMIS_TLS_KEY"):
        read_settings()


def test_address_and_readiness_of_the_command_use_https(settings: Settings, port: int) -> None:
    assert serve._url(settings) == "https://127.0.0.1:3000"
    assert serve._get(f"https://127.0.0.1:{port}/readyz") == (200, {"scheme": "https"})
    assert "headers" not in tls.uvicorn_options(settings.model_copy(update={"hsts_seconds": 0}))


def test_worker_of_the_gateway_has_these_options(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn.protocols.http.auto
    from _bentoml_impl.worker import service

    monkeypatch.setattr(uvicorn, "Config", uvicorn.Config)
    monkeypatch.setattr(uvicorn.protocols.http.auto, "AutoHTTPProtocol", None)
    monkeypatch.setattr("services.settings.settings_of_process", lambda: settings)
    monkeypatch.setattr(worker, "exit_with_parent", lambda _: None)
    monkeypatch.setattr(service, "main", lambda: None)
    monkeypatch.setattr(sys, "argv", ["worker", "1", "services.service:Gateway", "--service-name", "gateway"])
    worker.main()
    config = uvicorn.Config
    assert isinstance(config, functools.partial)
    assert config.keywords.keys() == {"proxy_headers", "loop", "ssl_context_factory", "headers"}
    assert config.keywords["proxy_headers"] is False
