"""Tests of the compact state of a training run: small files, known rounding, and a resumed run that continues as before."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from dermis.errors import TrainingError
from training.data.images import ImageDataset
from training.gan.batches import batches
from training.gan.compact import (
    load_compact_state,
    read_compact_state,
    save_compact,
    save_compact_state,
    warm_up_factor,
)
from training.gan.config import GanConfig, auto_config
from training.gan.state import GanState, new_state
from training.gan.step import training_step

CPU = torch.device("cpu")


def dataset(count: int = 32) -> ImageDataset:
    """Two classes of plain colours with a little noise: something that a small network learns in a few steps."""
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int64) % 2
    images = np.where(labels[:, None, None, None] == 1, 190, 60) + rng.integers(-30, 30, (count, 16, 16, 3))
    return ImageDataset(images.astype(np.uint8), labels, ("a", "b"), tuple(map(str, range(count))), "0" * 64)


def config(**changes: object) -> GanConfig:
    small = {"z_dim": 16, "w_dim": 16, "channel_base": 512, "channel_max": 32, "batch": 8, "mbstd_group_size": 4}
    return auto_config(16, 2, total_kimg=1.0, **(small | changes))


def run(state: GanState, options: GanConfig, steps: int, warm_up_steps: int = 0) -> list[float]:
    """The discriminator's losses of `steps` more steps."""
    data = dataset()
    phases = state.phases(options)
    real = batches(data, options, state.progress.nimg)
    losses = []
    for step in range(steps):
        factor = warm_up_factor(step, warm_up_steps)
        losses.append(training_step(state, phases, data, next(real), options, rate_factor=factor)["D"])
    real.close()
    return losses


def trained(options: GanConfig, steps: int) -> GanState:
    state = new_state(options, CPU)
    run(state, options, steps)
    return state


@pytest.fixture(scope="module")
def halfway() -> GanState:
    torch.set_num_threads(1)
    return trained(config(), 40)


def test_round_trip_keeps_state_needed_for_next_step(tmp_path: Path, halfway: GanState) -> None:
    summary = save_compact_state(tmp_path / "state", halfway, config(), dataset())
    assert summary.moments == "bf16"
    assert max(summary.rounding.values()) < 2**-11
    weights = sum(p.numel() for module in halfway.modules.values() for p in module.parameters())
    assert summary.bytes < 5 * weights, "2 bytes a weight of three networks, 2 for a second moment of two"
    resumed = new_state(config(seed=0), CPU)
    for parameter in resumed.G.parameters():
        parameter.data.zero_()
    assert load_compact_state(tmp_path / "state", resumed, config(), dataset())
    for name, module in halfway.modules.items():
        for (key, exact), value in zip(
            module.state_dict().items(), resumed.modules[name].state_dict().values(), strict=True
        ):
            assert value.dtype == exact.dtype
            assert torch.allclose(value, exact, rtol=2**-10, atol=1e-7), (name, key)
    for name, optimizer in halfway.optimizers.items():
        ours = resumed.optimizers[name].state_dict()["state"]
        for index, slots in optimizer.state_dict()["state"].items():
            assert ours[index]["step"] == slots["step"]
            assert torch.allclose(ours[index]["exp_avg_sq"], slots["exp_avg_sq"], rtol=2**-7, atol=0)
    assert resumed.progress == halfway.progress and resumed.adaptive == halfway.adaptive
    assert torch.equal(resumed.pl_mean, halfway.pl_mean)
    start = [parameter.detach().clone() for parameter in halfway.G.parameters()]
    whole = copy.deepcopy(halfway)
    run(whole, config(), 1)
    run(resumed, config(), 1)
    steps = [
        torch.cat([(after - before).flatten() for after, before in zip(state.G.parameters(), start, strict=True)])
        for state in (whole, resumed)
    ]
    assert (steps[0] - steps[1]).norm() < 0.2 * steps[0].norm(), "the next step is nearly the same"


def test_first_moments_are_stored_where_they_have_an_effect(tmp_path: Path) -> None:
    layer = torch.nn.Linear(100, 100)
    for beta1, kept in ((0.0, False), (0.9, True)):
        optimizer = torch.optim.Adam(layer.parameters(), betas=(beta1, 0.99), fused=True)
        layer(torch.ones(1, 100)).sum().backward()
        optimizer.step()
        save_compact(tmp_path / "state", {"net": layer}, {"opt": optimizer}, {}, {})
        names = {key for path in (tmp_path / "state").iterdir() for key in _keys(path)}
        assert ("opt/0/exp_avg" in names) is kept


def _keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


@pytest.mark.full
def test_resumed_losses_stay_within_noise_of_uninterrupted_run(tmp_path: Path) -> None:
    """Noise: how far the nearest run of another seed is from it. What is compared are mean losses over 40 steps."""
    torch.set_num_threads(1)
    calm = {"learning_rate": 0.001, "r1_gamma": 1.0, "augment": "none"}  # else such small networks behave chaotically
    options, half = config(**calm), 40
    whole = new_state(options, CPU)
    run(whole, options, half)
    for moments in ("bf16", "none"):
        save_compact_state(tmp_path / moments, whole, options, dataset(), moments)  # type: ignore[arg-type]
    expected = float(np.mean(run(whole, options, half)))
    noise = float("inf")
    for seed in (1, 2):
        other = config(seed=seed, **calm)
        noise = min(noise, abs(float(np.mean(run(new_state(other, CPU), other, 2 * half)[half:])) - expected))
    losses = {}
    for moments, warm_up_steps in (("bf16", 0), ("none", 20)):
        resumed = new_state(options, CPU)
        assert load_compact_state(tmp_path / moments, resumed, options, dataset()) is (moments == "bf16")
        losses[moments] = float(np.mean(run(resumed, options, half, warm_up_steps)))
        rates = [group["lr"] for group in resumed.G_opt.param_groups]
        assert rates == [group["lr"] for group in whole.G_opt.param_groups], "the whole rate again"
    print(f"D loss {expected:.4f}, resumed {losses}, noise {noise:.4f}")
    assert all(abs(value - expected) <= noise for value in losses.values())
    broken = new_state(options, CPU)
    load_compact_state(tmp_path / "bf16", broken, options, dataset())
    broken.D.load_state_dict(new_state(options, CPU).D.state_dict())
    assert abs(float(np.mean(run(broken, options, half))) - expected) > noise, "its loss must be detected"


def test_state_parts_are_bounded_and_mixed_parts_are_refused(tmp_path: Path, halfway: GanState) -> None:
    parts = {"part_bytes": 250_000, "parts": 4}
    scalars = {"config": {}, "progress": {}}
    summary = save_compact(tmp_path / "a", halfway.modules, halfway.optimizers, {}, scalars, **parts)
    files = sorted((tmp_path / "a").iterdir())
    assert 1 < len(files) == len(summary.files) <= 4
    assert max(file.stat().st_size for file in files) <= 250_000
    save_compact(tmp_path / "b", halfway.modules, halfway.optimizers, {}, {"progress": {"step": 1}}, **parts)
    (tmp_path / "b" / files[0].name).write_bytes(files[0].read_bytes())
    with pytest.raises(TrainingError, match="different states"):
        read_compact_state(tmp_path / "b")
    files[1].unlink()
    with pytest.raises(TrainingError, match="all parts"):
        read_compact_state(tmp_path / "a")


def test_moments_but_never_networks_are_omitted_to_fit_limit(tmp_path: Path, halfway: GanState) -> None:
    whole = save_compact(tmp_path / "a", halfway.modules, halfway.optimizers, {}, {}, moments="bf16")
    less = save_compact(tmp_path / "a", halfway.modules, halfway.optimizers, {}, {}, moments="none")
    assert whole.moments == "bf16" and less.moments == "none" and less.bytes < whole.bytes
    limit = {"part_bytes": (whole.bytes + less.bytes) // 2 + 2**16, "parts": 1}
    kept = save_compact(tmp_path / "a", halfway.modules, halfway.optimizers, {}, {}, **limit)
    assert kept.moments == "none"
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    with pytest.raises(TrainingError, match="do not fit"):
        save_compact(tmp_path / "a", halfway.modules, halfway.optimizers, {}, {}, part_bytes=less.bytes // 2, parts=1)
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before, "the old state stays"


def test_state_resumes_with_other_rate_but_not_other_network(tmp_path: Path, halfway: GanState) -> None:
    save_compact_state(tmp_path / "state", halfway, config(), dataset())
    other = config(channel_base=256)
    with pytest.raises(TrainingError, match="channel_base"):
        load_compact_state(tmp_path / "state", new_state(other, CPU), other, dataset())
    slower = config(learning_rate=0.001)
    state = new_state(slower, CPU)
    load_compact_state(tmp_path / "state", state, slower, dataset())
    assert state.progress.changes[-1]["after"] == {"learning_rate": 0.001}
    run(state, slower, 1)
    assert state.G_opt.param_groups[0]["lr"] == pytest.approx(0.001 * 4 / 5)


@pytest.mark.full
def test_feature_moments_restart_after_resume(tmp_path: Path) -> None:
    options = config(projected=True, moments_weight=1.0, r1_gamma=0.0, pl_weight=0.0)
    state = trained(options, 2)
    assert state.moments is not None and float(state.moments.seen) == 16
    save_compact_state(tmp_path / "state", state, options, dataset())
    resumed = new_state(options, CPU)
    load_compact_state(tmp_path / "state", resumed, options, dataset())
    assert resumed.moments is not None and float(resumed.moments.seen) == 0
    assert np.isfinite(run(resumed, options, 2)).all()
