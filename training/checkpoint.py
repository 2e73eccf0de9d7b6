"""Checkpoints and run folders, shared by all trainings.

A checkpoint is one safetensors file that holds the whole state of a training and is replaced atomically: all tensors, and
the scalars as JSON in its metadata.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dermis.errors import TrainingError, escape
from dermis.files import atomic_write, try_lock
from training.locks import NO_LOCKS

CHECKPOINT = "checkpoint.safetensors"  # name of the file in the folder of a run
# Also used for encoders and classifiers; stored files contain it, so it cannot change.
FORMAT = "dermis-gan-checkpoint-1"


def save_checkpoint(
    path: Path,
    modules: Mapping[str, torch.nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write a checkpoint completely or not at all.

    Args:
        path: The file. Its folder must exist.
        modules: Networks by name.
        optimizers: Optimizers by name; the names differ from those of the modules.
        tensors: Further tensors by name.
        state: Everything else, as JSON can hold it.

    Raises:
        TrainingError: A value is not finite or the file cannot be written. An older checkpoint is kept.
    """
    flat = flatten(modules, optimizers, tensors, path)
    try:
        write_tensors(path, flat, {"format": FORMAT, "state": json.dumps(dict(state))})
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise TrainingError(f"{path}: cannot save the checkpoint ({reason}); the previous one is kept") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file completely or not at all. It is on the disk when this returns.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        with atomic_write(path) as partial:
            save_file(dict(tensors), partial, metadata=dict(metadata))
            with partial.open("r+b") as file:
                os.fsync(file.fileno())  # so that a power failure cannot leave the name without the content
    except SafetensorError as error:  # for instance if the disk is full
        raise OSError(escape(error)) from error


def flatten(
    modules: Mapping[str, torch.nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
    path: Path,
) -> dict[str, Tensor]:
    """Copy all tensors to the CPU under the names from which `fill` reads them.

    Args:
        modules: Networks by name.
        optimizers: Optimizers by name.
        tensors: Further tensors by name.
        path: The file that they will be saved to, for the error message.

    Raises:
        TrainingError: A value is not finite.
    """
    flat: dict[str, Tensor] = {f"tensor/{name}": value for name, value in tensors.items()}
    for name, module in modules.items():
        flat |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            flat |= {f"{name}/{index}/{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    flat = {key: value.detach().cpu().contiguous().clone() for key, value in flat.items()}
    non_finite = next((key for key, value in flat.items() if not torch.isfinite(value).all()), None)
    if non_finite is not None:
        raise TrainingError(
            f"{path}: not saved, because {non_finite} has values that are not finite: the run has diverged"
        )
    return flat


def read_state(path: Path) -> dict[str, Any]:
    """Read the scalars of a checkpoint. Raises TrainingError if the file is not a checkpoint."""
    state: dict[str, Any] = json.loads(read_header(path, FORMAT, "checkpoint")["state"])
    return state


def read_state_of_kind(path: Path, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Read the scalars of a checkpoint that can be resumed only with the options that it was trained with.

    Args:
        path: The checkpoint. Its scalars have the fields `kind` and `config`.
        kind: Kind of the trained network, such as "classifier".
        options: The options of the run that resumes, without those that can change.

    Raises:
        TrainingError: The file is not a checkpoint of this kind, or an option differs.
    """
    state = read_state(path)
    if state.get("kind") != kind:
        raise TrainingError(f"{path}: is not the checkpoint of a training of this kind ({kind}); choose another --out")
    stored: dict[str, Any] = state["config"]
    changed = sorted(name for name in options.keys() | stored.keys() if options.get(name) != stored.get(name))
    if changed:
        raise TrainingError(
            f"{path}: was trained with other values of {', '.join(changed)}; use the same options, or choose another --out"
        )
    return state


def read_header(path: Path, expected_format: str, kind: str) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    Args:
        path: The file.
        expected_format: The value that its field `format` must have.
        kind: Name of such a file in error messages.

    Raises:
        TrainingError: The file cannot be read or has another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: is not a readable {kind} ({escape(error)})") from error
    if metadata.get("format") != expected_format:
        raise TrainingError(f"{path}: is not a {expected_format} file")
    return metadata


def read_flat(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def load_checkpoint(
    path: Path,
    modules: Mapping[str, torch.nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
) -> None:
    """Fill modules, optimizers and tensors in place."""
    fill(read_flat(path), modules, optimizers, tensors)


def fill(
    flat: Mapping[str, Tensor],
    modules: Mapping[str, torch.nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
) -> None:
    """Fill modules, optimizers and tensors in place with what `flatten` returned, in any floating-point format."""
    for name, module in modules.items():
        module.load_state_dict(_under(flat, name))
    for name, optimizer in optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in _under(flat, name).items():
            index, slot = key.split("/")
            slots.setdefault(int(index), {})[slot] = _in_layout_of(parameters[int(index)], value)
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, tensor in tensors.items():
        tensor.copy_(flat[f"tensor/{name}"])


def _in_layout_of(parameter: Tensor, value: Tensor) -> Tensor:
    # The fused optimizer reads parameters and their averages in the order of memory, so their layouts must agree.
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value) if value.shape == parameter.shape else value


def _under(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}/"): value for key, value in flat.items() if key.startswith(f"{prefix}/")}


def checkpoint_path(out: Path, *, resume: bool) -> Path:
    """Path of the checkpoint of the run in `out`.

    Raises:
        TrainingError: There is a checkpoint and `resume` is false, or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out}: is not a folder; choose another --out")
    checkpoint = out / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise TrainingError(f"{out}: already contains a run; add --resume to continue it, or choose another --out")
    return checkpoint


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make a run folder, and prevent other trainings in it.

    The kernel releases the lock when this process ends, however it ends.

    Raises:
        TrainingError: Another training holds the lock, or the file cannot be locked.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = try_lock(out / "lock")
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise TrainingError(f"{out / 'lock'}: cannot be locked ({error.strerror})") from None
        yield
        return
    if lock is None:
        raise TrainingError(
            f"{out}: another training is running in this folder; wait for it or stop it, or choose another --out"
        )
    try:
        yield
    finally:
        lock.release()


def drop_after(log: Path, last: int, key: str = "nimg") -> None:
    """Remove the lines of a log that a run wrote after its last checkpoint: those whose number `key` is above `last`."""
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if position(line, key) <= last]
    if len(kept) < len(lines):
        with atomic_write(log) as partial:
            partial.write_text("".join(kept), encoding="utf-8")


def position(line: str, key: str = "nimg") -> float:
    """Number `key` of a line of a log; infinity if the line is incomplete."""
    try:
        return float(json.loads(line)[key])
    except (ValueError, KeyError, TypeError):
        return math.inf


def opened_log(log: Path, step: int) -> TextIO:
    """Open the log of a run to append lines with a number `step`, without those of a run that crashed after this step."""
    drop_after(log, step if step else -1, "step")
    return log.open("a", encoding="utf-8")
