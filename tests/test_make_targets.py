"""Tests that the full test targets of the Makefile install what their tests use, and name what they cannot install."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import cluster_tests
from programs import CLUSTER_PROGRAMS, OTHER_PROGRAMS, Program, all_are_there

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("target", ["test-cluster", "test-full"])
def test_full_targets_install_the_extras_of_their_programs(target: str, tmp_path: Path) -> None:
    """In a fresh clone, where nothing is installed."""
    command = ["make", "--no-print-directory", "-n", target, f"VENV={tmp_path}", f"CHECKOV={tmp_path}/checkov"]
    (tmp_path / "checkov").touch()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    installed = {extra for line in lines for extras in re.findall(r"\.\[(.*?)\]", line) for extra in extras.split(",")}
    programs = CLUSTER_PROGRAMS if target == "test-cluster" else (*CLUSTER_PROGRAMS, *OTHER_PROGRAMS)
    needed = {extra for each in programs for extra in re.findall(r"extra (\w+)", each.installation)}
    assert {"cluster", "soak"} <= needed <= installed
    tests = next(number for number, line in enumerate(lines) if "tests/support/" in line)
    assert all("pip install" not in line for line in lines[tests:])
    assert all(f"CHECKOV={tmp_path}/checkov" in line for line in lines[tests:])


def test_cluster_tests_include_those_that_get_a_server_from_a_conftest_or_a_benchmark() -> None:
    files = {path.relative_to(ROOT / "tests").as_posix() for path in cluster_tests.test_files()}
    jobs = {f"services/jobs/test_{name}.py" for name in ("job_interruptions", "jobs_schema", "upgrade")}
    assert {"services/test_backup.py", "benchmarks/test_scale.py", *jobs} <= files
    assert "services/jobs/test_turns.py" not in files


def test_programs_that_tests_look_for_are_listed() -> None:
    listed = {each.name for each in (*CLUSTER_PROGRAMS, *OTHER_PROGRAMS)}
    files = [path for folder in ("tests", "clients") for path in (ROOT / folder).rglob("test_*.py")]
    looked_for = {name for path in files for name in re.findall(r"which\(\"([\w-]+)\"\)", path.read_text("utf-8"))}
    assert {"promtool", "Orthanc"} <= looked_for - {"uv"} <= listed  # uv is in the extra dev


def test_missing_program_is_an_error_unless_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there, missing = (
        Program(name, "tests", "extra cluster", lambda name=name: name == "one") for name in ("one", "two")
    )  # type: ignore[misc]
    monkeypatch.delenv("ALLOW_MISSING", raising=False)
    assert all_are_there([there])
    assert not all_are_there([there, missing])
    assert "MISSING: extra cluster" in (out := capsys.readouterr().out) and "ALLOW_MISSING=1" in out
    monkeypatch.setenv("ALLOW_MISSING", "1")
    assert all_are_there([there, missing])
    assert "two would be skipped" in capsys.readouterr().out
