"""A training run's whole state in one safetensors file, replaced atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dermis.errors import TrainingError, escape
from dermis.files import atomic_write

FORMAT = "dermis-gan-checkpoint-1"


def save_checkpoint(
    path: Path,
    modules: Mapping[str, torch.nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write a checkpoint completely or not at all.

    Raises:
        TrainingError: A value is not finite or the file cannot be written. An older checkpoint is kept.
    """
    flat = flatten(modules, optimizers, tensors, path)
    try:
        with atomic_write(path) as partial:
            save_file(flat, partial, metadata={"format": FORMAT, "state": json.dumps(dict(state))})
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise TrainingError(f"{path}: cannot save the checkpoint ({reason}); the last good one is kept") from error


def flatten(
    modules: Mapping[str, torch.nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
    path: Path,
) -> dict[str, Tensor]:
    """Copies of all tensors on the CPU, by the names under which `fill` takes them, to be saved at `path`.

    TrainingError if a value is not finite.
    """
    flat: dict[str, Tensor] = {f"tensor/{name}": value for name, value in tensors.items()}
    for name, module in modules.items():
        flat |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            flat |= {f"{name}/{index}/{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    flat = {key: value.detach().cpu().contiguous().clone() for key, value in flat.items()}
    broken = next((key for key, value in flat.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise TrainingError(f"{path}: not saved, because {broken} has values that are not finite: the run has diverged")
    return flat


def read_state(path: Path) -> dict[str, Any]:
    """The scalars of a checkpoint; TrainingError if the file is none."""
    state: dict[str, Any] = json.loads(read_header(path, FORMAT, "checkpoint")["state"])
    return state


def read_header(path: Path, expected_format: str, kind: str) -> dict[str, str]:
    """The metadata of a safetensors file. TrainingError, which calls it a `kind`, if it has another format."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: not a readable {kind} ({escape(error)})") from error
    if metadata.get("format") != expected_format:
        raise TrainingError(f"{path}: not a {expected_format} file")
    return metadata


def read_flat(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
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
            slots.setdefault(int(index), {})[slot] = _laid_out_like(parameters[int(index)], value)
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, tensor in tensors.items():
        tensor.copy_(flat[f"tensor/{name}"])


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """The fused optimizer walks over parameters and their averages in the order of memory: their layouts must agree."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value) if value.shape == parameter.shape else value


def _under(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}/"): value for key, value in flat.items() if key.startswith(f"{prefix}/")}
