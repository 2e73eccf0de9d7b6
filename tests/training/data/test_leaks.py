"""Tests of leaks and inspection: planted copies are removed from the larger part; planted frames are reported."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from commands.main import app
from dermis.errors import DataError
from training.data.leaks import Leaks, Pair, find_leaks, ids_to_remove
from training.data.sources import Record, read_source
from training.data.splits import read_split


def _picture(seed: int) -> NDArray[np.uint8]:
    """A smooth picture unlike those of other seeds."""
    noise = np.random.default_rng(seed).integers(60, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)).clip(70, 255).astype(np.uint8)


def _collection(folder: Path) -> Path:
    """16 pictures of 16 patients; I02 is a re-encoded copy of I12, I03 the same file as I04."""
    (folder / "images").mkdir(parents=True)
    lines = ["isic_id,patient_id,target,sex"]
    for i in range(16):
        name = f"I{i:02d}"
        Image.fromarray(_picture({2: 12, 4: 3}.get(i, i))).save(
            folder / "images" / f"{name}.jpg", quality=70 if i == 2 else 95
        )
        lines.append(f"{name},P{i},{int(i >= 10)},{'female' if i % 2 else ''}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def _split(folder: Path, collection: Path, validation: tuple[str, ...]) -> Path:
    folder.mkdir()
    header, *lines = (collection / "metadata.csv").read_text().splitlines()
    for name, inside in (("train", False), ("validation", True)):
        rows = [line for line in lines if (line.split(",")[0] in validation) == inside]
        (folder / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "split.json").write_text(json.dumps({"parts": {"train": {}, "validation": {}}}))
    return folder


def test_copies_across_parts_are_removed_from_the_larger(tmp_path: Path) -> None:
    collection = _collection(tmp_path / "set")
    split = _split(tmp_path / "split", collection, ("I12", "I13", "I14"))
    out = tmp_path / "out"
    command = ["data", "leaks", str(collection), "--split", str(split), "--embedding", "none", "--remove"]
    result = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "1 pair across parts" in result.output
    first, second = csv.DictReader((out / "leaks.csv").open())
    assert (first["id_a"], first["id_b"], first["part_a"], first["part_b"]) == ("I02", "I12", "train", "validation")
    assert (first["identical"], first["same_patient"], first["similarity"]) == ("no", "no", "")
    assert float(first["correlation"]) > 0.8
    assert (second["id_a"], second["id_b"], second["identical"]) == ("I03", "I04", "yes")
    cleaned = read_split(out / "split")
    assert read_split(split).keys() - cleaned.keys() == {"I02"}, "the copy in training must go, and nothing else"
    assert cleaned["I12"] == "validation"
    (collection / "metadata.csv").unlink()  # a second run is refused before anything is read
    again = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert isinstance(again.exception, DataError) and "split: is not empty; choose another --out" in str(
        again.exception
    )


def test_cleaned_list_reads_back_without_duplicates(tmp_path: Path) -> None:
    collection = _collection(tmp_path / "set")
    command = ["data", "leaks", str(collection), "--embedding", "none", "--remove", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, command).exit_code == 0
    cleaned = read_source(collection, metadata=tmp_path / "out" / "cleaned.csv")
    assert len(cleaned.records) == 14
    assert find_leaks(cleaned, progress=False).pairs == ()


class _Small:
    """Stands for a feature extractor: the image at 8 x 8 px."""

    name, identity, dim, calls = "timm:small@/its/weights.safetensors", "small/1", 192, 0
    images = 0

    def over(self, batches: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
        self.calls += 1
        means = np.concatenate([x.reshape(len(x), 8, 28, 8, 28, 3).mean(axis=(2, 4)) for x in batches])
        self.images += len(means)
        flat = means.reshape(len(means), 192).astype(np.float32)
        return flat - flat.mean(axis=1, keepdims=True)


def test_embedding_confirms_pairs_and_is_cached(tmp_path: Path) -> None:
    source, extractor = read_source(_collection(tmp_path / "set")), _Small()
    for _ in range(2):
        leaks = find_leaks(source, extractor=extractor, cache=tmp_path / "cache", progress=False)  # type: ignore[arg-type]
        assert [(pair.a, pair.b) for pair in leaks.pairs] == [(3, 4), (2, 12)]
        assert all(pair.similarity is not None and pair.similarity > 0.95 for pair in leaks.pairs)
        assert extractor.calls == 1, "features must be computed once"
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    find_leaks(source, extractor=extractor, cache=tmp_path / "cache", progress=False)  # type: ignore[arg-type]
    assert extractor.calls == 2, "the features of a damaged file are computed again"
    Image.fromarray(_picture(40)).save(source.records[7].image.path)  # type: ignore[union-attr]
    again = find_leaks(source, extractor=extractor, cache=tmp_path / "cache", progress=False)  # type: ignore[arg-type]
    fresh = find_leaks(source, extractor=extractor, progress=False)  # type: ignore[arg-type]
    assert extractor.images == 16 + 16 + 1 + 16, "only the image that has changed is embedded again"
    assert again.pairs == fresh.pairs


def test_mirrored_copies_are_found_on_request(tmp_path: Path) -> None:
    collection = _collection(tmp_path / "set")
    table = tmp_path / "three.csv"
    table.write_text("isic_id,target\nI00,0\nI01,0\nI05,0\n")
    Image.fromarray(_picture(0)[:, ::-1]).save(collection / "images" / "I05.jpg", quality=95)
    source = read_source(collection, metadata=table)
    assert find_leaks(source, progress=False).pairs == ()
    (pair,) = find_leaks(source, mirrors=True, progress=False).pairs
    assert (source.records[pair.a].id, source.records[pair.b].id) == ("I00", "I05")


def test_broken_images_and_unknown_ids_are_named(tmp_path: Path) -> None:
    collection = _collection(tmp_path / "set")
    (collection / "images" / "I05.jpg").write_bytes(b"no picture")
    leaks = find_leaks(read_source(collection), progress=False)
    assert [name for name, _ in leaks.broken] == ["I05"]
    assert len(leaks.records) == 15
    with pytest.raises(DataError, match="I99"):
        find_leaks(read_source(collection), {"I99": "train"}, progress=False)


def test_removal_breaks_every_pair_and_keeps_ends_of_chain() -> None:
    records = tuple(Record(name, "", "", "", None, {}) for name in "abcde")
    chain = [Pair(a, b, False, False, False, 0.9, 1, None) for a, b in ((0, 1), (1, 2), (2, 3))]
    removed = ids_to_remove(Leaks(records, ("",) * 5, tuple(chain), ()))
    assert removed == {"b", "d"}
    assert ids_to_remove(Leaks(records, ("",) * 5, tuple(chain), ()), within_parts=False) == set()


def test_inspection_reports_classes_missing_values_and_frames(tmp_path: Path) -> None:
    collection = _collection(tmp_path / "set")
    for i in (11, 12, 13):  # half of the six malignant images get a frame
        file = collection / "images" / f"I{i}.jpg"
        framed = np.array(Image.open(file))
        y, x = np.mgrid[-1:1:64j, -1:1:64j]
        framed[x**2 + y**2 > 1] = 0
        Image.fromarray(framed).save(file, quality=95)
    (collection / "images" / "I05.jpg").write_bytes(b"no picture")
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["data", "inspect", str(collection), "--out", str(out)])
    assert result.exit_code == 3, result.output
    assert "Black frame: 0.0 % of benign, 50.0 % of malignant" in result.output
    assert "I05" in result.output
    report = json.loads((out / "report.json").read_text())
    assert report["classes"] == {"benign": 10, "malignant": 6}
    assert report["missing"]["sex"] == {"benign": 5, "malignant": 3}
    assert report["missing"]["lesion_id"] == {"benign": 10, "malignant": 6}
    assert (report["patients"], report["sizes"], report["broken"][0]["id"]) == (16, {"64x64": 15}, "I05")
    rows = {row["id"]: row for row in csv.DictReader((out / "artefacts.csv").open())}
    assert {name for name, row in rows.items() if "frame" in row["found"].split()} == {"I11", "I12", "I13"}
    assert Image.open(out / "contact-sheet.png").width > 100


def test_a_table_alone_is_inspected_without_images(tmp_path: Path) -> None:
    table = _collection(tmp_path / "set") / "metadata.csv"
    alone = tmp_path / "alone.csv"
    alone.write_bytes(table.read_bytes())
    result = CliRunner().invoke(app, ["data", "inspect", str(alone), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["images"], report["artefacts_by_class"], report["broken"]) == (16, None, [])
