"""`dermis serve`: the HTTP service on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    bundles: Annotated[
        str | None,
        typer.Option(
            help="Bundles to serve, separated by commas: folders, folders of bundles, URLs, or names of installed bundles "
            "such as demo. Default: the folder `bundles` of the repository, else the installed bundles.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on; default 127.0.0.1. 0.0.0.0 opens the service to the network."),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on; default 3000.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the database and the datasets; default .dermis.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu, cuda or cuda:N.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Another setting, such as --set max_images=16; repeatable. docs/deployment.md lists all of them.",
            show_default=False,
        ),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Print all settings as a Markdown table and end.")] = False,
) -> None:
    """Start the service: the HTTP API, the inference services, and the jobs. Ctrl-C stops it.

    Each setting is also an environment variable, such as DERMIS_PORT; an option takes precedence.
    """
    from services.serve import serve as run
    from services.settings import Settings, settings_table

    if table:
        typer.echo(settings_table())
        return
    options: dict[str, str | None] = {
        "bundles": bundles,
        "host": host,
        "port": None if port is None else str(port),
        "data_dir": None if data_dir is None else str(data_dir),
        "device": device,
    }
    for text in settings or []:
        name, equals, value = text.partition("=")
        if not equals or name not in Settings.model_fields:
            raise typer.BadParameter(
                f"{text}: write NAME=VALUE with a setting that `dermis serve --table` lists", param_hint="--set"
            )
        options[name] = value
    raise typer.Exit(run(options))
