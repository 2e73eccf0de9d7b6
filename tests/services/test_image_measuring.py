"""Tests of the processes that measure the images of reports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

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
