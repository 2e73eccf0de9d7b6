"""The state of a training run in a few small files, for machines that are available for minutes and return little data.

A checkpoint of `training.checkpoint` resumes bit for bit and takes about 20 bytes for each weight. This form takes 2 bytes
for each weight of G, of G_ema and of D, and 2 for each second moment. Differences from a full checkpoint:

weights         rounded to float16 (relative error at most 2^-11; a step of the optimizer changes them more)
first moments   rounded to bfloat16; left out if beta1 is 0, because they are then the last gradient, which no later step uses
second moments  rounded to bfloat16, or left out, and then the optimizer starts from zero: see `warm_up_factor`
feature moments (`training.gan.moments`) left out: the resumed run starts them again, and uses them after 4,000 images

Tensors of a few thousand values (biases, noise strengths, averages), and tensors with values beyond the range of float16, are
stored exactly.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dermis.errors import TrainingError, escape
from training.checkpoint import fill, flatten, read_flat, read_header, write_tensors
from training.data.images import ImageDataset
from training.gan.config import GanConfig
from training.gan.state import GanState, changes_since, restore_scalars, scalars_of

FORMAT = "dermis-gan-compact-1"
Moments = Literal["auto", "bf16", "none"]
PART_BYTES = 15 << 20
PARTS = 4
_MAX_EXACT_VALUES = 4096  # tensors of at most this many values are stored exactly
_MAX_FLOAT16 = 65504.0
_HEADER_BYTES = 64 << 10  # bytes reserved for the header of each part; its JSON is smaller


@dataclass(frozen=True)
class CompactSummary:
    """The files of a compact state, and their rounding errors."""

    files: tuple[str, ...]
    bytes: int
    moments: str  # second moments: "bf16" or "none"
    rounding: dict[str, float]  # network -> |stored - exact| / |exact| over all its weights

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def save_compact_state(
    folder: Path, state: GanState, config: GanConfig, dataset: ImageDataset, moments: Moments = "auto"
) -> CompactSummary:
    """Save the state of a training run with `save_compact`."""
    scalars = scalars_of(state, config, dataset)
    return save_compact(folder, state.networks, state.optimizers, {"pl_mean": state.pl_mean}, scalars, moments=moments)


def load_compact_state(folder: Path, state: GanState, config: GanConfig, dataset: ImageDataset) -> bool:
    """Fill a new state in place. GanProgress.changes lists the options that differ.

    Returns:
        Whether the optimizers have their second moments. If not, multiply the rates of every step by `warm_up_factor`.

    Raises:
        TrainingError: The shape of the networks, the seed or the images differ.
    """
    scalars, moments = read_compact_state(folder)
    changes = changes_since(folder, scalars, config, dataset, allow_changes=True)
    load_compact(folder, state.networks, state.optimizers, {"pl_mean": state.pl_mean})
    restore_scalars(state, scalars, changes)
    return moments != "none"


def save_compact(
    folder: Path,
    modules: Mapping[str, torch.nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    moments: Moments = "auto",
    part_bytes: int = PART_BYTES,
    parts: int = PARTS,
) -> CompactSummary:
    """Replace the folder by at most `parts` files of at most `part_bytes` each. An interruption keeps the old or the new ones.

    Args:
        folder: The folder to write.
        modules: Networks by name.
        optimizers: Optimizers by name.
        tensors: Further tensors by name.
        state: Everything else, as JSON can hold it.
        moments: Whether to store second moments; "auto" stores them if they fit.
        part_bytes: The largest size of a file.
        parts: The largest number of files.

    Raises:
        TrainingError: A value is not finite, or the networks do not fit even without moments.
    """
    exact = flatten(modules, optimizers, tensors, folder)
    unused = {name for name, optimizer in optimizers.items() if _beta1(optimizer) == 0}
    exact = {key: value for key, value in exact.items() if not _has_no_effect(key, unused)}
    stored, same = _without_copies({key: _narrow(key, value, optimizers) for key, value in exact.items()})
    kept: str = moments
    if moments != "bf16":
        packed = None if moments == "none" else _pack(stored, part_bytes, parts)
        kept = "none" if packed is None else "bf16"
    if kept == "none":
        stored = {key: value for key, value in stored.items() if key.partition("/")[0] not in optimizers}
        same = {key: original for key, original in same.items() if key.partition("/")[0] not in optimizers}
    packed = _pack(stored, part_bytes, parts)
    if packed is None:
        size = sum(map(_size, stored.values()))
        raise TrainingError(
            f"{folder}: {size / 2**20:.1f} MiB do not fit into {parts} files of {part_bytes / 2**20:.1f} MiB; "
            "choose smaller networks (channel_base, channel_max), or --moments none"
        )
    rounding = {name: _rounding(name, exact, stored, same) for name in modules}
    header = {"format": FORMAT, "state": json.dumps(dict(state)), "moments": kept, "same": json.dumps(same)}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    names = [f"state-{number}.safetensors" for number in range(len(packed))]
    try:
        partial.mkdir(parents=True)
        for number, (name, part) in enumerate(zip(names, packed, strict=True)):
            write_tensors(partial / name, part, header | {"part": f"{number + 1}/{len(packed)}"})
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(f"{folder}: cannot be written ({error.strerror or error})") from error
    size = sum((partial / name).stat().st_size for name in names)
    _replace(partial, folder)
    return CompactSummary(tuple(names), size, kept, rounding)


def read_compact_state(folder: Path) -> tuple[dict[str, Any], str]:
    """Read the scalars, and whether second moments are stored ("bf16" or "none").

    Raises:
        TrainingError: A part is missing, or belongs to another state.
    """
    headers = [_header(path) for path in _parts(folder)]
    count = len(headers)
    first = headers[0]
    numbers = [header.get("part") for header in headers]
    if sorted(map(str, numbers)) != sorted(f"{number + 1}/{count}" for number in range(count)):
        raise TrainingError(
            f"{folder}: has the parts {', '.join(map(str, numbers))}; all parts of one state are needed"
        )
    if any(header["state"] != first["state"] for header in headers):
        raise TrainingError(f"{folder}: its files are of different states; copy all of one run's files again")
    state: dict[str, Any] = json.loads(first["state"])
    return state, first["moments"]


def load_compact(
    folder: Path,
    modules: Mapping[str, torch.nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
) -> None:
    """Fill modules, optimizers and tensors in place. Optimizers without stored moments are left unchanged."""
    flat: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for path in _parts(folder):
        same = json.loads(_header(path)["same"])
        flat |= read_flat(path)
    # Clones: the optimizer increments the step of every weight, and would increment a shared tensor many times.
    flat |= {key: flat[original].clone() for key, original in same.items()}
    for name, optimizer in optimizers.items():
        for key in [key for key in flat if key.startswith(f"{name}/") and key.endswith("/exp_avg_sq")]:
            if _beta1(optimizer) == 0:  # the optimizer needs the slot, but its value has no effect
                flat[key.removesuffix("_sq")] = torch.zeros_like(flat[key], dtype=torch.float32)
    present = {name: each for name, each in optimizers.items() if any(key.startswith(f"{name}/") for key in flat)}
    try:
        fill(flat, modules, present, tensors)
    except (RuntimeError, KeyError) as error:
        raise TrainingError(f"{folder}: does not fit these networks ({escape(str(error).splitlines()[0])})") from error


def warm_up_factor(step: int, steps: int) -> float:
    """Factor of the learning rates in step 0, 1, ... after resuming without moments.

    Without a second moment, Adam's first steps change every weight by the full rate, whatever its gradient. The rate
    therefore rises linearly from 1 / steps of its value to its full value in `steps` steps. Choose `steps` as the number of
    steps that the moments average over, 1 / (1 - beta2).
    """
    return min((step + 1) / max(steps, 1), 1.0)


def _beta1(optimizer: torch.optim.Optimizer) -> float:
    return max(float(group["betas"][0]) for group in optimizer.param_groups)


def _has_no_effect(key: str, unused: set[str]) -> bool:
    return key.endswith("/exp_avg") and key.partition("/")[0] in unused


def _narrow(key: str, value: Tensor, optimizers: Mapping[str, torch.optim.Optimizer]) -> Tensor:
    if value.dtype != torch.float32 or value.numel() <= _MAX_EXACT_VALUES:
        return value
    if key.partition("/")[0] in optimizers:  # second moments have a larger range than float16
        return value.bfloat16()
    return value.half() if value.abs().max() <= _MAX_FLOAT16 else value


def _without_copies(flat: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Remove tensors that equal an earlier one, such as buffers of G_ema that equal those of G.

    Returns:
        The tensors that are left, and the name of the equal earlier tensor by the name of each removed one.
    """
    kept: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    by_shape: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
    for key, value in flat.items():
        candidates = by_shape.setdefault((value.shape, value.dtype), [])
        original = next((name for name in candidates if torch.equal(kept[name], value)), None)
        if original is None:
            kept[key] = value
            candidates.append(key)
        else:
            same[key] = original
    return kept, same


def _pack(flat: Mapping[str, Tensor], part_bytes: int, parts: int) -> list[dict[str, Tensor]] | None:
    """Divide the tensors into at most `parts` groups; None if they do not fit.

    Tensors are taken by decreasing size, each into the fullest group that can hold it.
    """
    capacity = part_bytes - _HEADER_BYTES
    groups: list[dict[str, Tensor]] = []
    free: list[int] = []
    for key, value in sorted(flat.items(), key=lambda item: -_size(item[1])):
        size = _size(value) + 200  # bytes, with its entry in the header
        candidates = [number for number, space in enumerate(free) if space >= size]
        if not candidates:
            if len(groups) == parts or size > capacity:
                return None
            groups.append({})
            free.append(capacity)
            candidates = [len(groups) - 1]
        fullest = min(candidates, key=lambda number: free[number])
        groups[fullest][key] = value
        free[fullest] -= size
    return groups


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _rounding(name: str, exact: Mapping[str, Tensor], stored: Mapping[str, Tensor], same: Mapping[str, str]) -> float:
    keys = [key for key in exact if key.startswith(f"{name}/") and exact[key].is_floating_point()]
    errors = [(stored[same.get(key, key)].double() - exact[key].double()).square().sum() for key in keys]
    total = sum(float(exact[key].double().square().sum()) for key in keys)
    return math.sqrt(sum(map(float, errors)) / max(total, 1e-300))


def _parts(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("state-*.safetensors"))
    if not paths:
        raise TrainingError(f"{folder}: contains no state (files state-0.safetensors, state-1.safetensors, ...)")
    return paths


def _header(path: Path) -> dict[str, str]:
    return read_header(path, FORMAT, "part of a state")


def _replace(partial: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
