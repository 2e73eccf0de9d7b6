"""Tests that the import names what a foreign file is, and stops reading a file that is made to take very long."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_safetensors
from typer.testing import CliRunner

from commands.main import app
from dermis.errors import BundleError
from dermis.limited import ProcessLimits
from dermis.official.convert import read_official
from dermis.official.isolation import DEFAULT_LIMITS
from dermis.official.stored import write_stored
from official_pickles import _official_names, generator, snapshot  # noqa: F401

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 381673535\n"
HTML = b'\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body onload="a()"></body>'


def _zip(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _torch(legacy: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"g_ema": {"w": torch.zeros(1000)}}, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("network.pkl"))
    return stream.getvalue()


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(3))
    return stream.getvalue()


FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty.*again"),
    "zeros": (lambda: bytes(5000), "zero bytes.*again"),
    "web page": (lambda: HTML, 'HTML page with the title "Google Drive - Virus scan warning".*browser'),
    "web page in UTF-16": (lambda: HTML.decode().encode("utf-16"), "HTML page"),
    "redirection": (lambda: b'<a href="https://x">Found</a>.', "HTML page"),
    "XHTML": (lambda: b'<?xml version="1.0"?><html xmlns="x">', "HTML page"),
    "storage error": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "XML document.*AccessDenied"),
    "JSON error": (lambda: b'{"error": "not found \\u001b"}', "JSON text.*not found"),
    "LFS pointer": (lambda: LFS, "Git LFS pointer.*git lfs pull"),
    "text": (lambda: b"Not Found", "not an official checkpoint.*'Not Found'"),
    "gzip": (lambda: gzip.compress(pickle.dumps(1)), "gzip; unpack it"),
    "bzip2": (lambda: bz2.compress(b"x"), "bzip2; unpack it"),
    "xz": (lambda: lzma.compress(b"x"), "xz; unpack it"),
    "tar": (_tar, "tar archive; unpack it"),
    "zip with a checkpoint": (lambda: _zip(**{"a/network.pkl": b"x"}), "zip archive; unpack it.*'a/network.pkl'"),
    "zip of images": (lambda: _zip(**{"dataset.json": b"{}"}), "training images.*--data"),
    "zip of others": (lambda: _zip(**{"\x1b[2J": b""}), r"zip archive of 1 files.*\\x1b\[2J"),
    "zip cut": (lambda: _zip(**{"a/network.pkl": b"x" * 5000})[:3000], "zip archive.*truncated"),
    "npz": (_npz, "NumPy archive"),
    "torch": (lambda: _torch(False), "PyTorch file.*not an official checkpoint.*look for the .pkl"),
    "torch before 1.6": (lambda: _torch(True), "PyTorch file.*look for the .pkl"),
    "torch cut": (lambda: _torch(False)[:2000], "PyTorch file.*truncated"),
    "safetensors": (lambda: to_safetensors({"w": torch.zeros(9)}), "safetensors file, not.*bundle"),
    "safetensors cut": (
        lambda: to_safetensors({"w" * 900: torch.zeros(9)})[:500],
        "safetensors file that is truncated",
    ),
    "checkpoint cut": (lambda: pickle.dumps({"G_ema": generator()})[:-20000], "truncated.*download it again.*size"),
    "cut in the middle": (lambda: pickle.dumps(snapshot())[:5000], "truncated.*download it again.*size"),
}


def _refused(path: Path, match: str, limits: ProcessLimits = DEFAULT_LIMITS) -> str:
    with pytest.raises(BundleError, match=match) as caught:
        read_official(path, limits=limits)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 800
    return message


@pytest.mark.parametrize("case", FOREIGN)
def test_broken_download_is_refused_with_its_actual_format(tmp_path: Path, case: str) -> None:
    make, message = FOREIGN[case]
    path = tmp_path / "network.pkl"
    path.write_bytes(make())
    _refused(path, message)


def test_path_that_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path / "absent.pkl", "cannot be read: No such file")
    _refused(tmp_path, "is a folder; give the .pkl file.*holds no .pkl")
    (tmp_path / "network-snapshot-000120.pkl").touch()
    _refused(tmp_path, "is a folder; give the .pkl file.*network-snapshot-000120.pkl")
    (tmp_path / "bundle.json").touch()
    _refused(tmp_path, "is a bundle already")
    os.mkfifo(tmp_path / "pipe")
    _refused(tmp_path / "pipe", "not a regular file")


# -- files that are made to take long


def _colliding() -> bytes:
    """A dictionary whose keys, multiples of 2^61 - 1, have one hash."""
    return pickle.dumps({(2**61 - 1) * number: None for number in range(1, 2000)})


def _slow(lists: int) -> bytes:
    """A valid pickle that takes very many operations."""
    return b"\x80\x04" + b"]0" * lists + b"}."


def test_checkpoint_with_colliding_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(_colliding())
    _refused(path, "large number as a key")
    path.write_bytes(pickle.dumps({float(2**61 * number): None for number in range(1, 2000)}))
    _refused(path, "float as a key")


def test_exceeded_import_limit_is_named_with_its_option(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(_slow(2_400_000))
    assert "1 seconds of processor time" in _refused(path, "--max-seconds", replace(DEFAULT_LIMITS, cpu_seconds=1))
    assert "more than 1 seconds;" in _refused(path, "--max-seconds", replace(DEFAULT_LIMITS, wall_seconds=1))
    path.write_bytes(b"\x80\x04\x8e" + (400 << 20).to_bytes(8, "little"))
    with path.open("ab") as file:
        file.truncate(500 << 20)  # a text of 400 MiB, mostly a hole in the file
    assert "0.75 GiB of memory" in _refused(path, "--max-memory-gib", replace(DEFAULT_LIMITS, memory_bytes=768 << 20))
    options = ["bundle", "import", str(path), str(tmp_path / "out"), "--max-memory-gib", "0.75"]
    result = CliRunner().invoke(app, options)
    assert isinstance(result.exception, BundleError) and "0.75 GiB" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_long_name_with_control_codes_is_shortened_and_escaped(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"\x1b[2J" + "G" * 10_000_000: 1}))
    assert r"\x1b[2JGGG" in _refused(path, "has no G_ema")
    path.write_bytes(b"c" + b"\x1b]0;a\x07" * 100_000 + b"\nb\n.")
    assert r"\x1b]0;a\x07" in _refused(path, "refers to")


def test_import_leaves_no_files_in_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"G_ema": generator()}))
    assert read_official(path).generator.config.img_resolution == 16
    path.write_bytes(b"\x80\x04}.")
    _refused(path, "has no G_ema")
    assert not list(scratch.glob("dermis-import-*"))


def test_full_disk_is_named_in_import_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"G_ema": generator()}))
    with pytest.raises(BundleError, match="temporary folder.*No space left.*TMPDIR"):
        write_stored(path, "G_ema", tmp_path)
