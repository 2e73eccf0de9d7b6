"""Tests of access tokens against a provider in a process of its own."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from identity_provider import AUDIENCE, Provider, running_provider
from services.gateway.auth.oidc import ProviderUnreachableError, TokenVerifier
from services.gateway.auth.principal import InvalidTokenError, Principal
from services.problems import ProblemError
from services.settings import Settings


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with running_provider() as running:
        yield running


class Clock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def settings_for(provider: Provider, **values: Any) -> Settings:
    defaults = {"auth": "oidc", "oidc_issuer": provider.issuer, "oidc_audience": AUDIENCE}
    return Settings(_env_file=None, **defaults | {"oidc_algorithms": "RS256,ES256,EdDSA"} | values)


def verify(provider: Provider, *tokens: str, clock: Clock | None = None, **values: Any) -> Principal:
    """The principal of the last token; all are verified by one verifier."""

    async def run() -> Principal:
        verifier = TokenVerifier(settings_for(provider, **values), clock or time.monotonic)
        try:
            return [await verifier.principal_of(token) for token in tokens][-1]
        finally:
            await verifier.close()

    return asyncio.run(run())


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_valid_token_becomes_a_principal(provider: Provider, algorithm: str) -> None:
    token = provider.token(
        algorithm=algorithm, claims={"aud": ["other", AUDIENCE], "scope": "openid images models:read"}
    )
    assert verify(provider, token) == Principal("default", "user:user-1", frozenset({"images", "models:read"}))


@pytest.mark.parametrize("order", [{"header": {"typ": "JWT"}}, {"header": {"typ": None}}], ids=str)
def test_access_tokens_of_providers_without_rfc_9068_are_accepted(provider: Provider, order: dict[str, Any]) -> None:
    assert verify(provider, provider.token(**order)).subject == "user:user-1"
    keycloak = provider.token(**order, claims={"typ": "Bearer", "nonce": "n"})
    assert verify(provider, keycloak).subject == "user:user-1"


NOW = int(time.time())
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attack": "none"}, "algorithm"),
    ({"attack": "public key as secret"}, "algorithm"),
    ({"algorithm": "HS256"}, "algorithm"),
    ({"algorithm": "PS256"}, "algorithm"),  # not in the list of this service
    ({"attack": "changed"}, "signature"),
    ({"attack": "encryption key"}, "does not publish"),
    ({"attack": "weak key"}, "does not publish"),
    ({"header": {"kid": "unknown"}}, "does not publish"),
    ({"header": {"kid": "ec-1"}}, "does not publish"),  # a key of another type
    ({"header": {"kid": 7}}, "key id"),
    ({"header": {"crit": ["x"], "x": 1}}, "extensions"),
    ({"header": {"typ": "id+jwt"}}, "type"),
    ({"claims": {"iss": "http://127.0.0.1:1"}}, "claim iss"),
    ({"claims": {"iss": None}}, "lacks the claim iss"),
    ({"claims": {"aud": "other"}}, "claim aud"),
    ({"claims": {"aud": None}}, "lacks the claim aud"),
    ({"claims": {"aud": []}}, "claim aud"),
    ({"claims": {"exp": None}}, "lacks the claim exp"),
    ({"claims": {"exp": "9999999999"}}, "claim exp"),
    ({"claims": {"exp": NOW - 60}}, "expired"),
    ({"claims": {"nbf": NOW + 3600}}, "claim nbf"),
    ({"claims": {"iat": NOW + 3600}}, "claim iat"),
    ({"claims": {"sub": None}}, "lacks the claim sub"),
    ({"claims": {"sub": 7}}, "claim sub"),
    ({"claims": {"sub": "a\nb"}}, "claim sub"),
    ({"claims": {"sub": "x" * 300}}, "claim sub"),
    ({"header": {"typ": "JWT"}, "claims": {"nonce": "n"}}, "access token"),
    ({"header": {"typ": None}, "claims": {"at_hash": "n"}}, "access token"),
    ({"header": {"typ": "JWT"}, "claims": {"typ": "ID", "nonce": "n"}}, "access token"),
    ({"header": {"typ": "JWT"}, "claims": {"typ": "Refresh"}}, "access token"),
]


@pytest.mark.parametrize(
    ("order", "reason"), REFUSED, ids=[f"{number} {reason}" for number, (_, reason) in enumerate(REFUSED)]
)
def test_token_that_must_not_be_accepted_is_refused(provider: Provider, order: dict[str, Any], reason: str) -> None:
    token = provider.token(**order)
    with pytest.raises(InvalidTokenError, match=reason) as caught:
        verify(provider, token)
    assert token not in str(caught.value) and token.split(".")[1] not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["x", "a.b.c", "..", "eyJhbGciOiJSUzI1NiJ9.e30.", "eyJhbGciOiJSUzI1NiJ9.W10.AA", "a.b.c.d.e"]
)
def test_text_that_is_no_token_is_refused(provider: Provider, text: str) -> None:
    with pytest.raises(InvalidTokenError):
        verify(provider, text)


def test_times_have_a_leeway(provider: Provider) -> None:
    now = int(time.time())
    late = provider.token(claims={"exp": now - 20})
    early = provider.token(claims={"nbf": now + 20, "iat": now + 20})
    assert verify(provider, late, early, oidc_leeway_seconds=60).tenant == "default"
    with pytest.raises(InvalidTokenError):
        verify(provider, late, oidc_leeway_seconds=0)


def test_claims_are_mapped_to_tenant_and_scopes(provider: Provider) -> None:
    claims = {"org": {"id": "Hospital A"}, "realm_access": {"roles": ["curator", "boss"]}, "scope": "images"}
    mapped = {
        "oidc_tenant_claim": "org.id",
        "oidc_tenants": "Hospital A=hospital-a",
        "oidc_scope_claim": "realm_access.roles",
        "oidc_scopes": "curator=datasets:read datasets:write,boss=admin,other=classify",
    }
    principal = verify(provider, provider.token(claims=claims), **mapped)
    assert principal == Principal("hospital-a", "user:user-1", frozenset({"datasets:read", "datasets:write", "admin"}))
    for org in ({"id": "Hospital B"}, {"id": 7}, None, "Hospital A"):
        with pytest.raises(InvalidTokenError, match="names no tenant"):
            verify(provider, provider.token(claims=claims | {"org": org}), **mapped)
    with pytest.raises(InvalidTokenError, match="names no tenant"):  # no name that is safe in a path
        verify(provider, provider.token(claims={"org": "../a"}), oidc_tenant_claim="org")
    of_default = provider.token(claims={"org": "default"})  # what was made before access control belongs to it
    with pytest.raises(InvalidTokenError, match="the tenant default, .* DERMIS_OIDC_TENANTS"):
        verify(provider, of_default, oidc_tenant_claim="org")
    assert verify(provider, of_default, oidc_tenant_claim="org", oidc_tenants="default=default").tenant == "default"


def test_sensitive_scopes_are_only_granted_by_an_explicit_mapping(provider: Provider) -> None:
    token = provider.token(claims={"scope": ["admin", "authenticity:uploads", "metrics:read", "classify", 7, {}]})
    assert verify(provider, token).scopes == {"classify"}


def test_new_keys_of_the_provider_are_fetched_with_a_limit(provider: Provider) -> None:
    clock = Clock()

    async def run() -> None:
        verifier = TokenVerifier(settings_for(provider), clock)
        old = provider.token()
        await verifier.principal_of(old)
        before = provider.fetched()
        provider.rotate()
        clock.seconds += 11.0
        assert (await verifier.principal_of(provider.token())).subject == "user:user-1"
        assert provider.fetched() == before + 1
        for number in range(8):  # invented keys cause no further request
            with pytest.raises(InvalidTokenError, match="does not publish"):
                await verifier.principal_of(provider.token(header={"kid": f"unknown-{number}"}))
        assert provider.fetched() == before + 1
        with pytest.raises(InvalidTokenError, match="does not publish"):  # the old key is withdrawn
            await verifier.principal_of(old)
        await verifier.close()

    asyncio.run(run())


def test_provider_that_cannot_be_reached() -> None:
    clock = Clock()

    async def run(provider: Provider) -> None:
        verifier = TokenVerifier(settings_for(provider), clock)
        token = provider.token(claims={"exp": NOW + 10_000})
        await verifier.principal_of(token)
        unused = TokenVerifier(settings_for(provider), clock)
        provider.process.kill()
        provider.process.wait()
        clock.seconds += 400.0  # the keys are due for another request
        await verifier.principal_of(token)
        clock.seconds += 4000.0
        for each in (verifier, unused):
            with pytest.raises(ProblemError) as caught:
                await each.principal_of(token)
            assert caught.value.kind == "not-ready"
            await each.close()

    with running_provider() as provider:
        asyncio.run(run(provider))


def test_provider_whose_tls_breaks_after_the_handshake_cannot_be_reached(provider: Provider) -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        raise ssl.SSLError(1, "decryption failed or bad record mac")

    async def run() -> None:
        verifier = TokenVerifier(settings_for(provider))
        verifier._http = httpx.AsyncClient(transport=httpx.MockTransport(broken))
        with pytest.raises(ProblemError) as caught:
            await verifier.principal_of(provider.token())
        assert caught.value.kind == "not-ready"
        await verifier.close()

    asyncio.run(run())


def test_requests_do_not_wait_for_a_provider_that_does_not_answer(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()

    async def run() -> None:
        verifier = TokenVerifier(settings_for(provider), clock)
        token = provider.token(claims={"exp": NOW + 10_000})
        await verifier.principal_of(token)
        published, attempts, answered = verifier._published_keys, [], asyncio.Event()

        async def late() -> Any:
            attempts.append(clock.seconds)
            if len(attempts) == 1:
                raise ProviderUnreachableError("it cannot be reached")
            await answered.wait()
            return await published()

        monkeypatch.setattr(verifier, "_published_keys", late)
        clock.seconds += 400.0
        await verifier.principal_of(token)
        for _ in range(3):
            clock.seconds += 20.0
            await asyncio.wait_for(verifier.principal_of(token), 10)
        await asyncio.sleep(0)
        assert len(attempts) == 2  # in the background
        answered.set()
        assert verifier._refreshing is not None
        await verifier._refreshing
        assert verifier._fetched_at == attempts[1]
        await verifier.principal_of(token)
        await verifier.close()

    asyncio.run(run())


def test_discovery_document_of_another_issuer_is_refused(provider: Provider) -> None:
    other = provider.issuer.replace("127.0.0.1", "localhost")

    async def run() -> None:
        # The address is that of the provider, but the provider calls itself by the name that it is asked under.
        verifier = TokenVerifier(settings_for(provider, oidc_issuer=f"{other}/"), Clock())
        with pytest.raises(ProblemError):
            await verifier.principal_of(provider.token())
        await verifier.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "values",
    [
        {"oidc_algorithms": "none"},
        {"oidc_algorithms": "RS256,HS256"},
        {"oidc_algorithms": ""},
        {"oidc_issuer": "http://login.example.org"},
        {"oidc_issuer": "ftp://127.0.0.1"},
        {"oidc_jwks_url": "http://10.0.0.1/keys"},
        {"oidc_audience": ""},
        {"oidc_issuer": None},
        {"oidc_tenants": "hospital-a"},
    ],
    ids=str,
)
def test_unsafe_settings_are_refused(provider: Provider, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings_for(provider, **values)
