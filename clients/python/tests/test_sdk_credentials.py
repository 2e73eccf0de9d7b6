"""Tests of where API keys and tokens go, and where they must never go."""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from typing import Any

import httpx
import pytest
from dermis_client import AsyncDermisClient, DermisClient, cli, errors
from fake_gateway import FakeGateway, Fault

KEY = "dermis_sk_abcdefghijkl_" + "S3cret-_" * 5 + "abc"


def sent(gateway: FakeGateway) -> list[str | None]:
    return [headers.get("authorization") for headers in gateway.requests("GET /v1/models")]


def test_key_comes_from_argument_or_environment(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with DermisClient(gateway.url) as client:
        client.models.list()
    monkeypatch.setenv("DERMIS_API_KEY", "environment")
    with DermisClient(gateway.url) as client:
        client.models.list()
    with DermisClient(gateway.url, api_key=KEY) as client:
        client.models.list()
    assert sent(gateway) == [None, "Bearer environment", f"Bearer {KEY}"]


def test_token_provider_is_called_before_each_request(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMIS_API_KEY", "environment")
    tokens = iter(["a1", "a2", "a3", "b1", "b2"])

    async def provide() -> str:
        await asyncio.sleep(0)
        return next(tokens)

    async def run() -> None:
        for provider in (provide, lambda: next(tokens)):
            async with AsyncDermisClient(gateway.url, token_provider=provider) as client:
                await client.models.list()

    with DermisClient(gateway.url, token_provider=lambda: next(tokens)) as client:
        client.models.list()
        gateway.faults = [Fault("GET /v1/models", status=503)]
        client.models.list()  # a repeated request asks again
    asyncio.run(run())
    assert sent(gateway) == [f"Bearer {token}" for token in ("a1", "a2", "a3", "b1", "b2")]


def test_both_or_unusable_credentials_are_refused_without_being_shown(gateway: FakeGateway) -> None:
    async def late() -> str:
        return KEY

    def refusal(**values: object) -> str:
        def call() -> None:
            with DermisClient(gateway.url, **values) as client:  # type: ignore[arg-type]
                client.models.list()

        with pytest.raises(errors.InvalidRequestError) as caught:
            call()
        return "".join(traceback.format_exception(caught.value))

    assert "not both" in refusal(api_key=KEY, token_provider=lambda: KEY)
    for wrong in (f"{KEY}\n", f"{KEY} x", f"ü{KEY}", f"{KEY}\r\nX: y"):
        assert KEY not in refusal(api_key=wrong)
        assert KEY not in refusal(token_provider=lambda wrong=wrong: wrong)
    refusal(token_provider=lambda: None)
    refusal(token_provider=late)  # a coroutine function needs the asynchronous client
    assert sent(gateway) == []


def test_password_in_the_address_is_refused_without_being_shown() -> None:
    with pytest.raises(errors.InvalidRequestError) as caught:
        DermisClient("https://user:hidden@service.example")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_key_is_not_sent_on_a_redirect_to_another_host_or_port(gateway: FakeGateway, status: int) -> None:
    with FakeGateway() as elsewhere:
        for place in (elsewhere.url, elsewhere.url.replace("127.0.0.1", "localhost")):
            gateway.faults = [Fault("GET /v1/models", status=status, headers={"Location": f"{place}/v1/models"})]
            with DermisClient(gateway.url, api_key=KEY) as client:
                client.models.list()
        assert sent(elsewhere) == [None, None]
        back = Fault("GET /v1/models", status=status, headers={"Location": f"{gateway.url}/v1/models"})
        elsewhere.faults = [back]
        gateway.faults = [Fault("GET /v1/models", status=status, headers={"Location": f"{elsewhere.url}/v1/models"})]
        with DermisClient(gateway.url, token_provider=lambda: KEY) as client:
            client.models.list()
        assert sent(gateway)[-2:] == [f"Bearer {KEY}", None]  # lost on the way there, and not added again


def test_key_is_not_sent_from_https_to_http() -> None:
    seen: list[tuple[str, str | None]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((str(request.url), request.headers.get("authorization")))
        if request.url.scheme == "https":
            return httpx.Response(307, headers={"Location": "http://service.example/v1/models"})
        return httpx.Response(200, json={"data": []})

    with httpx.Client(transport=httpx.MockTransport(answer)) as http:
        DermisClient("https://service.example", api_key=KEY, http_client=http).models.list()
    assert seen == [
        ("https://service.example/v1/models", f"Bearer {KEY}"),
        ("http://service.example/v1/models", None),
    ]


SIGNATURE = "X-Amz-Signature=abcdef0123"


def test_storage_gets_nothing_that_belongs_to_the_http_client_of_the_caller() -> None:
    """The service sends the client to a storage, and that to another path of the storage."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        places = [f"https://storage.example/file?{SIGNATURE}", f"https://storage.example/moved?{SIGNATURE}"]
        if len(seen) % 3:
            return httpx.Response(307, headers={"Location": places[len(seen) % 3 - 1]})
        return httpx.Response(200, content=b"file")

    options: dict[str, Any] = {
        "transport": httpx.MockTransport(answer), "auth": ("user", "hidden"), "cookies": {"session": "hidden"},
        "headers": {"X-Api-Key": "hidden"},
    }  # fmt: skip
    headers = {"Range": "bytes=5-", "If-Range": '"etag"', "Cache-Control": "no-store"}
    with httpx.Client(**options) as http:
        DermisClient("https://service.example", http_client=http).request("GET", "/v1/x", headers=headers)

    async def scenario() -> None:
        async with httpx.AsyncClient(**options) as http:
            client = AsyncDermisClient("https://service.example", http_client=http)
            await client.request("GET", "/v1/x", headers=headers)

    asyncio.run(scenario())
    assert [request.url.path for request in seen] == ["/v1/x", "/file", "/moved"] * 2
    for request in seen:
        if request.url.host == "service.example":
            assert {"authorization", "cookie", "x-api-key", "if-range"} <= request.headers.keys()
        else:
            expected = {"accept", "accept-encoding", "connection", "host", "range", "user-agent"}
            assert request.headers.keys() == expected and request.headers["host"] == "storage.example"
            assert request.url.query.decode() == SIGNATURE


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"status": 403, "body": b"<Error/>", "media_type": "application/xml"}, errors.PermissionDeniedError),
        ({"status": 503, "body": b"<Error/>", "media_type": "application/xml"}, errors.ServerError),
        ({"status": 200, "body": b"<html>"}, errors.APIResponseError),
        ({"status": 200, "body": b"{}", "headers": {"Content-Encoding": "br"}}, errors.APIResponseError),
        ({"after": True}, errors.APIConnectionError),
    ],
)
def test_signature_of_an_address_is_in_no_message_or_log_line(
    gateway: FakeGateway, caplog: pytest.LogCaptureFixture, fault: dict[str, Any], kind: type[errors.DermisError]
) -> None:
    with FakeGateway() as storage:
        target = {"Location": f"{storage.url.replace('//', '//user:hidden@')}/v1/models?{SIGNATURE}#{SIGNATURE}"}
        gateway.faults = [Fault("GET /v1/models", times=9, status=307, headers=target)]
        storage.faults = [Fault("GET /v1/models", times=9, **fault)]
        caplog.set_level(logging.DEBUG, "dermis_client")
        with DermisClient(gateway.url, max_retries=1) as client, pytest.raises(kind) as caught:
            client.models.list()
    assert f"{storage.url}/v1/models" in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "Signature" not in shown and "hidden" not in shown


def test_plain_http_to_another_machine_needs_an_explicit_option(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (
        "http://service.example",
        "HTTP://10.0.0.5:3000",
        "http://127.0.0.1.evil.example",
        "http://[2001:db8::1]",
    ):
        for values in ({"api_key": KEY}, {"token_provider": lambda: KEY}):
            with pytest.raises(errors.InvalidRequestError, match="allow_plain_http") as caught:
                DermisClient(address, **values)  # type: ignore[arg-type]
            assert KEY not in str(caught.value)
        DermisClient(address).close()
        DermisClient(address, api_key=KEY, allow_plain_http=True).close()
    for address in ("https://service.example", "http://127.9.9.9", "http://localhost:3000", "http://[::1]:3000"):
        DermisClient(address, api_key=KEY).close()
    monkeypatch.setenv("DERMIS_API_KEY", KEY)
    with pytest.raises(errors.InvalidRequestError, match="DERMIS_ALLOW_PLAIN_HTTP"):
        AsyncDermisClient("http://service.example")
    monkeypatch.setenv("DERMIS_ALLOW_PLAIN_HTTP", "true")
    AsyncDermisClient("http://service.example")


def test_proxy_of_the_environment_does_not_see_requests_to_this_machine(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeGateway() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        with DermisClient(gateway.url, api_key=KEY) as client:
            client.models.list()
        assert proxy.log == [] and sent(gateway) == [f"Bearer {KEY}"]


def test_key_is_in_no_log_line_repr_or_error(gateway: FakeGateway, caplog: pytest.LogCaptureFixture) -> None:
    gateway.faults = [Fault("GET /v1/models", status=401), Fault("GET /v1/models/demo", status=403)]
    shown: list[str] = []
    with caplog.at_level(logging.DEBUG), DermisClient(gateway.url, api_key=KEY) as client:
        shown += [repr(client), str(client), repr(client._transport.settings), repr(vars(client))]
        for call, kind in (
            (client.models.list, errors.AuthenticationError),
            (lambda: client.models.retrieve("demo"), errors.PermissionDeniedError),
        ):
            with pytest.raises(kind) as caught:
                call()
            shown += traceback.format_exception(caught.value)
        gateway.stop()
        with pytest.raises(errors.APIConnectionError) as broken:
            client.models.list()
        shown += traceback.format_exception(broken.value)
        gateway.start()
    assert caplog.records and KEY not in caplog.text and not any(KEY in text for text in shown)
    assert KEY[23:] not in "".join(shown)


def test_command_line_sends_the_key_and_never_prints_it(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dermis-client", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        out, err = capsys.readouterr()
        return out + err

    printed = run("--base-url", gateway.url, "--api-key", KEY, "models")
    monkeypatch.setenv("DERMIS_API_KEY", KEY)
    printed += run("models", "--base-url", gateway.url)
    assert sent(gateway) == [f"Bearer {KEY}"] * 2
    printed += run("--help") + run("models", "--wrong")
    refused = run("models", "--base-url", "http://service.example")
    assert "--allow-plain-http" in refused and KEY not in printed + refused
