"""Tests of `dermis generate` and `dermis verify`: the same files after a kill, from a manifest, in shards; one-line errors."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from commands.console import table_console
from dermis.bundle import Bundle
from painter import Painter
from tiny import make_bundle

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]
# The command with slower shards, so that it has not ended when it is stopped, on a busy machine either.
SLOW_COMMAND = """
import time
from dermis.dataset import shards
write = shards.write_shard
def write_slowly(*arguments, **options):
    time.sleep(0.08)
    return write(*arguments, **options)
shards.write_shard = write_slowly
from commands.main import main
main()
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_dataset_has_same_bytes_from_command_manifest_and_shards(run: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Generate, verify, make again from the manifest, make in single shards: always the same bytes."""
    asked = ("--bundle", tiny_bundle.location, "--classes", "malignant=9,benign=6", "--seed", 7, "--shard-size", 5)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert run("generate", *asked, "--out", one)[0] == 0
    assert run("verify", one) == (0, f"{one}: 7 files checked, all hashes match\n", "")
    status, out, _ = run(
        "generate", "--manifest", one / "manifest.json", "--bundle", tiny_bundle.location, "--out", two
    )
    assert status == 0 and "byte for byte" in out
    for shards in (("--only-shard", 2), ("--only-shard", 0, "--only-shard", 1)):
        assert run("generate", *asked, "--out", three, *shards)[0] == 0
        assert not (three / "manifest.json").exists()
    assert run("generate", *asked, "--out", three, "--finalize")[0] == 0
    assert contents(one) == contents(two) == contents(three)
    (one / "metadata.csv").write_text("changed")
    assert run("verify", one)[:2] == (1, "changed metadata.csv\n")


@pytest.mark.full
def test_killed_run_resumes_to_same_bytes(run: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The run is stopped by Ctrl-C, then killed, then not interrupted: shards that were finished are not changed."""
    asked = ["generate", "--bundle", tiny_bundle.location, "--classes", "malignant=750,benign=750", "--shard-size"]
    asked += ["25", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    finished: dict[str, int] = {}
    for blow, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        command = [sys.executable, "-c", SLOW_COMMAND, *asked, str(killed)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 180
            while len(list(killed.glob(".partial/shard-*.json"))) < len(finished) + 3:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(blow)
            assert process.wait(timeout=120) == status
        assert not (killed / "manifest.json").exists()
        shards = {path.name: path.stat().st_mtime_ns for path in killed.glob(".partial/shard-*.json")}
        assert len(finished) + 3 <= len(shards) < 60 and finished.items() <= shards.items()
        finished = shards
    assert run(*asked, killed)[0] == 0
    assert run(*asked, whole)[0] == 0
    assert contents(killed) == contents(whole)
    assert run("verify", killed)[0] == 0


def test_dataset_of_the_former_format_is_continued_and_repeated_in_it(
    run: Run, painter: type[Painter], tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As version 0.1.0 left it: a mark and records of shards without a format."""
    out, again, new = tmp_path / "out", tmp_path / "again", tmp_path / "new"
    asked = ("generate", "--bundle", tiny_bundle.location, "--classes", "benign=9", "--shard-size", 3)
    with monkeypatch.context() as former:
        former.setattr("dermis.dataset.plan.plan_for.__defaults__", (1,))
        assert run(*asked, "--out", out, "--only-shard", 0)[0] == 0
    mark = json.loads((out / ".partial" / "plan.json").read_text())
    assert mark.pop("format_version") == 1
    (out / ".partial" / "plan.json").write_text(json.dumps(mark))
    status, _, err = run(*asked, "--out", out)
    assert status == 0 and "format 1" in err and painter.drawn == 9
    manifest = out / "manifest.json"
    assert json.loads(manifest.read_text())["format_version"] == 1 and run("verify", out)[0] == 0
    status, printed, _ = run("generate", "--manifest", manifest, "--bundle", tiny_bundle.location, "--out", again)
    assert status == 0 and "byte for byte" in printed and contents(again) == contents(out)
    assert run(*asked, "--out", new)[0] == 0 and json.loads((new / "manifest.json").read_text())["format_version"] == 2
    status, _, err = run("generate", "--manifest", manifest, "--bundle", tiny_bundle.location, "--out", new)
    assert status == 1 and "in format 2, --manifest has format 1" in err
    (new / "manifest.json").unlink()
    (new / ".partial").mkdir()
    (new / ".partial" / "plan.json").write_text(json.dumps(mark | {"format_version": 3}))
    status, _, err = run(*asked, "--out", new)
    assert status == 1 and "newer version" in err


@pytest.mark.full
def test_finished_dataset_is_kept_and_damaged_dataset_is_repaired(
    run: Run, painter: type[Painter], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ["generate", "--bundle", tiny_bundle.location, "--classes", "benign=9", "--format", "webdataset"]
    asked += ["--shard-size", "4", "--out", str(out)]
    assert run(*asked)[0] == 0
    before = contents(out)
    for option in ((), ("--only-shard", 1), ("--finalize",)):
        assert run(*asked, *option)[0] == 0
        assert painter.drawn == 9, "an intact dataset was drawn again"
        assert run("verify", out)[0] == 0 and contents(out) == before
    for name in before.keys() - {"manifest.json"}:
        (out / name).write_bytes(b"changed")
        status, _, err = run(*asked, "--finalize")
        assert status == 1 and "damaged" in err and (out / "manifest.json").exists()
        status, _, err = run(*asked)
        assert status == 0 and f"changed or missing: {name}" in err
        assert contents(out) == before


def test_other_synthesizer_is_reported_and_dataset_is_kept(
    run: Run, painter: type[Painter], tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    asked = ("generate", "--bundle", tiny_bundle.location, "--classes", "benign=3", "--out", out)
    assert run(*asked)[0] == 0
    before = contents(out)
    monkeypatch.setattr(painter, "identity", {"device": "other"})
    status, _, err = run(*asked)
    assert status == 1 and "device is test there, other here" in err
    assert contents(out) == before
    remake = ("--manifest", out / "manifest.json", "--bundle", tiny_bundle.location, "--out", again)
    status, printed, err = run("generate", *remake)
    assert status == 0 and "warning: the bytes may differ" in err and "device is test there, other here" in err
    assert "byte for byte" in printed and contents(again)["images.zip"] == before["images.zip"]
    altered = json.loads(before["manifest.json"])
    altered["files"][1]["sha256"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(altered))
    shutil.rmtree(again)
    status, _, err = run("generate", "--manifest", tmp_path / "manifest.json", *remake[2:])
    assert status == 0 and "the bytes differ from those of the manifest" in err


def test_leftover_partial_files_do_not_stop_a_run(
    run: Run, painter: type[Painter], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / ".partial").mkdir(parents=True)
    asked = ("generate", "--bundle", tiny_bundle.location, "--classes", "benign=3", "--out", out)
    (out / ".partial" / "writing-0123").write_bytes(b"hal")
    assert run(*asked, "--only-shard", 0)[0] == 0
    (out / ".partial" / "writing-4567").write_bytes(b"hal")
    assert run(*asked)[0] == 0
    assert run("verify", out)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "nevus=3"), "classes.nevus: unknown class; this model has benign, malignant"),
        (("--classes", "benign=-3"), "--classes: 'benign=-3'"),
        (("--classes", "benign=0"), "--classes.benign"),
        (("--classes", "benign"), "NAME=COUNT"),
        ((), "--classes: give the number of images"),
        (("--classes", "benign=1", "--seed", "-1"), "--seed"),
        (("--classes", "benign=1", "--truncation-psi", "nan"), "--truncation-psi"),
        (("--classes", "benign=1", "--only-shard", "3"), "--only-shard: 3 is not in 0 to 0"),
        (("--manifest", "nowhere.json"), "nowhere.json: No such file"),
        (("--manifest", "nowhere.json", "--seed", "1"), "omit --seed"),
        (("--classes", "benign=1", "--bundle", "nowhere"), "nowhere: bundle.json is missing"),
        (("--classes", "benign=1", "--device", "cuda:99"), "device"),
    ],
)
def test_generate_error_is_one_line_and_leaves_no_folder(
    run: Run, tiny_bundle: Bundle, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out"
    bundle = () if "--bundle" in arguments else ("--bundle", tiny_bundle.location)
    status, printed, err = run("generate", *bundle, *arguments, "--out", out)
    assert (status, printed) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not out.exists()


@pytest.mark.parametrize("option", ["--format", "--image-format", "--noise-mode", "--keep", "--gate", "--on-reject"])
def test_unknown_option_value_is_wrong_usage(run: Run, tmp_path: Path, option: str) -> None:
    status, printed, err = run("generate", "--classes", "benign=1", option, "rar", "--out", tmp_path / "out")
    assert (status, printed) == (2, "")
    assert err.count("\n") == 1 and option in err and "'rar' is not one of" in err


def test_foreign_folder_and_other_bundle_are_refused(
    run: Run, painter: type[Painter], tiny_bundle: Bundle, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("early", [False, True], ids=["with the request", "digest only"])
def test_resume_with_other_default_names_the_option(
    run: Run, painter: type[Painter], tiny_bundle: Bundle, tmp_path: Path, early: bool
) -> None:
    """The same command without the option is refused by the option, and continues with it; also with an early mark."""
    out = tmp_path / "out"
    asked = ("generate", "--bundle", tiny_bundle.location, "--classes", "benign=4", "--shard-size", 2, "--out", out)
    const = ("--noise-mode", "const")
    assert run(*asked, *const, "--only-shard", 0)[0] == 0
    mark = out / ".partial" / "plan.json"
    if early:
        mark.write_text(json.dumps({"plan": json.loads(mark.read_text())["plan"]}))
    begun = f"{out}: contains an unfinished dataset with other options; it was started with --noise-mode const: use these to"
    status, _, err = run(*asked)
    assert status == 1 and begun in err and "or choose another --out or remove it" in err
    assert run(*asked, *const)[0] == 0
    # Early marks are of datasets of format 1: a finished shard of the same format is kept, one of another is made again.
    assert painter.drawn == (6 if early else 4)
    status, _, err = run(*asked, "--seed", 3)
    assert (
        status == 1 and "contains another dataset, made with --seed 0, --noise-mode const; choose another --out" in err
    )


def test_options_that_differ_are_named_as_on_the_command_line(
    run: Run, painter: type[Painter], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("generate", "--bundle", tiny_bundle.location, "--out", out, "--only-shard", 0)
    assert run(*asked, "--classes", "malignant=2,benign=1", "--truncation-psi", 0.5)[0] == 0
    err = run(*asked, "--classes", "benign=1", "--truncation-psi", 0.5, "--truncation-cutoff", 2)[2]
    assert "it was started with --classes benign=1,malignant=2 and without --truncation-cutoff: use these" in err
    other = make_bundle(tmp_path / "other", seed=1)
    err = run(*asked, "--classes", "malignant=2,benign=1", "--truncation-psi", 0.5, "--bundle", other.location)[2]
    assert f"it was started with --bundle of digest {tiny_bundle.digest[:12]}: use these" in err
    (out / ".partial" / "plan.json").write_text("[")
    assert (
        "contains an unfinished dataset with other options; choose another --out"
        in run(*asked, "--classes", "benign=1")[2]
    )


def test_output_folder_that_cannot_be_made_is_refused(
    run: Run, painter: type[Painter], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        status, _, err = run("generate", "--bundle", tiny_bundle.location, "--classes", "benign=1", "--out", out)
        assert status == 1 and err.startswith("error: ") and "Not a directory" in err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--min-probability", "2"), "error: --min-probability: Input should be less than or equal to 1"),
        (
            ("--min-probability", "0.6", "--max-probability", "0.5"),
            "--min-probability must not be above --max-probability",
        ),
        (("--tries", "0"), "error: --tries: "),
        (("--tries", "3"), "--tries"),
        (("--gate", "authentic", "--gate-tries", "99"), "error: --gate-tries: "),
        (("--gate", "authentic", "--percentile", "-1"), "error: --percentile: "),
        (("--percentile", "20"), "error: --percentile: is an option of the gate"),
        (("--gate", "authentic", "--percentile", "20"), "error: --percentile: is an option of --gate min_distance"),
        (("--gate", "authentic", "--on-reject", "drop", "--gate-tries", "3"), "error: --gate-tries: is an option of"),
        (("--edit", "nowhere=1e9"), "error: --edit: "),
        (("--image-quality", "0"), "error: --image-quality: "),
        (("--truncation-psi", "nan"), "error: --truncation-psi: "),
        (("--min-probability", "0.5"), "--min-probability"),  # the bundle has no classifier
    ],
)
def test_errors_name_the_option_that_was_given(
    run: Run, tiny_bundle: Bundle, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    out = tmp_path / "made"
    status, printed, err = run(
        "generate", "--bundle", tiny_bundle.location, "--classes", "benign=2", "--out", out, *options
    )
    assert (status, printed) == (1, "") and expected in err and err.count("\n") == 1
    assert not any(word in err for word in ("classifier.", "privacy.", "_probability", "on_reject"))
    assert not out.exists()


def test_wrong_usage_is_one_line_and_missing_command_shows_usage(run: Run) -> None:
    for arguments, expected in (
        (("clasify",), "No such command 'clasify'. Did you mean 'classify'?; see: dermis --help"),
        (("surve",), "No such command 'surve'. Did you mean 'survey', 'serve'?; see: dermis --help"),
        (("generate", "--nonsense"), "--nonsense"),
        (("generate",), "--out"),
        (("generate", "--out", "x", "--seed", "y"), "--seed"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "") and expected in err
        assert err.startswith("error: ") and err.count("\n") == 1 and err.count("Did you mean") <= 1
    for arguments in ((), ("data",)):
        status, out, err = run(*arguments)
        assert status == 2 and "Usage" in out + err and "error" not in err


def test_the_last_line_counts_images(run: Run, tiny_bundle: Bundle, tmp_path: Path, painter: type[Painter]) -> None:
    del painter
    for file_format, expected in (
        ("imagefolder", "5 images in images.zip;"),
        ("webdataset", "5 images in 3 .tar files;"),
    ):
        made = ("generate", "--bundle", tiny_bundle.location, "--classes", "benign=5", "--shard-size", 2)
        status, out, _ = run(*made, "--format", file_format, "--out", tmp_path / file_format)
        assert status == 0 and expected in out


def test_table_in_pipe_is_not_truncated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    for columns in ("", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        table = Table("name", "value")
        table.add_row("n" * 150, "v" * 150)
        table_console().print(table)
        assert "n" * 150 in capsys.readouterr().out


def test_detection_of_copies_without_a_gate_is_refused(run: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    asked = ("generate", "--bundle", tiny_bundle.location, "--classes", "benign=1", "--out", tmp_path / "d")
    status, _, error = run(*asked, "--no-detect-copies")
    assert status != 0 and "--detect-copies" in error and "--gate" in error
    assert not (tmp_path / "d").exists()
