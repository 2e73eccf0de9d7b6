"""Tests of requests that web pages cause: foreign host names get no response, foreign pages change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dermis.bundle import Bundle
from dermis.imaging import encode
from pictures import PIXELS
from service_kit import Service, service
from services.gateway.origins import TrustedHosts, parse_authority
from services.settings import Settings, SettingsError, read_settings

BODY = {"classes": {"benign": 1}}
CORS = "https://studio.example"


@pytest.fixture(scope="module")
def served(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(
        tiny_bundle.location,
        tmp_path_factory.mktemp("data"),
        trusted_hosts=("lab.example", "*.cluster.local", "port.example:8443"),
        cors_origins=(CORS,),
    ) as running:
        yield running


def kind_of(answer: Any) -> str:
    kind: str = answer.json()["type"].rpartition(":")[2]
    return kind


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "192.168.1.7",
        "lab.example.evil",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_request_for_foreign_host_name_is_refused(served: Service, host: str, method: str) -> None:
    """DNS rebinding: the browser takes the page and the service for one origin."""
    before = served.generator.calls
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    path = "/v1/images" if method == "POST" else "/v1/datasets"
    answer = served.client.request(method, path, json=BODY if method == "POST" else None, headers=headers)
    assert (answer.status_code, kind_of(answer)) == (421, "untrusted-host")
    assert "DERMIS_TRUSTED_HOSTS" in answer.json()["detail"] and answer.headers["x-request-id"]
    assert served.generator.calls == before


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:9000",
        "localhost.",
        "127.0.0.1:3000",
        "127.8.8.8",
        "[::1]:3000",
        "lab.example",
        "Lab.Example:81",
        "dermis.default.svc.cluster.local",
        "port.example:8443",
    ],
)
def test_requests_for_loopback_and_trusted_hosts_are_answered(served: Service, host: str) -> None:
    assert served.client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["", "a b", "localhost:99999", "user@localhost", "localhost/evil", "[::1", "port.example:8444"]
)
def test_invalid_or_untrusted_host_headers_are_refused(served: Service, host: str) -> None:
    assert served.client.get("/v1/models", headers={"Host": host}).status_code in (400, 421)


def test_probes_are_answered_for_address_of_pod(served: Service) -> None:
    for path in ("/livez", "/readyz"):
        assert served.client.get(path, headers={"Host": "10.42.0.7:3000"}).status_code == 200
    assert served.client.get("/metrics", headers={"Host": "evil.example"}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:8888", "Sec-Fetch-Site": "same-site"},  # another program's pages on this machine
        {"Origin": "http://127.0.0.1"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"},
        {"Origin": f"{CORS}.evil.example"},
    ],
)
def test_pages_of_other_origins_change_nothing(served: Service, headers: dict[str, str]) -> None:
    dataset = served.ask(BODY)
    form = {"files": ("a.png", encode(PIXELS), "image/png")}
    calls = [
        served.client.post("/v1/projections", files=form, headers=headers),
        served.client.post("/v1/datasets", json=BODY, headers=headers),
        served.client.delete(dataset["links"]["self"], headers=headers),
    ]
    assert [(call.status_code, kind_of(call)) for call in calls] == [(403, "cross-origin")] * 3
    assert "DERMIS_CORS_ORIGINS" in calls[0].json()["detail"]
    assert served.client.get(dataset["links"]["self"], headers=headers).status_code == 200
    assert sum(served.ctx.table.statistics().counts["projection"].values()) == 0


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Host": "localhost:3000", "Origin": "http://localhost:3000"},
        {"Host": "lab.example", "Origin": "https://lab.example", "Sec-Fetch-Site": "same-origin"},  # TLS ends before us
        {"Origin": CORS, "Sec-Fetch-Site": "cross-site"},
    ],
)
def test_requests_of_own_pages_and_allowed_origins_are_accepted(served: Service, headers: dict[str, str]) -> None:
    answer = served.client.post("/v1/images", json=BODY, headers=headers)
    assert answer.status_code == 200, answer.text


def test_origin_refusals_are_documented(served: Service) -> None:
    paths = served.client.get("/openapi.json").json()["paths"]
    assert {"403", "421"} <= paths["/v1/projections"]["post"]["responses"].keys()
    assert "`cross-origin`" in paths["/v1/projections"]["post"]["responses"]["403"]["description"]
    assert "421" in paths["/v1/models"]["get"]["responses"]
    assert "`cross-origin`" not in paths["/v1/models"]["get"]["responses"]["403"]["description"]
    assert "421" not in paths["/livez"]["get"]["responses"]


def trusts(header: str, **settings: Any) -> bool:
    authority = parse_authority(header)
    assert authority is not None
    return TrustedHosts(Settings(_env_file=None, **settings)).allows(authority)


def test_trusted_hosts_depend_on_listening_address() -> None:
    assert not trusts("10.0.0.5:3000")
    assert trusts("10.0.0.5:3000", host="0.0.0.0")
    assert trusts("[fe80::1]:3000", host="::")
    assert not trusts("evil.example", host="0.0.0.0")
    assert trusts("10.0.0.5", host="10.0.0.5") and not trusts("10.0.0.6", host="10.0.0.5")
    assert trusts("dermis.example:3000", host="dermis.example")
    assert trusts("evil.example", trusted_hosts=("*",))
    assert trusts("[2001:DB8:0::7]", trusted_hosts=("2001:db8::7",))


@pytest.mark.parametrize("entry", ["http://lab.example", "lab.example/x", "*.", "a b", "**"])
def test_trusted_hosts_entry_that_is_not_a_host_is_refused(
    entry: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERMIS_TRUSTED_HOSTS", f"ok.example,{entry}")
    with pytest.raises(SettingsError, match="DERMIS_TRUSTED_HOSTS.*not a host"):
        read_settings()
