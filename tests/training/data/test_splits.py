"""Tests of splits: whole patients, the requested sizes and class shares, the same result for any order of the rows."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from commands.main import app
from dermis.errors import DataError
from training.data.sources import Record, read_source
from training.data.splits import HOSPITALS, PRESETS, TRAIN_VALIDATION, read_split, split_by_patient

TABLE = Path(__file__).parents[3] / ".." / "shared" / "data" / "ISIC_2020_Training_GroundTruth.csv.gz"


def _record(i: int, class_name: str, patient: str = "", lesion: str = "") -> Record:
    return Record(f"ISIC_{i:05d}", class_name, patient, lesion, None, {"isic_id": f"ISIC_{i:05d}"})


rows = st.lists(
    st.tuples(
        st.sampled_from(["benign", "benign", "benign", "malignant", ""]),
        st.one_of(st.just(""), st.integers(0, 30).map(lambda n: f"P{n}")),
        st.one_of(st.just(""), st.integers(0, 60).map(lambda n: f"L{n}")),
    ),
    min_size=1,
    max_size=120,
)
sizes = st.one_of(
    st.just(dict(TRAIN_VALIDATION)),
    st.just(dict(HOSPITALS)),
    st.dictionaries(st.sampled_from("abcd"), st.integers(2, 60).map(float), min_size=1, max_size=4),
)


@given(rows=rows, sizes=sizes, seed=st.integers(0, 5), shuffle=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_table_is_split_by_whole_patients(
    rows: list[tuple[str, str, str]], sizes: dict[str, float], seed: int, shuffle: object
) -> None:
    records = [_record(i, *row) for i, row in enumerate(rows)]
    try:
        split = split_by_patient(records, sizes, seed)
    except DataError as error:
        assert "cannot be divided" in str(error)
        return
    for key in ("patient_id", "lesion_id"):
        places = defaultdict(set)
        for record, part in zip(records, split.parts, strict=True):
            places[getattr(record, key)].add(part)
        assert all(len(parts) == 1 for name, parts in places.items() if name), f"a {key} is in two parts"
    assert sum(part.images for part in split.summary) == len(records) == split.whole.images
    assert all(part.images == split.parts.count(part.name) > 0 for part in split.summary)
    assert sum(part.target for part in split.summary) == pytest.approx(len(records))
    mixed = list(records)
    shuffle.shuffle(mixed)  # type: ignore[attr-defined]
    again = dict(zip((r.id for r in mixed), split_by_patient(mixed, sizes, seed).parts, strict=True))
    assert again == dict(zip((r.id for r in records), split.parts, strict=True))


@given(benign=st.integers(40, 200), malignant=st.integers(10, 60), share=st.floats(0.2, 0.8), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_images_without_patient_are_split_to_exact_sizes(benign: int, malignant: int, share: float, seed: int) -> None:
    records = [_record(i, "benign" if i < benign else "malignant") for i in range(benign + malignant)]
    split = split_by_patient(records, {"a": share, "b": 1 - share}, seed)
    for part in split.summary:
        assert abs(part.images - part.target) <= 1
        assert abs(part.classes["malignant"] - part.target * malignant / len(records)) <= 1


def test_split_is_determined_by_seed() -> None:
    records = [_record(i, "nv", f"P{i // 3}") for i in range(300)]
    first, again, other = (split_by_patient(records, TRAIN_VALIDATION, seed).parts for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_an_image_without_patient_follows_its_lesion() -> None:
    records = [_record(i, "nv", f"P{i}", f"L{i}") for i in range(50)]
    records += [_record(100 + i, "nv", "", f"L{i}") for i in range(50)]
    split = split_by_patient(records, {"a": 0.5, "b": 0.5})
    assert split.parts[:50] == split.parts[50:]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({}, "parts need"), ({"a": 0.8, "b": 0.3}, "more than 1"), ({"a": -1}, "above 0"), ({"rest": 5}, "rest")],
)
def test_impossible_split_sizes_are_refused(sizes: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_by_patient([_record(i, "nv") for i in range(9)], sizes)


def test_command_writes_parts_that_read_back(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    lines = [f"ISIC_{i},P{i // 4},{'nevus, common' if i % 5 else 'melanoma'},{int(not i % 5)}" for i in range(100)]
    lines = [line.replace("nevus, common", '"nevus, common"') for line in lines]
    table.write_text("\n".join(["image_name,patient_id,diagnosis,target", *lines]) + "\n")
    out = tmp_path / "split"
    options = ["--parts", "train=60,validation=20", "--out", str(out)]
    result = CliRunner().invoke(app, ["data", "split", str(table), *options])
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "split.json").read_text())
    assert {name: part["images"] for name, part in summary["parts"].items()} == {
        "train": 60,
        "validation": 20,
        "rest": 20,
    }
    assert {name: part["classes"]["malignant"] for name, part in summary["parts"].items()} == {
        "train": 12,
        "validation": 4,
        "rest": 4,
    }
    parts = read_split(out)
    whole = {record.id: record for record in read_source(table).records}
    assert parts.keys() == whole.keys()
    for record in read_source(out / "validation.csv").records:
        assert (record, record.row) == (whole[record.id], whole[record.id].row)
        assert parts[record.id] == "validation"
    assert CliRunner().invoke(app, ["data", "split", str(table), *options]).exit_code == 1, "must not overwrite"
    for wrong in ("train", "a=1,a=2", "../a=1", "a=x"):
        result = CliRunner().invoke(app, ["data", "split", str(table), "--parts", wrong, "--out", str(tmp_path / "x")])
        assert isinstance(result.exception, DataError), wrong


@pytest.mark.full
@pytest.mark.skipif(not TABLE.is_file(), reason="needs ../shared/data/ISIC_2020_Training_GroundTruth.csv.gz")
@pytest.mark.parametrize("sizes", PRESETS.values(), ids=PRESETS.keys())
def test_isic_2020_is_split_within_one_per_cent(sizes: dict[str, float]) -> None:
    """Sizes within 1 %, the malignant share within 0.2 percentage points, no patient shared."""
    records = read_source(TABLE).records
    assert len(records) == 33_126
    split = split_by_patient(records, sizes)
    patients = defaultdict(set)
    for record, part in zip(records, split.parts, strict=True):
        patients[part].add(record.patient_id)
    assert sum(map(len, patients.values())) == len(set().union(*patients.values())) == 2_056
    assert [part.name for part in split.summary] == list(sizes)
    total = sum(sizes.values())
    for part in split.summary:
        assert abs(part.images - 33_126 * sizes[part.name] / total) <= 0.01 * 33_126 * sizes[part.name] / total
        assert abs(part.share("malignant") - 584 / 33_126) <= 0.002
        assert abs(part.groups / 2_056 - part.images / 33_126) <= 0.02
