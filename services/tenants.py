"""Tenants: their names, their folders in the storage, and the setting that limits bundles to some of them.

A tenant is a department or a partner that shares the service with others and must not see their data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

DEFAULT_TENANT = "default"
"""The tenant of a service without access control, and of all jobs of versions that knew no tenants."""

TENANT_PATTERN = r"[a-z0-9][a-z0-9-]{0,62}"  # it can be part of a path of the storage
_TENANT = re.compile(TENANT_PATTERN)
_JOB_FOLDER = re.compile(r"(ds|pr)_[0-9a-f]{32}")
_TENANTS = "tenants"


def is_tenant(name: str) -> bool:
    """Whether a text can be the name of a tenant: lower-case letters, digits and hyphens, at most 63 characters."""
    return _TENANT.fullmatch(name) is not None


def folder_of(tenant: str, job_id: str) -> str:
    """The folder of a job, relative to the root of the storage.

    The jobs of the default tenant are directly below the root, where versions that knew no tenants stored them.

    Raises:
        ValueError: The text is not a name of a tenant, so it must not be part of a path.
    """
    if not is_tenant(tenant):
        raise ValueError(f"{tenant[:100]!r} is not the name of a tenant")
    return job_id if tenant == DEFAULT_TENANT else f"{_TENANTS}/{tenant}/{job_id}"


def job_folders(root: Path) -> Iterator[tuple[str, str]]:
    """Yield tenant and id of each job that has a folder in a local storage."""
    yield from ((DEFAULT_TENANT, job_id) for job_id in _jobs_in(root))
    for folder in sorted((root / _TENANTS).glob("*")):
        if is_tenant(folder.name) and folder.name != DEFAULT_TENANT:
            yield from ((folder.name, job_id) for job_id in _jobs_in(folder))


def _jobs_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if _JOB_FOLDER.fullmatch(path.name)) if folder.is_dir() else []


def read_model_tenants(text: str) -> dict[str, tuple[str, ...]]:
    """Read the value of DERMIS_MODEL_TENANTS: `bundle=tenant,tenant,bundle=tenant`.

    Returns:
        The tenants that may use each bundle, by name of the bundle.

    Raises:
        ValueError: The text is not such a list; the message says what is wrong.
    """
    tenants: dict[str, tuple[str, ...]] = {}
    name = ""
    for part in filter(None, (each.strip() for each in text.split(","))):
        before, equals, after = (each.strip() for each in part.partition("="))
        tenant = after if equals else before
        if equals:
            if not before or before in tenants:
                raise ValueError(f"{part[:100]!r}: write each bundle once, as bundle=tenant,tenant")
            name, tenants[before] = before, ()
        if not name:
            raise ValueError(f"{part[:100]!r}: write bundle=tenant,tenant,bundle=tenant")
        if not is_tenant(tenant):
            raise ValueError(
                f"{tenant[:100]!r} is not the name of a tenant: use lower-case letters, digits and hyphens"
            )
        tenants[name] = (*tenants[name], tenant)
    return tenants
