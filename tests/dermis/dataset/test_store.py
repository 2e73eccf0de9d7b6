"""Tests of the storage of datasets in a folder that other processes use as well, or that cannot be reached for a moment."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dermis.dataset.store import Store
from dermis.errors import StorageError
from stale_folder import stale


@pytest.mark.parametrize("call", [Store.free_bytes, Store.remove_abandoned, lambda store: store.remove("a")])
def test_call_on_a_stale_folder_can_be_repeated(tmp_path: Path, call: Callable[[Store], object]) -> None:
    store = Store(tmp_path)
    store.write("a", b"1")
    with stale(tmp_path), pytest.raises(StorageError) as away:
        call(store)
    assert away.value.kind == "storage-unavailable"
    assert store.read("a") == b"1"


def test_file_can_be_written_again_after_its_folder_was_stale(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with ExitStack() as stack:
        with pytest.raises(StorageError) as away, store.writing("a") as path:
            path.write_bytes(b"1")
            stack.enter_context(stale(tmp_path))
        assert away.value.kind == "storage-unavailable"
    store.write("a", b"2")
    assert store.read("a") == b"2"


def test_free_space_of_a_folder_that_is_made_later_is_that_of_its_parent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("new/datasets", "file/datasets"):
        assert Store(tmp_path / name).free_bytes()


def test_folder_is_removed_completely_although_another_process_removes_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, unlink, removed = tmp_path / "job", os.unlink, list[str]()
    folder.mkdir()
    for name in "abcde":
        (folder / name).touch()

    def unlink_late(path: str, **options: Any) -> None:
        unlink(path, **options)
        removed.append(path)
        if len(removed) == 1:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    monkeypatch.setattr(os, "unlink", unlink_late)
    Store(tmp_path).remove("job")
    assert not folder.exists() and len(removed) == 5
