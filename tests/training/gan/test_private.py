"""Tests of differential privacy: the bound of a patient's contribution, the noise, the accountant, what is refused."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from scipy.optimize import brentq
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle import open_bundle
from dermis.errors import TrainingError
from dermis.networks import one_hot
from lesions import lesion
from training.checkpoint import read_state
from training.data.images import ImageDataset
from training.data.sources import Record
from training.federated.config import FederationConfig, gan_config
from training.gan.best import Measurements
from training.gan.config import GanConfig, auto_config
from training.gan.loop import train
from training.gan.private.accountant import accounting, epsilon_spent, noise_for, steps_within
from training.gan.private.gradients import clipped_sum_of_patients, discriminator_gradients
from training.gan.private.planning import resolved_privacy
from training.gan.private.sampling import (
    LEDGER,
    PatientImages,
    PatientSampler,
    PrivacyLedger,
    PrivateBatch,
    SecretRandomness,
)
from training.gan.private.units import units_of
from training.gan.projected import ProjectedDiscriminator
from training.gan.snapshot import GeneratorOrigin, write_snapshot
from training.gan.state import GanState, new_state
from training.gan.step import training_step

CPU = torch.device("cpu")
ORIGIN = GeneratorOrigin("moles", "folder", "CC0-1.0", "nobody")
NETWORKS = ["--channel-base", "64", "--channel-max", "8", "--z-dim", "8", "--w-dim", "8"]


def _dataset(patients: int = 12, images_each: int = 2) -> ImageDataset:
    count = patients * images_each
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    ids = tuple(f"{i:03}" for i in range(count))
    records = tuple(Record(name, "a", f"p{i // images_each:02}", "", None, {}) for i, name in enumerate(ids))
    return ImageDataset(images, np.arange(count) % 2, ("a", "b"), ids, "0" * 64, records)


def _config(kimg: float = 0.024, **changes: object) -> GanConfig:
    small = {"z_dim": 8, "w_dim": 8, "channel_base": 64, "channel_max": 8, "batch": 4, "dp": True, "dp_noise": 2.0}
    return auto_config(8, 2, total_kimg=kimg, **(small | changes))


def _sampled(dataset: ImageDataset, config: GanConfig, out: Path, step: int) -> list[PatientImages]:
    """All patients, as they would take part in a step."""
    sampler = PatientSampler(dataset, config, out, None)
    return [sampler._images(unit, step, CPU) for unit in range(len(sampler.units))]


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


@pytest.mark.parametrize("projected", [False, True])
def test_one_patient_changes_the_sum_by_at_most_the_clipping_norm(tmp_path: Path, projected: bool) -> None:
    """Whichever patient leaves, and wherever in the batch: also with augmentation, mirroring and several images each."""
    options = {"projected": True, "projected_width": 8} if projected else {}
    config = _config(dp_clip=0.01, augment_p=0.8, dp_images_per_patient=2, **options)
    patients = _sampled(_dataset(4, 3), config, tmp_path, step=5)
    phases = new_state(config, CPU).phases(config)
    phases.D.eval()
    whole = _flat(clipped_sum_of_patients(phases, patients, 0.8))
    for i in range(len(patients)):
        others = patients[:i] + patients[i + 1 :]
        change = (whole - _flat(clipped_sum_of_patients(phases, others, 0.8))).norm()
        assert 0.0099 < change <= 0.01 * (1 + 1e-6), "exactly one clipped gradient"


def test_a_patient_with_a_gradient_that_is_not_finite_contributes_nothing(tmp_path: Path) -> None:
    config = _config(mirror=False)
    phases = new_state(config, CPU).phases(config)
    patients = _sampled(_dataset(4), config, tmp_path, 0)[:2]
    expected = _flat(clipped_sum_of_patients(phases, patients[:1], 0.0))
    broken = replace(patients[1], images=torch.full((1, 8, 8, 3), math.nan), labels=np.zeros(1, dtype=np.int64))
    assert torch.equal(_flat(clipped_sum_of_patients(phases, [patients[0], broken], 0.0)), expected)


def test_contribution_follows_from_the_name_of_the_patient_and_not_from_its_place(tmp_path: Path) -> None:
    """Otherwise a patient more or less would change the images or the augmentation of all that follow."""
    config = _config(dp_images_per_patient=1)
    whole, dataset = _sampled(_dataset(6, 4), config, tmp_path / "a", 3), _dataset(6, 4)
    fewer = replace(
        dataset, images=dataset.images[4:], labels=dataset.labels[4:], ids=dataset.ids[4:], records=dataset.records[4:]
    )
    for before, after in zip(whole[1:], _sampled(fewer, config, tmp_path / "b", 3), strict=True):
        assert before.seed == after.seed and torch.equal(before.images, after.images)


def test_generated_images_do_not_depend_on_the_patients_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradients have no noise. A device whose random numbers nobody restores after a patient must not matter."""
    config = _config(augment_p=0.8, dp_noise=0.0)
    patient = _sampled(_dataset(4), config, tmp_path, 0)[0]
    monkeypatch.setattr(torch.random, "fork_rng", lambda *_, **__: nullcontext())
    losses = []
    for patients in ([], [patient]):
        phases = new_state(config, CPU).phases(config)
        torch.manual_seed(7)
        z, c = torch.randn(4, 8), torch.eye(2)[[0, 1, 0, 1]]
        losses.append(discriminator_gradients(phases, PrivateBatch(patients, SecretRandomness(1, 0)), z, c, 0.8))
    assert torch.equal(*losses)


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_random_numbers_of_every_device_are_restored_after_a_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The images of other steps follow from them. The device is named only; the images stay on the CPU."""

    class Elsewhere(torch.Tensor):
        device = torch.device(kind)

    config = _config(mirror=False)
    patient = _sampled(_dataset(4), config, tmp_path, 0)[0]
    moved = replace(patient, images=patient.images.as_subclass(Elsewhere))
    asked: list[dict[str, object]] = []

    def fork(**options: object) -> AbstractContextManager[None]:
        asked.append(options)
        return nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    monkeypatch.setattr("training.gan.private.gradients.one_hot", lambda labels, count, _: one_hot(labels, count, CPU))
    phases = new_state(config, CPU).phases(config)
    clipped_sum_of_patients(phases, [moved], 0.0)
    assert asked == [{"devices": [torch.device(kind)], "device_type": kind}]


def test_noise_has_the_stated_deviation_in_every_weight() -> None:
    """With no patient in the step the real part of the gradient is noise alone; the fake part is the same in both runs."""
    config = _config(dp_clip=0.5, dp_noise=3.0)
    phases = new_state(config, CPU).phases(config)

    def gradient(noise: float, step: int) -> torch.Tensor:
        phases.config = replace(config, dp_noise=noise)
        torch.manual_seed(7)
        z, c = torch.randn(4, 8), torch.eye(2)[[0, 1, 0, 1]]
        discriminator_gradients(phases, PrivateBatch([], SecretRandomness(None, step)), z, c, 0.0)
        return _flat([parameter.grad for parameter in phases.D.parameters() if parameter.grad is not None])

    noise = (gradient(3.0, 0) - gradient(0.0, 0)) * config.batch / (3.0 * 0.5)
    assert len(noise) == sum(parameter.numel() for parameter in phases.D.parameters())
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-9
    again = (gradient(3.0, 0) - gradient(0.0, 0)) * config.batch / (3.0 * 0.5)
    assert abs(np.corrcoef(noise, again)[0, 1]) < 5 / math.sqrt(len(noise)), "the same step again has other noise"
    assert abs(noise.mean()) < 5 / math.sqrt(len(noise))


def test_every_patient_is_sampled_independently_with_the_same_probability(tmp_path: Path) -> None:
    config = _config(batch=3)
    source = PatientSampler(_dataset(12), config, tmp_path, None).batches(0, CPU)
    sizes = np.array([len(next(source).patients) for _ in range(1000)])
    assert sizes.min() < 2 and sizes.max() > 5, "the number of patients in a step is not fixed"
    assert abs(sizes.mean() - 3) < 5 * math.sqrt(12 * 0.25 * 0.75 / 1000)
    assert sizes.var() == pytest.approx(12 * 0.25 * 0.75, rel=0.25)


def test_epsilon_agrees_with_published_and_exact_values() -> None:
    """The example of Abadi et al. (arXiv 1607.00133): epsilon 1.26 by moments; the exact value without sampling."""
    abadi = epsilon_spent(10_000, 0.01, 4.0, 1e-5)
    package = accounting()
    from dp_accounting import pld

    exact = pld.PLDAccountant()
    exact.compose(package.PoissonSampledDpEvent(0.01, package.GaussianDpEvent(4.0)), 10_000)
    assert exact.get_epsilon(1e-5) <= abadi <= 1.26
    assert abadi < 1.15 * exact.get_epsilon(1e-5)

    def delta_of(epsilon: float, noise: float) -> float:  # of one Gaussian mechanism, arXiv 1805.06530
        a, b = 1 / (2 * noise), epsilon * noise
        return float(stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b))

    ten_steps = brentq(lambda epsilon: delta_of(epsilon, 5 / math.sqrt(10)) - 1e-5, 0.01, 50)
    assert ten_steps <= epsilon_spent(10, 1.0, 5.0, 1e-5) < 1.15 * ten_steps
    assert epsilon_spent(0, 0.1, 1.0, 1e-5) == 0 and epsilon_spent(1, 0.1, 0.0, 1e-5) == math.inf


def test_noise_and_steps_are_the_limits_that_epsilon_allows() -> None:
    noise = noise_for(3.0, 200, 0.01, 1e-5)
    assert epsilon_spent(200, 0.01, noise, 1e-5) <= 3.0 < epsilon_spent(200, 0.01, noise - 0.001, 1e-5)
    steps = steps_within(3.0, 0.01, noise, 1e-5)
    assert epsilon_spent(steps, 0.01, noise, 1e-5) <= 3.0 < epsilon_spent(steps + 1, 0.01, noise, 1e-5)


def test_epsilon_that_no_noise_gives_is_refused() -> None:
    with pytest.raises(TrainingError, match="^--dp-epsilon: no noise"):
        noise_for(1e12, 10, 0.1, 1e-5)


def test_unit_is_the_patient_then_the_lesion_then_the_image() -> None:
    known = [("p", "l1"), ("p", "l2"), ("", "l2"), ("", "l3"), ("", "l3"), ("", ""), ("", "")]
    records = tuple(Record(str(i), "a", patient, lesion_id, None, {}) for i, (patient, lesion_id) in enumerate(known))
    units = units_of(replace(_dataset(7, 1), records=records))
    assert sorted(sorted(map(int, images)) for images in units.images) == [[0, 1, 2], [3, 4], [5], [6]]
    assert units.kinds == {"patient": 1, "lesion": 1, "image": 2} and units.unit == "patient or lesion or image"
    assert units_of(replace(_dataset(7, 1), records=())).unit == "image"


def test_generator_and_statistics_do_not_depend_on_real_images(tmp_path: Path) -> None:
    """One step with other real images and the same noise: only the discriminator differs afterwards."""

    def step(images: int) -> tuple[GanState, dict[str, float]]:
        dataset = replace(
            _dataset(), images=np.full((24, 8, 8, 3), images, dtype=np.uint8), labels=np.full(24, images % 2)
        )
        config = _config(dp_seed=1, dp_noise=0.1, batch=10)
        state = new_state(config, CPU)
        out = tmp_path / str(images)
        out.mkdir()
        batch = next(PatientSampler(dataset, config, out, None).batches(0, CPU))
        assert len(batch.patients) > 3
        return state, training_step(state, state.phases(config), dataset, batch, config)

    (dark, dark_stats), (bright, bright_stats) = step(10), step(201)
    for name in ("G", "G_ema"):
        for key, value in dark.networks[name].state_dict().items():
            assert torch.equal(value, bright.networks[name].state_dict()[key]), f"{name} {key}"
    assert dark.adaptive == bright.adaptive and torch.equal(dark.pl_mean, bright.pl_mean)
    assert dark_stats["G"] == bright_stats["G"] and dark_stats["D"] == bright_stats["D"]
    assert any(not torch.equal(a, b) for a, b in zip(dark.D.parameters(), bright.D.parameters(), strict=True))


def test_spectral_norms_stay_fixed_within_a_step() -> None:
    """A power iteration for each patient would let a patient change what the next ones contribute."""
    config = _config(projected=True, projected_width=8)
    phases = new_state(config, CPU).phases(config)
    assert isinstance(phases.D, ProjectedDiscriminator)
    batch = PrivateBatch([], SecretRandomness(0, 0))
    before = {name: value.clone() for name, value in phases.D.named_buffers()}
    discriminator_gradients(phases, batch, torch.randn(2, 8), torch.eye(2), 0.0)
    after_two = {name: value.clone() for name, value in phases.D.named_buffers()}
    for name, value in phases.D.named_buffers():
        value.copy_(before[name])
    discriminator_gradients(phases, batch, torch.randn(4, 8), torch.eye(2)[[0, 1, 0, 1]], 0.0)
    assert any(not torch.equal(before[name], value) for name, value in after_two.items()), "one iteration in a step"
    assert all(torch.equal(after_two[name], value) for name, value in phases.D.named_buffers())
    assert phases.D.training


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r1_gamma", 1.0),
        ("augment_target", 0.6),
        ("class_balance", 0.5),
        ("mbstd_group_size", 4),
        ("moments_weight", 1.0),
        ("projected_mbstd", True),
        ("relativistic", True),
        ("dp_clip", 0.0),
        ("dp_delta", 1.0),
        ("dp_epsilon", -1.0),
        ("dp_images_per_patient", 0),
        ("dp_noise", -1.0),
        ("dp_noise", float("nan")),
        ("dp_noise", 1e300),
        ("dp_clip", float("inf")),
    ],
)
def test_options_that_break_the_guarantee_are_refused_by_name(option: str, value: object) -> None:
    extra = {"r1_gamma": 0.0} if option == "augment_target" else {}
    projected = {"projected": option in ("moments_weight", "projected_mbstd", "relativistic")}
    with pytest.raises(TrainingError, match=f"^{option}: "):
        _config(**{option: value}, **extra, **projected)


def test_options_need_dp_and_dp_needs_one_process_and_random_or_public_weights(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="dp_noise: needs --dp"):
        auto_config(8, 2, dp_noise=1.0)
    with pytest.raises(TrainingError, match="--dp: works in one process"):
        _config().check_processes(2)
    with pytest.raises(TrainingError, match="--metric"):
        write_snapshot(_dataset(), _config(), ORIGIN, CPU, measurements=Measurements(_dataset(), "fid", 1.0, 2, CPU))
    with pytest.raises(TrainingError, match="options: dp: "):
        gan_config(FederationConfig(resolution=8, options="batch=4 dp=true dp_noise=1.0", precision="fp32"), CPU)

    def other_weights(state: GanState) -> None:
        state.progress.started_from = {"name": "other", "digest": "", "share_of_G": 1.0, "share_of_D": 1.0}

    with pytest.raises(TrainingError, match="--dp-public-start"):
        train(_dataset(), _config(), tmp_path, device=CPU, begin=other_weights, progress_bar=False)
    for option, config in (
        ("batch", _config(batch=16)),
        ("--dp-delta", _config(dp_delta=0.5)),
        ("dp_noise", _config(dp_noise=None)),
        ("--dp-epsilon", _config(dp_epsilon=0.001)),
    ):
        with pytest.raises(TrainingError, match=option):
            train(_dataset(), config, tmp_path / option.strip("-"), device=CPU, progress_bar=False)
    state = new_state(_config(), CPU)
    with pytest.raises(TrainingError, match="dp: "):
        batch = PrivateBatch([], SecretRandomness(None, 0))
        plain = auto_config(8, 2, batch=4)
        training_step(state, state.phases(plain), _dataset(), batch, plain)


def test_seeded_run_resumes_bit_for_bit_and_epsilon_continues(tmp_path: Path) -> None:
    config = _config(dp_seed=3, dp_epsilon=100.0)
    whole, progress = train(_dataset(), config, tmp_path / "whole", device=CPU, progress_bar=False)
    train(_dataset(), replace(config, total_kimg=0.012), tmp_path / "parts", device=CPU, progress_bar=False)
    assert read_state(tmp_path / "parts" / "checkpoint.safetensors")["progress"]["dp_steps"] == 3
    parts, resumed = train(_dataset(), config, tmp_path / "parts", device=CPU, resume=True, progress_bar=False)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.dp_steps == progress.dp_steps == 6
    assert resumed.stats["epsilon"] == progress.stats["epsilon"] == epsilon_spent(6, 4 / 12, 2.0, 1 / 120)
    log = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["epsilon"] for line in log] == sorted({line["epsilon"] for line in log}) and len(log) == 6


def test_noise_of_a_run_without_seed_is_never_repeated(tmp_path: Path) -> None:
    for run in ("a", "b"):
        train(_dataset(), _config(0.004), tmp_path / run, device=CPU, progress_bar=False)
    a, b = (load_file(tmp_path / run / "checkpoint.safetensors") for run in ("a", "b"))
    assert any(not torch.equal(value, b[name]) for name, value in a.items() if name.startswith("D/"))


def test_steps_that_were_lost_count_and_the_ledger_cannot_be_left_out(tmp_path: Path) -> None:
    config = _config(0.008)
    train(_dataset(), config, tmp_path, device=CPU, progress_bar=False)
    assert json.loads((tmp_path / LEDGER).read_text()) == {"steps": 2}
    (tmp_path / LEDGER).write_text('{"steps": 7}')  # a run that was killed after its checkpoint
    _, progress = train(
        _dataset(), replace(config, total_kimg=0.012), tmp_path, device=CPU, resume=True, progress_bar=False
    )
    assert progress.step == 3 and progress.dp_steps == 8
    (tmp_path / LEDGER).write_text("{}")
    with pytest.raises(TrainingError, match="damaged"):
        train(_dataset(), replace(config, total_kimg=0.016), tmp_path, device=CPU, resume=True, progress_bar=False)
    (tmp_path / LEDGER).unlink()
    with pytest.raises(TrainingError, match=f"{LEDGER}: is missing"):
        train(_dataset(), replace(config, total_kimg=0.016), tmp_path, device=CPU, resume=True, progress_bar=False)
    ledger = PrivacyLedger(tmp_path, None)
    ledger.count_step()
    assert json.loads((tmp_path / LEDGER).read_text())["steps"] >= 1, "on the disk before the step"
    with pytest.raises(TrainingError, match="saved no checkpoint"):
        PrivacyLedger(tmp_path, None)


def test_training_stops_before_epsilon_is_exceeded(tmp_path: Path) -> None:
    target = epsilon_spent(4, 4 / 12, 2.0, 1 / 120)
    _, progress = train(_dataset(), _config(1.0, dp_epsilon=target), tmp_path, device=CPU, progress_bar=False)
    assert progress.step == 4 and not progress.stopped and progress.stats["epsilon"] == target
    more = _config(1.0, dp_epsilon=epsilon_spent(5, 4 / 12, 2.0, 1 / 120))
    _, progress = train(_dataset(), more, tmp_path, device=CPU, resume=True, progress_bar=False)
    assert progress.step == 5, "a larger epsilon continues the run"


def test_no_other_option_changes_when_a_private_run_is_resumed(tmp_path: Path) -> None:
    train(_dataset(), _config(0.004), tmp_path, device=CPU, progress_bar=False)
    plain = auto_config(8, 2, total_kimg=0.008, z_dim=8, w_dim=8, channel_base=64, channel_max=8, batch=4)
    for name, config in (("dp_clip", _config(0.008, dp_clip=2.0)), ("batch", _config(0.008, batch=6)), ("dp", plain)):
        with pytest.raises(TrainingError, match=rf"other values of .*\b{name}\b"):
            train(_dataset(), config, tmp_path, device=CPU, resume=True, allow_changes=True, progress_bar=False)
    unset = _config(0.008, dp_noise=None, dp_epsilon=100.0)
    assert resolved_privacy(unset, _dataset(), tmp_path, resume=True).dp_noise == 2.0, "that of the checkpoint"
    train(_dataset(), replace(plain, total_kimg=0.004), tmp_path / "plain", device=CPU, progress_bar=False)
    with pytest.raises(TrainingError, match="without --dp"):
        resolved_privacy(unset, _dataset(), tmp_path / "plain", resume=True)


@pytest.mark.full
def test_command_trains_with_privacy_and_the_bundle_states_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = ["isic_id,patient_id,target"]
    for i in range(12):
        Image.fromarray(lesion(i, 16)).save(data / f"ISIC_{i:07}.png")
        patient = "" if i > 9 else f"p{i // 2}"
        rows.append(f"ISIC_{i:07},{patient},{'malignant' if i % 3 else 'benign'}")
    (data / "metadata.csv").write_text("\n".join(rows))
    common = ["train", "gan", "--data", str(data), "--resolution", "8", "--out", str(tmp_path / "run"), *NETWORKS]
    common += ["--batch", "2", "--kimg", "0.006", "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    runner = CliRunner()
    for options, named in (
        (["--dp"], "--dp-epsilon"),
        (["--dp-noise", "1"], "dp_noise"),
        (["--dp", "--dp-noise", "1", "--metric", "fid"], "--metric"),
        (["--dp", "--dp-noise", "1", "--r1-gamma", "1"], "r1_gamma"),
        (["--dp", "--dp-noise", "1", "--from", str(tmp_path)], "--dp-public-start"),
    ):
        result = runner.invoke(app, [*common, *options])
        assert result.exit_code != 0 and isinstance(result.exception, TrainingError) and named in str(result.exception)
    result = runner.invoke(app, [*common, "--dp", "--dp-epsilon", "5"])
    assert result.exit_code == 0, result.output
    assert "7 units" in result.output or "5 patients, 2 images" in result.output
    bundle = open_bundle(tmp_path / "run" / "bundle")
    record = bundle.provenance["privacy"]
    assert record["guarantee"] and 4 < record["epsilon"] <= 5 and record["steps"] == 3
    assert record["unit"] == "patient or image" and record["units"] == {"patient": 5, "image": 2}
    assert record["delta"] == pytest.approx(1 / 70) and record["noise"] == "from the operating system"
    assert any("index" in item for item in record["not_covered"])
    assert f"({record['epsilon']:.3g}, 0.0143)-differentially private" in bundle.model_card


def test_card_of_a_run_without_protection_says_so(tmp_path: Path) -> None:
    for name, changes in (("seed", {"dp_seed": 1}), ("noise", {"dp_noise": 0.0})):
        config = _config(0.004, **changes)
        snapshot = write_snapshot(_dataset(), config, ORIGIN, CPU)
        train(_dataset(), config, tmp_path / name, device=CPU, on_snapshot=snapshot, progress_bar=False)
        bundle = open_bundle(tmp_path / name / "bundle")
        assert bundle.provenance["privacy"]["epsilon"] is None and not bundle.provenance["privacy"]["guarantee"]
        assert (
            "**No guarantee**" in bundle.model_card and name in bundle.model_card.partition("**No guarantee**")[2][:60]
        )
