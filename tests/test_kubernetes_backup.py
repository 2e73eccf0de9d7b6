"""Tests of the scripts in docs/kubernetes.md that back up and restore one replica's volume, with a substitute for kubectl."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from kubernetes_manifests import ROOT
from services.jobs.table import JobTable

# `exec` runs here, with the volume at VOLUME. With CUT an upload ends in its middle, as when a connection is lost unnoticed.
KUBECTL = """#!/usr/bin/env python3
import os, re, subprocess, sys

arguments = sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(" ".join(arguments) + "\\n")
data = sys.stdin.buffer.read() if "-i" in arguments or arguments[-1] == "-" else b""
if "exec" in arguments:
    command = arguments[arguments.index("--") + 1 :]
    if command[0] != "dermis":
        if os.environ.get("CUT"):
            data = data[: len(data) // 2]
        command = [re.sub(r"/data\\b", os.environ["VOLUME"], each) for each in command]
        sys.exit(subprocess.run(command, input=data).returncode)
"""


class Place:
    """A volume, and a folder in which an operator runs the scripts."""

    def __init__(self, folder: Path) -> None:
        self.volume, self.site, self.calls = folder / "volume", folder / "site", folder / "calls"
        (self.site / "bin").mkdir(parents=True)
        (self.site / "dermis").symlink_to(ROOT)
        (self.site / "bin/kubectl").write_text(KUBECTL)
        (self.site / "bin/kubectl").chmod(0o755)
        self.backup_script, self.restore_script = re.findall(
            r"^```bash no-check\n(set -euo pipefail\n.*?)^```",
            (ROOT / "docs/kubernetes.md").read_text(),
            re.MULTILINE | re.DOTALL,
        )
        for name in ("datasets/ds_1/manifest.json", "datasets/pr_1/image.png"):
            (self.volume / name).parent.mkdir(parents=True)
            (self.volume / name).write_text(name * 5000)
        self.add_job("ds_1")

    def add_job(self, job_id: str) -> None:
        table = JobTable(f"sqlite:///{self.volume / 'jobs.sqlite'}")
        table.open()
        table.create(
            job_id, {}, tenant="a", kind="dataset", model=("m", "0"), samples=1, shards=1, body_hash="", max_active=9
        )
        table.close()

    def jobs(self) -> list[str]:
        table = JobTable(f"sqlite:///{self.volume / 'jobs.sqlite'}")
        found = [job.id for job in table.active()]
        table.close()
        return found

    def files(self) -> Mapping[str, bytes]:
        paths = (path for path in self.volume.rglob("*") if path.is_file() and "restored" not in path.parts)
        return {str(path.relative_to(self.volume)): path.read_bytes() for path in paths}

    def run(self, script: str, **variables: str) -> int:
        path = f"{self.site / 'bin'}:{os.environ['PATH']}"
        values = {"PATH": path, "VOLUME": str(self.volume), "CALLS": str(self.calls), "IMAGE": "image"} | variables
        return subprocess.run(["bash", "-c", script], cwd=self.site, env=os.environ | values).returncode


@pytest.fixture
def backed_up(tmp_path: Path) -> Place:
    """A place with a backup, whose volume has changed since."""
    place = Place(tmp_path)
    assert place.run(place.backup_script) == 0
    place.add_job("ds_2")
    (place.volume / "datasets/ds_2").mkdir()
    (place.volume / "datasets/ds_2/manifest.json").write_text("later")
    return place


def test_backup_is_restored_and_what_it_replaces_is_kept(backed_up: Place) -> None:
    assert not (backed_up.volume / "backup.sqlite").exists()
    assert backed_up.run(backed_up.restore_script) == 0
    assert backed_up.jobs() == ["ds_1"]
    files = backed_up.files()
    (before,) = (path.name for path in backed_up.volume.glob("before-*"))
    kept = {f"{before}/datasets/ds_2/manifest.json", f"{before}/jobs.sqlite"}
    assert {"datasets/ds_1/manifest.json", *kept} <= set(files)
    assert not {"datasets/ds_2/manifest.json", "datasets/pr_1/image.png"} & set(files)
    assert not (backed_up.volume / "restored").exists()
    calls = backed_up.calls.read_text().splitlines()
    assert calls.index("-n dermis delete networkpolicy dermis-requests") < calls.index(
        "-n dermis scale deployment/dermis --replicas=1"
    )


def test_second_restore_is_not_stopped_by_what_the_first_one_kept(backed_up: Place) -> None:
    assert backed_up.run(backed_up.restore_script) == 0
    backed_up.add_job("ds_3")
    time.sleep(1)  # the name of the folder has the second
    assert backed_up.run(backed_up.restore_script) == 0
    assert backed_up.jobs() == ["ds_1"]
    assert len(list(backed_up.volume.glob("before-*/jobs.sqlite"))) == 2


@pytest.mark.parametrize("name", ["jobs.sqlite", "datasets.tar"])
@pytest.mark.parametrize("left", [0.0, 0.5])
def test_incomplete_backup_stops_nothing_and_replaces_nothing(backed_up: Place, name: str, left: float) -> None:
    before = backed_up.files()
    file = backed_up.site / name
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * left)])
    backed_up.calls.write_text("")
    assert backed_up.run(backed_up.restore_script) != 0
    assert backed_up.calls.read_text() == ""
    assert backed_up.files() == before


def test_restore_without_an_image_stops_nothing(backed_up: Place) -> None:
    backed_up.calls.write_text("")
    assert backed_up.run(backed_up.restore_script, IMAGE="") != 0
    assert backed_up.calls.read_text() == ""


def test_upload_that_ends_early_replaces_nothing(backed_up: Place) -> None:
    before = backed_up.files()
    assert backed_up.run(backed_up.restore_script, CUT="1") != 0
    assert backed_up.files() == before
    assert "--replicas=1" not in backed_up.calls.read_text()


def test_backup_that_fails_says_so(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (place.volume / "jobs.sqlite").write_bytes(b"damaged" * 1000)
    assert place.run(place.backup_script) != 0
    (place.volume / "jobs.sqlite").unlink()
    assert place.run(place.backup_script) != 0  # a database without tables
