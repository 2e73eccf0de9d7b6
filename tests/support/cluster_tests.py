"""Run the tests that need a real PostgreSQL, S3 server, kubectl or promtool.

`python tests/support/cluster_tests.py [OPTION OF PYTEST ...]` lists these programs first. It ends with status 1 if one is
missing, unless ALLOW_MISSING is set: tests that need a missing one are then skipped.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from programs import CLUSTER_PROGRAMS, ROOT, all_are_there

# Files of tests that use one of the programs, directly or through modules of tests/support.
_USES = re.compile(r"real_servers|kubernetes_manifests|\bkubectl\b|\bpromtool\b|\blocust\b")


def test_files() -> list[Path]:
    """The files with tests that use one of the programs."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in files if _USES.search(path.read_text(encoding="utf-8"))]


def main() -> int:
    """Report the programs and run the tests."""
    if not all_are_there(CLUSTER_PROGRAMS):
        return 1
    paths = [str(path.relative_to(ROOT)) for path in test_files()]
    pytest = Path(sys.executable).parent / "pytest"
    return subprocess.run([str(pytest), "-rs", *sys.argv[1:], *paths], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
