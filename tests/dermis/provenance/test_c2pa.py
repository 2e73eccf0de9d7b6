"""Tests of signed images: signing changes no pixel and nothing else of the file, and tampering is detected."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dermis_client import _canonical

from benchmarks.signers import SignerFiles, make_signer
from dermis.errors import SignatureError
from dermis.image_metadata import ImageOrigin
from dermis.imaging import MEDIA_TYPES, ImageFormat, decode, encode
from dermis.provenance.c2pa import ImageSigner, ImageVerifier
from dermis.provenance.canonical import canonical, canonical_sha256

c2pa = pytest.importorskip("c2pa", reason="c2pa-python is not installed")
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
ORIGIN = ImageOrigin("demo", "ab" * 32, "CC-BY-NC-4.0", "HAM10000").of_sample(7, 3)
FORMATS: list[ImageFormat] = ["png", "jpeg", "webp"]


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SignerFiles]:
    folder = tmp_path_factory.mktemp("signers")
    return {name: make_signer(folder / name, name) for name in ("Clinic", "Other")}


@pytest.mark.parametrize("image_format", FORMATS)
def test_signing_adds_a_manifest_and_changes_nothing_else(
    signers: dict[str, SignerFiles], image_format: ImageFormat
) -> None:
    plain = encode(PIXELS, image_format, 95, ORIGIN)
    signer = ImageSigner(signers["Clinic"].certificate, signers["Clinic"].key)
    signed, again = (signer.sign(plain, image_format, ORIGIN) for _ in range(2))
    assert signed != again and (decode(signed) == decode(plain)).all()
    for file in (plain, signed, again):
        assert canonical(file) == _canonical.canonical(file) == plain
    result = ImageVerifier([signers["Clinic"].authority]).verify(signed)
    assert (result.state, result.signer, result.reason) == ("signed", "Clinic, Test", "")
    assert result.origin is not None
    assert {"bundle": "ab" * 32, "seed": 7, "index": 3, "licence": "CC-BY-NC-4.0"}.items() <= result.origin.items()
    with c2pa.Reader(MEDIA_TYPES[image_format], io.BytesIO(signed)) as reader:
        manifest = reader.get_active_manifest()
    (action,) = next(each["data"]["actions"] for each in manifest["assertions"] if "c2pa.actions" in each["label"])
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/digitalsourcetype/trainedAlgorithmicMedia")
    assert manifest["claim_generator_info"][0]["name"] == "dermis"
    # Licence and attribution are where viewers that do not know dermis look: the metadata assertion of the CAWG.
    (metadata,) = (each["data"] for each in manifest["assertions"] if each["label"] == "cawg.metadata")
    assert metadata["dc:rights"] == "Licence: CC-BY-NC-4.0. Attribution: HAM10000"
    assert metadata["@context"]["dc"] == "http://purl.org/dc/elements/1.1/"
    assert {each["label"].split(".")[0] for each in manifest["assertions"]} == {"c2pa", "cawg"}  # registered namespaces


@pytest.mark.parametrize(
    ("label", "data", "known"),
    [
        ("dermis.image-origin", {"bundle": "ab" * 32, "seed": 7}, True),  # of former versions
        ("cawg.metadata", {"@context": {"dermis": "urn:dermis:image-origin:1/"}, "dermis:seed": 7}, True),
        ("cawg.metadata", {"@context": {"dermis": "https://other.example/"}, "dermis:seed": 7}, False),
        ("com.litware.origin", {"seed": 7, "canonical_sha256": "0" * 64}, False),
    ],
)
def test_origin_is_read_from_this_and_former_versions_only(
    signers: dict[str, SignerFiles], monkeypatch: pytest.MonkeyPatch, label: str, data: dict[str, Any], known: bool
) -> None:
    plain = encode(PIXELS, "png", 95, ORIGIN)
    data = dict(data)
    if known:
        data["dermis:canonical_sha256" if "@context" in data else "canonical_sha256"] = canonical_sha256(plain)
    kind = {"kind": "Json"} if "@context" in data else {}
    action = {"action": "c2pa.created", "digitalSourceType": "http://c2pa.org/digitalsourcetype/empty"}
    assertions = [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}, {"label": label, "data": data, **kind}]
    definition = {"claim_generator_info": [{"name": "other", "version": "1"}], "assertions": assertions}
    signer = ImageSigner(signers["Clinic"].certificate, signers["Clinic"].key)
    monkeypatch.setattr("dermis.provenance.c2pa._definition", lambda origin, sha256: definition)
    signed = signer.sign(plain, "png", ORIGIN)
    result = ImageVerifier([signers["Clinic"].authority]).verify(signed)
    assert result.state == "signed" and (result.origin is not None) == known
    assert not known or (result.origin is not None and result.origin["seed"] == 7)


@pytest.mark.parametrize("image_format", FORMATS)
def test_states_of_images(signers: dict[str, SignerFiles], image_format: ImageFormat) -> None:
    plain = encode(PIXELS, image_format, 95, ORIGIN)
    signed = ImageSigner(signers["Clinic"].certificate, signers["Clinic"].key).sign(plain, image_format, ORIGIN)
    verifier = ImageVerifier([signers["Clinic"].authority])
    assert verifier.verify(plain).state == "unsigned"
    assert ImageVerifier().verify(signed).state == "unknown signer"
    assert ImageVerifier([signers["Other"].authority]).verify(signed).state == "unknown signer"
    for position in (signed.index(plain[-40:-20]), signed.index(b"trainedAlgorithmicMedia")):
        changed = bytearray(signed)
        changed[position] ^= 1
        assert verifier.verify(bytes(changed)).state == "tampered"
    other = signed.replace(b"trainedAlgorithmicMedia", b"digitalCapture000000000")  # also in the XMP of the image
    assert other != signed and verifier.verify(other).state == "tampered"
    assert verifier.verify(signed[: len(signed) // 2]).state == "tampered"
    for data in (
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xeb\xff",
        b"RIFF\0\0\0\0WEBPC2PA\xff\xff\xff\xff",
        b"\0" * 99,
    ):
        assert verifier.verify(data).state in ("unsigned", "tampered") and isinstance(canonical(data), bytes)


def test_certificates_that_are_not_fit_are_refused_before_any_image(
    signers: dict[str, SignerFiles], tmp_path: Path
) -> None:
    clinic, other = signers["Clinic"], signers["Other"]
    expired = make_signer(tmp_path / "expired", days=-0.5)
    for certificate, key in (
        (clinic.certificate, other.key),
        (clinic.authority, clinic.key),
        (expired.certificate, expired.key),
        (clinic.key, clinic.key),
        (clinic.certificate, clinic.certificate),
    ):
        with pytest.raises(SignatureError, match=certificate.name):
            ImageSigner(certificate, key)
    with pytest.raises(SignatureError, match="cannot be read"):
        ImageSigner(tmp_path / "missing.pem", clinic.key)
    with pytest.raises(SignatureError, match="public key"):
        ImageVerifier([clinic.public_key])
