"""The settings of the address and of access control, a part of `services.settings.Settings`."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode

from dermis.addresses import is_secure_url

_TRUSTED_HOST = re.compile(
    r"\*|\*(\.[A-Za-z0-9_-]+)+|([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?|[0-9A-Fa-f]*:[0-9A-Fa-f:.]+"
)

# Signatures with public keys. With an HMAC the public key of the provider would be the secret.
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA")


def split_commas(value: Any) -> Any:
    """Split a text at its commas; other values stay."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


class AccessSettings(BaseSettings):
    """Settings of the address and of access control."""

    # Address
    host: str = Field(
        "127.0.0.1", description="Address that the gateway listens on. 0.0.0.0 makes it reachable from the network."
    )
    port: int = Field(3000, ge=1, le=65535, description="Port that the gateway listens on.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Web origins whose pages can call the API from a browser, separated by commas; `*` for any."
    )
    trusted_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Host names under which requests are answered, separated by commas, in addition to loopback and "
        "`DERMIS_HOST`: `name`, `name:port`, `*.domain`, or `*` for any. Set it behind a proxy, or if clients use a name.",
    )
    tls_certificate: Path | None = Field(
        None,
        description="PEM file with the certificate of the gateway and those of intermediate authorities. With it and "
        "DERMIS_TLS_KEY the gateway uses HTTPS. Both files are read again when they change.",
    )
    tls_key: Path | None = Field(None, description="PEM file with the private key of DERMIS_TLS_CERTIFICATE.")
    hsts_seconds: int = Field(
        31_536_000,
        ge=0,
        description="With DERMIS_TLS_CERTIFICATE: time for which browsers that have used the service refuse to use it without "
        "TLS (Strict-Transport-Security); 0 for none.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Addresses and networks of proxies, separated by commas, such as `10.0.0.5,fd00::/64`. Their headers "
        "X-Forwarded-For and X-Forwarded-Proto are believed, those of others are ignored.",
    )

    # Access control
    auth: Literal["none", "keys", "oidc"] = Field(
        "none",
        description="Who may send requests: `none`, everyone who reaches the port, which must be a loopback address; `keys`, "
        "holders of an API key; `oidc`, holders of an access token of DERMIS_OIDC_ISSUER or of an API key.",
    )
    allow_anonymous: bool = Field(
        False,
        description="Together with an explicit DERMIS_AUTH=none, allows another address than loopback without access control.",
    )
    bootstrap_key_file: Path | None = Field(
        None,
        description="File with the first API key, made by `dermis keys generate`. It gets the scope `admin` at the start.",
    )
    open_metrics: bool = Field(
        False, description="Whether /metrics needs no credentials. Otherwise it needs the scope `metrics:read`."
    )
    open_docs: bool = Field(
        True, description="Whether /docs and /openapi.json need no credentials. Otherwise any valid ones suffice."
    )
    studio: bool = Field(
        True,
        description="Whether the web pages of the package dermis-studio are at /studio, and / leads browsers there. "
        "They call the API with the credentials of their visitors.",
    )
    audit_log: bool = Field(
        False, description="Whether each entry of the audit trail is also written to stdout, as a line of JSON."
    )
    audit_key_file: Path | None = Field(
        None,
        description="File with a secret of at least 32 bytes, the same for all replicas, that signs the audit trail.",
    )
    oidc_issuer: str | None = Field(
        None, description="Issuer of access tokens: the https URL below which /.well-known/openid-configuration is."
    )
    oidc_audience: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Accepted audiences (claim `aud`) of access tokens, separated by commas."
    )
    oidc_algorithms: Annotated[tuple[str, ...], NoDecode] = Field(
        ("RS256", "ES256"),
        description="Signature algorithms: RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, ES512, Ed25519, EdDSA.",
    )
    oidc_leeway_seconds: int = Field(
        30, ge=0, le=300, description="Tolerated difference of the clocks for the times in access tokens."
    )
    oidc_jwks_url: str | None = Field(
        None, description="URL of the provider's keys (JWKS). Default: that of the discovery document."
    )
    oidc_tenant: str = Field(
        "default", description="Tenant of all access tokens, if DERMIS_OIDC_TENANT_CLAIM is not set."
    )
    oidc_tenant_claim: str | None = Field(
        None, description="Claim with the tenant; dots lead into objects, such as `organisation.id`."
    )
    oidc_tenants: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Tenants by value of the claim: `value=tenant,value=tenant`. Other values are then refused. Without it the "
        "value is the tenant, except `default`.",
    )
    oidc_scope_claim: str = Field(
        "scope",
        description="Claim with scopes or roles: a text separated by spaces, or a list; dots lead into objects.",
    )
    oidc_scopes: Annotated[dict[str, tuple[str, ...]], NoDecode] = Field(
        {},
        description="Scopes by value of the claim: `value=scope scope,value=scope`. Default: values that are names of scopes, "
        "except `admin`, `authenticity:uploads`, `metrics:read` and `studies`.",
    )

    @field_validator(
        "cors_origins", "trusted_hosts", "trusted_proxies", "oidc_audience", "oidc_algorithms", mode="before"
    )
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return split_commas(value)

    @field_validator("oidc_tenants", "oidc_scopes", mode="before")
    @classmethod
    def _split_pairs(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        pairs: dict[str, Any] = {}
        for part in filter(None, (each.strip() for each in value.split(","))):
            name, equals, text = part.rpartition("=")
            if not equals or not name.strip() or not text.strip():
                raise ValueError(f"{part[:100]!r}: write value=name, separated by commas")
            pairs[name.strip()] = tuple(text.split()) if info.field_name == "oidc_scopes" else text.strip()
        return pairs

    @field_validator("trusted_hosts")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not _TRUSTED_HOST.fullmatch(entry):
                raise ValueError(f"{entry[:100]!r} is not a host; write name, name:port, *.domain or *")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            try:
                network = ipaddress.ip_network(entry)
            except ValueError:
                raise ValueError(f"{entry[:100]!r} is not an address or a network such as 10.0.0.0/24") from None
            if network.prefixlen == 0:
                raise ValueError(f"{entry} are all addresses; name those of the proxies")
        return value

    @field_validator("oidc_algorithms")
    @classmethod
    def _are_asymmetric(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        refused = [name for name in value if name not in _ALGORITHMS]
        if refused or not value:
            raise ValueError(f"use {', '.join(_ALGORITHMS)}")
        return value

    @field_validator("oidc_issuer", "oidc_jwks_url")
    @classmethod
    def _is_secure(cls, value: str | None) -> str | None:
        if value is not None and not is_secure_url(value):
            raise ValueError("use a URL with https; http only on a loopback address")
        return value

    @model_validator(mode="after")
    def _provider_is_complete(self) -> Self:
        if self.auth == "oidc" and (self.oidc_issuer is None or not self.oidc_audience):
            raise ValueError("DERMIS_AUTH=oidc needs DERMIS_OIDC_ISSUER and DERMIS_OIDC_AUDIENCE")
        return self
