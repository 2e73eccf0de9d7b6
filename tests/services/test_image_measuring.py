"""Tests of the process that measures the images of reports."""

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
from services.image_measuring import AppearanceProcess

IMAGES = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def measure() -> Iterator[AppearanceProcess]:
    process = AppearanceProcess()
    yield process
    process.close()


def _measuring() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "spawn_main" in " ".join(each.cmdline())]


def test_images_are_measured_in_another_process_which_may_be_killed(measure: AppearanceProcess) -> None:
    expected = appearances(IMAGES)
    assert measure(IMAGES) == expected
    (process,) = _measuring()
    process.kill()
    process.wait(30)
    assert measure(IMAGES) == expected  # in this process
    assert measure(IMAGES) == expected  # in a new one
    (again,) = _measuring()
    assert again.pid != process.pid
    measure.close()
    assert not _measuring()


def test_process_ends_with_its_parent() -> None:
    """A gateway that is killed leaves no process behind."""
    program = (
        "import numpy as np, psutil, sys, time\n"
        "from services.image_measuring import AppearanceProcess\n"
        "if __name__ == '__main__':\n"
        "    AppearanceProcess()(np.zeros((1, 64, 64, 3), np.uint8))\n"
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
