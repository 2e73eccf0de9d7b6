"""Tests that every file of examples/ runs: the clients against a service in this process, the others on tiny images."""

from __future__ import annotations

import hashlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.components import free_port
from dermis.bundle import amend_bundle, open_bundle
from dermis.bundle.directions import Direction
from dermis.directions.fit import oriented
from launched_service import Launched
from official_pickles import _official_names, save, snapshot  # noqa: F401  a fixture that gives pickles official names
from service_kit import assemble, listening
from tiny import make_bundle
from tiny_classifier import make_classifier

EXAMPLES = Path(__file__).parents[1] / "examples"
CLIENTS = (
    "sdk_sync",
    "sdk_async",
    "torch_dataloader",
    "train_on_stream",
    "huggingface_dataset",
    "classify_with_heat_map",
    "edit_direction",
)
OFFLINE = ("train_generator", "federate_two_sites", "import_official_pickle")

Run = Callable[..., str]


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run an example as a script in an empty folder and return what it printed on stdout."""
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def _add_direction(bundle: Path, classifier_folder: Path) -> None:
    direction = Direction("axis", oriented(np.eye(16, dtype=np.float32)[0]), (0, 6), 1.0, "sefa")
    amend_bundle(open_bundle(bundle), parts={"classifier": classifier_folder}, directions=[direction])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("service")
    make_bundle(root / "tiny")
    make_classifier(root / "classifier")
    _add_direction(root / "tiny", root / "classifier")
    with listening(assemble(root / "tiny", root / "data", default_model="tiny")) as address:
        yield address


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*CLIENTS, *OFFLINE}


@pytest.mark.parametrize("name", [*CLIENTS, *OFFLINE])
def test_example_help_shows_its_command_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert exit_info.value.code == 0
    assert f"python examples/{name}.py" in capsys.readouterr().out


def test_sdk_sync_generates_and_verifies_a_dataset(run: Run, url: str, tmp_path: Path) -> None:
    text = run("sdk_sync", "--url", url, "--out", "lesions", "--count", "3")
    assert "6 images in lesions" in text and "every file is intact" in text
    assert len(list((tmp_path / "lesions" / "images").rglob("*.png"))) == 6
    assert Image.open(tmp_path / "lesions-grid.png").width > 16


def test_sdk_async_generates_different_datasets(run: Run, url: str, tmp_path: Path) -> None:
    text = run("sdk_async", "--url", url, "--out", "set", "--count", "2")
    assert "4 images in set-1" in text and "4 images in set-2" in text
    digests = [
        {hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / folder / "images").rglob("*.png")}
        for folder in ("set-1", "set-2")
    ]
    assert len(digests[0]) == 4 and not digests[0] & digests[1]


def test_torch_dataloader_yields_images_and_labels(run: Run, url: str) -> None:
    text = run("torch_dataloader", "--url", url, "--count", "3", "--batch-size", "4")
    assert "images (4, 3, 16, 16)" in text and "images (2, 3, 16, 16)" in text
    labels = [int(label) for line in text.splitlines() for label in line.split("labels ")[1].strip("[]").split(",")]
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]
    assert len(run("torch_dataloader", "--url", "http://127.0.0.1:9").splitlines()) == 1, "the folder is read again"


def test_classifier_is_trained_on_a_stream(run: Run, url: str, tmp_path: Path) -> None:
    options = ("--samples", "40", "--epochs", "1", "--batch-size", "8", "--workers", "0")
    text = run("train_on_stream", "--url", url, *options)
    assert "epoch 0, step 0: loss" in text and "of 40 new generated images" in text
    saved = torch.load(tmp_path / "classifier.pt", weights_only=True)
    assert saved["classes"] == ["benign", "malignant"] and saved["weights"]


def test_huggingface_dataset_has_typed_columns(
    run: Run, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = run("huggingface_dataset", "--url", url, "--count", "3")
    assert "ClassLabel(names=['benign', 'malignant'])" in text
    assert "6 images; the first is (16, 16) px" in text
    assert "3 images are malignant" in text


def test_classify_with_heat_map_saves_a_picture_for_each_image(run: Run, url: str, tmp_path: Path) -> None:
    text = run("classify_with_heat_map", "--url", url)
    assert "malignant with probability 0." in text and "Not a medical device" in text
    (generated,) = (tmp_path / "heat-maps").glob("malignant_3_*.png")
    heat_maps = set((tmp_path / "heat-maps").glob("*.png")) - {generated}
    assert len(heat_maps) == 1
    text = run("classify_with_heat_map", str(generated), "--url", url, "--out", "again")
    assert len(list((tmp_path / "again").iterdir())) == 1


def test_edit_direction_saves_a_strip(run: Run, url: str, tmp_path: Path) -> None:
    text = run("edit_direction", "--url", url, "--strengths", "-2", "0", "2")
    assert "axis: found by sefa, layers 0 to 5" in text and "2 samples at 3 strengths of axis" in text
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape[:2] == (2 * 16 + 2, 3 * 16 + 2 * 2)
    assert (strip[:16, :16] != strip[:16, 36:52]).any(), "the strengths -2 and 2 give different images"


@pytest.mark.full
def test_train_generator_reads_what_sdk_sync_downloads(run: Run, url: str, tmp_path: Path) -> None:
    run("sdk_sync", "--url", url, "--count", "6")
    text = run("train_generator", "--resolution", "8", "--kimg", "0.032", "--channels", "8")
    assert "runs/example/bundle: example@" in text
    assert open_bundle(tmp_path / "runs" / "example" / "bundle").class_names == ("benign", "malignant")
    assert Image.open(tmp_path / "runs" / "example" / "generated.png").width > 8 * 8


@pytest.mark.full
def test_federate_two_sites_reads_what_sdk_async_downloads(run: Run, url: str) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed")
    run("sdk_async", "--url", url, "--count", "8")
    text = run("federate_two_sites", "--rounds", "2", "--iterations", "2", "--resolution", "8")
    assert "round 2: 2 sites" in text
    assert "runs/federation/bundle: federation@" in text


def test_import_official_pickle_writes_a_bundle(run: Run, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, snapshot())
    text = run(
        "import_official_pickle", str(checkpoint), "mine", "--classes", "benign", "malignant", "--preview", "sheet.png"
    )
    assert "mine: imported@" in text and "classes benign, malignant" in text
    bundle = open_bundle(tmp_path / "mine")
    assert bundle.provenance["source"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert bundle.discriminator is not None
    assert Image.open(tmp_path / "sheet.png").width > 4 * 16


@pytest.mark.full
def test_examples_run_as_programs_against_a_real_service(
    launch: Callable[..., Launched],
    timm_classifier: Path,
    tmp_path: Path,
) -> None:
    make_bundle(tmp_path / "tiny")
    _add_direction(tmp_path / "tiny", timm_classifier)
    port = free_port()
    service = launch(str(tmp_path / "tiny"), port)
    service.wait_until(service.ready)
    paths = (EXAMPLES.parent, EXAMPLES.parent / "clients" / "python" / "src")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    for name in ("sdk_sync", "edit_direction", "classify_with_heat_map"):
        command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--url", f"http://127.0.0.1:{port}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}\n{service.log.read_text()}"
    assert len(list((tmp_path / "lesions" / "images").rglob("*.png"))) == 100
    assert len(list((tmp_path / "heat-maps").iterdir())) == 2
