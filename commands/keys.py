"""`dermis keys`: the API keys of a service, in its jobs database."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.console import folding_table, table_console

if TYPE_CHECKING:
    from services.audit.trail import AuditTable
    from services.gateway.auth.keys import ApiKey, KeyTable

keys_app = typer.Typer(
    help="API keys of the service: create, list, rotate and revoke them. Changes take effect within seconds.",
    no_args_is_help=True,
)

_DAY_SECONDS = 86_400.0

DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Data folder of the service, as for `dermis serve`; default DERMIS_DATA_DIR or .dermis. A PostgreSQL of "
        "DERMIS_DATABASE_URL takes precedence.",
        show_default=False,
    ),
]
Identifier = Annotated[
    str, typer.Argument(metavar="ID", help="Id of the key, with or without dermis_sk_.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True)
class _Opened:
    """The keys and the audit trail of a service."""

    keys: KeyTable
    trail: AuditTable

    def record(self, action: str, key: ApiKey) -> None:
        """Record a change of a key in the audit trail."""
        from services.audit.trail import command_event

        detail = {"key.create": key.allows, "key.rotate": f"replaces {key.replaces}"}.get(action)
        self.trail.append([command_event(action, tenant=key.tenant, object=key.id, detail=detail)])


@contextmanager
def _opened(data_dir: Path | None, *, changes: bool = True) -> Iterator[_Opened]:
    from services.audit.trail import AuditTable
    from services.gateway.auth.keys import opened_keys
    from services.settings import read_settings

    settings = read_settings(**({} if data_dir is None else {"data_dir": data_dir}))
    trail = AuditTable.of(settings)  # first: a key that cannot be recorded must not be created
    with opened_keys(settings) as table, closing(trail):
        if changes:
            trail.check_key()
        yield _Opened(table, trail)


def _id(text: str) -> str:
    """The id in an argument: the id itself, the part of a key that is not secret, or a whole key."""
    from services.gateway.auth.keys import PREFIX

    return text.removeprefix(PREFIX)[:12] if text.startswith(PREFIX) else text


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _fields(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "prefix": key.prefix,
        "tenant": key.tenant,
        "name": key.name,
        "state": key.state(),
        "scopes": list(key.scopes),
        "created_at": _time(key.created_at),
        "created_by": key.created_by,
        "expires_at": _time(key.expires_at),
        "revoked_at": _time(key.revoked_at),
        "last_used_at": _time(key.last_used_at),
        "replaces": key.replaces,
    }


def _print_new(table: KeyTable, key: ApiKey, text: str, as_json: bool) -> None:
    """Print a new key: on stdout the key alone, so that it can be piped into a file or a secret store."""
    if as_json:
        typer.echo(json.dumps({**_fields(key), "key": text}, indent=2))
        return
    expires = f"expires {_time(key.expires_at)}" if key.expires_at is not None else "does not expire"
    typer.echo(f"{key.prefix}: tenant {key.tenant}, {key.name}, {expires}, {' '.join(key.scopes)}", err=True)
    typer.echo(f"Its hash is in {table.location}. The key is not shown again:", err=True)
    typer.echo(text)


@keys_app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Tenant whose data the key can use.")] = "default",
    name: Annotated[str, typer.Option(help="Name for people, such as that of the program that uses the key.")] = "key",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What the key allows; repeatable. Default: everything within the tenant except authenticity:uploads and "
            "studies.",
            show_default=False,
        ),
    ] = None,
    expires_days: Annotated[
        float | None, typer.Option(min=0.0, help="Days until the key expires; default: it does not expire.")
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Create a key and print it. It is stored as a hash and cannot be shown again."""
    from services.gateway.auth.principal import DEFAULT_SCOPES

    with _opened(data_dir) as opened:
        key, text = opened.keys.create(
            tenant=tenant,
            name=name,
            scopes=tuple(scope or DEFAULT_SCOPES),
            created_by="dermis keys create",
            lifetime_seconds=None if expires_days is None else expires_days * _DAY_SECONDS,
        )
        opened.record("key.create", key)
    _print_new(opened.keys, key, text, as_json)


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only keys of this tenant.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List the keys, newest first, also those that have ended. The keys themselves are not stored."""
    with _opened(data_dir, changes=False) as opened:
        keys = [_fields(key) for key in opened.keys.all(tenant)]
    if as_json:
        typer.echo(json.dumps(keys, indent=2))
        return
    shown = folding_table("key", "tenant", "name", "state", "expires", "last used", "scopes")
    for key in keys:
        cells = (key["prefix"], key["tenant"], key["name"], key["state"], key["expires_at"], key["last_used_at"])
        shown.add_row(*(cell or "-" for cell in cells), " ".join(key["scopes"]))
    table_console().print(shown, markup=False)


@keys_app.command()
def rotate(
    identifier: Identifier,
    overlap_hours: Annotated[float, typer.Option(min=0.0, help="Hours for which the old key still works.")] = 24.0,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Replace a key by a new one with the same tenant, name and scopes, and print that."""
    with _opened(data_dir) as opened:
        key, text = opened.keys.rotate(
            _id(identifier), created_by="dermis keys rotate", overlap_seconds=overlap_hours * 3600.0
        )
        opened.record("key.rotate", key)
    _print_new(opened.keys, key, text, as_json)


@keys_app.command()
def revoke(identifier: Identifier, data_dir: DataDir = None) -> None:
    """Revoke a key. Requests with it are refused within seconds."""
    with _opened(data_dir) as opened:
        key = opened.keys.revoke(_id(identifier))
        opened.record("key.revoke", key)
    typer.echo(f"{key.prefix} is revoked")


@keys_app.command()
def generate() -> None:
    """Print a new key that is stored nowhere, for DERMIS_BOOTSTRAP_KEY_FILE."""
    from services.gateway.auth.keys import new_key

    typer.echo(new_key())
