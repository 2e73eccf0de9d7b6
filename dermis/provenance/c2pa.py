"""Signed metadata of images (C2PA, Content Credentials), made and verified offline with the library of the C2PA.

A manifest in the image says which generator made it, from which seed and index, under which licence, and has the SHA-256 of the
canonical file (`dermis.provenance.canonical`). Signing changes no pixel.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dermis import __version__
from dermis.errors import SignatureError, escape, install_command
from dermis.image_metadata import NAMESPACE, NAMESPACES, SOURCE_TYPE_PREFIX, ImageOrigin, standard_properties
from dermis.imaging import MEDIA_TYPES, ImageFormat
from dermis.provenance.canonical import canonical_sha256
from dermis.provenance.signing import EXTRA

METADATA = "cawg.metadata"
"""Label of the metadata assertion of the Creator Assertions Working Group, which generic viewers show. It has the standard
properties of the XMP and, in the namespace of dermis, the fields of `ImageOrigin` and the SHA-256 of the canonical file."""
FORMER_ORIGIN = "dermis.image-origin"
"""Label of the assertion of former versions with these fields. Labels that are not registered must begin with a domain name."""
_PREFIX = "dermis:"

State = Literal["signed", "unsigned", "tampered", "unknown signer"]

_MAX_IMAGE_BYTES = 256 << 20
_SETTINGS: dict[str, Any] = {
    "builder": {"thumbnail": {"enabled": False}},
    # Nothing is ever read from the network: a manifest that is only a link counts as none.
    "verify": {"verify_trust": True, "verify_after_sign": False, "ocsp_fetch": False, "remote_manifest_fetch": False},
}


@dataclass(frozen=True)
class Verified:
    """What is known of the provenance of an image.

    Attributes:
        state: "signed" by a trusted signer, by an "unknown signer", "unsigned", or "tampered": changed after it was signed.
        signer: The signer of the manifest; empty without one.
        origin: The assertion of dermis; empty if there is none.
        reason: Why it is tampered or the signer is not known.
    """

    state: State
    signer: str = ""
    origin: dict[str, Any] | None = None
    reason: str = ""


class ImageSigner:
    """Signs images with a certificate. Several threads can use it.

    Args:
        certificate: PEM file with the certificate and those of intermediate authorities.
        key: PEM file with its private key, not encrypted.

    Raises:
        SignatureError: A file cannot be read, or the certificate is not fit for signing images.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        c2pa = _library()
        chain = _read(certificate)
        try:
            info = c2pa.C2paSignerInfo(_algorithm(chain, certificate), chain, _read(key), None)
            self._signer = c2pa.Signer.from_info(info)
            self._context = c2pa.Context.from_dict(_SETTINGS)
            self._builder = c2pa.Builder
        except (c2pa.C2paError, ValueError) as error:
            raise SignatureError(f"{certificate}, {key}: cannot be used to sign images: {escape(error)}") from None
        self._try(certificate)

    def sign(self, data: bytes, image_format: ImageFormat, origin: ImageOrigin) -> bytes:
        """Put a signed manifest into an image.

        Args:
            data: The encoded image, without a manifest.
            image_format: Its format.
            origin: What the manifest says.
        """
        c2pa = _library()
        signed = io.BytesIO()
        try:
            builder = self._builder(json.dumps(_definition(origin, canonical_sha256(data))), self._context)
            builder.sign(self._signer, MEDIA_TYPES[image_format], io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            raise SignatureError(f"an image cannot be signed: {escape(error)}") from None
        return signed.getvalue()

    def _try(self, certificate: Path) -> None:
        """Sign an image and read it, so that an unfit certificate is an error at the start and not in every image."""
        import numpy as np

        from dermis.imaging import encode

        image = encode(np.zeros((8, 8, 3), np.uint8))
        try:
            result = verify_image(self.sign(image, "png", ImageOrigin("test")), _reader_context(()))
        except SignatureError as error:
            raise SignatureError(f"{certificate}: {error}") from None
        problems = result.reason.removeprefix(_UNTRUSTED).strip(", ")
        if result.state != "unknown signer" or problems:
            raise SignatureError(f"{certificate}: is not fit for signing images (C2PA): {problems or result.state}")


_UNTRUSTED = "signingCredential.untrusted"


class ImageVerifier:
    """Verifies the manifests of images.

    Args:
        trusted: PEM files with the certificates of authorities whose signers are trusted.

    Raises:
        SignatureError: A file cannot be used.
    """

    def __init__(self, trusted: Sequence[Path] = ()) -> None:
        from dermis.provenance.signing import read_signers

        signers = read_signers(trusted)
        if signers.keys:
            raise SignatureError("images are verified by certificates; --trusted has a public key")
        self._context = _reader_context(signers.authorities)

    def verify(self, data: bytes) -> Verified:
        """Verify an image file, which can be untrusted."""
        return verify_image(data, self._context)


def verify_image(data: bytes, context: Any) -> Verified:
    """Verify an image with a context of the library."""
    c2pa = _library()
    if len(data) > _MAX_IMAGE_BYTES:
        return Verified("unsigned", reason=f"it has more than {_MAX_IMAGE_BYTES >> 20} MiB")
    try:
        with c2pa.Reader(None, io.BytesIO(data), None, context) as reader:
            document = json.loads(reader.json())
            state = reader.get_validation_state()
    except (c2pa.C2paError, ValueError) as error:
        if not _has_manifest(data):
            return Verified("unsigned")
        return Verified("tampered", reason=f"its manifest cannot be read: {escape(error)}")
    manifest = document.get("manifests", {}).get(document.get("active_manifest"), {})
    failures = [str(each.get("code")) for each in _failures(document)]
    origin = _origin(manifest)
    info = manifest.get("signature_info", {})
    signer = escape(", ".join(filter(None, (info.get("common_name"), info.get("issuer")))))
    if origin is not None and origin.get("canonical_sha256") != canonical_sha256(data):
        failures.append("the file differs from the one that was signed")
    wrong = [code for code in failures if not code.startswith("signingCredential.")]
    if wrong:
        return Verified("tampered", signer, origin, ", ".join(dict.fromkeys(wrong)))
    if state == "Trusted":
        return Verified("signed", signer, origin)
    return Verified("unknown signer", signer, origin, ", ".join(dict.fromkeys(failures)))


def _origin(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Return what dermis says of the image in a manifest, of this or a former version; None if it says nothing."""
    for each in manifest.get("assertions", ()):
        label, data = each.get("label"), each.get("data")
        if not isinstance(data, dict):
            continue
        if label == FORMER_ORIGIN:
            return data
        context = data.get("@context")
        if label == METADATA and isinstance(context, dict) and context.get(_PREFIX[:-1]) == NAMESPACE:
            return {name.removeprefix(_PREFIX): value for name, value in data.items() if name.startswith(_PREFIX)}
    return None


def _failures(document: Any) -> list[dict[str, Any]]:
    results = document.get("validation_results") or {}
    found = list((results.get("activeManifest") or {}).get("failure") or ())
    for delta in results.get("ingredientDeltas") or ():
        found += (delta.get("validationDeltas") or {}).get("failure") or ()
    return found


def _definition(origin: ImageOrigin, sha256: str) -> dict[str, Any]:
    """The manifest in the form that the library takes. Its random identifiers make every signed file different."""
    fields = {
        "generator": escape(origin.generator),
        "bundle": origin.digest,
        "seed": origin.seed,
        "index": origin.index,
        "edits": escape(origin.edits),
        "licence": escape(origin.licence),
        "attribution": escape(origin.attribution, 500),
        "canonical_sha256": sha256,
    }
    metadata = {
        "@context": dict(NAMESPACES),
        **standard_properties(origin),
        **{_PREFIX + name: value for name, value in fields.items() if value not in (None, "")},
    }
    action = {
        "action": "c2pa.created",
        "digitalSourceType": SOURCE_TYPE_PREFIX + origin.source_type,
        "softwareAgent": {"name": "dermis", "version": __version__},
    }
    return {
        "claim_generator_info": [{"name": "dermis", "version": __version__}],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
            {"label": METADATA, "data": metadata, "kind": "Json"},
        ],
    }


def _reader_context(authorities: Sequence[bytes]) -> Any:
    c2pa = _library()
    settings = dict(_SETTINGS)
    if authorities:
        settings["trust"] = {"user_anchors": b"\n".join(authorities).decode()}
    try:
        return c2pa.Context.from_dict(settings)
    except c2pa.C2paError as error:
        raise SignatureError(f"--trusted: {escape(error)}") from None


def _algorithm(chain: bytes, place: Path) -> str:
    """The signature algorithm of C2PA for the key of a certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        key = x509.load_pem_x509_certificate(chain).public_key()
    except ValueError:
        raise SignatureError(f"{place}: has no certificate in PEM format") from None
    if isinstance(key, ec.EllipticCurvePublicKey):
        algorithm = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}.get(key.curve.name)
        if algorithm is not None:
            return algorithm
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPublicKey):
        return "ps256"
    raise SignatureError(f"{place}: its key is of no kind that C2PA allows; use EC P-256, P-384, P-521, Ed25519 or RSA")


def _has_manifest(data: bytes) -> bool:
    """Whether there is a manifest or a part of one: the type and the label of its outermost box."""
    return b"jumb" in data and b"c2pa" in data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SignatureError(f"{path}: cannot be read: {error.strerror}") from None


def _library() -> Any:
    try:
        import c2pa
    except (ImportError, OSError) as error:  # OSError: its shared library cannot be loaded
        raise SignatureError(
            f"signed images need the package c2pa-python ({error}): {install_command(EXTRA)}"
        ) from None
    return c2pa
