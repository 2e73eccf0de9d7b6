"""Tests of checkpoints of all kinds of training: what is refused when a run is resumed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from dermis.errors import TrainingError
from training.checkpoint import (
    CHECKPOINT,
    checkpoint_path,
    load_checkpoint,
    locked,
    read_state,
    read_state_of_kind,
    save_checkpoint,
)
from training.federated.config import FederationConfig
from training.federated.server.global_state import GlobalState, save_global


def saved(folder: Path, state: dict[str, object]) -> tuple[Path, torch.nn.Module, torch.optim.Optimizer]:
    """A checkpoint of a network after one step of Adam."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = folder / CHECKPOINT
    save_checkpoint(path, {"network": network}, {"optimizer": optimizer}, {"mean": torch.tensor(2.5)}, state)
    return path, network, optimizer


def test_checkpoint_restores_networks_optimizers_and_state(tmp_path: Path) -> None:
    path, network, optimizer = saved(tmp_path, {"step": 1})
    torch.manual_seed(1)
    other = torch.nn.Linear(3, 2)
    other_optimizer = torch.optim.Adam(other.parameters(), lr=0.1)
    mean = torch.zeros(())
    load_checkpoint(path, {"network": other}, {"optimizer": other_optimizer}, {"mean": mean})
    assert read_state(path) == {"step": 1} and mean.item() == 2.5
    for each, its_optimizer in ((network, optimizer), (other, other_optimizer)):
        its_optimizer.zero_grad()
        each(torch.ones(1, 3)).square().sum().backward()
        its_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(TrainingError, match="out: is not a folder"):
        checkpoint_path(tmp_path / "out", resume=False)


def test_value_that_is_not_finite_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path, network, optimizer = saved(tmp_path, {"step": 1})
    before = path.read_bytes()
    with torch.no_grad():
        network.bias[0] = float("nan")
    with pytest.raises(TrainingError, match="not saved, because network/bias has values that are not finite"):
        save_checkpoint(path, {"network": network}, {"optimizer": optimizer}, {}, {"step": 2})
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ],
)
def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    path, network, _ = saved(tmp_path, {"step": 1})
    before = path.read_bytes()

    def full(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr("training.checkpoint.save_file", full)
    with pytest.raises(TrainingError, match=r"cannot save the checkpoint \(.*No space left.*the previous one is kept"):
        save_checkpoint(path, {"network": network}, {}, {}, {"step": 2})
    with pytest.raises(TrainingError, match=r"cannot save the round \(.*No space left.*the one before is kept"):
        save_global(tmp_path, GlobalState("run", 1, {}), FederationConfig())
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]


def test_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[bool] = []
    monkeypatch.setattr("os.fsync", lambda handle: named.append((tmp_path / CHECKPOINT).exists()))
    path, _, _ = saved(tmp_path, {"step": 1})
    assert named == [False] and path.exists()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("encoder", {"size": 8, "seed": 0}, r"not the checkpoint of a training of this kind \(encoder\)"),
        ("classifier", {"size": 9, "seed": 0}, "was trained with other values of size; use the same options"),
        ("classifier", {"size": 8}, "was trained with other values of seed"),
        ("classifier", {"size": 8, "seed": 0, "batch": 4}, "was trained with other values of batch"),
    ],
)
def test_checkpoint_of_other_kind_or_options_is_refused(
    tmp_path: Path, kind: str, options: dict[str, int], message: str
) -> None:
    path, _, _ = saved(tmp_path, {"kind": "classifier", "config": {"size": 8, "seed": 0}})
    assert read_state_of_kind(path, "classifier", {"size": 8, "seed": 0})["kind"] == "classifier"
    with pytest.raises(TrainingError, match=message) as refused:
        read_state_of_kind(path, kind, options)
    assert str(refused.value).startswith(f"{path}: ")


def test_run_folder_with_checkpoint_needs_resume(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    assert checkpoint_path(tmp_path, resume=False) == path
    path.touch()
    assert checkpoint_path(tmp_path, resume=True) == path
    with pytest.raises(TrainingError, match="already contains a run; add --resume"):
        checkpoint_path(tmp_path, resume=False)


def test_run_folder_lock_is_released_after_block(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(TrainingError, match="another training is running"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
