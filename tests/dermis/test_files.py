"""Tests that files are written completely or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dermis.errors import StorageError
from dermis.files import atomic_write, try_lock, write_file


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_keeps_old_file_and_leaves_no_other(
    tmp_path: Path, concurrent: bool, failure: BaseException
) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(type(failure)), atomic_write(path, concurrent=concurrent) as partial:
        partial.write_text("ne")
        raise failure
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_concurrent_writers_do_not_mix_their_files(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with atomic_write(path, concurrent=True) as first, atomic_write(path, concurrent=True) as second:
        second.write_text("second")
        first.write_text("first")
    assert path.read_text() == "first"  # the last to finish
    assert list(tmp_path.iterdir()) == [path]


def test_next_write_replaces_partial_file_of_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    left: list[Path] = []
    with atomic_write(path) as partial:
        partial.write_text("new")
        left.append(partial)
    left[0].write_text("left by a process that was killed, and longer")
    with atomic_write(path) as partial:
        partial.write_text("newer")
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_file_with_longest_possible_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ("x" * 251 + ".txt")
    write_file(path, b"content")
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


def test_write_file_names_the_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/below: cannot be written: "):
        write_file(tmp_path / "file" / "below", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_lock_excludes_other_processes_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = (
        "import sys; from pathlib import Path; from dermis.files import try_lock\n"
        "lock = try_lock(Path(sys.argv[1])); print(lock is not None, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert try_lock(path) is None
        process.kill()
    lock = try_lock(path)
    assert lock is not None
    assert try_lock(path) is None, "another lock of the same process"
    lock.release()
    again = try_lock(path)
    assert again is not None
    again.release()


def test_lock_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        try_lock(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()
