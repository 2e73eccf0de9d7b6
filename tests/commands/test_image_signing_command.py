"""Tests of signed images in `dermis generate` and `dermis verify --provenance`."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import dermis_client
import pytest

from benchmarks.signers import SignerFiles, make_signer
from dermis.bundle import Bundle
from painter import Painter

pytest.importorskip("c2pa", reason="c2pa-python is not installed")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SignerFiles]:
    folder = tmp_path_factory.mktemp("signers")
    return {name: make_signer(folder / name, name) for name in ("Clinic", "Other")}


@pytest.mark.full
@pytest.mark.parametrize(
    ("file_format", "image_format"),
    [
        ("imagefolder", "png"),
        pytest.param("webdataset", "jpeg", marks=pytest.mark.full),
        pytest.param("parquet", "webp", marks=pytest.mark.full),
    ],
)
def test_signed_dataset_has_the_hashes_of_the_unsigned_one(
    run: Run,
    painter: type[Painter],
    tiny_bundle: Bundle,
    signers: dict[str, SignerFiles],
    tmp_path: Path,
    file_format: str,
    image_format: str,
) -> None:
    plain, signed, again = (tmp_path / name for name in ("plain", "signed", "again"))
    clinic = signers["Clinic"]
    keys = ("--c2pa-certificate", clinic.certificate, "--c2pa-key", clinic.key)
    asked = ("generate", "--bundle", tiny_bundle.location, "--classes", "benign=5,malignant=4", "--shard-size", 4)
    asked += ("--format", file_format, "--image-format", image_format)
    assert run(*asked, *keys, "--no-c2pa", "--out", plain)[0] == 0
    assert run(*asked, *keys, "--out", signed)[0] == 0
    assert (plain / "metadata.csv").read_bytes() == (signed / "metadata.csv").read_bytes()
    status, verified, _ = run("verify", signed)
    assert status == 0 and dermis_client.verify(signed).ok and dermis_client.verify(plain).ok
    status, out, _ = run("verify", "--provenance", signed, "--trusted", clinic.authority)
    assert status == 0 and "10 images: 10 signed; signers: Clinic, Test" in out
    assert run("verify", "--provenance", signed, "--trusted", signers["Other"].authority)[0] == 1
    (signed / "images").mkdir()
    (signed / "images" / "x.png").write_bytes((plain / "preview.png").read_bytes())  # not listed by the manifest
    status, out, _ = run("verify", "--provenance", signed, "--trusted", clinic.authority)
    assert status == 1 and "images/x.png: unsigned" in out and "10 signed, 1 unsigned" in out
    shutil.rmtree(signed / "images")
    status, out, _ = run("verify", "--provenance", plain)
    assert status == 0 and "10 unsigned" in out
    status, out, err = run(
        "generate", "--manifest", signed / "manifest.json", "--bundle", tiny_bundle.location, "--out", again
    )
    assert status == 1 and "--c2pa-certificate" in err and not again.exists()
    repeat = ("generate", "--manifest", signed / "manifest.json", "--bundle", tiny_bundle.location, *keys)
    assert "byte for byte, but for the signatures of images" in run(*repeat, "--out", again)[1]
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (signed, again)]
    containers = {path.name for path in signed.iterdir() if path.name.startswith(("images.zip", "data-"))}
    for manifest in manifests:  # the digest as the documentation says, without dermis
        canonical = manifest.pop("canonical")
        assert canonical["files"].keys() == {*containers, "preview.png", "croissant.json"}
        for entry in manifest["files"]:
            if entry["name"] in canonical["files"]:
                entry |= {"bytes": 0, "sha256": canonical["files"][entry["name"]]}
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        assert canonical["digest"] == hashlib.sha256(text.encode()).hexdigest()
    assert f"digest without the signatures of images {canonical['digest']}" in verified
    assert manifests[0] == manifests[1]
    assert (signed / "manifest.json").read_bytes() != (again / "manifest.json").read_bytes()
    if file_format != "imagefolder":  # names and hashes of all images, in order
        with (signed / "metadata.csv").open(newline="") as table:
            lines = [f"{row['sha256']}  {row['file_name']}\n" for row in csv.DictReader(table)]
        assert canonical["files"][min(containers)] == hashlib.sha256("".join(lines[:4]).encode()).hexdigest()
    assert "canonical" not in json.loads((plain / "manifest.json").read_text())
    false = json.loads((again / "manifest.json").read_text())
    false["canonical"]["files"]["preview.png"] = "0" * 64
    (again / "manifest.json").write_text(json.dumps(false))
    status, out, _ = run("verify", again)
    assert status == 1 and out.splitlines() == ["changed manifest.json", "changed preview.png"]
    if file_format == "imagefolder":
        archive = signed / "images.zip"
        assert run("verify", archive)[0] == 0 and dermis_client.verify(archive).ok
        status, out, _ = run("verify", "--provenance", archive, "--trusted", clinic.authority)
        assert out.startswith(f"{archive}: 9 images: 9 signed")
        altered = tmp_path / "altered.zip"
        with zipfile.ZipFile(archive) as source, zipfile.ZipFile(altered, "w") as target:
            for number, name in enumerate(source.namelist()):
                data = source.read(name)
                target.writestr(name, data.replace(b'seed="0"', b'seed="1"') if number == 0 else data)
        assert run("verify", altered)[0] == 1 and not dermis_client.verify(altered).ok
        status, out, _ = run("verify", "--provenance", altered, "--trusted", clinic.authority)
        assert status == 1 and "SYN_00000000.png: tampered" in out and "8 signed, 1 tampered" in out


def test_parts_that_two_processes_sign_make_the_dataset_of_one(
    run: Run, painter: type[Painter], tiny_bundle: Bundle, signers: dict[str, SignerFiles], tmp_path: Path
) -> None:
    """Of each shard the file that was written last stays, whichever description was written last."""
    clinic, other = (
        ("--c2pa-certificate", signers[name].certificate, "--c2pa-key", signers[name].key)
        for name in ("Clinic", "Other")
    )
    asked = ("generate", "--bundle", tiny_bundle.location, "--classes", "benign=5,malignant=4", "--shard-size", 4)
    asked += ("--format", "webdataset", "--out")
    one, parts, late = (tmp_path / name for name in ("one", "parts", "late"))
    assert run(*asked, one, *clinic)[0] == 0
    for folder, keys in ((parts, clinic), (late, other)):
        assert run(*asked, folder, *keys, "--shards", "0/2")[0] == 0
    first, second = sorted(path.name for path in late.glob("*.tar"))
    shutil.copy(late / first, parts / first)  # the other process was killed before it wrote its description
    shutil.copytree(late, parts, dirs_exist_ok=True, ignore=lambda *_: [first, *(_names(late, "shard-00000-*"))])
    assert (parts / second).read_bytes() == (late / second).read_bytes() and len(_names(parts, "shard-00002-*")) == 2
    assert run(*asked, parts, *clinic, "--shards", "1/2")[0] == 0
    status, _, err = run(*asked, parts, *clinic, "--finalize")
    assert status == 2 and "shard 0 of 3 is damaged" in err
    assert run(*asked, parts, *clinic, "--shards", "0/2")[0] == 0
    assert run(*asked, parts, *clinic, "--finalize")[0] == 0 and not (parts / ".partial").exists()
    digests = [run("verify", folder)[1].split()[-1] for folder in (one, parts)]
    assert digests[0] == digests[1] and len(digests[0]) == 64
    status, out, _ = run("verify", "--provenance", parts)
    assert status == 0 and "10 images: 10 unknown signer; signers: Clinic, Test, Other, Test" in out


def _names(folder: Path, pattern: str) -> list[str]:
    return [path.name for path in folder.rglob(pattern)]


def test_wrong_options_of_signing_are_named(
    run: Run, tiny_bundle: Bundle, signers: dict[str, SignerFiles], tmp_path: Path
) -> None:
    asked = ("generate", "--bundle", tiny_bundle.location, "--classes", "benign=1", "--out", tmp_path / "d")
    clinic = signers["Clinic"]
    assert "give --c2pa-certificate and --c2pa-key" in run(*asked, "--c2pa")[2]
    assert "give both" in run(*asked, "--c2pa-key", clinic.key)[2]
    assert "has no PNG" in run("verify", "--provenance", tmp_path)[2]
    assert "is no file" in run("verify", "--provenance", tmp_path / "missing")[2]
