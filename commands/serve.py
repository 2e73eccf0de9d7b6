"""`dermis serve` and `dermis worker`: the HTTP service on this machine, and a worker for its jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

_Bundles = Annotated[
    str | None,
    typer.Option(
        help="Bundles to serve, separated by commas: folders, folders of bundles, URLs, or names of installed bundles "
        "such as demo. Default: the folder `bundles` of the repository, else the installed bundles.",
        show_default=False,
    ),
]
_DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the database and the datasets; default .dermis.", show_default=False)
]
_Device = Annotated[str | None, typer.Option(help="auto (default), cpu, cuda or cuda:N.")]
_More = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Another setting, such as --set max_images=16; repeatable. docs/settings.md lists all of them.",
        show_default=False,
    ),
]
_Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on; default 3000.")]


def serve(
    bundles: _Bundles = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on; default 127.0.0.1. 0.0.0.0 opens the service to the network."),
    ] = None,
    port: _Port = None,
    data_dir: _DataDir = None,
    device: _Device = None,
    settings: _More = None,
    table: Annotated[bool, typer.Option("--table", help="Print all settings as a Markdown table and end.")] = False,
) -> None:
    """Start the service: the HTTP API, the inference services, and the jobs. Ctrl-C stops it.

    Each setting is also an environment variable, such as DERMIS_PORT; an option takes precedence.
    """
    from services.settings import settings_table

    if table:
        typer.echo(settings_table())
        return
    options = {"bundles": bundles, "host": host, "port": port, "data_dir": data_dir, "device": device}
    _run(options, settings)


def worker(
    bundles: _Bundles = None,
    host: Annotated[
        str | None, typer.Option(help="Address for probes and /metrics; default 127.0.0.1.", show_default=False)
    ] = None,
    port: _Port = None,
    data_dir: _DataDir = None,
    device: _Device = None,
    settings: _More = None,
) -> None:
    """Start a worker: it makes the datasets and projections that replicas on the same database and storage have accepted.

    Its port answers only /livez, /readyz and /metrics. It needs DERMIS_DATABASE_URL and DERMIS_STORAGE_URL.
    """
    options = {"bundles": bundles, "host": host, "port": port, "data_dir": data_dir, "device": device}
    _run({**options, "role": "worker"}, settings)


def _run(options: Mapping[str, object], more: Sequence[str] | None) -> None:
    from services.serve import serve as run
    from services.settings import Settings

    values = {name: None if value is None else str(value) for name, value in options.items()}
    for text in more or []:
        name, equals, value = text.partition("=")
        if not equals or name not in Settings.model_fields:
            raise typer.BadParameter(
                f"{text}: write NAME=VALUE with a setting that `dermis serve --table` lists", param_hint="--set"
            )
        values[name] = value
    raise typer.Exit(run(values))
