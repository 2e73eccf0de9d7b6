"""Write files whole or not at all."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from dermis_client.errors import DownloadError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all; makes its folder. Raises DownloadError."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DownloadError(f"{path}: cannot be written ({error.strerror or error})") from error
