"""Tests that several processes compute the same losses and weights as one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

from dermis.errors import TrainingError
from dermis.networks import minibatch_std
from training.data.images import ImageDataset
from training.distributed import Ranks, joined_ranks
from training.gan import state
from training.gan.augment import AUGMENTATIONS, augment
from training.gan.config import GanConfig, auto_config
from training.gan.loop import train
from training.gan.loss import _interleave, _separate

CPU = torch.device("cpu")


def _dataset() -> ImageDataset:
    images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(24, dtype=np.int64) % 2
    return ImageDataset(images, labels, ("benign", "malignant"), tuple(map(str, range(24))), "0" * 64)


def _config(**changes: object) -> GanConfig:
    """Every phase within four steps, every augmentation, two groups of the mini-batch standard deviation."""
    small = {"z_dim": 8, "w_dim": 8, "channel_base": 128, "channel_max": 8, "r1_gamma": 1.0, "learning_rate": 1e-3}
    lazy = {"r1_interval": 2, "pl_interval": 2, "augment": "bgcfnc", "augment_p": 0.5, "augment_kimg": 0.1}
    return auto_config(16, 2, batch=8, total_kimg=0.032, **(small | lazy | changes))


@contextmanager
def _adam_in_proportion() -> Iterator[None]:
    """Adam whose steps do not enlarge rounding.

    With its usual epsilon a weight whose gradient is zero but for rounding moves as far as any other, so that the order of two
    sums, which differs between processors, would decide where the training goes.
    """
    original = state._adam

    def adam(module: torch.nn.Module, ratio: float) -> torch.optim.Adam:
        optimizer = original(module, ratio)
        for group in optimizer.param_groups:
            group["eps"] = 0.01
        return optimizer

    with patch.object(state, "_adam", adam):
        yield


def _one_rank(rank: int, count: int, port: int, out: Path, changes: dict[str, object]) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ.update(address)
    with joined_ranks(CPU) as ranks, _adam_in_proportion():
        train(_dataset(), _config(**changes), out, device=CPU, ranks=ranks, progress_bar=False)
    # All is computed and written. An interpreter that ends beside another rank is now and then aborted by threads of torch's
    # ("terminate called without an active exception"), which is not what is tested.
    os._exit(0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"relativistic": True, "class_balance": 0.5}, marks=pytest.mark.full),
        pytest.param(
            {
                "projected": True,
                "projected_mbstd": True,
                "moments_weight": 1.0,
                "class_moments_weight": 0.5,
                "augment": "blit",
                "r1_interval": 4,
            },
            marks=pytest.mark.full,
        ),
    ],
    ids=["usual", "relativistic", "projected"],
)
def test_two_processes_train_like_one_process(tmp_path: Path, changes: dict[str, object]) -> None:
    with _adam_in_proportion():
        train(_dataset(), _config(**changes), tmp_path / "one", device=CPU, progress_bar=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_one_rank, (2, port, tmp_path / "two", changes), nprocs=2)
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 4
    lines = list(zip(*[[json.loads(line) for line in log] for log in logs], strict=True))
    projected = "projected" in changes
    # The generator's gradient goes through the kinks of the pretrained network: rounding moves some values to their other side.
    for one, two in lines[: 2 if projected else 4]:
        del one["seconds"], two["seconds"]
        if projected:
            assert two.pop("G_gradient") == pytest.approx(one.pop("G_gradient"), rel=1e-2)
        assert two == pytest.approx(one, rel=1e-3 if projected else 1e-5)
    one, two = (load_file(tmp_path / run / "checkpoint.safetensors") for run in ("one", "two"))
    if projected:  # moments of real images, which do not depend on what was learnt
        assert float(one["moments/real_count"].sum()) > 31 and one["moments/seen"] == two["moments/seen"] == 32
        for name in ("moments/real_count", "moments/real_sum", "moments/real_outer"):
            assert (two[name] - one[name]).norm() < 1e-4 * one[name].norm(), name
    else:
        assert {"r1", "path_length_penalty", "r_t", "p"} <= {name for line in logs[1] for name in json.loads(line)}
        for name, value in one.items():
            assert torch.allclose(two[name], value, rtol=1e-4, atol=1e-6), name
    assert not list((tmp_path / "two").glob("*.partial"))


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_draw_their_parts_of_single_process_random_values(count: int) -> None:
    def draw(n: int) -> list[torch.Tensor]:
        images = torch.zeros(n, 3, 16, 16).contiguous(memory_format=torch.channels_last)
        return [
            torch.rand(n),
            torch.randn((n, 1, 2)),
            torch.randint(5, (n,)),
            torch.randint(1, 9, size=(n, 2)),
            torch.rand(()).expand(n),  # one choice for all
            torch.randn_like(images),
            augment(
                torch.linspace(-1, 1, 3 * 256).reshape(1, 3, 16, 16).expand(n, -1, -1, -1), 0.8, AUGMENTATIONS["bgcfn"]
            ),
        ]

    torch.manual_seed(0)
    whole = draw(12)
    for rank in range(count):
        ranks = Ranks(rank, count)
        torch.manual_seed(0)
        with ranks.draws(12 // count):
            own = draw(12 // count)
        for part, all_of_it in zip(own, whole, strict=True):
            assert torch.allclose(part, ranks.rank_part(all_of_it), atol=1e-5)


def test_batches_that_cannot_be_divided_are_refused() -> None:
    config = auto_config(16, 0, batch=24)  # groups of 4, path length on half of the batch
    config.check_processes(2)
    with pytest.raises(TrainingError, match="batch: 24 must be a multiple of 16 for 4 processes"):
        config.check_processes(4)


def test_one_pass_over_two_batches_keeps_their_groups_apart() -> None:
    a, b = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    apart = torch.cat([minibatch_std(x, 4, 1) for x in (a, b)])
    together = torch.cat(_separate(minibatch_std(_interleave(a, b, 4), 4, 1), 4))
    assert torch.equal(together, apart)
