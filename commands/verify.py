"""`dermis verify`: check the files of a dataset, and who signed it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.signing import TrustedOption, check_dataset_signature
from dermis.errors import RequestError, escape


def verify(
    folder: Annotated[str, typer.Argument(help="Folder or fsspec URL of a dataset, or its images.zip.")],
    trusted: TrustedOption = None,
) -> None:
    """Check every file of a dataset against its manifest.json, and list changed, missing and extra files."""
    from dermis.dataset.verify import verify as verify_dataset

    archive = Path(folder).is_file()
    if archive and trusted:
        raise RequestError("--trusted", "the signature is that of the whole dataset; give its folder")
    report = verify_dataset(folder)
    for what, names in (("changed", report.changed), ("missing", report.missing), ("extra", report.extra)):
        for name in names:
            typer.echo(f"{what} {escape(name)}")
    if not report.ok:
        raise typer.Exit(1)
    if archive:
        typer.echo(f"{folder}: {report.checked} images checked, all hashes match")
        return
    signed = check_dataset_signature(folder, trusted)
    typer.echo(f"{folder}: {report.checked} files checked, all hashes match{signed}")
