"""The contents of a checkpoint as plain data, for the process that uses it.

`write_stored` puts the networks of a pickle into a folder: their modules, attributes and options as JSON, their weights
as safetensors. `read_stored` reads that folder. No pickle leaves the process that reads the foreign one.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dermis.errors import BundleError, escape
from dermis.official.foreign import describe_foreign
from dermis.official.persisted import (
    Checkpoint,
    array,
    mapping,
    module,
    modules,
    plain,
    read_checkpoint,
    shape,
    tensors,
)

MAX_FILE_BYTES = 4 << 30  # an official 1024 px snapshot has 380 MB
RESULT = "checkpoint.json"
ATTRIBUTES = (
    "z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "num_ws", "num_layers", "w_avg_beta", "in_channels",
    "resolution", "cmap_dim", "architecture", "activation", "up", "down", "conv_clamp", "use_fp16", "use_noise", "num_conv",
    "weight_gain", "bias_gain", "act_gain", "padding", "group_size", "num_channels",
)  # fmt: skip
"""Attributes of modules that decide how a network computes."""
_MAX_RESULT_CHARACTERS = 16_000_000


@dataclass(frozen=True)
class StoredModule:
    """A module of a network: the name of its class, and its values of `ATTRIBUTES`."""

    class_name: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class StoredNetwork:
    """A network as the file describes it."""

    modules: Mapping[str, StoredModule]
    """Modules by path; "" is the network itself."""
    positional: Sequence[Any]
    """Arguments of the constructor by position."""
    named: Mapping[str, Any]
    """Arguments of the constructor by name."""
    shapes: Mapping[str, Sequence[int]]
    """Shapes of all parameters and buffers, by their state_dict name."""

    def attribute(self, path: str, name: str, default: Any = None) -> Any:
        """Return an attribute of the module at `path`, or `default` if there is no such module or attribute."""
        stored = self.modules.get(path)
        return default if stored is None else stored.attributes.get(name, default)

    def children(self, path: str = "") -> list[str]:
        """Return the names of the modules directly inside the one at `path`."""
        prefix = f"{path}." if path else ""
        below = [name.removeprefix(prefix) for name in self.modules if name and name.startswith(prefix)]
        return [name for name in below if "." not in name]


@dataclass(frozen=True)
class StoredCheckpoint:
    """The networks of a file, and its information on the training set. `weights_file(folder, name)` has the weights."""

    networks: Mapping[str, StoredNetwork]
    training_set: Mapping[str, Any]
    """Values of training_set_kwargs that are texts or numbers."""
    sha256: str


def weights_file(folder: Path, network: str) -> Path:
    """Return the path of the weights of a network that `write_stored` wrote."""
    return folder / f"{network}.safetensors"


# -- reading the pickle


def write_stored(path: Path, generator: str, folder: Path) -> None:
    """Read an official pickle and write `generator` ("G_ema" or "G") and D, if it has one, into a folder.

    Raises:
        BundleError: The file is not an official checkpoint, is damaged, or holds what no official checkpoint does.
        OSError: The file cannot be read, or the folder not written.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise BundleError(f"is larger than {MAX_FILE_BYTES:,} bytes; this is not a StyleGAN2-ADA checkpoint")
    if size == 0:
        raise BundleError("is empty; the download failed: download the checkpoint itself again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if reason := describe_foreign(stream, size):
            raise BundleError(reason)
        stream.seek(0)
        checkpoint = read_checkpoint(stream)
        digest = hashlib.sha256(stream).hexdigest()
    values = checkpoint.values
    if values.get(generator) is None:
        entries = ", ".join(sorted(values)) if len(values) <= 20 else f"{len(values):,} other entries"
        raise BundleError(
            f"has no {generator} (it holds {escape(entries) or 'nothing'}); choose another network or file"
        )
    names = [name for name in (generator, "D") if values.get(name) is not None]
    result = StoredCheckpoint(
        {name: _store(checkpoint, values[name], name, size, folder) for name in names},
        _training_set(values.get("training_set_kwargs")),
        digest,
    )
    text = json.dumps(asdict(result))
    if len(text) > _MAX_RESULT_CHARACTERS:
        raise BundleError("has a larger configuration than any official checkpoint; it is damaged or tampered with")
    (folder / RESULT).write_text(text)


def _store(checkpoint: Checkpoint, record: Any, name: str, file_bytes: int, folder: Path) -> StoredNetwork:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    parts = modules(module(record, name))
    positional = plain(parts[""].state.get("_init_args", ()))
    named = plain(parts[""].state.get("_init_kwargs", {}))
    if not isinstance(positional, list) or not isinstance(named, dict):
        raise BundleError(f"{name}: _init_args or _init_kwargs are malformed; the file is damaged or tampered with")
    stored = {
        path: StoredModule(
            part.class_name, {key: _attribute(part.state[key]) for key in ATTRIBUTES if key in part.state}
        )
        for path, part in parts.items()
    }
    records = tensors(parts)
    shapes = {key: shape(record, f"{name}.{key}") for key, record in records.items()}
    if sum(math.prod(size) for size in shapes.values()) > file_bytes:
        raise BundleError(f"{name}: the file is too small for its tensors; it is damaged or tampered with")
    weights = {key: array(checkpoint, record, f"{name}.{key}") for key, record in records.items()}
    checkpoint.storages.clear()
    try:
        save_file(weights, os.fspath(weights_file(folder, name)))
    except SafetensorError as error:
        raise BundleError(
            f"its weights cannot be written to the temporary folder ({escape(error)}); set TMPDIR to another folder"
        ) from None
    return StoredNetwork(stored, positional, named, shapes)


def _attribute(record: Any) -> Any:
    """Return an attribute as a plain value.

    Any other value is replaced by a text that differs from every valid value, so that later checks refuse it.
    """
    try:
        return plain(record)
    except BundleError as error:
        return f"({error})"


def _training_set(record: Any) -> dict[str, Any]:
    options = mapping(record, "training_set_kwargs") if record is not None else {}
    plain_values = {key: value for key, value in options.items() if isinstance(value, str | int | float)}
    return {key: plain(value) for key, value in plain_values.items()}


# -- reading what was written


def read_stored(folder: Path) -> StoredCheckpoint:
    """Read what `write_stored` wrote into a folder."""
    content = json.loads((folder / RESULT).read_text())
    networks = {
        name: StoredNetwork(
            {path: StoredModule(**part) for path, part in network.pop("modules").items()},
            shapes={key: tuple(size) for key, size in network.pop("shapes").items()},
            **network,
        )
        for name, network in content["networks"].items()
    }
    return StoredCheckpoint(networks, content["training_set"], content["sha256"])
