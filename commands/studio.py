"""`dermis studio`: the web pages for a service at another address."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from dermis.errors import DermisError


def studio(
    url: Annotated[
        str, typer.Option(help="Address of the service.", envvar="DERMIS_BASE_URL")
    ] = "http://127.0.0.1:3000",
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 opens the pages to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 3080,
    trusted_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Host name under which the pages are answered, in addition to this machine's own; repeatable.",
            show_default=False,
        ),
    ] = None,
    allow_plain_http: Annotated[
        bool, typer.Option(help="Allow that keys of visitors are sent over http:// to another machine.")
    ] = False,
    public_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Address of the service for readers of studies and programs of visitors, if --url is not the one for them.",
            show_default=False,
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"],
        typer.Option(help="Format of the log: text, or json for objects, one a line.", envvar="DERMIS_LOG_FORMAT"),
    ] = "text",
) -> None:
    """Show the studio, web pages for a service, on this machine. Ctrl-C stops it.

    A service on this machine has them already, at /studio. The pages use the API key that each visitor enters.
    """
    try:
        from dermis_client import DermisClient, InvalidRequestError

        try:
            DermisClient(url, api_key="").close()
        except InvalidRequestError as error:
            raise DermisError(f"--url: {error}") from None
        try:
            if public_url is not None:
                DermisClient(public_url, api_key="").close()
        except InvalidRequestError as error:
            raise DermisError(f"--public-url: {error}") from None
        from dermis_studio.serve import run
    except ImportError as error:
        raise DermisError(f"the studio is not installed ({error}): pip install 'dermis[studio]'") from None
    run(
        url,
        host=host,
        port=port,
        hosts=frozenset(trusted_host or ()),
        allow_plain_http=allow_plain_http,
        public_url=public_url,
        json_log=log_format == "json",
    )
