"""Signatures of bundles and datasets in the format of OpenSSF Model Signing (OMS), made and verified offline.

A signature lists the SHA-256 of every file, so that `model_signing verify` checks a folder without dermis. dermis itself has
compared the files with their descriptor (bundle.json, manifest.json) already, so it compares the signature with the descriptor
and reads no file twice. That also works for bundles in remote storage.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dermis.errors import SignatureError, escape, install_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryptography.x509 import Certificate
    from model_signing.manifest import Manifest

EXTRA = "provenance"
_KEY, _CERTIFICATE = b"-----BEGIN PUBLIC KEY-----", b"-----BEGIN CERTIFICATE-----"
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MAX_PEM_BYTES = 1 << 20
MAX_SIGNATURE_BYTES = 64 << 20  # of the largest dataset: 40 MB


@dataclass(frozen=True)
class TrustedSigners:
    """The signers that are trusted: their public keys, and authorities that issue certificates to signers.

    Attributes:
        keys: Public keys (PEM) by fingerprint.
        authorities: Certificates of authorities (PEM).
    """

    keys: Mapping[str, bytes]
    authorities: tuple[bytes, ...]


def read_signers(paths: Sequence[str | Path]) -> TrustedSigners:
    """Read trusted signers from PEM files. A file can hold several public keys or certificates.

    Raises:
        SignatureError: A file cannot be read, or holds something else than EC public keys and certificates.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    keys: dict[str, bytes] = {}
    authorities: list[bytes] = []
    for path in map(Path, paths):
        data = _read_pem(path)
        blocks = [b"-----BEGIN " + block for block in data.split(b"-----BEGIN ")[1:]]
        try:
            for block in blocks:
                if block.startswith(_KEY):
                    key = load_pem_public_key(block)
                    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
                        raise ValueError("its key is not on a curve of NIST (P-256, P-384, P-521)")
                    pem = _pem_of(key)
                    keys[fingerprint(pem)] = pem
                elif block.startswith(_CERTIFICATE):
                    x509.load_pem_x509_certificate(block)
                    authorities.append(block)
                else:
                    raise ValueError("it holds something else; never give a private key here")
        except ValueError as error:
            raise SignatureError(f"{path}: is not a file of public keys or certificates: {escape(error)}") from None
        if not blocks:
            raise SignatureError(f"{path}: has no public key and no certificate in PEM format")
    return TrustedSigners(keys, tuple(authorities))


def fingerprint(public_key: bytes) -> str:
    """SHA-256 (hex) of a public key in PEM format, by which signatures name their key."""
    return hashlib.sha256(public_key).hexdigest()


def sign_records(
    records: Mapping[str, str],
    name: str,
    *,
    ignored: str,
    key: Path,
    certificate: Path | None = None,
    chain: Sequence[Path] = (),
) -> bytes:
    """Sign the files of a folder.

    Args:
        records: SHA-256 (hex) of every file, by its path in the folder.
        name: Name of the folder, for people.
        ignored: Path of the signature in the folder, which it does not cover.
        key: File of the private key, on a curve of NIST, not encrypted.
        certificate: Certificate of the key. Without one, verifiers need the public key.
        chain: Certificates of the intermediate authorities.

    Returns:
        The signature: a Sigstore bundle with a DSSE envelope of an in-toto statement, as JSON.

    Raises:
        SignatureError: The key or a certificate cannot be used.
    """
    model_signing = _model_signing()
    config = model_signing.signing.Config().set_hashing_config(_Recorded(records, name, ignored))
    try:
        if certificate is None:
            config.use_elliptic_key_signer(private_key=key)
        else:
            chain = chain or (
                certificate,
            )  # the library refuses an empty chain; a certificate twice makes no difference
            config.use_certificate_signer(private_key=key, signing_certificate=certificate, certificate_chain=chain)
        with tempfile.TemporaryDirectory(prefix="dermis-sign-") as folder:
            path = Path(folder) / ignored
            config.sign(folder, path)
            return path.read_bytes()
    except TypeError:  # of cryptography, for a key that needs a password
        raise SignatureError(
            f"{key}: is encrypted; give a key without a password: openssl pkey -in {key.name}"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or escape(error)
        files = ", ".join(str(path) for path in (key, certificate, *chain) if path is not None)
        raise SignatureError(f"{files}: cannot be used to sign: {reason}") from None


def verify_records(signature: bytes, records: Mapping[str, str], signers: TrustedSigners, where: str) -> str:
    """Verify that a trusted signer signed these files.

    Args:
        signature: Content of the signature's file.
        records: SHA-256 (hex) of every file, by its path in the folder.
        signers: The trusted signers.
        where: The folder, for errors.

    Returns:
        The signer, in words.

    Raises:
        SignatureError: The signature cannot be read, is not of a trusted signer or not of these files.
    """
    model_signing = _model_signing()
    material = _verification_material(signature, where)
    with _as_files(signature, signers) as (path, keys, authorities):
        config = model_signing.verifying.Config().set_hashing_config(_Recorded(records, "", ""))
        if isinstance(material, str):
            who = f"the key {material[:16]}"
            if material not in keys:
                raise SignatureError(f"{where}: is signed by {who}, which is not a trusted signer")
            config.use_elliptic_key_verifier(public_key=keys[material])
        else:
            who = escape(material.subject.rfc4514_string())
            if not authorities:
                raise SignatureError(f"{where}: is signed by {who}, which is not a trusted signer")
            config.use_certificate_verifier(certificate_chain=authorities)
        try:
            config.verify(path.parent, path)
        except Exception as error:  # of cryptography, pyOpenSSL, pydantic and the library itself
            raise SignatureError(f"{where}: {_reason(error, who, records, signature)}") from None
    return who


def _reason(error: Exception, who: str, records: Mapping[str, str], signature: bytes) -> str:
    """Say why a verification failed. The library's messages for changed files list whole digests."""
    kind = type(error).__name__
    if kind == "X509StoreContextError":
        return f"is signed by {who}, which is not a trusted signer"
    if kind == "InvalidSignature":
        return f"its signature is not of {who}: it was altered"
    signed = _signed_files(signature)
    differing = sorted(name for name in signed.keys() | records.keys() if signed.get(name) != records.get(name))
    if str(error).startswith("Signature mismatch") and differing:
        return f"differs from what {who} signed: {escape(', '.join(differing[:3]))}"
    return f"its signature by {who} cannot be verified: {escape(error)}"


class _Recorded:
    """In place of the library's hashing of files: the digests that dermis has verified already."""

    def __init__(self, records: Mapping[str, str], name: str, ignored: str) -> None:
        self._records, self._name, self._ignored = records, name, ignored

    def hash(self, _folder: Any, *, files_to_hash: Any = None) -> Manifest:
        """The manifest of the library."""
        from model_signing import manifest
        from model_signing._hashing.hashing import Digest  # it has no public name

        serialization = manifest.SerializationType.from_args(
            {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [self._ignored]}
        )
        items = [
            manifest.FileManifestItem(path=PurePosixPath(name), digest=Digest("sha256", bytes.fromhex(digest)))
            for name, digest in self._records.items()
        ]
        return manifest.Manifest(self._name, items, serialization)

    def add_ignored_paths(self, **_: Any) -> None:
        """Nothing: no file is read."""


def check_installed() -> None:
    """Check that signatures can be made and verified.

    Raises:
        SignatureError: A package is not installed. The message says how to install it.
    """
    _model_signing()


def _model_signing() -> Any:
    try:
        import model_signing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise SignatureError(f"signatures need the package model-signing ({error}): {install_command(EXTRA)}") from None
    return model_signing


def _verification_material(signature: bytes, where: str) -> str | Certificate:
    """Read by whom a signature claims to be: the fingerprint of a key, or a certificate.

    Raises:
        SignatureError: The signature cannot be read.
    """
    import base64

    from cryptography import x509

    try:
        material = json.loads(signature)["verificationMaterial"]
        if "x509CertificateChain" in material:
            chain = material["x509CertificateChain"]["certificates"]
            return x509.load_der_x509_certificate(base64.b64decode(chain[0]["rawBytes"]))
        return str(material["publicKey"]["hint"])
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise SignatureError(f"{where}: its signature cannot be read; sign it again") from None


def _signed_files(signature: bytes) -> dict[str, str]:
    """The digests in a signature, for messages; empty if they cannot be read."""
    import base64

    try:
        payload = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
        return {str(each["name"]): str(each["digest"]) for each in payload["predicate"]["resources"]}
    except (ValueError, TypeError, KeyError):
        return {}


@contextmanager
def _as_files(signature: bytes, signers: TrustedSigners) -> Iterator[tuple[Path, dict[str, Path], list[Path]]]:
    """Write signature, keys and authorities to files, as the library reads files only."""
    with tempfile.TemporaryDirectory(prefix="dermis-verify-") as name:
        folder = Path(name)
        path = folder / "signature"
        path.write_bytes(signature)
        keys: dict[str, Path] = {}
        for number, (name_of_key, pem) in enumerate(signers.keys.items()):
            keys[name_of_key] = folder / f"key-{number}"
            keys[name_of_key].write_bytes(pem)
        authorities = []
        for number, pem in enumerate(signers.authorities):
            authorities.append(folder / f"authority-{number}")
            authorities[-1].write_bytes(pem)
        yield path, keys, authorities


def _pem_of(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    data: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return data


def _read_pem(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_PEM_BYTES + 1)
    except OSError as error:
        raise SignatureError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _MAX_PEM_BYTES:
        raise SignatureError(f"{path}: is too large for a file of keys or certificates")
    return data
