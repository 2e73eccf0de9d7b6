"""Tests that the address of the client and the scheme come from trusted proxies only."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from service_kit import assemble
from services.gateway.proxies import ProxyMiddleware
from services.settings import SettingsError, read_settings

TRUSTED = ("10.0.0.5", "192.168.1.0/24", "fd00::/64")


def seen(peer: str | None, *headers: tuple[str, str]) -> tuple[Any, str]:
    """The address and the scheme that the application sees of a request from `peer`."""
    scopes: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        scopes.append(scope)

    scope = {
        "type": "http",
        "scheme": "http",
        "client": None if peer is None else (peer, 1234),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
    }
    asyncio.run(ProxyMiddleware(app, TRUSTED)(scope, None, None))  # type: ignore[arg-type]
    client = scopes[0]["client"]
    return client and client[0], scopes[0]["scheme"]


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.0.0.5", ["203.0.113.7"], "203.0.113.7"),
        ("::ffff:10.0.0.5", ["203.0.113.7"], "203.0.113.7"),
        ("fd00::1", ["[2001:db8::1]:443"], "2001:db8::1"),
        ("10.0.0.5", ["198.51.100.1, 203.0.113.7:5000"], "203.0.113.7"),  # the client wrote the first one itself
        ("10.0.0.5", ["198.51.100.1", "203.0.113.7, 192.168.1.9"], "203.0.113.7"),  # two proxies
        ("10.0.0.5", ["192.168.1.8, 192.168.1.9"], "192.168.1.8"),
        ("10.0.0.5", ["evil\t, 192.168.1.9"], "192.168.1.9"),
        ("10.0.0.5", ["fe80::1%any text"], "fe80::1"),
        ("10.0.0.5", [""], "10.0.0.5"),
        ("10.0.0.5", [], "10.0.0.5"),
        ("10.0.0.6", ["203.0.113.7"], "10.0.0.6"),
        ("203.0.113.7", ["10.0.0.5"], "203.0.113.7"),
        ("127.0.0.1", ["203.0.113.7"], "127.0.0.1"),
        (None, ["203.0.113.7"], None),
    ],
)
def test_client_is_the_last_address_that_no_trusted_proxy_has(
    peer: str | None, forwarded: list[str], client: str | None
) -> None:
    assert seen(peer, *(("X-Forwarded-For", value) for value in forwarded))[0] == client


@pytest.mark.parametrize(
    ("peer", "value", "scheme"),
    [
        ("10.0.0.5", "https", "https"),
        ("10.0.0.5", "http, HTTPS", "https"),
        ("10.0.0.5", "https, http", "http"),
        ("10.0.0.5", "javascript", "http"),
        ("10.0.0.6", "https", "http"),
    ],
)
def test_scheme_is_that_of_a_trusted_proxy(peer: str, value: str, scheme: str) -> None:
    assert seen(peer, ("X-Forwarded-Proto", value))[1] == scheme


@pytest.mark.parametrize(("proxies", "client"), [((), "10.0.0.5"), (("10.0.0.0/24",), "203.0.113.7")])
def test_log_has_the_address_of_the_client(
    proxies: tuple[str, ...], client: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = assemble(tmp_path / "none", tmp_path / "data", trusted_proxies=proxies).app

    async def request() -> None:
        async def send(_message: Any) -> None: ...

        headers = [(b"host", b"localhost"), (b"x-forwarded-for", b"203.0.113.7")]
        scope = {"type": "http", "method": "GET", "path": "/none", "raw_path": b"/none", "query_string": b""}
        await app(scope | {"headers": headers, "client": ("10.0.0.5", 1), "scheme": "http"}, None, send)  # type: ignore[arg-type]

    with caplog.at_level(logging.INFO, "dermis.http"):
        asyncio.run(request())
    (record,) = (record for record in caplog.records if record.message == "request")
    assert record.client == client  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", ["*", "proxy.example", "10.0.0.5/24", "0.0.0.0/0", "::/0"])
def test_setting_names_addresses_and_networks(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMIS_TRUSTED_PROXIES", f"10.0.0.5, {value}")
    with pytest.raises(SettingsError, match="DERMIS_TRUSTED_PROXIES"):
        read_settings()
