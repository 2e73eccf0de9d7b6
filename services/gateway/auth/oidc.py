"""Access tokens (JWT) of an OpenID Connect provider: their signature, their claims, and the provider's keys.

Only keys that the provider publishes at its own address are used: the headers `jku`, `jwk`, `x5u` and `x5c` of a token are
ignored. Only algorithms of DERMIS_OIDC_ALGORITHMS are accepted, which cannot name `none` or an HMAC: with an HMAC a public key
would be the secret.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
from joserfc import jws
from joserfc.errors import (
    BadSignatureError,
    ExpiredTokenError,
    InvalidClaimError,
    JoseError,
    MissingClaimError,
    SecurityWarning,
)
from joserfc.jwk import ECKey, JWKRegistry, OKPKey, RSAKey
from joserfc.jwt import JWTClaimsRegistry

from dermis.addresses import is_loopback_url, is_secure_url
from services.gateway.auth.principal import EXPLICIT_SCOPES, SCOPES, InvalidTokenError, Principal
from services.problems import ProblemError
from services.settings import Settings
from services.tenants import DEFAULT_TENANT, is_tenant

warnings.filterwarnings(
    "ignore", message="EdDSA is deprecated", category=SecurityWarning
)  # providers still use the name

logger = logging.getLogger("dermis.auth")

_KEY_TYPES: Mapping[str, type[RSAKey | ECKey | OKPKey]] = {"RS": RSAKey, "PS": RSAKey, "ES": ECKey, "Ed": OKPKey}
_LONG_ENOUGH = "x" * 342  # length of the modulus of an RSA key of 2048 bits, in base64
_TOKEN_TYPES = frozenset({"", "jwt", "at+jwt", "application/at+jwt"})
_MAX_SUBJECT = 255
_FETCH_SECONDS = 5.0
_MAX_DOCUMENT_BYTES = 512 << 10
_KEYS_SECONDS = (
    300.0  # age at which the keys are fetched again, so the longest time for which a withdrawn key is accepted
)
_UNKNOWN_KEY_SECONDS = 10.0  # pause between two requests to the provider, whatever tokens arrive
_STALE_SECONDS = 3600.0  # time for which the last keys are used while the provider cannot be reached

_Key = RSAKey | ECKey | OKPKey


class _Registry(jws.JWSRegistry):
    max_header_length = 4096
    max_payload_length = 16_384


@dataclass(frozen=True)
class _ProviderKey:
    id: str | None
    key: _Key
    algorithm: str | None  # the only one that the key is for, if the provider says so


class ProviderUnreachableError(Exception):
    """The provider did not answer with a usable document."""


class TokenVerifier:
    """Turns access tokens into principals. Use it on one event loop.

    Args:
        settings: The settings `oidc_*`.
        clock: Seconds of a monotonic clock, for the age of the keys.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        assert settings.oidc_issuer is not None
        self._settings, self._clock = settings, clock
        self._registry = _Registry(algorithms=settings.oidc_algorithms, strict_check_header=False)
        self._claims = JWTClaimsRegistry(
            leeway=settings.oidc_leeway_seconds,
            iss={"essential": True, "value": settings.oidc_issuer},
            aud={"essential": True, "values": list(settings.oidc_audience)},
            exp={"essential": True},
            sub={"essential": True},
        )
        self._keys: Sequence[_ProviderKey] = ()
        self._fetched_at = self._tried_at = float("-inf")
        self._unreachable = False  # at the last attempt
        self._lock = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._http: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Close the connections to the provider."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()

    async def prepare(self) -> None:
        """Fetch the keys of the provider at the start, so that the log says at once if they cannot be fetched."""
        with suppress(ProblemError):
            await self._fetch()

    async def _refresh(self) -> None:
        """Fetch the keys again if they are old."""
        age = self._clock() - self._fetched_at
        if age <= _KEYS_SECONDS:
            return
        if not self._unreachable or age > _STALE_SECONDS:
            await self._fetch()
        elif self._refreshing is None or self._refreshing.done():
            # An attempt can take seconds, and requests do not wait for a provider that did not answer the last one.
            self._refreshing = asyncio.create_task(self.prepare())

    async def principal_of(self, token: str) -> Principal:
        """Verify a token.

        Raises:
            InvalidTokenError: The token is not valid, or contains no tenant. The message contains nothing of the token.
            ProblemError: The keys of the provider are not known and cannot be fetched (503).
        """
        try:
            signature = jws.extract_compact(token.encode("ascii"), registry=self._registry)
            header = signature.headers()
            algorithm = self._check_header(header)
            for provider_key in await self._candidates(header.get("kid"), algorithm):
                if jws.validate_compact(signature, provider_key.key, registry=self._registry):
                    break
            else:
                raise BadSignatureError
            claims = json.loads(signature.payload)
            if not isinstance(claims, dict):
                raise InvalidTokenError("its payload is not a JSON object")
            self._claims.validate(claims)
        except ExpiredTokenError:
            raise InvalidTokenError("it has expired") from None
        except MissingClaimError as error:
            raise InvalidTokenError(f"it lacks the claim {error.claim}") from None
        except InvalidClaimError as error:
            raise InvalidTokenError(f"its claim {error.claim} is not accepted") from None
        except BadSignatureError:
            raise InvalidTokenError("its signature does not match") from None
        except (JoseError, ValueError, RecursionError):
            raise InvalidTokenError("it is not a signed JSON Web Token that this service accepts") from None
        if not _is_access_token(header, claims):
            raise InvalidTokenError("it is an identity or refresh token; send an access token")
        return self._principal(claims)

    def _check_header(self, header: Mapping[str, Any]) -> str:
        """Return the algorithm of a token whose header can be used."""
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._settings.oidc_algorithms:
            raise InvalidTokenError(f"use an algorithm of {', '.join(self._settings.oidc_algorithms)}")
        if "crit" in header or header.get("b64", True) is not True:
            raise InvalidTokenError("its header has extensions that are not supported")
        kind = header.get("typ", "")
        if not isinstance(kind, str) or kind.lower() not in _TOKEN_TYPES:
            raise InvalidTokenError("its type is not that of an access token")
        return algorithm

    async def _candidates(self, kid: object, algorithm: str) -> list[_ProviderKey]:
        """The keys that may have signed a token; fetched again if there is none, or if they are old."""
        if kid is not None and not isinstance(kid, str):
            raise InvalidTokenError("its key id is not a text")
        now = self._clock()
        await self._refresh()
        matching = self._matching(kid, algorithm)
        if not matching and self._fetched_at < now:
            await self._fetch()
            matching = self._matching(kid, algorithm)
        if not matching:
            raise InvalidTokenError("it is signed with a key that the provider does not publish")
        return matching

    def _matching(self, kid: str | None, algorithm: str) -> list[_ProviderKey]:
        usable = [
            each
            for each in self._keys
            if isinstance(each.key, _KEY_TYPES[algorithm[:2]]) and each.algorithm in (None, algorithm)
        ]
        if kid is None:
            return usable if len(usable) == 1 else []
        return [each for each in usable if each.id == kid]

    async def _fetch(self) -> None:
        """Fetch the keys, unless that was tried a moment ago."""
        async with self._lock:
            now = self._clock()
            if now - self._tried_at >= _UNKNOWN_KEY_SECONDS:
                self._tried_at = now
                try:
                    self._keys = await self._published_keys()
                    self._fetched_at, self._unreachable = now, False
                except ProviderUnreachableError as error:
                    self._unreachable = True
                    logger.warning("keys of the identity provider not fetched", extra={"problem": str(error)})
            if now - self._fetched_at > _STALE_SECONDS:
                raise ProblemError(
                    "not-ready",
                    "the identity provider cannot be reached at the moment; try again",
                    headers={"Retry-After": "10"},
                )

    async def _published_keys(self) -> list[_ProviderKey]:
        issuer = str(self._settings.oidc_issuer)
        url = self._settings.oidc_jwks_url
        if url is None:
            discovery = await self._document(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
            if discovery.get("issuer") != issuer:
                raise ProviderUnreachableError("the discovery document names another issuer than DERMIS_OIDC_ISSUER")
            found = discovery.get("jwks_uri")
            if not isinstance(found, str) or not is_secure_url(found):
                raise ProviderUnreachableError("the discovery document has no jwks_uri with https")
            url = found
        listed = (await self._document(url)).get("keys")
        if not isinstance(listed, list):
            raise ProviderUnreachableError("the document of the keys has no list `keys`")
        keys = [key for each in listed if (key := _import(each)) is not None]
        if not keys:
            raise ProviderUnreachableError("the provider publishes no key that can be used")
        return keys

    async def _document(self, url: str) -> dict[str, Any]:
        if self._http is None:
            # A proxy of the environment is for other machines.
            through_proxy = not is_loopback_url(url)
            self._http = httpx.AsyncClient(timeout=_FETCH_SECONDS, follow_redirects=False, trust_env=through_proxy)
        data = bytearray()
        try:
            async with (
                asyncio.timeout(_FETCH_SECONDS),
                self._http.stream("GET", url, headers={"Accept": "application/json"}) as response,
            ):
                if response.status_code != 200:
                    raise ProviderUnreachableError(f"{url} answered {response.status_code}")
                async for piece in response.aiter_bytes():
                    data += piece
                    if len(data) > _MAX_DOCUMENT_BYTES:
                        raise ProviderUnreachableError(f"{url} sent more than {_MAX_DOCUMENT_BYTES} bytes")
            document = json.loads(data)
        # An OSError is a timeout, or one of TLS after the handshake, which httpx lets through.
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise ProviderUnreachableError(f"{url}: {type(error).__name__}: {error}") from None
        except (ValueError, RecursionError):
            raise ProviderUnreachableError(f"{url} sent no JSON") from None
        if not isinstance(document, dict):
            raise ProviderUnreachableError(f"{url} sent no JSON object")
        return document

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        settings = self._settings
        subject = claims["sub"]
        if not 1 <= len(subject) <= _MAX_SUBJECT or not subject.isprintable():
            raise InvalidTokenError("its claim sub is not accepted")
        tenant: object = settings.oidc_tenant
        if settings.oidc_tenant_claim is not None:
            tenant = _claim(claims, settings.oidc_tenant_claim)
            if settings.oidc_tenants:
                tenant = settings.oidc_tenants.get(tenant) if isinstance(tenant, str) else None
            elif tenant == DEFAULT_TENANT:  # it has what was made before access control
                raise InvalidTokenError(
                    f"its claim {settings.oidc_tenant_claim} names the tenant {DEFAULT_TENANT}, which a token gets only if the "
                    "operator maps a value to it in DERMIS_OIDC_TENANTS"
                )
        if not isinstance(tenant, str) or not is_tenant(tenant):
            raise InvalidTokenError(f"its claim {settings.oidc_tenant_claim} names no tenant of this service")
        return Principal(tenant, f"user:{subject}", self._scopes(_claim(claims, settings.oidc_scope_claim)))

    def _scopes(self, value: object) -> frozenset[str]:
        """The scopes that a claim grants: names separated by spaces, or a list of names."""
        names = value.split() if isinstance(value, str) else value if isinstance(value, list) else []
        if self._settings.oidc_scopes:
            mapped = (self._settings.oidc_scopes.get(name, ()) for name in names if isinstance(name, str))
            return frozenset(scope for scopes in mapped for scope in scopes)
        return frozenset(name for name in names if isinstance(name, str) and name in SCOPES) - EXPLICIT_SCOPES


def _is_access_token(header: Mapping[str, Any], claims: Mapping[str, Any]) -> bool:
    """Whether a token is meant for an API. The other tokens of a provider have the same issuer and signature.

    RFC 9068 marks access tokens in the header. Providers that do not follow it mark the other kinds by claims: `at_hash` and
    `nonce` are in identity tokens, and Keycloak writes the kind into the claim `typ`, with `nonce` in all kinds.
    """
    if str(header.get("typ", "")).lower().endswith("at+jwt"):
        return True
    if claims.get("typ") == "Bearer":
        return True
    return not ({"at_hash", "nonce"} & claims.keys() or claims.get("typ") in ("ID", "Refresh", "Offline"))


def _import(document: object) -> _ProviderKey | None:
    """A key of the provider; None if tokens must not be verified with it."""
    if not isinstance(document, dict) or document.get("use", "sig") != "sig":
        return None
    operations = document.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    if len(str(document.get("n", _LONG_ENOUGH))) < len(_LONG_ENOUGH):
        return None
    public = {name: document[name] for name in ("kty", "n", "e", "crv", "x", "y") if name in document}
    try:
        key = JWKRegistry.import_key(public)
    except (JoseError, ValueError, TypeError, KeyError):
        return None
    if not isinstance(key, _Key):
        return None
    kid, algorithm = document.get("kid"), document.get("alg")
    return _ProviderKey(kid if isinstance(kid, str) else None, key, algorithm if isinstance(algorithm, str) else None)


def _claim(claims: Mapping[str, Any], path: str) -> object:
    """The value of a claim; a dot in the name leads into an object, unless a claim has the whole name."""
    if path in claims:
        return claims[path]
    value: object = claims
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
