"""The programs that tests use beyond the packages of the extra `dev`, and how to install them.

`python tests/support/programs.py` lists them and ends with status 1 if one is missing, unless ALLOW_MISSING is set: tests that
need a missing program are skipped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from benchmarks.components import chromium  # noqa: E402
from benchmarks.components.moto_s3 import moto_program  # noqa: E402
from benchmarks.components.postgres import binaries  # noqa: E402
from benchmarks.components.s3 import weed_binary  # noqa: E402
from kubernetes_manifests import why_kubectl_cannot_render  # noqa: E402

ALLOW_MISSING = "ALLOW_MISSING"
"""Environment variable: run the tests, although a program is missing."""


@dataclass(frozen=True)
class Program:
    """A program that tests use, and how to install it."""

    name: str
    purpose: str
    installation: str
    find: Callable[[], object]


CLUSTER_PROGRAMS = (
    Program("postgres", "jobs database of several replicas", "Debian package postgresql", binaries),
    Program("pg_dump", "backup of PostgreSQL", "Debian package postgresql-client", lambda: which("pg_dump")),
    Program("sqlite3", "backup of SQLite", "Debian package sqlite3", lambda: which("sqlite3")),
    Program("weed", "S3 server SeaweedFS", "extra cluster", weed_binary),
    Program("moto_server", "a second S3 server", "extra cluster", moto_program),
    Program("rclone", "backup of a bucket", "Debian package rclone", lambda: which("rclone")),
    Program("libfaketime", "a clock that jumps", "extra cluster", lambda: find_spec("libfaketime")),
    Program("s3fs", "storage at s3://", "extra cluster", lambda: find_spec("s3fs")),
    Program("locust", "load of the soak test", "extra soak", lambda: find_spec("locust")),
    Program(
        "kubectl",
        "overlays of Kubernetes",
        "extra cluster, or kubectl 1.27 or newer",
        lambda: why_kubectl_cannot_render() is None,
    ),
    Program("promtool", "alert rules", "Debian package prometheus", lambda: which("promtool")),
    Program(
        "checkov", "hardening of the manifests", "make build/checkov/bin/checkov; CHECKOV is its path",
        lambda: os.environ.get("CHECKOV") or which("checkov"),
    ),
)  # fmt: skip
OTHER_PROGRAMS = (
    Program("chromium", "pages in a browser", "Debian package chromium", chromium),
    Program("node", "scripts of pages", "Debian package nodejs", lambda: which("node")),
    Program("mkdocs", "the documentation site", "extra docs", lambda: find_spec("mkdocs")),
    Program("dcm2pnm", "a reader of DICOM", "Debian package dcmtk", lambda: which("dcm2pnm")),
    Program("dciodvfy", "the standard DICOM", "Debian package dicom3tools", lambda: which("dciodvfy")),
    Program("Orthanc", "a DICOM server", "Debian packages orthanc, orthanc-dicomweb", lambda: which("Orthanc")),
    Program(
        "mlflow", "an MLflow server", "PyPI package mlflow, elsewhere; MLFLOW_SERVER is its program",
        lambda: os.environ.get("MLFLOW_SERVER"),
    ),
)  # fmt: skip


def all_are_there(programs: Iterable[Program]) -> bool:
    """List the programs, and return whether all are installed or may be missing."""
    missing = []
    for program in programs:
        there = bool(program.find())
        missing += [] if there else [program.name]
        print(
            f"{program.name:<12} {program.purpose:<36} {'installed' if there else f'MISSING: {program.installation}'}"
        )
    if missing:
        print(f"Tests that need {', '.join(missing)} would be skipped.")
        if not os.environ.get(ALLOW_MISSING):
            print(f"Install the missing programs, or set {ALLOW_MISSING}=1 to run the other tests.")
    sys.stdout.flush()
    return not missing or bool(os.environ.get(ALLOW_MISSING))


if __name__ == "__main__":
    sys.exit(0 if all_are_there((*CLUSTER_PROGRAMS, *OTHER_PROGRAMS)) else 1)
