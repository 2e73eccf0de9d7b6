"""`dermis generate` and `dermis verify`: the same files after a kill, from a manifest, in shards; errors are one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import make_bundle

from commands import main as program
from dermis.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("generate", ...) -> exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dermis", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            program.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_offline_story(run: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Generate, verify, make again from the manifest, make in single shards: always the same bytes."""
    asked = ("--bundle", tiny_bundle.location, "--classes", "malignant=9,benign=6", "--seed", 7, "--shard-size", 5)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert run("generate", *asked, "--out", one)[0] == 0
    assert run("verify", one) == (0, f"{one}: 4 files, every hash right\n", "")
    status, out, _ = run(
        "generate", "--manifest", one / "manifest.json", "--bundle", tiny_bundle.location, "--out", two
    )
    assert status == 0 and "byte for byte" in out
    for shard in (2, 0, 1):
        assert run("generate", *asked, "--out", three, "--only-shard", shard)[0] == 0
        assert not (three / "manifest.json").exists()
    assert run("generate", *asked, "--out", three, "--finalize")[0] == 0
    assert contents(one) == contents(two) == contents(three)
    assert run("generate", *asked, "--out", one)[0] == 0, "a finished dataset is left as it is"
    (one / "metadata.csv").write_text("changed")
    assert run("verify", one)[:2] == (1, "changed metadata.csv\n")


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    run: Run, tiny_bundle: Bundle, tmp_path: Path, blow: signal.Signals
) -> None:
    asked = [
        "generate",
        "--bundle",
        tiny_bundle.location,
        "--classes",
        "malignant=3000,benign=3000",
        "--shard-size",
        "100",
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "commands.main", *asked, "--out", str(killed)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(list(killed.glob(".partial/shard-*.json"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(blow)
        assert process.wait(timeout=30) == (130 if blow == signal.SIGINT else -signal.SIGKILL)
    assert not (killed / "manifest.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in killed.glob(".partial/shard-*.zip")}
    assert 3 <= len(finished) < 60
    assert run(*asked, "--out", killed)[0] == 0
    assert run(*asked, "--out", whole)[0] == 0
    assert contents(killed) == contents(whole)
    assert run("verify", killed)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "nevus=3"), "classes.nevus: unknown class; this model has benign, malignant"),
        (("--classes", "benign=-3"), "--classes: 'benign=-3'"),
        (("--classes", "benign=0"), "--classes.benign"),
        (("--classes", "benign"), "NAME=COUNT"),
        ((), "--classes: say how many"),
        (("--classes", "benign=1", "--seed", "-1"), "--seed"),
        (("--classes", "benign=1", "--format", "rar"), "--format"),
        (("--classes", "benign=1", "--truncation-psi", "nan"), "--truncation-psi"),
        (("--classes", "benign=1", "--only-shard", "3"), "--only-shard: 3 is not in 0 to 0"),
        (("--manifest", "nowhere.json"), "nowhere.json: No such file"),
        (("--manifest", "nowhere.json", "--seed", "1"), "leave out --seed"),
        (("--classes", "benign=1", "--bundle", "nowhere"), "nowhere: bundle.json is missing"),
        (("--classes", "benign=1", "--device", "cuda:99"), "device"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    run: Run, tiny_bundle: Bundle, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out"
    bundle = () if "--bundle" in arguments else ("--bundle", tiny_bundle.location)
    status, printed, err = run("generate", *bundle, *arguments, "--out", out)
    assert (status, printed) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (out / "manifest.json").exists()


def test_folders_and_bundles_are_not_mixed_up(run: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    asked = ("--bundle", tiny_bundle.location, "--classes", "benign=2")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert "not empty" in run("generate", *asked, "--out", foreign)[2]
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    mine = tmp_path / "mine"
    assert run("generate", *asked, "--out", mine)[0] == 0
    assert "another dataset" in run("generate", *asked, "--seed", "1", "--out", mine)[2]
    assert run("verify", mine)[0] == 0
    other = make_bundle(tmp_path / "other", seed=1)
    again = ("--manifest", mine / "manifest.json", "--bundle", other.location, "--out", tmp_path / "again")
    assert "give the bundle that made it" in run("generate", *again)[2]
    assert "has no manifest.json" in run("verify", foreign)[2]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(run: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    status, _, err = run(
        "generate", "--bundle", tiny_bundle.location, "--classes", "benign=1", "--out", tmp_path / "out"
    )
    assert status == 1 and "Permission denied" in err
