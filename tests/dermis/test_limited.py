"""Tests that functions on untrusted data run isolated and within limits, and that their process may end in any way."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dermis.limited import LimitError, ProcessLimits, run_limited

LIMITS = ProcessLimits(cpu_seconds=20, wall_seconds=60, memory_bytes=1 << 30)


def surroundings(data: bytes | Path, word: str) -> str:
    print("a library that prints")
    content = data.read_bytes() if isinstance(data, Path) else data
    facts = [content.decode(), word, sys.path, str(Path.cwd()), hash("a"), "planted" in sys.modules]
    return json.dumps(facts)


def misbehave(_: bytes, how: str) -> str:
    actions: dict[str, Callable[[], object]] = {
        "compute": _compute,
        "sleep": lambda: time.sleep(60),
        "allocate": lambda: bytes(2 << 30),
        "abort": lambda: (sys.stderr.write("x" * 10_000 + "\x1b[2J"), sys.stderr.flush(), os.abort()),
        "raise": lambda: json.loads("\x1b"),
        "talk": lambda: None,
    }
    actions[how]()
    return "x" * (2 << 20)


def _compute() -> None:
    while True:
        pass


def test_limited_process_ignores_folder_path_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json.py", "sitecustomize.py", "dermis.py"):
        (tmp_path / name).write_text("import sys; sys.modules['planted'] = sys")
    (tmp_path / "data").write_text("abc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    answers = [
        json.loads(run_limited(f"{__name__}:surroundings", data, "x", limits=LIMITS)) for data in (b"abc", Path("data"))
    ]
    for content, word, path, folder, _, planted in answers:
        assert (content, word, planted) == ("abc", "x", False)
        assert "" not in path and str(tmp_path) not in path and folder != str(tmp_path)
    assert answers[0][4] != answers[1][4]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems lack some of the limits")
@pytest.mark.parametrize(
    ("how", "limits", "reason", "message"),
    [
        ("compute", replace(LIMITS, cpu_seconds=1), "time", "took longer than 1 seconds of processor time"),
        ("sleep", replace(LIMITS, wall_seconds=2), "time", "took longer than 2 seconds"),
        ("allocate", LIMITS, "memory", "needs more than 1 GiB of memory"),
        ("abort", LIMITS, "crash", r"ended with status -6 \(x+\\x1b\[2J\)"),
        ("raise", LIMITS, "crash", "ended with status 1 .*JSONDecodeError"),
        ("talk", LIMITS, "crash", "returned more than"),
    ],
)
def test_each_abnormal_end_of_process_raises_error_naming_cause(
    how: str, limits: ProcessLimits, reason: str, message: str
) -> None:
    with pytest.raises(LimitError, match=message) as caught:
        run_limited(f"{__name__}:misbehave", b"", how, limits=limits)
    assert caught.value.reason == reason and bool(caught.value.limit) == (reason != "crash")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
