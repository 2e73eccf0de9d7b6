"""Tests of TCAV and painted frames: they detect a network that uses the frame, and only such a network."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typer.testing import CliRunner

from commands.explain.concepts import _frames as measure_frames
from commands.main import app
from dermis.artefacts import Artefacts, detect_artefacts
from dermis.bundle.classifier import write_classifier
from dermis.classifier.torch_network import TorchClassifier
from dermis.errors import DataError, DermisError
from dermis.explain.counterfactual import change, corners, with_corners, zoomed
from dermis.explain.tcav import Concept, ConceptTest, corrected, tcav
from dermis.imaging import Images, encode
from tiny_classifier import describe
from training.classifier.config import ClassifierConfig
from training.classifier.export import to_onnx
from training.classifier.network import finished_network, new_network
from training.data.concepts import mine_concepts
from training.data.files import ImageFile
from training.data.sources import Record

SIZE = 24


class _Backbone(nn.Module):
    """Two maps: darkness of the corners, and of the middle; `weights` determines which one the logit depends on."""

    def __init__(self, weights: tuple[float, float]) -> None:
        super().__init__()
        masks = torch.stack([torch.from_numpy(corners(SIZE, 0.15)), 1 - torch.from_numpy(corners(SIZE, 0.15))])
        self.register_buffer("masks", masks)
        self.stage = nn.Softplus(beta=20)  # not linear, so that gradients differ between images
        self.head = nn.Linear(2, 1, bias=False)
        self.head.weight.data = torch.tensor([weights])

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stage((0.5 - x.mean(1, keepdim=True)) * self.masks)

    def forward_head(self, maps: Tensor, pre_logits: bool) -> Tensor:
        return torch.tanh(maps.mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.head


def _network(weights: tuple[float, float]) -> TorchClassifier:
    return TorchClassifier(_Backbone(weights), (0, 0, 0), (1, 1, 1)).eval()


def _skin(count: int, seed: int) -> Images:
    rng = np.random.default_rng(seed)
    images: Images = rng.integers(60, 250, (count, SIZE, SIZE, 3)).astype(np.uint8)
    return images


def _frames(seed: int = 0) -> Concept:
    counters = tuple(_skin(30, 100 * seed + i) for i in range(1, 16))
    return Concept("frame", with_corners(_skin(30, 100 * seed), 0.15, "black"), counters)


def _tests(network: TorchClassifier, concept: Concept) -> list[ConceptTest]:
    return corrected(list(tcav(network, [concept], _skin(24, 7), ["stage", "last"])))


@pytest.mark.full
def test_network_that_uses_frame_is_detected() -> None:
    results = _tests(_network((1.0, 0.3)), _frames())
    assert [test.layer for test in results] == ["stage", "last"]
    for test in results:
        assert test.verdict == "raises the probability" and test.accuracy == 1 and np.mean(test.scores) == 1
    assert {test.verdict for test in _tests(_network((-1.0, 0.3)), _frames())} == {"lowers the probability"}
    assert _tests(_network((1.0, 0.3)), _frames()) == results, "the same again"


def test_concept_without_difference_has_no_effect() -> None:
    nothing = Concept("nothing", _skin(30, 50), tuple(_skin(30, i) for i in range(51, 56)))
    for test in _tests(_network((1.0, 1.0)), nothing):
        assert test.verdict in ("not separable in this layer", "no effect shown")
    with pytest.raises(DermisError, match="'elsewhere' is none of this network's modules"):
        list(tcav(_network((1.0, 1.0)), [nothing], _skin(4, 0), ["elsewhere"]))


def test_p_values_are_corrected_by_holm_method() -> None:
    def test(p: float) -> ConceptTest:
        return ConceptTest("c", "l", 30, 1.0, (1.0,), (0.0,), p)

    assert [t.p_corrected for t in corrected([test(0.04), test(0.01), test(0.03)])] == pytest.approx([0.06, 0.03, 0.06])


def test_painted_corners_do_not_affect_blind_network() -> None:
    images = _skin(40, 3)
    mask = corners(SIZE, 0.1)
    assert mask.mean() == pytest.approx(0.1, abs=0.02)
    for fill in ("black", "skin"):
        painted = with_corners(images, 0.1, fill)  # type: ignore[arg-type]
        assert np.array_equal(painted[:, mask == 0], images[:, mask == 0])
        assert painted[:, mask == 1].std(axis=1).max() == 0, "one colour"
    assert with_corners(images, 0.1, "black")[:, 0, 0].max() < 10 < with_corners(images, 0.1, "skin")[:, 0, 0].min()
    assert zoomed(with_corners(images, 0.05, "black"))[:, :2, :2].min() > 10, "the frame is gone"

    def logits(network: TorchClassifier, shown: Images) -> NDArray[np.float64]:
        with torch.no_grad():
            return network(torch.tensor(shown).permute(0, 3, 1, 2).float())[0].double().numpy()

    framed, patients = with_corners(images, 0.1, "black"), [f"p{i // 2}" for i in range(40)]
    seeing, blind = (
        change(logits(n, images), logits(n, framed), patients) for n in (_network((1.0, 0.0)), _network((0.0, 0.0)))
    )
    assert seeing.low > 0 and seeing.rose == 1 and seeing.images == 40
    assert (blind.mean, blind.low, blind.high, blind.rose) == (0, 0, 0, 0)


def _record(name: str, source: str, class_name: str) -> Record:
    return Record(name, class_name, "", "", None, {"source": source})


def test_counter_sets_match_sources_and_classes_of_concept() -> None:
    groups = [("a", "malignant", 30, 60), ("b", "benign", 10, 200), ("c", "benign", 9, 4)]  # framed, others
    records, artefacts = [], []
    for source, class_name, framed, others in groups:
        for i in range(framed + others):
            records.append(_record(f"{source}{i}", source, class_name))
            artefacts.append(Artefacts(0.1 if i < framed else 0.0, 0.0, 0.0, 0.0))
    (frame,), left_out = mine_concepts(records, artefacts, size=40, counters=3, seed=1)

    def strata(chosen: tuple[Record, ...]) -> list[tuple[str, str]]:
        return sorted((record.row["source"], record.class_name) for record in chosen)

    assert len(frame.shown) == 40
    for counter in frame.counters:
        assert strata(counter) == strata(frame.shown)
        assert len({record.id for record in counter}) == 40 and not set(counter) & set(frame.shown)
    assert len({tuple(counter) for counter in frame.counters}) == 3
    assert [text.split(":")[0] for text in left_out] == ["ruler", "hair", "ink"]


@pytest.mark.full
def test_concepts_command_writes_table_and_example_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = finished_network(new_network(ClassifierConfig("test_efficientnet", size=32), "none"), 0.0)
    made = describe(32, architecture="test_efficientnet", feature_dim=network.head.in_features)
    write_classifier(tmp_path / "classifier", made, to_onnx(network, 32), "# Tiny")
    rng = np.random.default_rng(0)
    (tmp_path / "set" / "images").mkdir(parents=True)
    rows = []
    for i in range(96):
        image = rng.normal(150, 20, (1, 1, 3)) + rng.normal(0, 6, (64, 64, 3))
        pixels = image.clip(0, 255).astype(np.uint8)
        if i % 4 == 0:
            pixels = with_corners(pixels[None], 0.1, "black")[0]
        (tmp_path / "set" / "images" / f"I{i:03d}.png").write_bytes(encode(pixels))
        rows.append((f"I{i:03d}", "malignant" if i % 2 == 0 else "benign", "one", f"P{i // 2}"))
    with (tmp_path / "set" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("isic_id", "target", "source", "patient_id"), *rows])
    line = ["explain", "concepts", "--classifier", tmp_path / "classifier", "--data", tmp_path / "set"]
    line += ["--out", tmp_path / "out", "--size", 20, "--counters", 3, "--inputs", 10, "--layer", "last"]
    result = CliRunner().invoke(app, list(map(str, line)), env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Not a medical device" in table and "| frame | last | 20 |" in table and "Left out: ink" in table
    assert (
        "| frame removed by cropping (images with a frame) | 24 |" in table
        and "| black corners painted | 72 |" in table
    )
    assert (tmp_path / "out" / "frame-above-counter-set-below.jpg").exists()
    again = CliRunner().invoke(app, list(map(str, line)))
    assert isinstance(again.exception, DataError) and "is not empty" in str(again.exception)
    wrong = CliRunner().invoke(app, [*map(str, line), "--out", "x", "--artefacts", str(tmp_path / "set/metadata.csv")])
    assert isinstance(wrong.exception, DataError) and "is not an artefacts.csv" in str(wrong.exception)


def test_images_whose_frame_remains_after_cropping_are_left_out(tmp_path: Path) -> None:
    skin = np.random.default_rng(0).integers(140, 200, (64, 64, 3)).astype(np.uint8)
    y, x = np.mgrid[:64, :64] - 31.5
    tested = []
    for name, radius in (("small", 0.42), ("large", 0.6), ("none", 1.0)):  # of the dermatoscope, in sides
        picture = np.where((np.hypot(y, x) < radius * 64)[..., None], skin, np.uint8(4))
        file = tmp_path / f"{name}.png"
        file.write_bytes(encode(picture))
        record = Record(name, "malignant", "", "", ImageFile(file), {"source": "one"})
        tested.append((record, detect_artefacts(picture)))
    assert ["frame" in artefacts.present for _, artefacts in tested] == [True, True, False]

    def classify(images: Images, features: bool) -> Any:
        return SimpleNamespace(calibrated=images.mean((1, 2, 3), dtype=np.float64))

    session: Any = SimpleNamespace(classify=classify)
    changes, left_out = measure_frames(session, tested, {"small": "a", "large": "b", "none": "c"}, 64)
    assert changes["frame removed by cropping (images with a frame)"].images == 1
    assert left_out == ["frame removed by cropping (images with a frame): 1 of 2 images, which show a frame after it"]
