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

# Files that use one of the programs: directly, through modules of tests/support, or through benchmarks that may lack one.
_USES = re.compile(r"real_servers|kubernetes_manifests|MissingComponentError|\bkubectl\b|\bpromtool\b|\blocust\b")
_FIXTURE = re.compile(r"^@pytest\.fixture.*\n(?:async )?def (\w+)", re.MULTILINE)


def test_files() -> list[Path]:
    """The files with tests that use one of the programs, themselves or through a fixture of a conftest.py."""
    tests = ROOT / "tests"
    chosen = {path for path in tests.rglob("test_*.py") if _USES.search(path.read_text(encoding="utf-8"))}
    for conftest in tests.rglob("conftest.py"):
        text = conftest.read_text(encoding="utf-8")
        names = _FIXTURE.findall(text)
        if names and _USES.search(text):
            fixture = re.compile(rf"\b({'|'.join(names)}): ")  # a parameter of a test
            below = conftest.parent.rglob("test_*.py")
            chosen.update(path for path in below if fixture.search(path.read_text(encoding="utf-8")))
    return sorted(chosen)


def main() -> int:
    """Report the programs and run the tests."""
    if not all_are_there(CLUSTER_PROGRAMS):
        return 1
    paths = [str(path.relative_to(ROOT)) for path in test_files()]
    pytest = Path(sys.executable).parent / "pytest"
    return subprocess.run([str(pytest), "-rs", *sys.argv[1:], *paths], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
