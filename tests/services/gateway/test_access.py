"""Tests that every route of the OpenAPI document is refused without the right credentials, whoever asks."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from dermis.bundle import Bundle
from identity_provider import AUDIENCE, Provider, running_provider
from service_kit import Service, service
from services.gateway import events
from services.gateway.auth import keys as keys_module
from services.gateway.auth.authentication import Authenticator, check_routes, requires
from services.gateway.auth.keys import new_key
from services.gateway.auth.principal import SCOPES, Principal
from services.logs import LineFormatter

# The scopes of every operation; one of them suffices. A new operation needs an entry here.
SCOPES_OF: dict[str, set[str]] = {
    "post /v1/datasets": {"datasets:write"},
    "get /v1/datasets": {"datasets:read"},
    "get /v1/datasets/{dataset_id}": {"datasets:read"},
    "delete /v1/datasets/{dataset_id}": {"datasets:write"},
    "get /v1/datasets/{dataset_id}/events": {"datasets:read"},
    "get /v1/datasets/{dataset_id}/files": {"datasets:read"},
    "get /v1/datasets/{dataset_id}/files/{name}": {"datasets:read"},
    "head /v1/datasets/{dataset_id}/files/{name}": {"datasets:read"},
    "get /v1/datasets/{dataset_id}/report": {"datasets:read"},
    "post /v1/images": {"images"},
    "get /v1/directions": {"models:read"},
    "post /v1/edits": {"edits"},
    "post /v1/edits/interpolations": {"edits"},
    "post /v1/edits/neighbours": {"edits"},
    "post /v1/projections": {"projections"},
    "get /v1/projections/{projection_id}": {"projections"},
    "delete /v1/projections/{projection_id}": {"projections"},
    "get /v1/projections/{projection_id}/files/{name}": {"projections"},
    "post /v1/classifications": {"classify"},
    "post /v1/authenticity": {"authenticity:generated", "authenticity:uploads"},
    "get /v1/embeddings": {"authenticity:generated"},
    "post /v1/embeddings": {"authenticity:generated", "authenticity:uploads"},
    "post /v1/embeddings/projections": {"authenticity:generated"},
    "get /v1/models": {"models:read"},
    "get /v1/models/{name}": {"models:read"},
    "post /v1/webhooks": {"webhooks"},
    "get /v1/webhooks": {"webhooks"},
    "get /v1/webhooks/{webhook_id}": {"webhooks"},
    "delete /v1/webhooks/{webhook_id}": {"webhooks"},
    "get /v1/webhooks/{webhook_id}/messages": {"webhooks"},
    "post /v1/webhooks/{webhook_id}/messages/{message_id}/retry": {"webhooks"},
    "post /v1/studies": {"studies"},
    "get /v1/studies": {"studies"},
    "get /v1/studies/{study_id}": {"studies"},
    "delete /v1/studies/{study_id}": {"studies"},
    "post /v1/studies/{study_id}/images": {"studies"},
    "post /v1/studies/{study_id}/open": {"studies"},
    "post /v1/studies/{study_id}/close": {"studies"},
    "get /v1/studies/{study_id}/results": {"studies"},
    "get /v1/studies/{study_id}/answers": {"studies"},
    "post /v1/studies/{study_id}/invitations": {"studies"},
    "get /v1/studies/{study_id}/invitations": {"studies"},
    "delete /v1/studies/{study_id}/invitations/{name}": {"studies"},
    "get /v1/usage": set(),  # any valid credentials
    "post /v1/admin/keys": {"admin"},
    "get /v1/admin/keys": {"admin"},
    "get /v1/admin/keys/{key_id}": {"admin"},
    "delete /v1/admin/keys/{key_id}": {"admin"},
    "post /v1/admin/keys/{key_id}/rotate": {"admin"},
    "get /v1/admin/audit": {"admin"},
    "get /metrics": {"metrics:read"},
}
PUBLIC = {"get /livez", "get /readyz"}
# Operations of the readers of studies, who have an invitation and no credentials.
READING = {"get /v1/reading", "get /v1/reading/images/{position}", "put /v1/reading/answers/{position}"}
NOT_IN_THE_DOCUMENT = {"/openapi.json", "/docs", "/docs/swagger-ui.css"}
IDS = {"dataset_id": f"ds_{'0' * 32}", "projection_id": f"pr_{'0' * 32}", "key_id": "0" * 12, "name": "none"}
IDS |= {"webhook_id": f"wh_{'0' * 32}", "message_id": f"msg_{'0' * 32}", "study_id": f"st_{'0' * 32}", "position": "1"}


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with running_provider() as running:
        yield running


@pytest.fixture(scope="module")
def served(provider: Provider, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("access")
    values = {"auth": "oidc", "oidc_issuer": provider.issuer, "oidc_audience": AUDIENCE, "open_docs": False}
    values["oidc_scopes"] = ",".join(f"{scope}={scope}" for scope in SCOPES)
    with service(tiny_bundle.location, folder, authenticity_uploads=True, max_webhooks=5, **values) as running:
        yield running


def key_for(served: Service, *scopes: str, **values: Any) -> str:
    names = scopes or tuple(SCOPES)
    return auth_of(served).keys.create(tenant="a", name="n", scopes=names, created_by="test", **values)[1]


def auth_of(served: Service) -> Authenticator:
    authenticator: Authenticator = served.client.app.state.context.auth  # type: ignore[attr-defined]
    return authenticator


def operations(served: Service) -> dict[str, dict[str, Any]]:
    """Every operation of the OpenAPI document by method and path."""
    paths = served.client.app.openapi()["paths"]  # type: ignore[attr-defined]
    return {f"{method} {path}": each for path, methods in paths.items() for method, each in methods.items()}


def sent(served: Service, operation: str, credentials: str | None, **headers: str) -> Any:
    method, path = operation.split(" ")
    if credentials is not None:
        headers["Authorization"] = f"Bearer {credentials}"
    return served.client.request(method, path.format(**IDS), headers=headers)


def problem_of(answer: Any) -> dict[str, Any]:
    """The problem document of a refusal, which must contain nothing else. The answer to HEAD has no body."""
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"].startswith('Bearer realm="dermis"')
    if answer.request.method == "HEAD":
        return {}
    document: dict[str, Any] = answer.json()
    assert document.keys() == {"type", "title", "status", "detail", "instance", "request_id", "errors"}
    return document


def test_document_names_the_scopes_of_every_operation(served: Service) -> None:
    documented = operations(served)
    assert documented.keys() == SCOPES_OF.keys() | PUBLIC | READING
    assert all(documented[operation]["security"] == [{"invitation": []}] for operation in READING)
    assert all(documented[operation]["security"] == [] for operation in PUBLIC)
    for operation, scopes in SCOPES_OF.items():
        ways = documented[operation]["security"]
        assert (
            {scope for way in ways for names in way.values() for scope in names}
            == scopes
            == set(documented[operation]["x-dermis-scopes"])
        )
        assert {name for way in ways for name in way} == {"apiKey", "accessToken"}
        assert {"401", "403"} <= documented[operation]["responses"].keys()
    schemes = served.client.app.openapi()["components"]["securitySchemes"]  # type: ignore[attr-defined]
    assert {scheme["scheme"] for scheme in schemes.values()} == {"bearer"}


@dataclass(frozen=True)
class Credentials:
    """Credentials of every kind, made once for all operations."""

    refused: Mapping[str, str | None]

    @classmethod
    def of(cls, served: Service, provider: Provider) -> Credentials:
        auth = auth_of(served)
        expired, revoked, rotated = key_for(served, lifetime_seconds=0.001), key_for(served), key_for(served)
        auth.keys.revoke(revoked[10:22])
        auth.keys.rotate(rotated[10:22], created_by="test", overlap_seconds=0.0)
        right = key_for(served)
        everything = {"scope": " ".join(SCOPES)}
        auth.cache.invalidate()
        time.sleep(0.01)
        return cls(
            {
                "none": None,
                "expired key": expired,
                "revoked key": revoked,
                "rotated key": rotated,
                "unknown key": new_key(),
                "right id, other secret": right[:23] + new_key()[23:],
                "cut key": right[:-1],
                "nonsense": "abc",
                "expired token": provider.token(claims=everything | {"exp": int(time.time()) - 3600}),
                "changed token": provider.token(claims=everything, attack="changed"),
                "unsigned token": provider.token(claims=everything, attack="none"),
                "token for another service": provider.token(claims=everything | {"aud": "other"}),
            }
        )


def test_every_operation_refuses_missing_wrong_and_ended_credentials(
    served: Service, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "_UNKNOWN_SECONDS", 0.01)  # the wait of a request with an unknown key
    credentials = Credentials.of(served, provider)
    closed = [*SCOPES_OF, *READING, *(f"get {path}" for path in NOT_IN_THE_DOCUMENT)]
    leaks = []
    for operation in closed:
        for name, text in credentials.refused.items():
            answer = sent(served, operation, text)
            if answer.status_code != 401:
                leaks.append((operation, name, answer.status_code))
                continue
            document = problem_of(answer)
            if answer.request.method != "HEAD":
                assert document["type"] == "urn:dermis:problem:unauthenticated"
            if text is not None and len(text) > 20:
                assert text not in answer.text and text[24:] not in answer.text
    assert leaks == []


def test_every_operation_needs_its_scope_and_no_other(served: Service, provider: Provider) -> None:
    leaks = []
    without = {operation: key_for(served, *(set(SCOPES) - scopes)) for operation, scopes in SCOPES_OF.items()}
    alone = {scope: key_for(served, scope) for scope in SCOPES}
    tokens = {scope: provider.token(claims={"scope": scope}) for scope in SCOPES}
    auth_of(served).cache.invalidate()
    assert sent(served, "get /v1/usage", alone["images"]).status_code == 200
    for operation, scopes in SCOPES_OF.items():
        if not scopes:
            continue
        for text in (without[operation], provider.token(claims={"scope": " ".join(set(SCOPES) - scopes)})):
            answer = sent(served, operation, text)
            if answer.status_code != 403:
                leaks.append((operation, "without", answer.status_code))
            elif answer.request.method != "HEAD":
                document = problem_of(answer)
                assert document["type"] == "urn:dermis:problem:missing-scope"
                assert all(scope in document["detail"] for scope in scopes)
            assert "insufficient_scope" in answer.headers["www-authenticate"]
        for scope in scopes:
            media_type = {"Content-Type": "application/json"} if scope == "authenticity:generated" else {}
            for text in (alone[scope], tokens[scope]):
                answer = sent(served, operation, text, **media_type)
                if answer.status_code in (401, 403):
                    leaks.append((operation, scope, answer.status_code))
    assert leaks == []


def test_each_way_of_comparing_images_has_its_own_scope(served: Service) -> None:
    generated, uploads = key_for(served, "authenticity:generated"), key_for(served, "authenticity:uploads")
    operation = "post /v1/authenticity"
    assert sent(served, operation, uploads, **{"Content-Type": "application/json"}).status_code == 403
    for media_type in ("image/png", "multipart/form-data; boundary=x", "text/plain"):
        answer = sent(served, operation, generated, **{"Content-Type": media_type})
        assert (answer.status_code, "authenticity:uploads" in answer.json()["detail"]) == (403, True)


def test_gate_of_images_needs_the_scope_of_comparisons(served: Service) -> None:
    def answer(*scopes: str) -> Any:
        body = {"classes": {"benign": 1}, "privacy": {"gate": "authentic"}}
        headers = {"Authorization": f"Bearer {key_for(served, *scopes)}"}
        return served.client.post("/v1/images", json=body, headers=headers)

    refused = answer("images")
    assert (refused.status_code, "authenticity:generated" in refused.json()["detail"]) == (403, True)
    assert answer("images", "authenticity:generated").json()["type"] == "urn:dermis:problem:no-index"


def test_editing_a_projection_needs_the_scope_of_projections(served: Service) -> None:
    body = {"projections": [{"id": IDS["projection_id"]}], "edits": [{"direction": "age", "strength": 1.0}]}
    key = key_for(served, "edits")
    answer = served.client.post("/v1/edits", json=body, headers={"Authorization": f"Bearer {key}"})
    assert (answer.status_code, "projections" in answer.json()["detail"]) == (403, True)


def test_probes_are_open_and_foreign_hosts_and_pages_are_refused_first(served: Service) -> None:
    for path in ("/livez", "/readyz", "/healthz"):
        assert served.client.get(path).status_code == 200
    key = key_for(served)
    assert sent(served, "get /v1/models", key, Host="evil.example").status_code == 421
    form = {"Origin": "https://evil.example", "Content-Type": "application/x-www-form-urlencoded"}
    assert sent(served, "delete /v1/datasets/{dataset_id}", key, **form).status_code == 403
    assert sent(served, "get /v1/models", key).status_code == 200


def test_ambiguous_headers_are_refused(served: Service) -> None:
    key = key_for(served)
    refused = [
        [f"Bearer {key}", f"Bearer {key}"],
        [f"Basic {key}"],
        [key],
        [f"Bearer {key} x"],
        ["Bearer "],
        ["Bearer ü"],
    ]
    for values in refused:
        headers = [("Authorization", value.encode("utf-8")) for value in values]
        assert served.client.get("/v1/models", headers=headers).status_code == 401, values
    assert served.client.get("/v1/models", headers={"Authorization": f"bearer  {key}"}).status_code == 200
    assert served.client.get(f"/v1/models?api_key={key}&access_token={key}").status_code == 401


def test_route_without_access_rule_is_refused_at_the_start() -> None:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/closed")
    def closed(principal: Annotated[Principal, requires("images")]) -> None: ...

    check_routes(app)

    @app.get("/open")
    def open_to_all() -> None: ...

    with pytest.raises(RuntimeError, match="/open"):
        check_routes(app)


def test_admin_makes_rotates_and_revokes_keys(served: Service) -> None:
    admin = {"Authorization": f"Bearer {key_for(served, 'admin')}"}
    made = served.client.post(
        "/v1/admin/keys", json={"tenant": "lab", "name": "notebook", "expires_in_seconds": 3600}, headers=admin
    )
    assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
    first = made.json()
    assert "authenticity:uploads" not in first["scopes"] and "admin" not in first["scopes"]
    assert sent(served, "get /v1/models", first["key"]).status_code == 200
    path = f"/v1/admin/keys/{first['id']}"
    rotated = served.client.post(f"{path}/rotate?overlap_seconds=60", headers=admin)
    second = rotated.json()
    assert (rotated.status_code, second["replaces"], second["scopes"]) == (201, first["id"], first["scopes"])
    assert served.client.post(f"{path}/rotate", headers=admin).status_code == 409  # rotate the newer one
    assert [sent(served, "get /v1/models", each["key"]).status_code for each in (first, second)] == [200, 200]
    revoked = served.client.delete(f"/v1/admin/keys/{second['id']}", headers=admin)
    assert (revoked.status_code, revoked.json()["state"]) == (200, "revoked")
    assert [sent(served, "get /v1/models", each["key"]).status_code for each in (first, second)] == [200, 401]
    listed = served.client.get("/v1/admin/keys?tenant=lab", headers=admin)
    assert [(each["id"], each["state"]) for each in listed.json()["data"]] == [
        (second["id"], "revoked"),
        (first["id"], "active"),
    ]
    assert first["key"][23:] not in listed.text and '"hash"' not in listed.text
    for wrong in ({"name": "n", "tenant": "A"}, {"name": "n", "scopes": ["all"]}, {"name": "n", "scopes": []}, {}):
        assert served.client.post("/v1/admin/keys", json=wrong, headers=admin).status_code == 422, wrong
    assert served.client.delete("/v1/admin/keys/nobody", headers=admin).status_code == 404


def test_credentials_are_in_no_log_line_answer_or_metric(
    served: Service, provider: Provider, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, token = key_for(served), provider.token(claims={"scope": " ".join(SCOPES)})
    secrets = (key[23:], token.split(".")[1], token.split(".")[2])

    def fail(*_: object, **__: object) -> None:
        raise ValueError(f"driver failed with {key} and {token}")

    monkeypatch.setattr(served.jobs.datasets, "page", fail)
    for logger in ("dermis.http", "dermis.auth"):
        monkeypatch.setattr(logging.getLogger(logger), "propagate", True)
    formatter = LineFormatter()
    with caplog.at_level(logging.DEBUG):
        for secret in (key, token):
            answers = [
                sent(served, "get /v1/datasets", secret),
                sent(served, "get /v1/models", secret, **{"X-Request-Id": secret[:128]}),
                sent(served, f"get /v1/models/{secret[:900]}", secret),
                sent(served, f"get /v1/datasets/{secret[:900]}?cursor={secret}", secret),
                sent(served, f"get /{secret[:900]}", secret),
                sent(served, f"get /v1/datasets?{secret}={secret}&state={secret}", secret),
                served.client.post("/v1/images", json={secret: secret}, headers={"Authorization": f"Bearer {secret}"}),
            ]
            assert answers[0].status_code == 500
            for answer in answers:
                assert not any(part in answer.text for part in secrets), answer.text
    lines = "\n".join(formatter.format(record) for record in caplog.records if record.name.startswith("dermis"))
    assert "trace=" in lines and "tenant=a" in lines and f"subject=key:{key[10:22]}" in lines
    assert not any(part in lines for part in secrets)
    metrics = sent(served, "get /metrics", key).text
    assert "dermis_http_request_duration_seconds" in metrics and not any(part in metrics for part in secrets)


def test_database_contains_no_key(served: Service) -> None:
    key = key_for(served)
    with sa.create_engine(served.settings.jobs_url).connect() as connection:
        rows = connection.execute(sa.text("SELECT * FROM dermis_api_keys")).all()
    assert any(key[10:22] in row for row in rows) and not any(key[23:] in str(value) for row in rows for value in row)
    assert re.fullmatch(r"[0-9a-f]{64}", next(row for row in rows if key[10:22] in row).hash)


def test_event_stream_ends_soon_after_its_key_is_revoked(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.events.CHECK_SECONDS", 0.1)
    monkeypatch.setattr(keys_module, "_CACHE_SECONDS", 0.1)
    key = key_for(served, "datasets:write", "datasets:read")
    headers = {"Authorization": f"Bearer {key}"}
    served.generator.gate.clear()
    try:
        made = served.client.post("/v1/datasets", json={"classes": {"benign": 1}}, headers=headers).json()
        auth_of(served).keys.revoke(key[10:22])
        auth_of(served).cache.invalidate()
        assert served.client.get(f"/v1/datasets/{made['id']}/events", headers=headers).status_code == 401
        other = key_for(served, "datasets:read")
        event = events._event

        def revoke_first(*arguments: Any) -> str:
            auth_of(served).keys.revoke(other[10:22])
            return event(*arguments)

        monkeypatch.setattr(events, "_event", revoke_first)  # when the stream has begun
        guard = threading.Timer(30.0, served.generator.gate.set)  # ends the stream if the revocation does not
        guard.start()
        with served.client.stream(
            "GET", f"/v1/datasets/{made['id']}/events", headers={"Authorization": f"Bearer {other}"}
        ) as stream:
            text = "".join(stream.iter_text())
        guard.cancel()
        assert "event: progress" in text and "event: succeeded" not in text
    finally:
        served.generator.gate.set()
