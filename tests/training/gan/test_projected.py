"""Tests of the projected discriminator: fixed features, trained scales, and a training run with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dermis.errors import TrainingError
from dermis.networks import one_hot
from training.data.images import ImageDataset
from training.gan.config import auto_config
from training.gan.loop import train
from training.gan.loss import HINGE
from training.gan.projected import ProjectedDiscriminator

CPU = torch.device("cpu")
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
LABELS = one_hot([0, 1, 0, 1], 2)


@pytest.fixture(scope="module")
def judge() -> ProjectedDiscriminator:
    torch.manual_seed(0)
    return ProjectedDiscriminator(2, seed=3).eval()


def test_logits_of_image_do_not_depend_on_batch(judge: ProjectedDiscriminator) -> None:
    together = judge(IMAGES, LABELS)
    alone = torch.cat([judge(IMAGES[i : i + 1], LABELS[i : i + 1]) for i in range(4)])
    assert together.shape == (4, 4)
    assert torch.allclose(together, alone, atol=1e-4)
    assert not torch.allclose(together, judge(IMAGES, LABELS.flip(0)), atol=1e-3)  # the label matters


def test_logits_depend_on_variation_within_group() -> None:
    torch.manual_seed(0)
    judge = ProjectedDiscriminator(0, seed=3, mbstd_group_size=4).eval()
    group, copies = judge(IMAGES, None), judge(IMAGES[:1].expand(4, -1, -1, -1), None)
    assert not torch.allclose(group[0], copies[0], atol=1e-4), "the same image among others and among its copies"


def test_fixed_part_of_discriminator_depends_only_on_seed(judge: ProjectedDiscriminator) -> None:
    same, other = (ProjectedDiscriminator(2, seed=seed).eval() for seed in (3, 4))
    same.load_state_dict(judge.state_dict())
    other.load_state_dict(judge.state_dict())
    assert torch.equal(same(IMAGES, LABELS), judge(IMAGES, LABELS))
    assert not torch.allclose(other(IMAGES, LABELS), judge(IMAGES, LABELS), atol=1e-3)


def test_discriminator_for_256_px_detects_single_pixel_detail() -> None:
    """A pattern of single pixels vanishes when it is halved: a discriminator for 256 px must see it."""
    checker = (torch.arange(256)[:, None] + torch.arange(256)) % 2 * 2.0 - 1
    images = torch.stack([torch.zeros(3, 256, 256), checker.expand(3, 256, 256)])
    torch.manual_seed(0)
    for resolution, seen in ((64, False), (256, True)):
        with torch.no_grad():
            flat, fine = ProjectedDiscriminator(0, seed=0, resolution=resolution).eval()(images, None)
        assert flat.shape == (4,)
        assert torch.allclose(flat, fine, atol=1e-4) is not seen


@pytest.mark.full
def test_discriminator_learns_on_fixed_features() -> None:
    torch.manual_seed(0)
    D = ProjectedDiscriminator(0, seed=0)
    assert not any("backbone" in name or "across" in name for name in D.state_dict())
    before = [value.clone() for value in D._fixed[0].state_dict().values()]
    optimizer = torch.optim.Adam(D.parameters(), lr=2e-3, betas=(0.0, 0.99))
    smooth = torch.nn.functional.interpolate(IMAGES[:, :, :4, :4], size=(16, 16), mode="bilinear")
    losses = []
    for _ in range(12):
        loss = HINGE.discriminator(D(smooth, None), D(IMAGES, None))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.3
    assert all(torch.equal(a, b) for a, b in zip(before, D._fixed[0].state_dict().values(), strict=True))
    images = smooth.clone().requires_grad_(True)
    logits = D(images, None)
    HINGE.generator(logits, logits).backward()
    assert images.grad is not None and (images.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"moments_weight": 1.0, "projected_levels": 5}, marks=pytest.mark.full),
        {"relativistic": True, "r1_gamma": 0.1, "projected_mbstd": True},
    ],
    ids=["usual", "moments", "relativistic"],
)
def test_resumed_projected_run_equals_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    # Otherwise such a short run would never use them.
    monkeypatch.setattr("training.gan.moments.MIN_GENERATED_IMAGES", 0)
    monkeypatch.setattr("training.gan.step.MOMENTS_INTERVAL", 1)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    dataset = ImageDataset(pixels, np.arange(8) % 2, ("benign", "malignant"), tuple(map(str, range(8))), "0" * 64)
    small = {"z_dim": 8, "w_dim": 8, "channel_base": 64, "channel_max": 8, "batch": 2, "projected": True} | options
    short, long = (auto_config(8, 2, total_kimg=kimg, **small) for kimg in (0.004, 0.008))
    assert long.pl_weight == 0 and long.augment_target is None
    whole, progress = train(dataset, long, tmp_path / "whole", device=CPU, progress_bar=False)
    train(dataset, short, tmp_path / "parts", device=CPU, progress_bar=False)
    parts, _ = train(dataset, long, tmp_path / "parts", device=CPU, resume=True, progress_bar=False)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    if "moments_weight" in options:
        assert progress.stats["moments"] > 0
    if "relativistic" in options:
        assert progress.stats["r1"] > 0 and progress.stats["r2"] > 0


def test_moment_matching_can_be_switched_on_and_off_at_resume(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    dataset = ImageDataset(pixels, np.arange(8) % 2, ("benign", "malignant"), tuple(map(str, range(8))), "0" * 64)
    small = {"z_dim": 8, "w_dim": 8, "channel_base": 64, "channel_max": 8, "batch": 2, "projected": True}
    for kimg, weight in ((0.004, 0.0), (0.008, 2.0), (0.012, 0.0)):
        config = auto_config(8, 2, total_kimg=kimg, moments_weight=weight, **small)
        _, progress = train(dataset, config, tmp_path, device=CPU, resume=True, allow_changes=True, progress_bar=False)
        assert progress.kimg == kimg and ("moments" in progress.stats) is (kimg > 0.004)
    assert [change["after"] for change in progress.changes] == [{"moments_weight": 2.0}, {"moments_weight": 0.0}]


def test_projected_options_require_projected_discriminator() -> None:
    for option, value in (
        ("moments_weight", 1.0),
        ("projected_mbstd", True),
        ("projected_levels", 5),
        ("projected_input", 224),
    ):
        with pytest.raises(TrainingError, match=f"{option}: needs the projected discriminator"):
            auto_config(8, 2, **{option: value})
    with pytest.raises(TrainingError, match="projected_input: 200 must be a multiple of 32"):
        auto_config(8, 2, projected=True, projected_input=200)
    with pytest.raises(TrainingError, match="r1_gamma: the relativistic loss needs gradient penalties"):
        auto_config(8, 2, projected=True, relativistic=True, r1_gamma=0.0)
    assert auto_config(8, 2, projected=True, relativistic=True).r1_gamma > 0
