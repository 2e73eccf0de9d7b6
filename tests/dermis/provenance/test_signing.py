"""Tests of signatures: made and verified by dermis and by model_signing, refused if unsigned, foreign or altered."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks.signers import SignerFiles, make_signer
from dermis.bundle import SIGNATURE, Bundle, amend_bundle, open_bundle
from dermis.errors import BundleError, SignatureError
from dermis.provenance.signing import read_signers
from painted_dataset import make
from services.models import ServedModels, check_signer, signers_of
from services.settings import Settings, SettingsError

signing = pytest.importorskip("model_signing.signing", reason="model-signing is not installed")
verifying = pytest.importorskip("model_signing.verifying")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> SignerFiles:
    return make_signer(tmp_path_factory.mktemp("signers") / "clinic")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> SignerFiles:
    return make_signer(tmp_path_factory.mktemp("signers") / "other", "Other")


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.location, tmp_path / "bundle"))


def test_signature_of_a_bundle_is_one_of_model_signing(
    run: Run, tiny_bundle: Bundle, bundle: Path, signer: SignerFiles
) -> None:
    assert run("bundle", "sign", bundle, "--key", signer.key)[0] == 0
    signature = bundle / SIGNATURE
    verifying.Config().use_elliptic_key_verifier(public_key=signer.public_key).verify(bundle, signature)
    (bundle / "MODEL_CARD.md").write_text("changed")
    with pytest.raises(ValueError, match="MODEL_CARD"):
        verifying.Config().use_elliptic_key_verifier(public_key=signer.public_key).verify(bundle, signature)
    (bundle / "MODEL_CARD.md").write_text(open_bundle(tiny_bundle.location).model_card)
    status, out, _ = run("bundle", "verify", bundle, "--trusted", signer.public_key)
    assert status == 0 and "signed by the key" in out
    signature.unlink()
    signing.Config().use_elliptic_key_signer(private_key=signer.key).sign(bundle, signature)
    assert run("bundle", "verify", bundle, "--trusted", signer.public_key)[0] == 0


def test_services_serve_only_bundles_of_a_trusted_signer(
    run: Run, bundle: Path, signer: SignerFiles, other: SignerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted = signers_of(Settings(trusted_signers=(signer.public_key, signer.authority)))
    assert "is not signed" in problem(bundle, trusted)
    assert run("bundle", "sign", bundle, "--key", other.key)[0] == 0
    assert "is signed by the key" in problem(bundle, trusted) and "not a trusted signer" in problem(bundle, trusted)
    assert run("bundle", "sign", bundle, "--key", other.key, "--certificate", other.certificate)[0] == 0
    assert "is signed by CN=Other,O=Test, which is not a trusted signer" in problem(bundle, trusted)
    for options in ((), ("--certificate", signer.certificate)):
        assert run("bundle", "sign", bundle, "--key", signer.key, *options)[0] == 0
        models = ServedModels([str(bundle)], signers=trusted)
        assert [each.name for each in models.bundles] == ["tiny"] and not models.check()
    monkeypatch.setattr("services.models._CHECK_SECONDS", 0.0)
    good = (bundle / SIGNATURE).read_bytes()
    (bundle / SIGNATURE).unlink()
    assert "is not signed" in models.check()["tiny"]
    (bundle / SIGNATURE).write_bytes(good)
    assert not models.check()
    (bundle / SIGNATURE).unlink()
    check_signer(open_bundle(bundle), None)


def test_altered_bundles_and_signatures_are_refused(run: Run, bundle: Path, signer: SignerFiles) -> None:
    trusted = read_signers([signer.public_key, signer.authority])
    for options in ((), ("--certificate", signer.certificate)):
        assert run("bundle", "sign", bundle, "--key", signer.key, *options)[0] == 0
        signature = (bundle / SIGNATURE).read_bytes()
        opened = open_bundle(bundle)
        amended = amend_bundle(opened, metrics={"fd": len(options)})  # a new, unsigned bundle with correct hashes
        assert not (bundle / SIGNATURE).exists()
        (bundle / SIGNATURE).write_bytes(signature)
        assert "differs from what" in problem(bundle, trusted) and "bundle.json" in problem(bundle, trusted)
        assert amended.digest == open_bundle(bundle).digest != opened.digest
        document = json.loads(signature)
        envelope = document["dsseEnvelope"]
        for field, value in (("payload", envelope["payload"][:-8] + "AAAAAAA="), ("signatures", [{"sig": "AAAA"}])):
            changed = json.dumps(document | {"dsseEnvelope": envelope | {field: value}})
            (bundle / SIGNATURE).write_text(changed)
            assert "its signature" in problem(bundle, trusted)
    for text in ("", "{}", "[" * 100_000, '{"verificationMaterial": {"publicKey": {"hint": null}}}'):
        (bundle / SIGNATURE).write_text(text)
        assert SIGNATURE not in problem(bundle, trusted)


def test_bundle_that_is_replaced_while_it_is_checked_is_refused(
    run: Run, bundle: Path, signer: SignerFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage gives the signed bundle at every read but those of opening it, and then one that nobody signed."""
    from services.inference import base

    trusted = read_signers([signer.public_key])
    assert run("bundle", "sign", bundle, "--key", signer.key)[0] == 0
    signed, unsigned = (Path(shutil.copytree(bundle, tmp_path / name)) for name in ("signed", "unsigned"))
    amend_bundle(open_bundle(unsigned), metrics={"fd": 1})

    def served(source: Path) -> None:
        shutil.rmtree(bundle)
        shutil.copytree(source, bundle)

    def open_replaced(location: str) -> Bundle:
        served(unsigned)
        opened = open_bundle(location)
        served(signed)
        return opened

    monkeypatch.setattr("services.models.open_bundle", open_replaced)
    monkeypatch.setattr(base, "open_bundle", open_replaced)
    text = problem(bundle, trusted)
    assert "differs from what" in text and "bundle.json" in text

    class Service(base.InferenceService[str]):
        logger = logging.getLogger("test")
        failure = "model not loaded"
        loaded: ClassVar[list[Bundle | str]] = []

        def load(self, source: Bundle | str) -> tuple[str, str]:
            self.loaded.append(source)
            return "", ""

    for name in ("exit_with_parent", "restrict_new_files"):
        monkeypatch.setattr(base, name, lambda: None)
    monkeypatch.setattr(base.logs, "configure", lambda *_: None)
    monkeypatch.setattr(base, "locate", lambda _: [str(bundle)])
    monkeypatch.setattr(base, "signers_of", lambda _: trusted)
    (text,) = asyncio.run(Service.describe.func(Service()))["problems"]  # type: ignore[attr-defined]
    assert "differs from what" in text and Service.loaded == []
    monkeypatch.setattr(base, "open_bundle", open_bundle)
    assert not asyncio.run(Service.describe.func(Service()))["problems"]  # type: ignore[attr-defined]
    assert Service.loaded == [open_bundle(bundle)]  # the object whose hashes were signed, not its location


def problem(bundle: Path, trusted: object) -> str:
    """The one line with which a service refuses a bundle."""
    (text,) = ServedModels([str(bundle)], signers=trusted).check().values()  # type: ignore[arg-type]
    assert "\n" not in text and str(bundle.parent) not in text
    return text


def test_bundle_with_other_unlisted_files_is_still_refused(bundle: Path) -> None:
    (bundle / "nested.sig").write_text("")
    with pytest.raises(BundleError, match=r"nested\.sig"):
        open_bundle(bundle)


def test_signed_dataset_is_verified_and_refused_after_a_change(
    run: Run, tiny_bundle: Bundle, signer: SignerFiles, other: SignerFiles, tmp_path: Path
) -> None:
    folder = tmp_path / "d"
    make(folder, tiny_bundle)
    status, _, err = run("verify", folder, "--trusted", signer.public_key)
    assert status == 1 and err == f"error: {folder}: is not signed\n"
    assert run("sign", folder, "--key", signer.key, "--certificate", signer.certificate)[0] == 0
    status, out, err = run("verify", folder, "--trusted", signer.authority)
    assert (status, err) == (0, "") and out.endswith("all hashes match, signed by CN=Clinic,O=Test\n")
    signature = folder / "dataset.sig"
    authorities = [signer.authority]
    verifying.Config().use_certificate_verifier(certificate_chain=authorities).verify(folder, signature)
    assert "not a trusted signer" in run("verify", folder, "--trusted", other.authority)[2]
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"device": "test"', '"device": "best"'))
    assert run("verify", folder)[0] == 0  # consistent, but not what was signed
    assert (
        "differs from what CN=Clinic,O=Test signed: manifest.json"
        in run("verify", folder, "--trusted", signer.authority)[2]
    )
    (folder / "metadata.csv").write_text("changed")
    assert "is not as its manifest" in run("sign", folder, "--key", signer.key)[2]


def test_unusable_keys_are_named(
    run: Run, bundle: Path, signer: SignerFiles, other: SignerFiles, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.pem"
    for content in (b"", signer.key.read_bytes(), b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        wrong.write_bytes(content)
        with pytest.raises(SettingsError, match="DERMIS_TRUSTED_SIGNERS: "):
            signers_of(Settings(trusted_signers=(wrong,)))
    with pytest.raises(SignatureError, match="cannot be read"):
        read_signers([tmp_path / "missing.pem"])
    status, _, err = run("bundle", "sign", bundle, "--key", other.key, "--certificate", signer.certificate)
    assert status == 1 and "does not match" in err and not (bundle / SIGNATURE).exists()
    assert run("bundle", "sign", bundle, "--key", signer.public_key)[0] == 1
    encrypted = tmp_path / "encrypted.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", signer.key, "-aes256", "-passout", "pass:x", "-out", encrypted], check=True
    )
    assert "is encrypted" in run("bundle", "sign", bundle, "--key", encrypted)[2]
