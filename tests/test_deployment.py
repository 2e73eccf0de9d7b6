"""What deployment files and documents say of versions and settings is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.settings import Settings, SettingsError, read_settings, settings_table

ROOT = Path(__file__).resolve().parents[1]


def packages(file: str) -> set[str]:
    return set(re.findall(r"^    - ([A-Za-z][^\s#]*)$", (ROOT / file).read_text(), re.MULTILINE))


def test_the_bentos_pin_what_is_tested_and_differ_in_their_variant_only() -> None:
    constraints = {line.lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    gpu, cpu = packages("bentofile.yaml"), packages("bentofile.cpu.yaml")
    for pin in gpu | cpu:
        if "==" in pin:
            assert re.sub(r"\[.*\]", "", pin).lower() in constraints
    assert {re.split(r"[=>\[]", pin)[0] for pin in gpu - cpu} == {"faiss-gpu", "onnxruntime-gpu"}
    assert {re.split(r"[=>\[]", pin)[0] for pin in cpu - gpu} == {"faiss-cpu", "onnxruntime", "openvino"}


def test_deployment_files_name_settings_that_exist() -> None:
    known = {f"DERMIS_{name.upper()}" for name in Settings.model_fields}
    for file in ("bentofile.yaml", "bentofile.cpu.yaml", "k8s/dermis.yaml", "docs/deployment.md", "docs/api.md"):
        assert set(re.findall(r"DERMIS_[A-Z_]+", (ROOT / file).read_text())) <= known


def test_the_documented_settings_are_the_settings() -> None:
    assert settings_table() in (ROOT / "docs/deployment.md").read_text()


def test_a_setting_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMIS_MAX_IMAGES", "many")
    with pytest.raises(SettingsError, match="DERMIS_MAX_IMAGES"):
        read_settings()


def test_lists_are_split_and_postgres_gets_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMIS_BUNDLES", "a, s3://b/c")
    monkeypatch.setenv("DERMIS_DATABASE_URL", "postgres://user@host/jobs")
    settings = read_settings()
    assert settings.bundles == ("a", "s3://b/c")
    assert settings.jobs_url == "postgresql+psycopg://user@host/jobs"
