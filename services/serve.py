"""`dermis serve` and `python -m services.serve`: the service on this machine, with a message when it is ready."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from dermis import __version__
from dermis.errors import DermisError, StorageError
from services import logs
from services.data_folder import prepare_data_folder, restrict_new_files
from services.settings import Settings, SettingsError, read_settings, settings_table

logger = logging.getLogger("dermis.serve")

_PORT_SECONDS = 5.0
_POLL_SECONDS = 0.3
_LONGEST_POLL_SECONDS = 2.0


def main(arguments: list[str] | None = None) -> int:
    """Run the service until a signal stops it.

    Returns:
        The exit status: 0 after a stop, 2 if the service cannot start (one line on stderr says why).
    """
    parser = argparse.ArgumentParser(prog="services.serve", description="Serve dermis on this machine.")
    parser.add_argument("--table", action="store_true", help="print the settings as a Markdown table and exit")
    for name, field in Settings.model_fields.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="VALUE", help=(field.description or "").replace("%", "%%")
        )
    options = vars(parser.parse_args(arguments))
    if options.pop("table"):
        print(settings_table())
        return 0
    return serve(options)


def serve(options: Mapping[str, str | None]) -> int:
    """Run the service until a signal stops it.

    Args:
        options: Values of settings by name, as in the environment; None leaves a setting as it is.

    Returns:
        The exit status, as of `main`.
    """
    if os.name != "posix":
        print("dermis: the service needs Unix sockets and signals; run it on Linux or macOS", file=sys.stderr)
        return 2
    from services import supervisor

    # The processes of the service read the environment, so that is where command line values go.
    os.environ.update({f"DERMIS_{name.upper()}": value for name, value in options.items() if value is not None})
    restrict_new_files()
    try:
        settings = read_settings()
        logs.configure(settings.log_level, settings.log_format)
        supervisor.refuse_tcp()
        supervisor.check_access(settings)
        _prepare(settings)
    except DermisError as error:
        print(f"dermis: {error}", file=sys.stderr)
        return 2
    if supervisor.credentials_unencrypted(settings):
        logger.warning(
            "credentials cross the network unencrypted: set DERMIS_TLS_CERTIFICATE and DERMIS_TLS_KEY, or put a proxy that "
            "ends TLS in front and set DERMIS_TRUSTED_PROXIES",
            extra={"host": settings.host},
        )
    threading.Thread(target=_print_address_when_ready, args=(settings,), daemon=True).start()
    try:
        supervisor.serve(settings)
    except DermisError as error:
        print(f"dermis: {error}", file=sys.stderr)
        return 2
    return 0


def _prepare(settings: Settings) -> None:
    """Check that the service can start, so that a failure is one line on stderr."""
    from services.errors import LoadPostponedError
    from services.image_signing import image_signer_of
    from services.jobs.table import JobTable
    from services.models import ServedModels, check_any_bundle, signers_of

    check_any_bundle(settings.bundles)
    image_signer_of(settings)
    signers = signers_of(settings)
    if settings.model_tenants:
        # The processes of the service try again, after pauses.
        with contextlib.suppress(StorageError, LoadPostponedError):
            ServedModels(settings.bundles, settings.default_model, settings.model_tenants, signers)
    prepare_data_folder(settings)
    try:
        table = JobTable(settings.jobs_url)
        table.open()
        table.close()
    except Exception as error:  # every database driver has its own
        raise SettingsError(
            f"the jobs database cannot be opened: {str(error.__cause__ or error).splitlines()[0]}"
        ) from None
    _wait_for_port(settings.host, settings.port)


def _wait_for_port(host: str, port: int) -> None:
    """Return once the port is free. Processes of a service that was just killed need a moment to release it."""
    deadline = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                if os.name == "posix":
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
                return
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise SettingsError(f"DERMIS_HOST: cannot listen on {host}:{port}: {error.strerror}") from None
            if time.monotonic() > deadline:
                raise SettingsError(
                    f"DERMIS_PORT: port {port} is in use; stop what uses it or choose another, as in DERMIS_PORT=3001"
                ) from None
        time.sleep(0.1)


def _print_address_when_ready(settings: Settings) -> None:
    """Print when the service is ready, and why it is not ready."""
    url = _url(settings)
    as_json = settings.log_format == "json"
    if as_json:
        logger.info(
            "starting", extra={"version": __version__, "url": url, "data_dir": str(settings.data_dir.absolute())}
        )
    else:
        print(f"dermis {__version__}: starting on {url} (data in {settings.data_dir.absolute()})", flush=True)
    last_reason = ""
    pause = _POLL_SECONDS
    while True:
        time.sleep(pause)
        pause = min(1.1 * pause, _LONGEST_POLL_SECONDS)
        status, document = _get(f"{url}/readyz")
        if status == 200:
            break
        reason = str(document.get("detail", ""))
        if reason not in ("", last_reason) and "is starting" not in reason:
            last_reason = reason
            if as_json:  # the gateway logs its readiness
                continue
            print(f"dermis is running, but not ready: {reason}", file=sys.stderr, flush=True)
    if as_json:
        logger.info("ready", extra={"url": url})
        return
    if settings.role == "worker":
        print(f"dermis worker is ready; {url} answers /livez, /readyz and /metrics (Ctrl-C stops it)", flush=True)
        return
    from services.gateway.studio import studio_installed

    models = _get(f"{url}/v1/models")[1].get("data", []) if settings.auth == "none" else []  # it needs credentials
    for model in models:
        shown = f"{model['resolution']} px; {', '.join(model['classes'])}"
        classifier = f"; classifier {model['classifier']['architecture']}" if model["classifier"] else ""
        print(f"  model    {model['name']} ({shown}{classifier})", flush=True)
    studio = f"  studio   {url}/studio\n" if studio_installed(settings) else ""
    print(
        f"{studio}  API      {url}/v1\n  docs     {url}/docs\n  health   {url}/readyz\n{_access(settings)}"
        f"dermis is ready at {url} (Ctrl-C stops it; unfinished datasets continue at the next start)",
        flush=True,
    )


def _access(settings: Settings) -> str:
    """A line about the credentials that requests need; empty if they need none."""
    if settings.auth == "none":
        return ""
    how = "API keys" if settings.auth == "keys" else f"access tokens of {settings.oidc_issuer}, or API keys"
    return f"  access   {how}; create a key with: dermis keys create\n"


def _url(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    scheme = "http" if settings.tls_certificate is None else "https"
    return f"{scheme}://[{host}]:{settings.port}" if ":" in host else f"{scheme}://{host}:{settings.port}"


def _get(url: str) -> tuple[int, dict[str, Any]]:
    # The certificate is for a name, not for the address of this machine, and the requests contain nothing secret.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    no_proxy = urllib.request.ProxyHandler({})
    opener = urllib.request.build_opener(no_proxy, urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=15) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        try:
            return error.code, json.load(error)
        except ValueError:
            return error.code, {}
    except (OSError, ValueError):
        return 0, {}


if __name__ == "__main__":
    sys.exit(main())
