"""Tests of the processes that measure the images of reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from dermis.report.appearance import appearances
from lesions import framed, lesion
from services.image_measuring import AppearanceProcesses

IMAGES = np.stack([lesion(0, 64), framed(lesion(1, 64)), lesion(2, 64)])


@pytest.fixture
def measure() -> Iterator[AppearanceProcesses]:
    processes = AppearanceProcesses(2)
    yield processes
    processes.close()


def _measuring() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "spawn_main" in " ".join(each.cmdline())]


@pytest.mark.full
def test_images_are_measured_in_other_processes_which_may_be_killed(measure: AppearanceProcesses) -> None:
    expected = appearances(IMAGES)
    assert [bool(each.artefacts) for each in expected] == [False, True, False]
    assert measure(IMAGES) == expected
    process, other = _measuring()
    assert measure(IMAGES[:1]) == expected[:1]
    process.kill()
    psutil.wait_procs([process, other], timeout=30)
    assert measure(IMAGES) == expected  # in this process
    assert measure(IMAGES) == expected  # in new ones
    assert len(_measuring()) == 2
    assert not {process.pid, other.pid} & {each.pid for each in _measuring()}
    measure.close()
    assert not _measuring()


@pytest.mark.full
def test_process_ends_with_its_parent() -> None:
    """A gateway that is killed leaves no process behind."""
    program = (
        "import numpy as np, psutil, sys, time\n"
        "from services.image_measuring import AppearanceProcesses\n"
        "if __name__ == '__main__':\n"
        "    AppearanceProcesses()(np.zeros((2, 64, 64, 3), np.uint8))\n"
        "    print(*[each.pid for each in psutil.Process().children(recursive=True)], flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert children
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(30)
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive


@pytest.mark.parametrize(
    ("fault", "place", "expected"),
    [
        ("warnings.warn('odd image')", "appearance", {("WARNING", "py.warnings"), ("WARNING", "dermis.jobs")}),
        ("1 / 0", "lower_priority", {("CRITICAL", "concurrent.futures"), ("WARNING", "dermis.jobs")}),
    ],
)
def test_lines_of_the_processes_have_the_format_of_the_service(
    tmp_path: Path, fault: str, place: str, expected: set[tuple[str, str]]
) -> None:
    """The program is imported by the processes, too: in them `place` has the fault, which a warning of the gateway follows."""
    program = tmp_path / "program.py"
    program.write_text(
        "import logging, warnings\n"
        "import numpy as np\n"
        "from services import image_measuring, logs\n"
        "if __name__ == '__main__':\n"
        "    logs.configure('INFO', 'json')\n"
        "    measure = image_measuring.AppearanceProcesses(1, ('INFO', 'json'))\n"
        "    measure(np.zeros((1, 64, 64, 3), np.uint8))\n"
        "    logging.getLogger('dermis.jobs').warning('measured')\n"
        "    measure.close()\n"
        "else:\n"
        f"    original = image_measuring.{place}\n"
        f"    image_measuring.{place} = lambda *image: ({fault}, original(*image))[1]\n"
    )
    log = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True, timeout=120).stderr
    lines = [json.loads(line) for line in log.splitlines()]
    assert {(line["level"], line["logger"]) for line in lines} == expected
