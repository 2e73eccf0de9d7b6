"""Tests of a classifier's training data: no patient is in two parts, and synthetic images are the requested ones."""

from __future__ import annotations

import csv
import errno
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle import Bundle, write_bundle
from dermis.classifier.preprocess import to_input
from dermis.dataset.manifest import finalize
from dermis.dataset.plan import plan
from dermis.dataset.request import DatasetRequest
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.errors import DataError
from dermis.files import try_lock
from dermis.imaging import Images
from dermis.networks import Generator, GeneratorConfig
from dermis.synthesizer import Synthesizer
from tiny import make_bundle
from tiny_skin import make_skin
from training.classifier import synthetic as synthetic_module
from training.classifier.batches import TrainingSet, epoch_order, rotated_and_flipped
from training.classifier.config import ClassifierConfig
from training.classifier.data import RealData, age_band, load_real
from training.classifier.run import ClassifierData
from training.classifier.synthetic import SyntheticSource, load_synthetic, parse_source
from training.data.isic import load_isic
from training.distributed import ALONE, Ranks

SIZE = 16


@pytest.fixture(scope="module")
def skin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_skin(tmp_path_factory.mktemp("data") / "skin")


@pytest.fixture(scope="module")
def real(skin: Path) -> RealData:
    return load_real(skin, SIZE, progress=False)


# -- real images


def test_split_assigns_each_patient_to_single_part(real: RealData, skin: Path) -> None:
    patients = [set(part.groups) for part in real.parts.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 48
    ids = [name for part in real.parts.values() for name in part.ids]
    assert sorted(ids) == sorted(path.stem for path in (skin / "images").iterdir())
    assert [len(part.ids) for part in real.parts.values()] == pytest.approx([62, 14, 20], abs=2)
    whole = load_isic(skin, SIZE, progress=False)
    at = {name: i for i, name in enumerate(whole.ids)}
    for part in real.parts.values():
        assert (part.images == whole.images[[at[name] for name in part.ids]]).all()
        assert part.labels.tolist() == [int(int(name[5:]) % 3 == 0) for name in part.ids]
        assert part.attributes["source"] == tuple("clinic-a" if int(n[5:]) % 4 else "clinic-b" for n in part.ids)


def test_split_depends_on_split_seed(skin: Path, real: RealData) -> None:
    again = load_real(skin, SIZE, progress=False)
    other = load_real(skin, SIZE, split_seed=1, progress=False)
    assert again.test.ids == real.test.ids != other.test.ids
    assert again.test.sha256 == real.test.sha256 != other.test.sha256


def test_a_given_split_is_used_and_checked(skin: Path, tmp_path: Path) -> None:
    parts = "train=0.5,validation=0.2,test=0.3"
    made = CliRunner().invoke(app, ["data", "split", str(skin), "--parts", parts, "--out", str(tmp_path / "s")])
    assert made.exit_code == 0
    real_images = load_real(skin, SIZE, split=tmp_path / "s", progress=False)
    with (tmp_path / "s" / "test.csv").open() as file:
        assert {row["isic_id"] for row in csv.DictReader(file)} == set(real_images.test.ids)
    # A generator that is trained on train.csv is known to have seen the training part alone.
    assert (
        load_isic(skin, SIZE, metadata=tmp_path / "s" / "train.csv", progress=False).sha256 == real_images.train.sha256
    )
    # What a cleaned split leaves out is not used.
    lines = (tmp_path / "s" / "test.csv").read_text().splitlines(keepends=True)
    (tmp_path / "s" / "test.csv").write_text("".join(lines[:-1]))
    assert len(load_real(skin, SIZE, split=tmp_path / "s", progress=False).test.ids) == len(real_images.test.ids) - 1
    # A patient in two parts makes the test worthless.
    train = (tmp_path / "s" / "train.csv").read_text().splitlines(keepends=True)
    partner = next(line for line in train[1:] if sum(line.split(",")[1] in other for other in train) == 2)
    (tmp_path / "s" / "train.csv").write_text("".join(line for line in train if line != partner))
    (tmp_path / "s" / "test.csv").write_text("".join(lines) + partner)
    with pytest.raises(DataError, match=r"both in .* split by patient"):
        load_real(skin, SIZE, split=tmp_path / "s", progress=False)
    shutil.copytree(tmp_path / "s", tmp_path / "two")
    (tmp_path / "two" / "split.json").write_text('{"parts": {"train": {}, "validation": {}}}')
    with pytest.raises(DataError, match="no part test; make the three parts with dermis data split"):
        load_real(skin, SIZE, split=tmp_path / "two", progress=False)


def test_a_class_that_is_missing_is_named(skin: Path, tmp_path: Path) -> None:
    benign = tmp_path / "benign.csv"
    lines = (skin / "metadata.csv").read_text().splitlines(keepends=True)
    benign.write_text("".join(line for line in lines if "malignant" not in line))
    with pytest.raises(DataError, match="no malignant images"):
        load_real(skin, SIZE, metadata=benign, progress=False)
    few = tmp_path / "few.csv"
    few.write_text("".join([*lines[:1], *lines[1:40:3], lines[2], lines[5]]))
    with pytest.raises(DataError, match="needs images of both classes"):
        load_real(skin, SIZE, metadata=few, progress=False)


@pytest.mark.parametrize(
    ("age", "band"),
    [
        ("0", "0 to 29"),
        ("29.5", "0 to 29"),
        ("30", "30 to 49"),
        ("85", "70 or more"),
        ("", "unknown"),
        ("x", "unknown"),
    ],
)
def test_age_is_assigned_to_its_band(age: str, band: str) -> None:
    assert age_band(age) == band


# -- synthetic images


class Painter:
    """Replaces the synthesizer, which takes long to start: an image encodes its request."""

    preferred_batch = 8
    asked: ClassVar[list[Sequence[int]]] = []

    def __init__(self, bundle: Bundle, **_: object) -> None:
        self.name = bundle.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def images(self, seeds: Sequence[int], indices: Sequence[int], labels: Sequence[int], **_: object) -> Images:
        self.asked.append(indices)
        tiles = np.zeros((len(indices), 8, 8, 3), np.uint8)
        tiles[:] = np.stack([np.array(seeds), np.array(indices), np.array(labels)], axis=1)[:, None, None]
        return tiles


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> type[Painter]:
    monkeypatch.setattr("dermis.synthesizer.Synthesizer", Painter)
    Painter.asked = []
    return Painter


def test_images_of_a_bundle_are_drawn_by_seed_and_class(tiny_bundle: Bundle, tmp_path: Path) -> None:
    source = [SyntheticSource(tiny_bundle.location)]
    synthetic = load_synthetic(source, {"benign": 3, "malignant": 2}, 8, seed=5, cache=tmp_path, progress=False)
    assert synthetic.labels == (0, 0, 0, 1, 1)
    with Synthesizer(tiny_bundle) as synthesizer:
        drawn = synthesizer.images([5] * 5, [0, 2, 4, 1, 3], [0, 0, 0, 1, 1])
    assert (np.concatenate(synthetic.images) == np.stack([to_input(image, 8) for image in drawn])).all()
    assert [each["images"] for each in synthetic.origin] == [3, 2]


def test_interrupted_drawing_of_images_resumes(
    tiny_bundle: Bundle, tmp_path: Path, painter: type[Painter], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, counts = [SyntheticSource(tiny_bundle.location)], {"malignant": 40}
    whole = load_synthetic(source, counts, 8, cache=tmp_path / "a", progress=False).images[0]
    assert whole[:, 0, 0, 1].tolist() == list(range(1, 80, 2))
    fewer = load_synthetic(source, {"malignant": 11}, 8, cache=tmp_path / "a", progress=False).images[0]
    assert (fewer == whole[:11]).all()
    monkeypatch.setattr(synthetic_module, "_SAVE_EVERY", 8)
    paint = painter.images
    painter.asked = []

    def stops(self: Painter, *args: Sequence[int], **options: Sequence[int]) -> Images:
        if len(self.asked) == 2:
            raise KeyboardInterrupt
        return paint(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(painter, "images", stops)
        load_synthetic(source, counts, 8, cache=tmp_path / "b", progress=False)
    assert not list((tmp_path / "b").glob("*.npy"))
    again = load_synthetic(source, counts, 8, cache=tmp_path / "b", progress=False).images[0]
    assert (again == whole).all()
    assert painter.asked[2][0] == 2 * 16 + 1  # not from the start
    assert [path.suffix for path in (tmp_path / "b").iterdir()] == [".npy"]


def test_training_waits_for_another_one_that_makes_its_images(
    tiny_bundle: Bundle,
    tmp_path: Path,
    painter: type[Painter],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, counts = [SyntheticSource(tiny_bundle.location)], {"malignant": 3}
    (made,) = load_synthetic(source, counts, 8, cache=tmp_path, progress=False).images
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    assert len(made) == 3
    file.unlink()
    lock = try_lock(file.with_suffix(".lock"))
    assert lock is not None
    painter.asked = []

    def finish(seconds: float) -> None:
        assert not painter.asked, "it must not make the images too"
        file.write_bytes(content)
        lock.release()

    monkeypatch.setattr("training.locks.time.sleep", finish)
    (again,) = load_synthetic(source, counts, 8, cache=tmp_path, progress=False).images
    assert (again == made).all() and not painter.asked
    assert "waiting for another training that is making these images" in capsys.readouterr().err


def test_full_disk_is_an_error_before_images_are_made(
    tiny_bundle: Bundle, tmp_path: Path, painter: type[Painter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DataError, match=r"--cache: .* cannot be written \(No space left on device\)"):
        load_synthetic([SyntheticSource(tiny_bundle.location)], {"benign": 3}, 8, cache=tmp_path, progress=False)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"] and not painter.asked


def test_images_come_from_separate_generator_for_each_class(tmp_path: Path, painter: type[Painter]) -> None:
    config = GeneratorConfig(16, c_dim=0, z_dim=16, w_dim=16, mapping_layers=2, channel_base=256, channel_max=16)
    for seed, name in enumerate(("ben", "mal")):
        torch.manual_seed(seed)
        write_bundle(tmp_path / name, name=name, generator=Generator(config), class_names=(), model_card="# Tiny\n",
                     provenance={"licence": "CC0-1.0"})  # fmt: skip
    with pytest.raises(DataError, match="state the class of its images: benign="):
        load_synthetic([SyntheticSource(str(tmp_path / "ben"))], {"benign": 2}, 8, cache=tmp_path / "c", progress=False)
    sources = [parse_source(f"benign={tmp_path / 'ben'}"), parse_source(f"malignant={tmp_path / 'mal'}")]
    synthetic = load_synthetic(sources, {"benign": 2, "malignant": 3}, 8, cache=tmp_path / "c", progress=False)
    assert [(each["name"], each["class"]) for each in synthetic.origin] == [("ben", "benign"), ("mal", "malignant")]
    assert synthetic.labels == (0, 0, 1, 1, 1)
    with pytest.raises(DataError, match="no source has malignant images"):
        load_synthetic(sources[:1], {"malignant": 1}, 8, cache=tmp_path / "c", progress=False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    bundle = make_bundle(folder / "bundle")
    for layout in ("imagefolder", "webdataset", "parquet"):
        request = {"classes": {"benign": 7, "malignant": 5}, "shard_size": 5, "format": layout}
        planned = plan(DatasetRequest.model_validate(request), bundle.digest, bundle.class_names)
        for shard in range(planned.shards):
            write_shard(
                planned,
                shard,
                lambda indices, labels: Painter(bundle).images([0] * len(indices), indices, labels),
                Store(folder / layout),
            )
        finalize(planned, Store(folder / layout), bundle, {})
    with zipfile.ZipFile(folder / "imagefolder" / "images.zip") as archive:
        archive.extractall(folder / "unpacked")
    (folder / "unpacked" / "metadata.csv").unlink()  # then the folder has only one sub-folder for each class
    return folder


def test_generated_dataset_gives_same_images_in_each_layout(dataset: Path, tmp_path: Path) -> None:
    loaded = []
    for place in ("imagefolder", "webdataset", "parquet", "imagefolder/images.zip", "unpacked/images"):
        source = [SyntheticSource(str(dataset / place))]
        images = load_synthetic(source, {"benign": 6, "malignant": 4}, 8, cache=tmp_path / place, progress=False)
        assert images.labels == (0,) * 6 + (1,) * 4
        assert np.concatenate(images.images)[:, 0, 0, 2].tolist() == list(images.labels)
        loaded.append(np.concatenate(images.images))
    for other in loaded[1:]:
        assert (other == loaded[0]).all()
    with pytest.raises(DataError, match="has 5 malignant images, 6 are requested"):
        load_synthetic(
            [SyntheticSource(str(dataset / "parquet"))], {"malignant": 6}, 8, cache=tmp_path / "x", progress=False
        )


def test_a_damaged_dataset_is_refused(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "webdataset", tmp_path / "d")
    shard = next((tmp_path / "d").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=f"{shard.name} differs from"):
        load_synthetic([SyntheticSource(str(tmp_path / "d"))], {"benign": 1}, 8, cache=tmp_path / "c", progress=False)


def test_configurations_have_the_images_that_they_name(
    real: RealData, tiny_bundle: Bundle, tmp_path: Path, painter: type[Painter]
) -> None:
    source = [SyntheticSource(tiny_bundle.location)]
    melanoma = load_synthetic(source, {"malignant": 10}, SIZE, cache=tmp_path, progress=False)
    balanced = load_synthetic(source, {"benign": 10, "malignant": 10}, SIZE, cache=tmp_path, progress=False)
    sets = [
        ClassifierData("real", real).training,
        ClassifierData("augmented", real, melanoma).training,
        ClassifierData("synthetic", real, balanced).training,
    ]
    ill, count = int(real.train.labels.sum()), len(real.train.labels)
    assert [(len(each), int(each.labels.sum())) for each in sets] == [(count, ill), (count + 10, ill + 10), (20, 10)]
    picked = np.array([count + 3, 0, count - 1])
    expected = np.stack([melanoma.images[0][3], real.train.images[0], real.train.images[-1]])
    assert (sets[1].read(picked) == expected).all()
    digests = {ClassifierData(*each).digest for each in (("real", real), ("augmented", real, melanoma))}
    assert len(digests) == 2


def test_generator_trained_beyond_training_part_is_reported(
    real: RealData, tiny_bundle: Bundle, tmp_path: Path, painter: type[Painter]
) -> None:
    config = GeneratorConfig(16, c_dim=2, z_dim=16, w_dim=16, mapping_layers=2, channel_base=256, channel_max=16)
    write_bundle(tmp_path / "b", name="b", generator=Generator(config), class_names=("benign", "malignant"),
                 model_card="# Tiny\n", provenance={"dataset": {"sha256": real.train.sha256}})  # fmt: skip
    for location, clean in ((str(tmp_path / "b"), True), (tiny_bundle.location, False)):
        images = load_synthetic(
            [SyntheticSource(location)], {"malignant": 2}, SIZE, cache=tmp_path / "c", progress=False
        )
        assert ClassifierData("augmented", real, images).generator_saw_training_part_only is clean


# -- order and augmentation


def _config(**options: object) -> ClassifierConfig:
    return ClassifierConfig(**{"size": SIZE, "batch": 4, **options})  # type: ignore[arg-type]


def test_epoch_shows_each_image_at_most_once() -> None:
    labels = (np.arange(22) % 5 == 0).astype(np.int64)
    first = epoch_order(labels, _config(), 0, ALONE)
    assert first.shape == (5, 4) and len(set(first.ravel().tolist())) == 20
    assert (first == epoch_order(labels, _config(), 0, ALONE)).all()
    assert (first != epoch_order(labels, _config(), 1, ALONE)).any()
    assert (first != epoch_order(labels, _config(seed=1), 0, ALONE)).any()
    assert epoch_order(labels, _config(epoch_images=9), 0, ALONE).shape == (2, 4)
    own = [Ranks(rank, 2).rank_part(first[0]) for rank in range(2)]
    assert sorted(np.concatenate(own)) == sorted(first[0])


def test_sampling_shows_the_classes_equally_often() -> None:
    labels = (np.arange(40) % 10 == 0).astype(np.int64)  # 4 of 40
    order = epoch_order(labels, _config(balance="sampling"), 0, ALONE).ravel()
    assert labels[order].sum() == 20
    assert set(np.bincount(order, minlength=40)[labels == 1]) == {5}
    assert np.bincount(order, minlength=40)[labels == 0].max() == 1


def test_turning_and_flipping_only_moves_pixels() -> None:
    torch.manual_seed(0)
    images = torch.rand(64, 3, 9, 9) * 255
    flipped = rotated_and_flipped(images, rotation=0, flips=True)
    kinds = []
    for image, moved in zip(images, flipped, strict=True):
        options = [image, image.flip(2), image.flip(1), image.flip(1, 2)]
        matches = [i for i, option in enumerate(options) if torch.equal(option, moved)]
        assert len(matches) == 1
        kinds += matches
    assert set(kinds) == {0, 1, 2, 3}
    # About the centre: a bright middle stays there, at any angle, mirrored or not.
    y, x = np.mgrid[:33, :33] - 16
    disc = torch.from_numpy(np.where(np.hypot(y, x) < 8, 200.0, 50.0)).float().expand(16, 3, 33, 33)
    round_ones = rotated_and_flipped(disc, rotation=180, flips=True)
    assert float((round_ones - disc).abs().mean()) < 3
    assert round_ones.min() >= 0 and round_ones.max() <= 255
    assert torch.allclose(rotated_and_flipped(images, rotation=1e-6, flips=False), images, atol=0.05)


def test_an_image_set_is_read_in_any_order() -> None:
    arrays = [np.full((n, 2, 2, 3), k, np.uint8) for k, n in enumerate((3, 1, 2))]
    batch = TrainingSet(tuple(arrays), np.zeros(6, np.int64)).read(np.array([5, 0, 3, 2, 4]))
    assert batch[:, 0, 0, 0].tolist() == [2, 0, 1, 0, 2]
