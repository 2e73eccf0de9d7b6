"""Signing: `dermis bundle sign`, `dermis sign` for datasets, and the verification of both signatures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.options import BundleArgument
from dermis.errors import RequestError, SignatureError, StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dermis.bundle import Bundle

KeyOption = Annotated[
    Path, typer.Option("--key", help="Private key on a curve of NIST in a PEM file, not encrypted.", show_default=False)
]
CertificateOption = Annotated[
    Path | None,
    typer.Option(
        help="Certificate of the key, for verifiers who trust its authority. Without it they need the public key."
    ),
]
ChainOption = Annotated[
    list[Path] | None, typer.Option(help="Certificate of an intermediate authority; may be repeated.")
]
TrustedOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="PEM file of a public key or of an authority's certificate: require that such a signer signed; may be repeated."
    ),
]


def sign_bundle(
    bundle: BundleArgument,
    key: KeyOption,
    certificate: CertificateOption = None,
    chain: ChainOption = None,
) -> None:
    """Sign a bundle in a local folder, in place of an earlier signature.

    Every file is verified first. Writes model.sig into the folder, in the format of OpenSSF Model Signing. Changing a bundle
    removes its signature, so sign it last.
    """
    from dermis.bundle import SIGNATURE, open_bundle, read_signature
    from dermis.files import write_file
    from dermis.provenance.signing import sign_records

    _check_chain(certificate, chain)
    opened = open_bundle(bundle)
    folder = Path(opened.location)
    if "://" in opened.location or not folder.is_dir():
        raise RequestError("BUNDLE", "only a bundle in a local folder can be signed; copy it first")
    _, records = read_signature(opened)
    data = sign_records(records, opened.name, ignored=SIGNATURE, key=key, certificate=certificate, chain=chain or ())
    write_file(folder / SIGNATURE, data)
    typer.echo(f"{folder / SIGNATURE}: signature of {len(records)} files of {opened.name}@{opened.digest}")


def check_bundle_signature(bundle: Bundle, trusted: Sequence[Path] | None) -> str:
    """Verify the signature of an opened bundle, and describe it; empty if it has none.

    Args:
        bundle: The bundle.
        trusted: Files of trusted signers; None if the bundle may be unsigned.

    Raises:
        SignatureError: A trusted signer is required and did not sign this bundle.
    """
    from dermis.bundle import read_signature
    from dermis.provenance.signing import read_signers, verify_records

    signature, records = read_signature(bundle)
    if not trusted:
        return _not_checked(signature)
    if signature is None:
        raise SignatureError(f"{bundle.location}: is not signed")
    return f", signed by {verify_records(signature, records, read_signers(trusted), bundle.location)}"


def sign_dataset(
    folder: Annotated[str, typer.Argument(help="Folder or fsspec URL of a finished dataset.", show_default=False)],
    key: KeyOption,
    certificate: CertificateOption = None,
    chain: ChainOption = None,
) -> None:
    """Sign a finished dataset, in place of an earlier signature.

    Every file is verified first. Writes dataset.sig beside the manifest, in the format of OpenSSF Model Signing; no other file
    changes. `dermis verify FOLDER --trusted signer.pem` checks it.
    """
    from dermis.dataset.manifest import SIGNATURE
    from dermis.dataset.store import PARTIAL, Store
    from dermis.dataset.verify import verify
    from dermis.provenance.signing import sign_records

    _check_chain(certificate, chain)
    report = verify(folder)
    if not report.sha256:
        raise StorageError(
            f"{folder}: is a single file; give the folder of the dataset, whose files are signed together"
        )
    if not report.ok:
        names = ", ".join([*report.changed, *report.missing, *report.extra][:3])
        raise StorageError(f"{folder}: is not as its manifest describes it ({names}); see dermis verify {folder}")
    store, records = Store(folder), report.sha256
    name = folder.rstrip("/").rpartition("/")[2] or "dataset"
    store.write(
        SIGNATURE,
        sign_records(records, name, ignored=SIGNATURE, key=key, certificate=certificate, chain=chain or ()),
    )
    store.remove(PARTIAL)  # files are written there first
    typer.echo(f"{store.where(SIGNATURE)}: signature of {len(records)} files")


def check_dataset_signature(folder: str, records: Mapping[str, str], trusted: Sequence[Path] | None) -> str:
    """Verify the signature of a dataset whose files were compared with its manifest, and describe it; empty if it has none.

    Args:
        folder: Folder or URL of the dataset.
        records: SHA-256 of its files, as its verification has read them (`dermis.dataset.verify.Report.sha256`).
        trusted: Files of trusted signers; None if the dataset may be unsigned.

    Raises:
        SignatureError: A trusted signer is required and did not sign this dataset.
    """
    from dermis.dataset.manifest import SIGNATURE
    from dermis.dataset.store import Store
    from dermis.provenance.signing import MAX_SIGNATURE_BYTES, read_signers, verify_records

    store = Store(folder)
    signature = None if store.size(SIGNATURE) is None else store.read(SIGNATURE, limit=MAX_SIGNATURE_BYTES)
    if not trusted:
        return _not_checked(signature)
    if signature is None:
        raise SignatureError(f"{folder}: is not signed")
    return f", signed by {verify_records(signature, records, read_signers(trusted), folder)}"


def _not_checked(signature: bytes | None) -> str:
    return "" if signature is None else ", signed (by whom is checked with --trusted)"


def _check_chain(certificate: Path | None, chain: Sequence[Path] | None) -> None:
    if chain and certificate is None:
        raise RequestError("--chain", "needs --certificate, the certificate of the key")
