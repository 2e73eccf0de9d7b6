"""Tests of the service with a certificate for images: which of them it signs, and what stays the same."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.signers import SignerFiles, make_signer
from dermis.bundle import Bundle
from dermis.imaging import encode
from dermis.provenance.c2pa import ImageVerifier
from dermis.provenance.canonical import canonical
from dermis.provenance.check import images_at
from service_kit import Service, service
from services.image_signing import image_signer_of
from services.settings import Settings, SettingsError

pytest.importorskip("c2pa", reason="c2pa-python is not installed")
BODY: dict[str, Any] = {"classes": {"benign": 2}, "seed": 5}


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> SignerFiles:
    return make_signer(tmp_path_factory.mktemp("signers") / "clinic")


@pytest.fixture(scope="module")
def running(tiny_bundle: Bundle, signer: SignerFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    files = {"c2pa_certificate": signer.certificate, "c2pa_key": signer.key}
    with service(tiny_bundle.location, tmp_path_factory.mktemp("data"), **files) as running_service:
        yield running_service


def state(data: bytes, signer: SignerFiles) -> str:
    return ImageVerifier([signer.authority]).verify(data).state


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_images_are_signed_unless_the_request_refuses(running: Service, signer: SignerFiles, image_format: str) -> None:
    body = BODY | {"image_format": image_format}
    first, second = (running.client.post("/v1/images", json=body).json()["data"] for _ in range(2))
    plain = running.client.post("/v1/images", json=body | {"provenance": {"c2pa": False}}).json()["data"]
    for one, two, without in zip(first, second, plain, strict=True):
        data, unsigned = base64.b64decode(one["b64"]), base64.b64decode(without["b64"])
        assert state(data, signer) == "signed" and canonical(data) == unsigned
        assert one["sha256"] == hashlib.sha256(data).hexdigest() != two["sha256"]
        assert one["canonical_sha256"] == two["canonical_sha256"] == without["sha256"]
        assert "canonical_sha256" not in without
    sheet = running.client.post("/v1/images", json=body, headers={"Accept": f"image/{image_format}"}).content
    assert state(sheet, signer) == "signed"
    npz = {"Accept": "application/x-npz"}
    assert running.client.post("/v1/images", json=body, headers=npz).status_code == 200
    refused = running.client.post("/v1/images", json=body | {"provenance": {"c2pa": True}}, headers=npz)
    assert refused.status_code == 422 and refused.json()["errors"][0]["field"] == "provenance.c2pa"
    edits = {"samples": [{"class": "benign", "seed": 5, "index": 1}], "image_format": image_format}
    (edited,) = running.client.post("/v1/edits", json=edits).json()["data"]
    assert edited["canonical_sha256"] == plain[1]["sha256"]
    assert state(base64.b64decode(edited["b64"]), signer) == "signed"


@pytest.mark.full
def test_datasets_are_signed_by_default_and_keep_their_hashes(running: Service, signer: SignerFiles) -> None:
    body = BODY | {"classes": {"benign": 5}, "format": "webdataset", "shard_size": 3}
    plain = running.wait(running.ask(body | {"provenance": {"c2pa": False}}))
    signed = running.wait(running.ask(body))
    assert (plain["state"], signed["state"]) == ("succeeded", "succeeded")
    assert signed["request"]["provenance"] == {"c2pa": True} and "provenance" not in plain["request"]
    folders = [Path(running.settings.storage) / each["id"] for each in (plain, signed)]
    assert len({(folder / "metadata.csv").read_bytes() for folder in folders}) == 1
    assert {state(data, signer) for _, data in images_at(str(folders[1]))} == {"signed"}
    assert {state(data, signer) for _, data in images_at(str(folders[0]))} == {"unsigned"}
    assert state((folders[1] / "preview.png").read_bytes(), signer) == "signed"


@pytest.mark.full
def test_projected_images_are_signed(running: Service, signer: SignerFiles) -> None:
    image = encode(np.zeros((16, 16, 3), np.uint8))
    job = running.client.post(
        "/v1/projections?steps=1&start=mean", content=image, headers={"Content-Type": "image/png"}
    ).json()
    finished = running.wait({"links": {"self": f"/v1/projections/{job['id']}"}})
    data = running.client.get(finished["data"][0]["files"]["image"]).content
    assert state(data, signer) == "signed" and b"compositeWithTrainedAlgorithmicMedia" in data


def test_service_without_certificate_refuses_to_sign(tiny_bundle: Bundle, signer: SignerFiles, tmp_path: Path) -> None:
    with service(tiny_bundle.location, tmp_path / "data") as without:
        for path in ("/v1/images", "/v1/datasets"):
            answer = without.client.post(path, json=BODY | {"provenance": {"c2pa": True}})
            assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == "provenance.c2pa"
            assert "DERMIS_C2PA_CERTIFICATE" in answer.json()["detail"]
    with pytest.raises(SettingsError, match="DERMIS_C2PA_CERTIFICATE: "):
        image_signer_of(Settings(c2pa_certificate=signer.authority, c2pa_key=signer.key))
    with pytest.raises(ValueError, match="DERMIS_C2PA_KEY"):
        Settings(c2pa_certificate=signer.certificate)
