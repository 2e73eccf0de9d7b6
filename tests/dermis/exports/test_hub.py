"""Tests of uploads to a hub: exactly the verified files arrive, and the token is nowhere else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dermis.bundle import Bundle, open_bundle
from dermis.dataset.verify import verify
from dermis.errors import RequestError
from dermis.exports.hub import hub_target, push_bundle
from fake_hub import FakeHub, running_hub

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
Run = Callable[..., tuple[int, str, str]]
SECRET = "hf_secret_of_this_test"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the Hub's own storage protocol
    with running_hub(SECRET) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield running


def test_a_dataset_arrives_as_it_is_and_nothing_else(hub: FakeHub, run: Run, painted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(painted, tmp_path / "set")
    (folder / "notes.txt").write_text("private")
    (folder / "dataset.sig").write_text("signature")
    status, out, err = run("push", "dataset", folder, "--to", "hub:clinic/lesions")
    assert (status, SECRET in out + err) == (0, False), err
    assert "/datasets/clinic/lesions/commit/" in out
    assert hub.created == [{"name": "lesions", "organization": "clinic", "visibility": "private", "type": "dataset"}]
    arrived = hub.files["datasets/clinic/lesions"]
    assert arrived == {path.name: path.read_bytes() for path in painted.iterdir()} | {"dataset.sig": b"signature"}
    assert hub.objects and "notes.txt" not in arrived
    for name, data in arrived.items():
        (tmp_path / "downloaded" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(data)
    assert verify(tmp_path / "downloaded").ok
    assert set(hub.tokens.values()) == {f"Bearer {SECRET}"}


def test_a_changed_dataset_and_a_refusal_are_named_without_the_token(
    hub: FakeHub, run: Run, painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(painted, tmp_path / "set")
    (folder / "README.md").write_text("changed")
    status, _, err = run("push", "dataset", folder, "--to", "hub:clinic/lesions")
    assert status == 1 and "README.md differs from manifest.json" in err and not hub.created
    monkeypatch.setenv("HF_TOKEN", "hf_another_secret")
    status, out, err = run("push", "dataset", painted, "--to", "hub:clinic/lesions")
    assert status == 1 and "refuses the upload (status 401" in err and "check that HF_TOKEN has write access" in err
    assert "hf_another_secret" not in out + err and "***" in err and not hub.files


def test_a_bundle_arrives_in_a_folder_that_can_be_opened(
    hub: FakeHub, run: Run, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    status, out, _ = run("push", "bundle", tiny_bundle.location, "--to", "hub:clinic/generator", "--public")
    assert status == 0 and tiny_bundle.digest in out
    assert hub.created[0]["visibility"] == "public"
    arrived = hub.files["models/clinic/generator"]
    assert arrived["README.md"].startswith(b"---\nlicense: cc0-1.0\n") and b"# Tiny" in arrived["README.md"]
    for name, data in arrived.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert open_bundle(tmp_path / "bundle").digest == tiny_bundle.digest


def test_parts_that_identify_training_images_are_not_uploaded_by_accident() -> None:
    bundle: Any = SimpleNamespace(name="demo", authenticity=object(), copies=object())
    with pytest.raises(
        RequestError, match="has authenticity and copies, which tell whether an image is a training image"
    ):
        push_bundle(bundle, hub_target("hub:a/b", {"HF_TOKEN": SECRET}))


@pytest.mark.parametrize(
    ("to", "environment", "message"),
    [
        ("clinic/lesions", {"HF_TOKEN": SECRET}, "must be of the form hub:ORG/NAME"),
        ("hub:clinic/../lesions", {"HF_TOKEN": SECRET}, "must be of the form hub:ORG/NAME"),
        ("hub:clinic/lesions", {}, "HF_TOKEN: is not set"),
        ("hub:clinic/lesions", {"HF_TOKEN": SECRET, "HF_ENDPOINT": "http://example.org"}, "must begin with https"),
        (
            "hub:clinic/lesions",
            {
                "HF_TOKEN": SECRET,
                "HF_ENDPOINT": "http://127.0.0.1:9",
                "HTTP_PROXY": "http://proxy",
                "NO_PROXY": "other",
            },
            r"HTTP_PROXY: would send the token .*; set NO_PROXY=127\.0\.0\.1",
        ),
        (
            "hub:clinic/lesions",
            {"HF_TOKEN": SECRET, "HF_ENDPOINT": "https://me:pass@example.org"},
            "without credentials",
        ),
    ],
)
def test_targets_that_cannot_be_used_are_refused(to: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        hub_target(to, environment)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(hub_target("hub:a/b", {"HF_TOKEN": SECRET}))
    local = {"HF_TOKEN": SECRET, "HF_ENDPOINT": "http://127.0.0.1:9", "HTTP_PROXY": "x", "NO_PROXY": "a, 127.0.0.1"}
    assert hub_target("hub:a/b", local).endpoint == "http://127.0.0.1:9"
