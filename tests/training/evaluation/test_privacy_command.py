"""Tests of `dermis privacy` on a tiny bundle and tiny folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

import dermis.features
from commands.main import app
from dermis.bundle import amend_bundle, open_bundle
from dermis.dataset.reading import read_samples
from dermis.dataset.verify import verify
from dermis.errors import BundleError, DataError, DermisError, RequestError, StorageError
from dermis.features import FeatureExtractor
from dermis.privacy.audit import Evidence, PrivacyAudit, Subject, _training_set
from dermis.synthesizer import Synthesizer
from tiny import make_bundle
from training.data.isic import load_isic

LABELS = [0] * 50 + [1] * 30


def _quarters(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Means over the 16 squares of an image: a feature space of 48 dimensions."""
    n, side = len(images), images.shape[1] // 4
    return images.reshape(n, 4, side, 4, side, 3).mean(axis=(2, 4)).reshape(n, 48).astype(np.float32)


def _extremes(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Largest values in the 16 squares of an image."""
    n, side = len(images), images.shape[1] // 4
    return images.reshape(n, 4, side, 4, side, 3).max(axis=(2, 4)).reshape(n, 48).astype(np.float32)


def _folder(
    out: Path, images: NDArray[np.uint8], labels: Sequence[int], first: int = 0, patients: int | None = None
) -> Path:
    """An ISIC-layout folder; `patients` is the number of the first patient."""
    out.mkdir()
    rows = ["isic_id,target,patient_id,sex"]
    for i, (image, label) in enumerate(zip(images, labels, strict=True), start=first):
        Image.fromarray(image).save(out / f"ISIC_{i:07d}.png")
        patient = "" if patients is None else f"anna{patients + (i - first) // 2}"
        rows.append(f"ISIC_{i:07d},{('benign', 'malignant')[label]},{patient},{('female', 'male')[i % 3 == 0]}")
    (out / "metadata.csv").write_text("\n".join(rows) + "\n")
    return out


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """A bundle, members and non-members: samples of two halves of the indices of a seed that is not audited."""
    for name, extract in (("quarters", _quarters), ("extremes", _extremes)):
        space = FeatureExtractor(name, f"{name}/1", 48, extract, None)
        monkeypatch.setitem(dermis.features.EXTRACTORS, name, lambda device, space=space: space)
    bundle = make_bundle(tmp_path / "bundle")
    with Synthesizer(bundle, device="cpu") as synthesizer:
        images = synthesizer.images([99] * 160, list(range(160)), LABELS * 2)
    return (
        tmp_path / "bundle",
        _folder(tmp_path / "members", images[:80], LABELS, patients=0),
        _folder(tmp_path / "others", images[80:], LABELS, first=500, patients=100),
    )


def _run(folders: tuple[Path, Path, Path], out: Path, *arguments: object) -> str:
    bundle, members, others = folders
    common = ("--bundle", bundle, "--members", members, "--non-members", others, "--device", "cpu", "--out", out)
    spaces = ("--extractor", "quarters", "--extractor", "extremes", "--cache", out.parent / "cache")
    result = CliRunner().invoke(app, ["privacy", "audit", *map(str, (*common, *spaces, *arguments))])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_audit_of_a_bundle_is_written_attached_and_shown(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    before = open_bundle(folders[0])
    output = _run(folders, tmp_path / "out", "--attach")
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    text = (tmp_path / "out" / "AUDIT.md").read_text()
    statuses = {outcome["rule"]: outcome["status"] for outcome in document["outcomes"]}
    assert statuses["generator-average"] == "not measured", "there is neither an encoder nor a discriminator"
    assert (document["verdict"]["status"], document["verdict"]["complete"]) == ("warn", False)
    assert statuses["training-set"] == "warn" and "does not name its training set" in text
    assert (document["subject"]["member_patients"], document["subject"]["non_member_patients"]) == (40, 40)
    assert {answer["subject"] for answer in document["answers"]} >= {"images", "class", "sex"}
    for leak in ("ISIC_", "anna", str(tmp_path)):
        assert leak not in text + json.dumps(document)

    after = open_bundle(folders[0])
    assert after.privacy_audit == document and document["subject"]["bundle_digest"] == before.digest != after.digest
    assert (
        "## Privacy audit" in after.model_card and "**Verdict: warn.**" in after.model_card and after.digest in output
    )
    shown = CliRunner().invoke(app, ["privacy", "show", str(folders[0])])
    assert shown.exit_code == 0 and shown.output == text
    removed = amend_bundle(after, remove=["privacy_audit"])
    assert removed.privacy_audit is None and removed.model_card == before.model_card
    assert removed.digest == before.digest
    again = tmp_path / "again"
    _run(folders, again)
    assert json.loads((again / "audit.json").read_text()) == document, "the result depends on the seed only"


@pytest.mark.full
@pytest.mark.parametrize("lesions", [False, True])
def test_images_without_a_patient_are_counted_and_warned_of(
    folders: tuple[Path, Path, Path], tmp_path: Path, lesions: bool
) -> None:
    for folder in folders[1:]:
        rows = [line.split(",") for line in (folder / "metadata.csv").read_text().splitlines()]
        for number, row in enumerate(rows):
            row[2] = row[2] if number < 2 else ""
            row.append("lesion_id" if number == 0 else f"{folder.name}{number // 4}" if lesions else "")
        (folder / "metadata.csv").write_text("\n".join(map(",".join, rows)) + "\n")
    _run(folders, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    text = (tmp_path / "out" / "AUDIT.md").read_text()
    outcome = next(outcome for outcome in document["outcomes"] if outcome["rule"] == "patients")
    assert outcome["status"] == "warn"
    assert "79 of 80 members and 79 of 80 held-out images have no patient id" in outcome["finding"]
    count_as = (
        "158 count with the other images of their lesion" if lesions else "158 of these count as patients of their own"
    )
    assert count_as in outcome["finding"] and outcome["finding"] in text
    assert lesions or "80 patients (of which 79 are images without an id)" in text
    counts = {"patient": 79, "patient_and_lesion": 0 if lesions else 79}
    assert document["subject"]["members_without_ids"] == document["subject"]["non_members_without_ids"] == counts
    del document["subject"]["members_without_ids"], document["subject"]["non_members_without_ids"]
    assert PrivacyAudit.from_json(document).subject.members_without_ids is None, "as in earlier audits"


def test_dataset_of_copies_fails(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    images = np.stack([np.array(Image.open(file)) for file in sorted(folders[1].glob("*.png"))])
    changed = np.clip(images.astype(int) + np.random.default_rng(0).integers(-2, 3, images.shape), 0, 255)
    copies = _folder(tmp_path / "copies", changed.astype(np.uint8), LABELS, first=900)
    output = _run(folders, tmp_path / "out", "--dataset", copies)
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    statuses = {outcome["rule"]: outcome["status"] for outcome in document["outcomes"]}
    assert output.startswith("fail:") or "\nfail:" in output
    assert document["subject"]["scope"] == "dataset" and "generator-average" not in statuses
    assert statuses["samples-average"] == "fail" and statuses["power"] == "warn", "80 images cannot show a few copies"


@pytest.mark.full
def test_discriminator_of_a_training_state_is_attacked(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    import torch

    from training.gan.config import auto_config
    from training.gan.state import new_state, save_state

    config = auto_config(16, 2, channel_base=256, channel_max=16, z_dim=16, w_dim=16)
    dataset = load_isic(folders[1], 16, progress=False)
    state = new_state(config, torch.device("cpu"))
    save_state(tmp_path / "checkpoint.safetensors", state, config, dataset)
    _run(folders, tmp_path / "out", "--training-state", tmp_path / "checkpoint.safetensors", "--projection-steps", 1)
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    attacks = {attack["attack"]: attack for attack in document["attacks"]}
    assert {"discriminator", "optimised projection"} <= attacks.keys()
    assert attacks["discriminator"]["access"] == "generator" and 0.3 < attacks["discriminator"]["auc"]["value"] < 0.7
    statuses = {outcome["rule"]: outcome["status"] for outcome in document["outcomes"]}
    assert statuses["generator-average"] == "pass"


def test_unfit_arguments_are_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle, members, _ = folders
    pixels = np.zeros((80, 16, 16, 3), np.uint8) + np.arange(80, dtype=np.uint8)[:, None, None, None]
    shared = _folder(tmp_path / "shared", pixels, LABELS, first=700, patients=39)
    with pytest.raises(DataError, match=r"--non-members: 1 patients or lesions also have images in --members"):
        _run((bundle, members, shared), tmp_path / "out")
    with pytest.raises(DataError, match=r"--non-members: 80 of its images are also in --members"):
        _run((bundle, members, members), tmp_path / "out")
    few = _folder(tmp_path / "few", pixels[:20], LABELS[:20], first=800)
    with pytest.raises(DataError, match="--non-members: 20 images are too few"):
        _run((bundle, members, few), tmp_path / "out")
    for arguments in (("--dataset", few, "--attach"), ("--count", 3), ("--dataset", few, "--count", 60)):
        with pytest.raises(RequestError):
            _run(folders, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
    for option, value in (("--seed", -1), ("--truncation-psi", "nan")):
        with pytest.raises(RequestError) as refused:
            _run(folders, tmp_path / "out", option, value)
        assert refused.value.field == option
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(DermisError, match="nothing: is not a readable checkpoint"),
    ):
        patch.setattr("training.evaluation.privacy._generated", lambda *_: pytest.fail("images were generated first"))
        _run(folders, tmp_path / "out", "--training-state", tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is not a folder"):
        _run(folders, tmp_path / "file")
    with pytest.raises(DermisError, match="has no privacy audit"):
        raise CliRunner().invoke(app, ["privacy", "show", str(bundle)]).exception or AssertionError


def test_bundle_with_a_foreign_audit_opens_and_show_refuses_it(folders: tuple[Path, Path, Path]) -> None:
    opened = open_bundle(folders[0])
    amend_bundle(
        opened,
        privacy_audit={
            "subject": {"members": 1, "non_members": 1, "generated": 1, "bundle_digest": ""},
            "verdict": {"status": "pass", "text": "."},
            "outcomes": [],
        },
    )
    amended = open_bundle(folders[0])
    amended = amend_bundle(amended, name="other")
    assert amended.privacy_audit is not None
    result = CliRunner().invoke(app, ["privacy", "show", str(folders[0])])
    assert isinstance(result.exception, DataError) and "is not a privacy audit" in str(result.exception)
    file = folders[0] / "privacy_audit.json"
    file.write_text("[]")
    with pytest.raises(BundleError, match="differs from what"):
        open_bundle(folders[0])


def _generate(folders: tuple[Path, Path, Path], out: Path, *arguments: object, audited: bool = True) -> str:
    bundle, members, others = folders
    asked = ("--bundle", bundle, "--classes", "benign=35,malignant=25", "--device", "cpu", "--out", out)
    audit = ("--audit-members", members, "--audit-non-members", others, "--audit-extractor", "quarters,extremes")
    result = CliRunner().invoke(app, ["generate", *map(str, (*asked, *(audit if audited else ()), *arguments))])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_dataset_of_another_or_an_unknown_generator_does_not_pass(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    audited: list[tuple[Subject, Evidence]] = []

    def stop(subject: Subject, evidence: Evidence) -> None:
        audited.append((subject, evidence))
        raise DataError("enough")

    monkeypatch.setattr("training.evaluation.privacy.run_audit", stop)
    _generate(folders, tmp_path / "former", audited=False)
    # Another bundle, which names the members as its training set.
    descriptor = json.loads((folders[0] / "bundle.json").read_text())
    descriptor["provenance"]["dataset"] = {"sha256": load_isic(folders[1], 16, progress=False).sha256}
    (folders[0] / "bundle.json").write_text(json.dumps(descriptor))
    _generate(folders, tmp_path / "present", audited=False)
    found = {}
    for name, dataset in (("former", tmp_path / "former"), ("unknown", folders[1]), ("present", tmp_path / "present")):
        with pytest.raises(DataError, match="enough"):
            _run(folders, tmp_path / "out", "--dataset", dataset)
        subject, evidence = audited.pop()
        assert subject.members_are_training_set
        outcome = _training_set(subject)
        found[name] = (outcome.status, subject.dataset_of_bundle)
        assert ("another digest" in outcome.finding + str(evidence.remarks)) == (name == "former")
        assert ("which generator made it" in outcome.finding) == (name == "unknown")
        assert any("which generator made it" in remark for remark in evidence.remarks) == (name == "unknown")
    assert found == {"former": ("warn", False), "unknown": ("warn", None), "present": ("pass", True)}


@pytest.mark.full
@pytest.mark.parametrize("file_format", ["imagefolder", "parquet"])
def test_dataset_is_audited_when_it_is_made(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "dataset"
    with monkeypatch.context() as patch:
        patch.setattr("training.evaluation.privacy.run_audit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            _generate(folders, out, "--format", file_format)
    assert not {"manifest.json", "privacy_audit.json", "AUDIT.md", "report.json"} & {
        file.name for file in out.iterdir()
    }
    output = _generate(folders, out, "--format", file_format)
    assert verify(out).ok and len(list(read_samples(out))) == 60
    document, report = (json.loads((out / name).read_text()) for name in ("privacy_audit.json", "report.json"))
    verdict = document["verdict"]["status"]
    assert f"audit: {verdict}: " in output and document["subject"]["scope"] == "dataset"
    assert (report["audit"]["scope"], report["audit"]["verdict"]) == ("dataset", verdict)
    assert f"Privacy audit of the dataset: {verdict}." in str(report["scorecard"])
    text = "".join(
        (out / name).read_text() for name in ("AUDIT.md", "privacy_audit.json", "report.html", "report.json")
    )
    assert "Privacy audit of the dataset" in text and not any(leak in text for leak in ("ISIC_", "anna", str(tmp_path)))
    _run(folders, tmp_path / "audit", "--dataset", out)
    separate = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert separate["attacks"] == document["attacks"] and separate["disclosures"] == document["disclosures"]

    before = {file.name: file.read_bytes() for file in out.iterdir()}
    _generate(folders, out, "--format", file_format, audited=False)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before, "it is finished"
    (out / "AUDIT.md").write_text("pass")
    with pytest.raises(StorageError, match="was audited; run the whole command with the --audit options"):
        _generate(folders, out, "--format", file_format, audited=False)
    _generate(folders, out, "--format", file_format)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before, "it is repaired"
    again = CliRunner().invoke(
        app,
        ["generate", *map(str, ("--manifest", out / "manifest.json", "--bundle", folders[0], "--out", tmp_path / "b"))],
    )
    assert again.exit_code == 0 and "every file except report and audit is the same" in again.output, again.exception


@pytest.mark.full
def test_audits_of_datasets_that_cannot_be_made_are_refused_first(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle, members, others = folders
    finished = tmp_path / "finished"
    _generate(folders, finished, audited=False)
    with pytest.raises(StorageError, match="finished without an audit; audit it with dermis privacy audit --dataset"):
        _generate(folders, finished)
    assert verify(finished).ok
    out = tmp_path / "dataset"
    monkeypatch.setattr("commands.generate._make", lambda *_: pytest.fail("images were generated first"))
    for arguments, field in (
        (("--audit-members", members), "--audit-non-members"),
        (("--audit-non-members", others), "--audit-non-members"),
        (("--audit-extractor", "quarters"), "--audit-extractor"),
    ):
        with pytest.raises(RequestError) as refused:
            _generate(folders, out, *arguments, audited=False)
        assert refused.value.field == field
    with pytest.raises(RequestError, match="omit it with --only-shard"):
        _generate(folders, out, "--only-shard", 0)
    with pytest.raises(RequestError, match="40 images are too few"):
        _generate(folders, out, "--classes", "benign=40")
    with pytest.raises(DataError, match=r"--audit-non-members: 80 of its images are also in --audit-members"):
        _generate((bundle, members, members), out)
    assert not out.exists()
