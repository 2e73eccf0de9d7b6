"""`dermis verify`: check the files of a dataset, who signed it, and the provenance of its images."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.signing import TrustedOption, check_dataset_signature
from dermis.errors import RequestError, escape

if TYPE_CHECKING:
    from dermis.provenance.c2pa import Verified

_LISTED = 20  # images that are named for each state that is no success


def verify(
    folder: Annotated[
        str,
        typer.Argument(
            help="Folder or fsspec URL of a dataset, or its images.zip; with --provenance also an image or a folder of images."
        ),
    ],
    trusted: TrustedOption = None,
    provenance: Annotated[
        bool,
        typer.Option(
            "--provenance", help="Verify the signed manifest (C2PA) of each image instead; --trusted names authorities."
        ),
    ] = False,
) -> None:
    """Check every file of a dataset against its manifest.json, and list changed, missing and extra files.

    With --provenance, list whether each image is signed by a trusted signer, signed by an unknown signer, unsigned, or
    tampered with. The exit status is 1 if an image is tampered, and with --trusted if one is not signed by a trusted signer.
    """
    if provenance:
        _verify_images(folder, trusted or ())
        return
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
    signed = check_dataset_signature(folder, report.sha256, trusted)
    without = f"; digest without the signatures of images {report.canonical}" if report.canonical else ""
    typer.echo(f"{folder}: {report.checked} files checked, all hashes match{signed}{without}")


def _verify_images(place: str, trusted: Sequence[Path]) -> None:
    from dermis.provenance.c2pa import ImageVerifier
    from dermis.provenance.check import images_at

    verifier = ImageVerifier(trusted)
    states: Counter[str] = Counter()
    signers: Counter[str] = Counter()
    single = Path(place).is_file() and not zipfile.is_zipfile(place)
    for name, data in images_at(place):
        result = verifier.verify(data)
        states[result.state] += 1
        signers[result.signer] += bool(result.signer)
        good = result.state == "signed" or (not trusted and result.state != "tampered")
        if (not good and states[result.state] <= _LISTED) or single:
            typer.echo(f"{escape(name)}: {_in_words(result)}")
    if states.total() > 1:
        counts = ", ".join(f"{count:,} {state}" for state, count in states.most_common())
        by = f"; signers: {', '.join(name for name in signers if name)}" if any(signers) else ""
        typer.echo(f"{place}: {states.total():,} images: {counts}{by}")
    if states["tampered"] or (trusted and states.keys() != {"signed"}):
        raise typer.Exit(1)


def _in_words(result: Verified) -> str:
    words = [result.state + (f" ({result.signer})" if result.signer else "")]
    if result.reason:
        words.append(result.reason)
    if result.origin is not None and result.state != "tampered":
        fields = ("generator", "bundle", "seed", "index", "edits", "licence")
        words += [f"{field} {escape(result.origin[field])}" for field in fields if field in result.origin]
    return "; ".join(words)
