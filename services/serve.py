"""`python -m services.serve`: check everything that can be checked, then start the service.

Errors that the operator can mend are one line; what BentoML would only say in a worker's stack trace is found here.
"""

from __future__ import annotations

import os
import socket
import sys

from dermis.errors import DermisError
from services.settings import REPOSITORY, Settings, SettingsError, read_settings

SERVICE = "services.service:Gateway"


def main() -> None:
    """Exit status 1 and one line on stderr if the service cannot start."""
    try:
        settings = read_settings()
        _check(settings)
    except DermisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    environment = os.environ | {"BENTOML_DO_NOT_TRACK": "True", "DO_NOT_TRACK": "1", "OTEL_SDK_DISABLED": "true"}
    environment.setdefault("BENTOML_HOME", str(settings.data_dir.absolute() / "bentoml"))
    address = f"http://{'localhost' if settings.host in ('0.0.0.0', '::') else settings.host}:{settings.port}"  # noqa: S104
    print(f"dermis is starting on {address}; documentation of its API: {address}/docs", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--host", settings.host, "--port", str(settings.port)]
    os.chdir(REPOSITORY)
    os.execve(sys.executable, command, environment)  # noqa: S606


def _check(settings: Settings) -> None:
    """DermisError if a bundle is not intact, the data folder cannot be written or the port is taken."""
    from services.models import Models

    Models(settings.bundles)
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        probe = settings.data_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"DERMIS_DATA_DIR: {settings.data_dir} cannot be written: {error.strerror}") from None
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((settings.host, settings.port))
        except OSError as error:
            raise SettingsError(
                f"DERMIS_PORT: cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another port"
            ) from None


if __name__ == "__main__":
    main()
