"""The sender of a request, and the scopes that say what a sender may do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dermis.errors import DermisError
from services.tenants import DEFAULT_TENANT

# Scope -> what it allows. The order is that of the documentation.
SCOPES: Mapping[str, str] = {
    "datasets:read": "List, follow and download the tenant's datasets.",
    "datasets:write": "Create, stop and delete datasets of the tenant.",
    "images": "Generate a few images in one call.",
    "edits": "Edit generated images; with `projections`, also projections.",
    "projections": "Upload images and find their latents; read and delete projections of the tenant.",
    "classify": "Classify uploaded images.",
    "authenticity:generated": "Compare generated images with the training images, and place them on the map of embeddings.",
    "authenticity:uploads": "Compare uploaded images with the training images and place them on the map, which shows whether "
    "an image is one of them.",
    "webhooks": "Send messages to URLs when datasets and projections of the tenant end.",
    "studies": "Create reader studies, invite readers by link, read their answers; read and delete studies of the tenant.",
    "models:read": "List the models and their directions.",
    "metrics:read": "Read the metrics of the whole service.",
    "admin": "Create, list, rotate and revoke the API keys of every tenant; read the audit trail.",
}
# Scopes that must be named: what they show or allow goes beyond the data of the tenant.
EXPLICIT_SCOPES = frozenset({"authenticity:uploads", "metrics:read", "admin", "studies"})
DEFAULT_SCOPES: tuple[str, ...] = tuple(scope for scope in SCOPES if scope not in EXPLICIT_SCOPES)


class InvalidTokenError(DermisError):
    """An access token is not accepted; the message says why."""


@dataclass(frozen=True)
class Principal:
    """The sender of a request, after authentication.

    Attributes:
        tenant: The tenant whose data the sender may use.
        subject: `key:<id>` of an API key, `user:<sub>` of an access token, or `anonymous`.
        scopes: What the sender may do; keys of `SCOPES`.
    """

    tenant: str
    subject: str
    scopes: frozenset[str]

    def has_any(self, scopes: Iterable[str]) -> bool:
        """Whether the sender has at least one of these scopes."""
        return not self.scopes.isdisjoint(scopes)


# Every sender, if the service is used without access control (DERMIS_AUTH=none).
ANONYMOUS = Principal(DEFAULT_TENANT, "anonymous", frozenset(SCOPES))


def unknown_scopes(scopes: Iterable[str]) -> list[str]:
    """Names that are no scopes, sorted."""
    return sorted(set(scopes) - set(SCOPES))
