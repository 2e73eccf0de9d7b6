"""Tests of training: the loop resumes bit for bit, learns, and stops before it saves values that are not finite."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dermis.bundle import load_generator, open_bundle
from dermis.errors import BundleError, DataError, TrainingError
from dermis.imaging import contact_sheet, decode
from training.checkpoint import read_state
from training.data.images import ImageDataset
from training.data.isic import load_isic
from training.gan.augment import AdaptiveP
from training.gan.batches import batches
from training.gan.config import GanConfig, auto_config
from training.gan.divergence import PATIENCE, DivergenceCheck
from training.gan.loop import train
from training.gan.snapshot import GeneratorOrigin, sample_grid, write_snapshot
from training.gan.state import new_state, save_state
from training.gan.step import training_step

CPU = torch.device("cpu")


def _dataset(count: int = 24, resolution: int = 8) -> ImageDataset:
    images = np.random.default_rng(0).integers(0, 256, (count, resolution, resolution, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % 2
    return ImageDataset(images, labels, ("benign", "malignant"), tuple(map(str, range(count))), "0" * 64)


def _config(kimg: float, **changes: object) -> GanConfig:
    small = {"z_dim": 8, "w_dim": 8, "channel_base": 64, "channel_max": 8, "batch": 4, "r1_interval": 2}
    return auto_config(8, 2, total_kimg=kimg, augment_kimg=0.1, **(small | changes))


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    """Bit for bit: weights, optimizer, augmentation strength, everything a checkpoint holds."""
    short, long = (_config(kimg, augment_target=-1.0) for kimg in (0.020, 0.048))  # a target that p rises towards
    whole, _ = train(_dataset(), long, tmp_path / "whole", device=CPU, progress_bar=False)
    train(_dataset(), short, tmp_path / "parts", device=CPU, progress_bar=False)
    parts, progress = train(_dataset(), long, tmp_path / "parts", device=CPU, resume=True, progress_bar=False)
    assert progress.nimg == 48
    assert progress.stats["p"] > 0, "the run must have augmented, or the resumed p is not tested"
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    states = [read_state(tmp_path / run / "checkpoint.safetensors") for run in ("whole", "parts")]
    assert states[0]["adaptive"] == states[1]["adaptive"]
    log = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [entry["nimg"] for entry in log] == list(range(4, 49, 4))


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    train(_dataset(), _config(0.004), tmp_path, device=CPU, progress_bar=False)
    with pytest.raises(TrainingError, match="--resume"):
        train(_dataset(), _config(0.008), tmp_path, device=CPU, progress_bar=False)
    with pytest.raises(TrainingError, match="r1_gamma"):
        train(_dataset(), _config(0.008, r1_gamma=3.0), tmp_path, device=CPU, resume=True, progress_bar=False)
    with pytest.raises(TrainingError, match="channel_max"):
        other = _config(0.008, channel_max=4)
        train(_dataset(), other, tmp_path, device=CPU, resume=True, allow_changes=True, progress_bar=False)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match="is not a readable checkpoint"):
        train(_dataset(), _config(0.008), tmp_path, device=CPU, resume=True, progress_bar=False)


def test_two_trainings_cannot_run_in_one_folder(tmp_path: Path) -> None:
    met = []

    def meanwhile(out: Path, state: object) -> None:
        with pytest.raises(TrainingError, match="another training is running") as caught:
            train(_dataset(), _config(0.004), out, device=CPU, resume=True, progress_bar=False)
        met.append(str(caught.value))

    train(_dataset(), _config(0.008), tmp_path, device=CPU, on_snapshot=meanwhile, progress_bar=False)
    assert len(met) == 2, "at the start, and at the end, when there is a checkpoint"
    assert all(message.startswith(f"{tmp_path}: ") for message in met)
    _, after = train(_dataset(), _config(0.012), tmp_path, device=CPU, resume=True, progress_bar=False)
    assert after.nimg == 12


def test_options_changed_at_resume_are_listed_in_card(tmp_path: Path) -> None:
    train(_dataset(), _config(0.004), tmp_path, device=CPU, progress_bar=False)
    changed = replace(_config(0.008, batch=2, mbstd_group_size=2, r1_gamma=0.5, augment_p=0.25), augment_target=None)
    origin = GeneratorOrigin("moles", "folder", "CC0-1.0", "nobody")
    _, progress = train(
        _dataset(),
        changed,
        tmp_path,
        device=CPU,
        resume=True,
        allow_changes=True,
        on_snapshot=write_snapshot(_dataset(), changed, origin, CPU),
        progress_bar=False,
    )
    assert progress.nimg == 8
    (change,) = progress.changes
    assert change["kimg"] == 0.004 and change["before"]["batch"] == 4 and change["after"]["batch"] == 2
    state = read_state(tmp_path / "checkpoint.safetensors")
    assert state["adaptive"]["p"] == 0.25 and state["adaptive"]["target"] is None
    assert "| 0.0 | `batch` | 4 | 2 |" in open_bundle(tmp_path / "bundle").model_card
    _, again = train(_dataset(), changed, tmp_path, device=CPU, resume=True, progress_bar=False)
    assert len(again.changes) == 1


def test_divergence_stops_and_keeps_the_last_state(tmp_path: Path) -> None:
    train(_dataset(), _config(0.004), tmp_path, device=CPU, progress_bar=False)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    wild = _config(0.4, learning_rate=1e18)
    with pytest.raises(TrainingError, match="diverged.*finite.*last good state is in .*checkpoint"):
        train(_dataset(), wild, tmp_path, device=CPU, resume=True, allow_changes=True, progress_bar=False)
    with pytest.raises(TrainingError, match="diverged.*start again"):
        train(_dataset(), wild, tmp_path / "fresh", device=CPU, progress_bar=False)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not (tmp_path / "fresh" / "checkpoint.safetensors").exists()


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """Injected where no loss shows it: into an average that only the checkpoint and the bundle hold."""
    train(_dataset(), _config(0.004), tmp_path, device=CPU, progress_bar=False)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    state = new_state(_config(0.004), CPU)
    state.G_ema.get_parameter("synthesis.b8.conv1.bias")[3] = math.nan
    with pytest.raises(TrainingError, match="G_ema/synthesis.b8.conv1.bias.*not finite"):
        save_state(tmp_path / "checkpoint.safetensors", state, _config(0.004), _dataset())
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_non_finite_gradients_are_tolerated_for_limited_steps(tmp_path: Path) -> None:
    health, sound = DivergenceCheck(tmp_path / "none"), {"G": 1.0, "D": 1.0, "G_gradient": 1.0}
    non_finite = sound | {"G_gradient": math.inf}
    for stats in [*[non_finite] * (PATIENCE - 1), sound, *[non_finite] * (PATIENCE - 1)]:
        health.check(1.0, stats)
    with pytest.raises(TrainingError, match="gradients"):
        health.check(1.0, non_finite)
    with pytest.raises(TrainingError, match="a loss is above 10000"):
        DivergenceCheck(tmp_path / "none").check(1.0, sound | {"D": 1e6})


def test_non_finite_gradient_of_weight_is_replaced(tmp_path: Path) -> None:
    """A NaN in the gradient of one weight stops neither that weight for ever nor any other."""
    state, config = new_state(_config(0.004), CPU), _config(0.004)
    phases = state.phases(config)
    weight = state.D.get_parameter("b4.out.weight")
    handle = weight.register_hook(lambda gradient: gradient.index_fill(1, torch.tensor([0]), math.nan))
    with closing(batches(_dataset(), config, 0)) as real:
        stats = training_step(state, phases, _dataset(), next(real), config)
        assert math.isnan(stats["D_gradient"]) and math.isfinite(stats["D"])
        handle.remove()
        before = weight.detach().clone()
        stats = training_step(state, phases, _dataset(), next(real), config)
    assert all(math.isfinite(value) for value in stats.values())
    assert (weight != before).all()


def test_half_precision_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="fp16 needs a CUDA device"):
        train(_dataset(), _config(0.004, precision="fp16"), tmp_path / "run", device=CPU, progress_bar=False)
    assert not (tmp_path / "run").exists()


def test_bf16_training_statistics_nearly_equal_those_of_fp32(tmp_path: Path) -> None:
    stats = {}
    for precision in ("fp32", "bf16"):
        _, progress = train(_dataset(), _config(0.004, precision=precision), tmp_path / precision, device=CPU)
        stats[precision] = progress.stats
    assert stats["bf16"] != stats["fp32"]
    assert stats["bf16"] == pytest.approx(stats["fp32"], rel=0.05)


@pytest.mark.full
def test_generator_learns_the_colour_of_each_class(tmp_path: Path) -> None:
    """Two plain colours, one for each class: after a few hundred steps the label must select the colour."""
    images = np.zeros((32, 8, 8, 3), dtype=np.uint8)
    images[::2] = (230, 40, 40)
    images[1::2] = (40, 40, 230)
    labels = np.arange(32, dtype=np.int64) % 2
    dataset = ImageDataset(images, labels, ("red", "blue"), tuple(map(str, range(32))), "1" * 64)
    config = _config(3.0, batch=8, augment="none", pl_weight=0.0, ema_kimg=0.1, channel_base=256, channel_max=32)
    generator, _ = train(dataset, config, tmp_path, device=CPU, progress_bar=False)
    z = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    red, blue = (generator(z, torch.eye(2)[[label] * 8], noise_mode="const").mean(dim=(0, 2, 3)) for label in (0, 1))
    assert red[0] - red[2] > blue[0] - blue[2] + 0.5


def test_bundle_of_run_generates_images_shown_in_its_card(tmp_path: Path) -> None:
    dataset, config = _dataset(), _config(0.008)
    origin = GeneratorOrigin("tiny", "folder", "CC0-1.0", "nobody")
    generator, _ = train(
        dataset,
        config,
        tmp_path,
        device=CPU,
        progress_bar=False,
        on_snapshot=write_snapshot(dataset, config, origin, CPU),
    )
    bundle = open_bundle(tmp_path / "bundle")
    assert (bundle.name, bundle.class_names, bundle.provenance["kimg"]) == ("tiny", ("benign", "malignant"), 0.008)
    assert "0.0 thousand images" in bundle.model_card
    assert "benign (12), malignant (12)" in bundle.model_card
    stored = load_generator(bundle)
    shown = contact_sheet(sample_grid(generator, CPU), columns=8)
    assert np.array_equal(decode((tmp_path / "samples-000000.png").read_bytes()), shown)
    picture = decode((tmp_path / "bundle" / "samples.webp").read_bytes())
    assert picture.shape == shown.shape and np.abs(picture.astype(int) - shown).mean() < 16
    difference = sample_grid(stored, CPU).astype(int) - sample_grid(generator, CPU)
    assert np.abs(difference).max() <= 1, "fp16 storage changed the images"


def test_invalid_bundle_name_is_refused_before_training() -> None:
    with pytest.raises(BundleError, match="name"):
        write_snapshot(_dataset(), _config(1.0), GeneratorOrigin("My Demo", "folder", "", ""), CPU)


def test_adaptive_p_follows_the_sign_of_real_logits() -> None:
    adaptive = AdaptiveP(p=0.5, target=0.6, interval=4, kimg=1.0)
    for step in range(1, 5):
        adaptive.observe(torch.ones(8))
        r_t = adaptive.update(step, 8)
    assert r_t == 1.0
    assert adaptive.p == pytest.approx(0.5 + 8 * 4 / 1000)
    adaptive.observe(-torch.ones(8))
    adaptive.update(8, 8)
    assert adaptive.p == pytest.approx(0.5)


def _write_isic(folder: Path, rows: list[tuple[str, str]], broken: tuple[str, ...] = ()) -> None:
    (folder / "images").mkdir(parents=True)
    lines = ["isic_id,target,age_approx", *(f"{name},{target}," for name, target in rows)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    for i, (name, _) in enumerate(rows):
        path = folder / "images" / f"{name}.jpg"
        if name in broken:
            path.write_bytes(b"\xff\xd8 not a picture")
        else:
            Image.new("RGB", (40, 30), (i * 20, 0, 255)).save(path)


def test_isic_folder_is_read_cropped_and_labelled(tmp_path: Path) -> None:
    _write_isic(tmp_path, [("ISIC_2", "malignant"), ("ISIC_1", "benign"), ("ISIC_3", "benign")])
    dataset = load_isic(tmp_path, 16, cache=tmp_path / "cache", progress=False)
    assert dataset.ids == ("ISIC_1", "ISIC_2", "ISIC_3")
    assert dataset.class_names == ("benign", "malignant")
    assert dataset.labels.tolist() == [0, 1, 0]
    assert dataset.images.shape == (3, 16, 16, 3)
    again = load_isic(tmp_path, 16, cache=tmp_path / "cache", progress=False)
    assert np.array_equal(again.images, dataset.images)
    Image.new("RGB", (40, 30), (9, 99, 9)).save(tmp_path / "images" / "ISIC_2.jpg")
    changed = load_isic(tmp_path, 16, cache=tmp_path / "cache", progress=False)
    assert changed.sha256 != dataset.sha256
    assert not np.array_equal(changed.images, dataset.images), "a stale cache was used"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "metadata.csv").unlink(), "metadata.csv"),
        (lambda folder: (folder / "images" / "ISIC_1.jpg").unlink(), "ISIC_1"),
        (lambda folder: (folder / "metadata.csv").write_text("isic_id,target\nISIC_1,\n"), "ISIC_1"),
        (lambda folder: (folder / "metadata.csv").write_text("a,b\n1,2\n"), "--image-column"),
        (lambda folder: (folder / "images" / "ISIC_1.jpg").write_bytes(b"\xff\xd8 broken"), "ISIC_1.jpg"),
    ],
)
def test_unusable_folders_are_refused_by_name(tmp_path: Path, spoil: object, message: str) -> None:
    _write_isic(tmp_path, [("ISIC_1", "benign"), ("ISIC_2", "malignant")])
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        load_isic(tmp_path, 16, progress=False)
