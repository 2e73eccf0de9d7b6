"""Tests of the prepared GPU run with tiny sizes on the CPU: order, time limits, files, and allowed imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import pack, train
from benchmarks.gpu.results import Results, read
from dermis.bundle import open_bundle
from dermis.errors import DermisError, TrainingError
from training.data.images import load_images
from training.data.sources import read_source

ROOT = Path(__file__).parents[2]
PLAN = ROOT / "benchmarks/gpu/train-128.toml"
# Packages that a machine with torch alone does not have; the run must not need them.
MISSING = (
    "bentoml",
    "captum",
    "dbos",
    "faiss",
    "fastapi",
    "flwr",
    "openvino",
    "pydantic_settings",
    "torch_fidelity",
    "typer",
)
MAX_FILES, MAX_BYTES = 8, 16 << 20  # maximum number of files that a run leaves, and maximum size of each


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    block = f"import sys\nfor name in {MISSING!r}: sys.modules[name] = None\n"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", block + code, *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=300,
    )  # fmt: skip


def files_of(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.is_file()]


@pytest.mark.full
def test_gpu_parts_run_without_optional_packages(tmp_path: Path) -> None:
    """Three of them, then training, which resumes its own state and makes a bundle of it."""
    plan = tmp_path / "plan.toml"
    plan.write_text('resolution = 128\nsnapshot_seconds = 0\nmoments = "none"\nwarm_up_steps = 3\n[gan]\nbatch = 8\n')
    code = """
from pathlib import Path
import torch
from benchmarks.gpu import measure, train
from benchmarks.gpu.results import Results
out = Path(sys.argv[1])
out.mkdir()
for part in ("machine", "generation", "look-up"):
    measure.PARTS[part](Results(out, part, torch.device("cpu"), tiny=True))
common = ["train", sys.argv[2], "--tiny"]
state = ["--resume", str(out / "state")]
for options in ([], state):
    sys.argv = [*common, "--out", str(out), "--seconds", "1000", "--steps", "4", *options]
    train.main()
sys.argv = [*common, *state, "--bundle", str(out.with_name("run"))]
train.main()
"""
    done = python(code, str(tmp_path / "out"), str(plan))
    assert done.returncode == 0, done.stderr
    lines = read(tmp_path / "out")
    names = [line["name"] for line in lines]
    assert {"generation, 16 px, const noise", "generation, 16 px, random noise", "look-up", "resumed"} <= set(names)
    assert all(line["device"] and line["tiny"] and np.isfinite(line["value"]) for line in lines if "value" in line)
    assert "skipped" in lines[names.index("look-up")]["note"]
    assert "3 steps of warm-up" in lines[names.index("resumed")]["note"]
    first, second = (line["kimg"] for line in lines if line["name"] == "training, steps")
    assert (first, second) == (0.016, 0.032)
    assert open_bundle(tmp_path / "run" / "bundle").generator.img_resolution == 16
    left = files_of(tmp_path / "out")
    assert {path.name for path in left} == {"results.jsonl", "training.jsonl", "grid.webp", "state-0.safetensors"}
    log = [json.loads(line)["nimg"] for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert log == [20, 24, 28, 32], "the second run's own steps"


@pytest.mark.full
def test_cuda_tests_are_collected_without_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins of packages that are missing there
    collect = ["--collect-only", "-m", "cuda", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    done = python("import pytest\nsys.exit(pytest.main(sys.argv[1:]))", *collect)
    assert done.returncode == 0, done.stdout + done.stderr


def test_crashed_or_hung_part_does_not_end_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hang = "import subprocess, time; subprocess.Popen(['sleep', '600']); print('begun', flush=True); time.sleep(600)"
    parts = [
        command.Part("crash", 30, ("-c", "import os; print('no', file=__import__('sys').stderr); os.abort()")),
        command.Part("hang", 2, ("-c", hang)),
        command.Part("good", 30, ("-c", "print('good numbers')")),
    ]
    monkeypatch.setattr(command, "parts_of", lambda _: parts)
    start = time.monotonic()
    assert command.main(["--minutes", "2", "--out", str(tmp_path / "out"), "--tiny"]) == 1
    assert time.monotonic() - start < 60
    lines = {line["part"]: line for line in read(tmp_path / "out")}
    assert lines["crash"]["status"].startswith("failed") and "no" in lines["crash"]["log"]
    assert lines["hang"]["status"] == "stopped after 2 s"
    assert lines["good"]["status"] == "done"
    assert "good numbers" in capfd.readouterr().out


def test_part_without_enough_time_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "parts_of", lambda _: [command.Part("late", 30, ("-c", "pass"))])
    command.main(["--minutes", "0.3", "--out", str(tmp_path / "out"), "--tiny"])
    assert read(tmp_path / "out")[0]["status"].startswith("not started")


def test_numbers_are_compared_with_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path, "part", torch.device("cpu"))
    results.number("share", 0.2, "", at_least=0.3)
    results.number("time", 4.0, "s/kimg", at_most=5.0)
    assert [line["met"] for line in read(tmp_path)] == [False, True]
    assert "target at least 0.3: missed" in capsys.readouterr().out


def test_plans_with_unknown_options_are_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    for text, message in (
        ("resolution = 128\nspeed = 3\n", "speed"),
        ("resolution = \n", "plan.toml"),
        ('resolution = 128\nmoments = "some"\n', "moments"),
    ):
        plan.write_text(text)
        with pytest.raises(TrainingError, match=message):
            train.read_plan(plan)
    plan.write_text("resolution = 128\n[gan]\nspeed = 3\n")
    with pytest.raises(TrainingError, match="speed"):
        train.config_of(train.read_plan(plan), train.load_data(None, 16, True), torch.device("cpu"), True)
    for name in ("train-128.toml", "train-256.toml"):
        prepared = train.read_plan(PLAN.with_name(name))
        config = train.config_of(prepared, train.load_data(None, 16, True), torch.device("cpu"), False)
        assert config.projected and str(config.resolution) in name


def test_pack_is_divided_into_limited_folders_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "images").mkdir(parents=True)
    rows = ["isic_id,target"]
    for i in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        coarse.save(tmp_path / "data" / "images" / f"ISIC_{i}.png")
        rows.append(f"ISIC_{i},{'malignant' if i % 3 == 0 else 'benign'}")
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "train.csv").write_text("\n".join(rows[:10]) + "\n")
    (tmp_path / "held-out.csv").write_text("\n".join(rows[:1] + rows[10:]) + "\n")
    monkeypatch.setattr(pack, "tracked_bytes", lambda: 1000)
    options = ["--data", "data", "--train", "train.csv", "--held-out", "held-out.csv", "--size", "64", "--no-wheels"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pack", *options, "--limit", "2.01"])
    pack.main()
    folders = sorted(path for path in Path("gpu-pack").iterdir())
    assert len(folders) > 1
    for folder in folders:
        assert sum(path.stat().st_size for path in files_of(folder)) + 1000 <= 2.01 * 2**20
        subprocess.run(
            ["sh", str(folder / "setup.sh"), "there"], check=True, env=os.environ | {"PATH": path_with_python(tmp_path)}
        )
    dataset = load_images(read_source(Path("there/train")), 64, progress=False)
    original = load_images(read_source(Path("data"), metadata=Path("train.csv")), 64, progress=False)
    assert dataset.ids == original.ids and dataset.class_names == original.class_names
    assert (dataset.labels == original.labels).all()
    assert pack.psnr(original.images, dataset.images) > 35
    assert len(read_source(Path("there/held-out")).records) == 3
    monkeypatch.setattr(sys, "argv", ["pack", *options, "--limit", "2"])
    with pytest.raises(DermisError, match="--limit"):
        pack.main()


def path_with_python(folder: Path) -> str:
    """A PATH whose python3 is this one."""
    binary = folder / "bin"
    binary.mkdir(exist_ok=True)
    if not (binary / "python3").exists():
        (binary / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (binary / "python3").chmod(0o755)
    return f"{binary}:{os.environ['PATH']}"


@pytest.mark.full
def test_gpu_run_command_completes_on_cpu_and_resumes(tmp_path: Path) -> None:
    """All parts with tiny sizes, and again with the state of the first run."""
    sizes = ["--minutes", "8", "--tests", "--benchmarks", "--train", str(PLAN), "--train-share", "0.05", "--tiny"]
    short = ["--minutes", "1", "--train", str(PLAN), "--tiny", "--resume", str(tmp_path / "first" / "state")]
    for name, options in (("first", sizes), ("second", short)):
        out = tmp_path / name
        start = time.monotonic()
        done = python(
            "from benchmarks.gpu.__main__ import main\nsys.exit(main(sys.argv[1:]))", "--out", str(out), *options
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert time.monotonic() - start < 60 * float(options[1]) + 20
        left = files_of(out)
        assert len(left) <= MAX_FILES and max(path.stat().st_size for path in left) <= MAX_BYTES
        assert all(len(path.relative_to(out).parts) <= 2 for path in left)
        lines = read(out)
        assert [line for line in lines if "status" in line and line["status"] != "done"] == []
    assert any(line.get("name") == "resumed" for line in lines)
