"""Converted generators on disk, with which a process starts in a second or two and without torch.

The key of an entry is the bundle's digest, the versions of the packages that made it, and the source of the networks, so an
entry is never outdated. Entries are read only from a folder that only its owner can write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from dermis import __version__
from dermis.network_config import GeneratorConfig
from dermis.synthesizer.openvino_cpu import STAGES, Stages, import_openvino

log = logging.getLogger(__name__)

_FORMAT = 1
_DESCRIPTOR = "stages.json"
_ARRAYS = "arrays.npz"
_KEEP_SECONDS = 30 * 24 * 3600.0  # an entry that was not read for so long is removed
# Modules that decide how a network is converted. A change of one of them leads to new entries.
_SOURCES = ("networks.py", "network_config.py", "synthesizer/network.py", "synthesizer/openvino_cpu.py")


def read_stages(folder: Path, digest: str) -> Stages | None:
    """Read the converted generator of a bundle by its digest; None if there is none, or it cannot be trusted."""
    try:
        entry = _entry(folder, digest)
        if not entry.is_dir() or not _is_private(entry):
            return None
        descriptor = json.loads((entry / _DESCRIPTOR).read_text(encoding="utf-8"))
        for name, sha256 in descriptor["files"].items():
            if hashlib.sha256((entry / name).read_bytes()).hexdigest() != sha256:
                raise ValueError(f"{name} differs from {_DESCRIPTOR}")
        core = import_openvino().Core()
        models = {name: core.read_model(entry / f"{name}.xml") for name in STAGES}
        with np.load(entry / _ARRAYS) as arrays:
            w_avg, noise = arrays["w_avg"], arrays["constant_noise"]
        os.utime(entry)
        config = GeneratorConfig(**descriptor["config"])
        return Stages(config, w_avg, noise, tuple(descriptor["resolutions"]), models)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        log.warning("a converted generator cannot be read and is made again: %s", error)
        return None


def write_stages(folder: Path, digest: str, stages: Stages) -> None:
    """Write a converted generator. If the folder cannot be written, a warning is logged, and the next start is as slow."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        entry = _entry(folder, digest)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))  # has mode 0700
        try:
            _write(partial, stages)
            if entry.exists():
                shutil.rmtree(entry)
            partial.rename(entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _remove_old(folder)
    except (OSError, RuntimeError) as error:
        log.warning("the converted generator cannot be kept in %s: %s", folder, error)


def _write(entry: Path, stages: Stages) -> None:
    ov = import_openvino()
    for name in STAGES:
        ov.save_model(stages.models[name], entry / f"{name}.xml", compress_to_fp16=False)
    with (entry / _ARRAYS).open("wb") as file:
        np.savez(file, w_avg=stages.w_avg, constant_noise=stages.constant_noise)
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(entry.iterdir())}
    descriptor = {"config": asdict(stages.config), "resolutions": stages.resolutions, "files": files}
    (entry / _DESCRIPTOR).write_text(json.dumps(descriptor, indent=2) + "\n", encoding="utf-8")


def _entry(folder: Path, digest: str) -> Path:
    return folder / hashlib.sha256(f"{_versions()}\n{digest}".encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _versions() -> str:
    root = Path(__file__).resolve().parents[1]
    sources = hashlib.sha256(b"".join((root / name).read_bytes() for name in _SOURCES)).hexdigest()
    return json.dumps([_FORMAT, __version__, sources, package_version("openvino"), package_version("torch")])


@lru_cache(maxsize=8)
def package_version(name: str) -> str:
    """Return the version of an installed package without importing it; "none" if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _is_private(entry: Path) -> bool:
    """Whether the entry belongs to this user or root, and nobody else can write it."""
    if os.name != "posix":
        return True
    for path in (entry, entry.parent):
        status = path.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            log.warning("%s can be written by others and is not read", path)
            return False
    return True


def _remove_old(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and time.time() - entry.stat().st_mtime > _KEEP_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)
