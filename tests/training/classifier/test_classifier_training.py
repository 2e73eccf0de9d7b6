"""Tests of a classifier's run: reproducible, resumes bit for bit, stops in time, and exports the network that was measured."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle.classifier import MODEL, open_classifier
from dermis.classifier.onnx_session import Classifier
from dermis.classifier.torch_network import load_torch_classifier, read_weights
from dermis.errors import BundleError, DermisError, TrainingError
from tiny_skin import make_skin
from training.checkpoint import CHECKPOINT, locked
from training.classifier import loop
from training.classifier.batches import TrainingSet
from training.classifier.config import ClassifierConfig
from training.classifier.data import RealData, load_real
from training.classifier.network import eight_bit, finished_network, freeze, new_network, set_train_mode
from training.classifier.state import ClassifierProgress
from training.distributed import ALONE, joined_ranks

SIZE = 32
TINY = "test_efficientnet"  # timm's own, for tests


@pytest.fixture(scope="module")
def skin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_skin(tmp_path_factory.mktemp("data") / "skin")


@pytest.fixture(scope="module")
def real(skin: Path) -> RealData:
    return load_real(skin, SIZE, progress=False)


def config(**options: Any) -> ClassifierConfig:
    return ClassifierConfig(**{"architecture": TINY, "size": SIZE, "batch": 8, "epochs": 2, **options})


def run(
    real: RealData, out: Path, options: ClassifierConfig, *, resume: bool = False, **more: Any
) -> ClassifierProgress:
    training = TrainingSet((real.train.images,), real.train.labels)
    network = new_network(options, "none")
    settings = {"data": "d", "ranks": ALONE, "progress_bar": False, **more}
    return loop.train(network, training, real.validation, options, out, resume=resume, **settings)[1]


def untimed(progress: ClassifierProgress) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in progress.history]


# -- the loop


@pytest.mark.full
def test_stopped_and_resumed_run_equals_uninterrupted_run(
    real: RealData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(real, tmp_path / "whole", config(balance="sampling"))
    assert not whole.stopped and whole.epoch == 2
    step, calls = loop.training_step, []

    def interrupted(*args: Any) -> None:
        step(*args)
        calls.append(1)
        if len(calls) in (3, 7, 8):  # in the middle of an epoch, and at its last step
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "training_step", interrupted)
    for resume, steps in ((False, 3), (True, 7), (True, 8)):
        parts = run(real, tmp_path / "parts", config(balance="sampling"), resume=resume)
        assert parts.stopped and len(calls) == steps
    parts = run(real, tmp_path / "parts", config(balance="sampling"), resume=True)
    assert untimed(parts) == untimed(whole)
    ends = [load_file(tmp_path / name / CHECKPOINT) for name in ("whole", "parts")]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 100
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_resume_with_other_options_or_data_is_refused(real: RealData, tmp_path: Path) -> None:
    run(real, tmp_path / "r", config(epochs=1))
    with pytest.raises(TrainingError, match="already contains a run; add --resume"):
        run(real, tmp_path / "r", config(epochs=1))
    with pytest.raises(TrainingError, match="trained with other values of dropout, learning_rate"):
        run(real, tmp_path / "r", config(epochs=1, dropout=0.5, learning_rate=1e-3), resume=True)
    with pytest.raises(TrainingError, match="other images or another split"):
        run(real, tmp_path / "r", config(epochs=1), resume=True, data="e")
    longer = run(real, tmp_path / "r", config(epochs=2), resume=True)
    assert longer.epoch == 2
    assert untimed(longer) == untimed(run(real, tmp_path / "s", config(epochs=2)))


def test_second_training_in_a_folder_is_refused(real: RealData, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(TrainingError, match="another training is running in this folder"):
        run(real, tmp_path, config(epochs=1))
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


def test_logits_and_features_are_measured_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With cuDNN's TF32 they differ from the exported file on the CPU, whose check then fails after the training."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # other tests of the process may have changed it
    network, seen = new_network(config(), "none"), list[bool]()
    network.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    images = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    loop.logits_of(network, images, torch.device("cpu"))
    loop.all_features(network, TrainingSet((images,), np.zeros(2, np.int64)), ALONE, progress_bar=False)
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32


def test_images_are_rotated_in_float32_when_training_in_bfloat16(
    real: RealData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotate, autocast = loop.rotated_and_flipped, list[bool]()

    def watched(*args: Any) -> torch.Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return rotate(*args)

    monkeypatch.setattr(loop, "rotated_and_flipped", watched)
    run(real, tmp_path, config(epochs=1, epoch_images=8, precision="bf16"))
    assert autocast == [False]


def test_training_stops_early_and_lowers_rate_on_plateau(
    real: RealData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.6, 0.8, 0.7, 0.8, 0.75, 0.9])  # the best is the second; an equal one is not better
    monkeypatch.setattr(loop, "auc", lambda labels, scores: [next(values)])
    options = config(epochs=20, patience=3, epoch_images=8)
    progress = run(real, tmp_path / "r", options)
    assert progress.epoch == 5 and progress.best_epoch == 1 and progress.best_value == 0.8
    rates = [row["learning_rate"] for row in progress.history]
    assert rates == pytest.approx([5e-4, 5e-4, 5e-4, 5e-4, 1e-4])
    end = load_file(tmp_path / "r" / CHECKPOINT)
    weight = "backbone.conv_stem.weight"
    assert not torch.equal(end[f"network/{weight}"], end[f"best/{weight}"])
    assert run(real, tmp_path / "r", options, resume=True).epoch == 5  # it has ended, and does not continue


def test_tensorboard_curves_continue_after_resume(real: RealData, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(real, tmp_path, config(epochs=1), loggers=["tensorboard"])
    run(real, tmp_path, config(epochs=2), loggers=["tensorboard"], resume=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("validation_auc")] == [1, 2]


@pytest.mark.parametrize(
    ("options", "moved", "kept"),
    [
        ({"freeze_stages": 2}, "blocks.2", "blocks.1"),
        ({"head_only": True}, "classifier", "conv_head"),
        ({"head_only": True, "rotation": 0, "flips": False}, "classifier", "conv_head"),  # on cached features
    ],
)
def test_frozen_layers_do_not_change(
    real: RealData, tmp_path: Path, options: dict[str, Any], moved: str, kept: str
) -> None:
    run(real, tmp_path / "r", config(epochs=1, **options))
    before = new_network(config(**options), "none").state_dict()
    after = load_file(tmp_path / "r" / CHECKPOINT)
    changed = {name for name, value in before.items() if not torch.equal(after[f"network/{name}"], value)}
    assert any(name.startswith(f"backbone.{moved}") for name in changed)
    assert not any(name.startswith((f"backbone.{kept}", "backbone.conv_stem")) for name in changed)
    with pytest.raises(TrainingError, match="freeze_stages: test_efficientnet has"):
        freeze(new_network(config(), "none"), config(freeze_stages=9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": "focal"}, "balance: 'focal' is none of none, weights, sampling"),
        ({"epochs": 0}, "epochs: 0 is not at least 1"),
        ({"rotation": 270}, "rotation: 270 is not from 0 to 180"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_invalid_training_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        config(**options)


def _one_rank(rank: int, count: int, port: int, skin: Path, out: Path) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ.update(address)
    with joined_ranks(torch.device("cpu")) as ranks:
        # Without batch norms' statistics and dropout, two processes compute what one does.
        options = config(epochs=1, head_only=True, rotation=0, flips=False, dropout=0)
        real = load_real(skin, SIZE, progress=False)
        run(real, out, options, ranks=ranks)
        run(real, out / "whole", config(epochs=1), ranks=ranks)
        step, calls = loop.training_step, []

        def interrupted(*args: Any) -> None:
            step(*args)
            calls.append(1)
            if len(calls) == 3 and ranks.first:  # in the middle of the epoch
                os.kill(os.getpid(), signal.SIGINT)

        loop.training_step = interrupted
        assert run(real, out / "parts", config(epochs=1), ranks=ranks).stopped
        run(real, out / "parts", config(epochs=1), ranks=ranks, resume=True)


@pytest.mark.full
def test_two_processes_train_one_network_and_resume(skin: Path, real: RealData, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_one_rank, (2, port, skin, tmp_path / "two"), nprocs=2)
    run(real, tmp_path / "one", config(epochs=1, head_only=True, rotation=0, flips=False, dropout=0))
    one, two = (load_file(tmp_path / name / CHECKPOINT) for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(two[name], value, rtol=1e-4, atol=1e-6), name
    # Batch norms see the images of one process: resumed from one checkpoint, all processes have the same averages.
    whole, parts = (load_file(tmp_path / "two" / name / CHECKPOINT) for name in ("whole", "parts"))
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


# -- networks


@pytest.mark.parametrize("architecture", [TINY, "googlenet"])
def test_finished_network_computes_same_as_trained_network(architecture: str) -> None:
    """But for folded batch norms, rounded weights and the shift."""
    options = config(architecture=architecture)
    network = new_network(options, "none")
    torch.manual_seed(1)
    images = torch.rand(8, 3, SIZE, SIZE) * 255
    set_train_mode(network, [])
    for _ in range(3):
        network(images)  # gives batch norms some statistics
    network.eval()
    with torch.no_grad():
        logits, features = network(images)
        finished_logits, finished_features = finished_network(network, 0.75)(images)
    assert features.shape == (8, network.head.in_features) and features.std() > 0
    assert torch.allclose(finished_features, features, atol=0.02 * float(features.abs().max()))
    assert torch.allclose(finished_logits - 0.75, logits, atol=0.02)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("resnet-fifty", "timm has no model 'resnet-fifty'"),
        ("densenet121", "its batch norms do not follow its convolutions"),
        ("test_vit", "cannot be trained here at 32 px"),
    ],
)
def test_network_that_cannot_be_exported_is_refused_at_start(architecture: str, reason: str) -> None:
    with pytest.raises(DermisError, match=reason):
        new_network(config(architecture=architecture), "none")


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    stored = new_network(config(seed=3), "none").backbone.state_dict()
    save_file({name: value.contiguous() for name, value in stored.items()}, tmp_path / "w.safetensors")
    loaded = new_network(config(seed=4), str(tmp_path / "w.safetensors")).backbone.state_dict()
    differing = {name for name in stored if not torch.equal(stored[name], loaded[name])}
    assert differing == {"classifier.weight", "classifier.bias"}  # the last layer is new
    with pytest.raises(DermisError, match="must be a .safetensors file"):
        new_network(config(), str(tmp_path / "w.pth"))


# -- from the command line to a classifier that runs


def command(skin: Path, out: Path, *options: str) -> list[str]:
    return ["train", "classifier", "--data", str(skin), "--out", str(out), "--architecture", TINY, "--weights", "none",
            "--size", str(SIZE), "--epochs", "8", "--batch", "8", "--learning-rate", "5e-3", "--device", "cpu", "--seed", "1",
            "--cache", str(out.parent / "cache"), "--licence", "CC0-1.0", "--attribution", "nobody", *options]  # fmt: skip


@pytest.fixture(scope="module")
def trained(skin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "skin-run"
    done = CliRunner().invoke(app, command(skin, out))
    assert done.exit_code == 0, done.output
    assert "auc" in done.output and "Not a medical device" in done.output
    return out


def test_exported_classifier_reproduces_measured_scores(trained: Path, real: RealData) -> None:
    description = open_classifier(trained / "classifier")
    assert (description.architecture, description.input.size, description.weights_dtype) == (TINY, SIZE, "fp16")
    assert description.metrics["test"]["metrics"]["auc"]["value"] > 0.8  # it did learn
    check_measured(trained, real)


def check_measured(trained: Path, real: RealData) -> None:
    description = open_classifier(trained / "classifier")
    with Classifier(trained / "classifier", device="cpu") as classifier:
        scores = classifier.classify(real.test.images)
    rows = [line.split(",") for line in (trained / "predictions.csv").read_text().splitlines()[1:]]
    measured = {row[0]: row for row in rows if row[1] == "test"}
    assert sorted(measured) == sorted(real.test.ids)
    for name, logit, calibrated in zip(real.test.ids, scores.logits, scores.calibrated, strict=True):
        assert float(measured[name][3]) == pytest.approx(float(logit), abs=2e-4)
        assert float(measured[name][5]) == pytest.approx(float(calibrated), abs=1e-4)
    auc = description.metrics["test"]["metrics"]["auc"]
    order = scores.logits[real.test.labels == 1][:, None] - scores.logits[real.test.labels == 0]
    assert auc["value"] == pytest.approx((order > 0).mean(), abs=1e-6)
    assert json.loads((trained / "evaluation.json").read_text()) == description.metrics


def test_torch_and_onnx_agree_on_any_batch(trained: Path, real: RealData) -> None:
    network = load_torch_classifier(trained / "classifier")
    images = real.test.images[:7]
    with torch.no_grad():
        logits, features = network(torch.tensor(images).permute(0, 3, 1, 2).float())
    with Classifier(trained / "classifier", device="cpu") as classifier:
        scores = classifier.classify(images)
    assert np.abs(torch.sigmoid(logits).numpy() - scores.probabilities).max() < 1e-4
    assert np.allclose(features.numpy(), scores.features, atol=1e-4)
    assert len(set(logits.tolist())) == 7


def test_exported_file_holds_named_fp16_weights_and_no_origin(trained: Path, skin: Path) -> None:
    import onnx

    data = (trained / "classifier" / MODEL).read_bytes()
    graph = onnx.load_model_from_string(data).graph
    names = finished_network(new_network(config(), "none"), 0.0).backbone.state_dict().keys()
    stored = {value.name: value.data_type for value in graph.initializer}
    assert names <= stored.keys()
    assert {stored[name] for name in names} == {onnx.TensorProto.FLOAT16}
    assert [value.name for value in graph.input] == ["images"]
    assert [value.name for value in graph.output] == ["logit", "features"]
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    for file in (trained / "classifier").iterdir():
        text = file.read_bytes()
        assert b"ISIC_00" not in text and b"IP_00" not in text and str(skin.parent).encode() not in text
        assert str(Path.cwd()).encode() not in text


@pytest.mark.full
def test_a_finished_run_can_be_stored_in_eight_bits(trained: Path, skin: Path, real: RealData, tmp_path: Path) -> None:
    import onnx

    again = tmp_path / "runs" / "skin-run"
    shutil.copytree(trained, again)
    done = CliRunner().invoke(app, command(skin, again, "--resume", "--weights-dtype", "int8"))
    assert done.exit_code == 0, done.output
    graph = onnx.load_model_from_string((again / "classifier" / MODEL).read_bytes()).graph
    sizes = {value.name: (value.data_type, np.prod(value.dims)) for value in graph.initializer}
    small = [count for kind, count in sizes.values() if kind == onnx.TensorProto.INT8]
    assert sum(small) > 0.6 * sum(count for _, count in sizes.values())
    assert open_classifier(again / "classifier").weights_dtype == "int8"
    check_measured(again, real)
    test_torch_and_onnx_agree_on_any_batch(again, real)


@given(arrays(np.float32, (3, 5, 2, 1), elements=st.floats(-1e3, 1e3, width=32)))
def test_int8_rounding_is_accurate_and_idempotent(weights: NDArray[np.float32]) -> None:
    values, integers, scales = eight_bit(torch.from_numpy(weights))
    assert torch.equal(values, integers.float() * scales) and scales.shape == (3, 1, 1, 1)
    assert bool(((values - torch.from_numpy(weights)).abs() <= 0.501 * scales + 1e-30).all())
    assert torch.equal(eight_bit(values)[0], values)


def test_card_contains_notice_licence_and_metrics(trained: Path) -> None:
    card = (trained / "classifier" / "CLASSIFIER_CARD.md").read_text()
    measured = json.loads((trained / "evaluation.json").read_text())
    assert "Not a medical device" in card and "CC0-1.0" in card and "Not for diagnosis" in card
    for number in (measured["test"]["metrics"]["auc"]["value"], measured["temperature"]):
        assert f"{number:.3f}" in card
    assert f"{measured['thresholds']['sensitivity_90']:.4f}" in card
    assert "| clinic-a |" in card and "too few" in card  # every group, also those without numbers


def test_a_finished_run_is_measured_again_with_another_threshold(trained: Path, skin: Path, tmp_path: Path) -> None:
    again = tmp_path / "skin-run"
    shutil.copytree(trained, again)
    done = CliRunner().invoke(app, command(skin, again, "--resume", "--default-threshold", "sensitivity_90"))
    assert done.exit_code == 0, done.output
    before, after = open_classifier(trained / "classifier"), open_classifier(again / "classifier")
    assert after.files[MODEL] == before.files[MODEL]  # the same bytes
    assert after.metrics["test"]["metrics"]["auc"] == before.metrics["test"]["metrics"]["auc"]
    assert after.thresholds == {**before.thresholds, "default": before.thresholds["sensitivity_90"]}


def test_weights_of_other_network_are_refused(trained: Path) -> None:
    from dataclasses import replace

    from dermis.bundle.classifier import write_classifier

    description = replace(open_classifier(trained / "classifier"), architecture="resnet50")
    data = (trained / "classifier" / MODEL).read_bytes()
    other = trained.parent / "other"
    write_classifier(other, description, data, "# Other\n")
    with pytest.raises(BundleError, match=r"lacks \d+ weights of resnet50"):
        load_torch_classifier(other)
    with pytest.raises(BundleError, match="is not an ONNX file"):
        read_weights(b"\xff\xfe no graph", "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--configuration", "augmented"], "needs --synthetic"),
        (["--synthetic", "bundles/demo"], "takes no --synthetic"),
        (["--size", "8"], "size: 8 is not from 16 to 4096"),
    ],
)
def test_invalid_options_are_refused_before_training_starts(
    skin: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    failed = CliRunner().invoke(app, command(skin, tmp_path / "r", *options))
    assert isinstance(failed.exception, DermisError) and message in str(failed.exception)
    assert CliRunner().invoke(app, command(skin, tmp_path / "r", "--default-threshold", "best")).exit_code == 2
    assert not (tmp_path / "r").exists()
