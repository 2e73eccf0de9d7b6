"""Tests of the package in a new environment, with the newest and the lowest versions that its ranges allow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_gateway import FakeGateway

SOURCE = Path(__file__).parent.parent
UV = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)

# command line, exit status, text on stdout, text on stderr
SESSION: list[tuple[list[str], int, str, str]] = [
    (["--version"], 0, "0.", ""),
    (["--help"], 0, "datasets", ""),
    (["datasets", "create", "--help"], 0, "--min-probability", ""),
    (["models"], 0, "demo", ""),
    (["models", "--nonsense"], 2, "", "error: No such option"),
    (["dataset"], 2, "", "error: No such command 'dataset'"),
    (["datasets", "create"], 2, "", "error: Missing option '--classes'"),
    (["datasets", "create", "--classes", "benign=1", "--seed", "x"], 2, "", "error: Invalid value for '--seed'"),
    (["datasets", "show"], 2, "", "error: Missing argument 'ID'"),
    (["datasets", "create", "--classes", "benign=1", "--tries", "many"], 2, "", "--tries"),
    (["datasets", "show", "ds_none"], 1, "", "error: "),
]


@pytest.mark.full
@pytest.mark.parametrize("resolution", ["highest", "lowest-direct"])
def test_command_works_in_new_environment(gateway: FakeGateway, tmp_path: Path, resolution: str) -> None:
    if UV is None:
        pytest.skip("uv is not installed: it resolves the lowest versions")
    source = shutil.copytree(
        SOURCE, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([UV, "venv", "-q", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    python = next((tmp_path / "venv").glob("[bS]*/python*"))
    install = [UV, "pip", "install", "-q", "--python", str(python), "--resolution", resolution]
    done = subprocess.run([*install, str(source)], env=environment, capture_output=True, text=True)
    if done.returncode and ("error sending request" in done.stderr or "Failed to fetch" in done.stderr):
        pytest.skip(f"no package index can be reached: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [UV, "pip", "freeze", "--python", str(python)], env=environment, capture_output=True, text=True
    )
    print(listed.stdout)  # shown if the test fails
    program = python.parent / "dermis-client"
    environment |= {"DERMIS_BASE_URL": gateway.url}
    for arguments, status, out, err in SESSION:
        done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stderr, (arguments, done)
        assert out in done.stdout and err in done.stderr, (arguments, done)
    download = [program, "datasets", "create", "--classes", "benign=2", "--out", str(tmp_path / "made"), "--extract"]
    done = subprocess.run(download, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "2 images" in done.stdout, done
