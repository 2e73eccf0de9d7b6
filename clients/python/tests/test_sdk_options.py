"""Tests of the options of both clients, of requests to other routes, and of the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest
from dermis_client import AsyncDermisClient, DermisClient, InvalidRequestError
from dermis_client._requests import json_body
from fake_gateway import FakeGateway, Fault

Seen = list[tuple[str, httpx.Headers, float]]


def service(seen: Seen) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((str(request.url), request.headers, request.extensions["timeout"]["read"]))
        return httpx.Response(200, json={"data": []}, headers={"X-Request-Id": "req-1"})

    return answer


def requests_of(options: Mapping[str, Any], *changes: Mapping[str, Any]) -> list[Seen]:
    """The requests of a client and of those that `with_options` makes of it in turn; once blocking, once asynchronous."""
    blocking: Seen = []
    with httpx.Client(transport=httpx.MockTransport(service(blocking))) as http:
        client = DermisClient(http_client=http, **options)
        client.models.list()
        for change in changes:
            client = client.with_options(**change)
            client.models.list()

    async def scenario() -> Seen:
        asynchronous: Seen = []
        async with httpx.AsyncClient(transport=httpx.MockTransport(service(asynchronous))) as http:
            client = AsyncDermisClient(http_client=http, **options)
            await client.models.list()
            for change in changes:
                client = client.with_options(**change)
                await client.models.list()
        return asynchronous

    return [blocking, asyncio.run(scenario())]


def test_options_change_one_client_and_are_inherited() -> None:
    for seen in requests_of(
        {"base_url": "https://a.example/x/", "api_key": "first", "timeout": 3, "headers": {"X-Team": "one"}},
        {"timeout": 7, "headers": {"x-team": "two", "Cookie": "c=1", "User-Agent": "mine"}},
        {"api_key": "second", "base_url": "https://b.example"},
        {"token_provider": lambda: "third", "headers": {"X-TEAM": None}},
        {"api_key": ""},
    ):
        urls, headers, timeouts = zip(*seen, strict=True)
        assert urls == ("https://a.example/x/v1/models",) * 2 + ("https://b.example/v1/models",) * 3
        assert timeouts == (3, 7, 7, 7, 7)
        keys = [each.get("authorization") for each in headers]
        assert keys == ["Bearer first", "Bearer first", "Bearer second", "Bearer third", None]
        assert [each.get_list("x-team") for each in headers] == [["one"], ["two"], ["two"], [], []]
        assert [each.get("cookie") for each in headers] == [None, "c=1", "c=1", "c=1", "c=1"]
        assert headers[0]["user-agent"].startswith("dermis-client/") and headers[1].get_list("user-agent") == ["mine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout must be above 0"),
        ({"max_retries": -1}, "max_retries at least 0"),
        ({"api_key": "a", "token_provider": lambda: "b"}, "not both"),
        ({"api_key": "a\nb"}, "^api_key: "),
        ({"base_url": "ftp://a"}, "^base_url: "),
        ({"base_url": "https://a.example\n"}, r"^base_url: .*\\n. is not an address"),
        ({"base_url": "https://ä..example"}, "^base_url: "),
        (
            {"base_url": "https://user:hidden@a.example:99999"},
            "^base_url: must not contain a user name or password[^@]*$",
        ),
        ({"base_url": "http://other.example"}, "allow_plain_http"),
        ({"headers": {"Authorization": "Bearer x"}}, "^headers: Authorization is set by the client: give api_key"),
        ({"headers": {"idempotency-key": "x"}}, "give idempotency_key to the call"),
        ({"headers": {"Accept-Encoding": "br"}}, "is set by the client"),
        ({"headers": {"X A": "1"}}, "'X A' is not the name of a header"),
        (
            {"headers": {"X-A": "hidden\r\nX-B: 1"}},
            "^headers: the value of X-A must be a line of printable ASCII characters$",
        ),
        ({"headers": {"X-A": 1}}, "the value of X-A"),
    ],
)
def test_wrong_options_are_refused_by_constructor_and_with_options(options: dict[str, Any], message: str) -> None:
    transport = httpx.MockTransport(service([]))
    first: dict[str, Any] = {"base_url": "https://a.example", "api_key": "first"}
    for kind, http in (
        (DermisClient, httpx.Client(transport=transport)),
        (AsyncDermisClient, httpx.AsyncClient(transport=transport)),
    ):
        client: Any = kind(http_client=http, **first)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match=message):
            client.with_options(**options)
        with pytest.raises(InvalidRequestError, match=message):
            kind(**(first | options))
        allowed = client.with_options(allow_plain_http=True)
        assert allowed.with_options(base_url="http://other.example").base_url == "http://other.example"


NOT_JSON: list[tuple[Any, str]] = [
    ({"privacy": {"percentile": float("nan")}}, "^privacy.percentile: must be a finite number, not nan$"),
    ({"sweep": {"strengths": [1, float("inf")]}}, r"^sweep.strengths\[1\]: must be a finite number, not inf$"),
    ({"edits": [{"layers": {1, 2}}]}, r"^edits\[0\].layers: must be text, a number, .*, not set$"),
    ({"name": "\ud800"}, "^name: has characters that cannot be sent$"),
    ({"seed": 10**5000}, "^seed: is too large a number$"),
    ({"a": {b"x": 1}}, "^a: its names must be text, not bytes$"),
    ([b"x"], r"^json\[0\]: must be text"),
]


@pytest.mark.parametrize(("body", "message"), NOT_JSON, ids=[str(number) for number in range(len(NOT_JSON))])
def test_body_that_json_cannot_hold_is_refused_with_its_field(body: Any, message: str) -> None:
    seen: Seen = []
    with httpx.Client(transport=httpx.MockTransport(service(seen))) as http:
        client = DermisClient("https://a.example", http_client=http)
        with pytest.raises(InvalidRequestError, match=message):
            client.request("POST", "/v1/x", json=body)
        with pytest.raises(InvalidRequestError, match=message.replace("^json", "^extra")):
            client.datasets.create({"benign": 1}, extra_body=body if isinstance(body, dict) else {"extra": body})
        for options in ({"headers": {"X-A": "ä"}}, {"params": {"a": "\ud800"}}):
            with pytest.raises(InvalidRequestError, match="^GET /v1/x: it cannot be sent"):
                client.request("GET", "/v1/x", **options)  # type: ignore[arg-type]
    assert not seen


def test_endless_nesting_of_a_body_is_refused() -> None:
    body: dict[str, Any] = {}
    body["again"] = [body]
    with pytest.raises(InvalidRequestError, match="again.*: must not be nested more than 64 times"):
        json_body(body)


def test_numbers_of_numpy_are_sent_as_those_of_python() -> None:
    numpy = pytest.importorskip("numpy", reason="NumPy is not installed")
    body = {"a": numpy.float32(0.5), "b": [numpy.int64(3), numpy.True_], "c": numpy.array(7), "d": (True, None, "x", 1)}
    plain = json_body(body)
    assert plain == {"a": 0.5, "b": [3, True], "c": 7, "d": [True, None, "x", 1]}
    assert [type(value) for value in (plain["a"], *plain["b"], plain["c"], *plain["d"])] == [
        float, int, bool, int, bool, type(None), str, int,
    ]  # fmt: skip
    with pytest.raises(InvalidRequestError, match="^a: must be text, a number, .*, not ndarray$"):
        json_body({"a": numpy.arange(2)})


def test_headers_are_not_sent_to_another_address_nor_shown(gateway: FakeGateway) -> None:
    with FakeGateway() as elsewhere:
        target = f"{elsewhere.url}/v1/models"
        gateway.faults = [Fault("GET /v1/models", times=2, status=307, headers={"Location": target})]
        options = {"headers": {"X-Proxy-Key": "hidden"}}
        with DermisClient(gateway.url, **options) as client:  # type: ignore[arg-type]
            client.models.list()
            assert "hidden" not in repr(client)

        async def scenario() -> None:
            async with AsyncDermisClient(gateway.url) as other:
                await other.with_options(headers={"X-Proxy-Key": "hidden"}).models.list()

        asyncio.run(scenario())
        assert [each["x-proxy-key"] for each in gateway.requests("GET")] == ["hidden"] * 2
        assert len(elsewhere.log) == 2 and not any("x-proxy-key" in each for each in elsewhere.requests("GET"))


def test_a_client_of_this_machine_does_not_take_over_connections_through_a_proxy(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with FakeGateway() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        with DermisClient("http://service.example", max_retries=0) as client:
            with client.with_options(base_url=gateway.url) as local:
                local.models.list()
                assert local._transport.http is not client._transport.http
            assert local._transport.http.is_closed and not client._transport.http.is_closed
            same = client.with_options(base_url="http://second.example", timeout=1)
            assert same._transport.http is client._transport.http
            same.close()
            assert not client._transport.http.is_closed  # they end with the client that opened them
            assert not proxy.log and len(gateway.log) == 1
            client.models.list()
        assert [line for line, _ in proxy.log] == ["GET /v1/models"]


def test_async_client_repeats_requests_and_returns_them_as_they_are(gateway: FakeGateway) -> None:
    async def scenario() -> None:
        async with AsyncDermisClient(gateway.url, api_key="secret-key", max_retries=0) as client:
            gateway.faults = [
                Fault("GET /v1/models", times=2, status=503),
                Fault("POST /v1/images", after=True, times=2),
            ]
            response = await client.with_options(max_retries=2).request("GET", "/v1/models", params={"limit": 1})
            assert response.json()["data"] and response.headers["X-Request-Id"] == "req-1"
            assert gateway.requests("GET /v1/models")[-1]["authorization"] == "Bearer secret-key"
            body = {"classes": {"benign": 1}, "seed": 0}
            patient = client.with_options(max_retries=2)
            headers = {"Idempotency-Key": "k", "accept": "application/x"}
            assert (await patient.request("post", "/v1/images", json=body, headers=headers)).status_code == 200
            sent = gateway.requests("POST /v1/images")
            assert len(sent) == 3 and {each["accept"] for each in sent} == {"application/x"}
            with pytest.raises(InvalidRequestError, match="path"):
                await client.request("GET", "v1/models")

    asyncio.run(scenario())


def test_repeated_requests_are_not_printed_unless_the_program_wants_it(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program that does not configure logging
    gateway.faults = [Fault("GET /v1/models", status=503)]
    with DermisClient(gateway.url) as client:
        client.models.list()
    assert len(gateway.log) == 2 and capsys.readouterr().err == ""
