"""Tests of edge cases: planted ones are detected with the correct reasons; files; the command."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import tiny_classifier
from dermis.errors import DataError
from dermis.explain.edge_cases import (
    MISCLASSIFIED,
    NEIGHBOURS,
    THRESHOLD,
    Criteria,
    edge_case_rows,
    edge_case_sheet,
    edge_scores,
    from_csv,
    to_csv,
)
from dermis.explain.embeddings import Embedded, Item


def two_clusters() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels, probabilities and what is planted: 0 nothing, 1 between the clusters, 2 in the wrong one.

    Ten benign images for each malignant one, everywhere; points are on an arc, so that cosine tells them apart.
    """
    rng = np.random.default_rng(0)
    benign, malignant, between = 200, 20, 11
    angle = np.concatenate(
        [rng.normal(0, 0.04, benign), rng.normal(1.2, 0.04, malignant), np.linspace(0.55, 0.65, between), [1.2, 1.21]]
    )
    labels = np.array([0] * benign + [1] * malignant + [0] * 5 + [1] + [0] * 5 + [0, 0])
    kind = np.array([0] * (benign + malignant) + [1] * between + [2, 2])
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    return x, labels, np.where(labels == 1, 0.9, 0.05), kind


def rows_of(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_edge_cases_are_exactly_planted_boundary_points_and_outliers() -> None:
    x, labels, p, kind = two_clusters()
    scores = edge_scores(x, labels, p, 0.5, Criteria(neighbours=9))
    assert (scores.between_clusters == (kind > 0)).all()
    assert not scores.misclassified.any()
    strays = np.flatnonzero(kind == 2)
    assert (scores.agreement[strays] < 0.2).all()
    assert set(strays) < set(scores.order[:3])  # and the one malignant image among the benign ones
    assert all(scores.reasons(int(i)) == (NEIGHBOURS,) for i in scores.order)
    assert scores.reasons(0) == ()


def test_misclassified_and_near_threshold_images_are_edge_cases() -> None:
    x, labels, p, kind = two_clusters()
    p[0], p[1], p[2], p[200] = 0.25, 0.19, 0.18, 0.001  # threshold 0.2: odds 1/4, 1/3, ...
    scores = edge_scores(x, labels, p, 0.2, Criteria(neighbours=9, odds=1.34))
    assert scores.reasons(0) == (MISCLASSIFIED, THRESHOLD)
    assert scores.reasons(1) == scores.reasons(2) == (THRESHOLD,)
    assert scores.reasons(200) == (MISCLASSIFIED,)
    assert edge_scores(x, labels, p, 0.2, Criteria(9, odds=1.01)).reasons(0) == (MISCLASSIFIED,)
    at = edge_scores(x, labels, np.full(len(x), 0.2), 0.2, Criteria(9))
    np.testing.assert_allclose(at.own, 0.5)  # the threshold is even odds, wherever it lies
    assert kind[0] == 0
    assert scores.own[0] < 0.5 < scores.own[1]
    for p_end in (0.0, 1.0):
        assert np.isfinite(edge_scores(x, labels, np.full(len(x), p_end), 0.2, Criteria(9)).score).all()


def test_neighbours_of_same_patient_are_ignored() -> None:
    x, labels, p, _ = two_clusters()
    stray = len(x) - 1
    x = np.concatenate([x, np.repeat(x[stray : stray + 1], 9, axis=0)])
    labels, p = np.concatenate([labels, [0] * 9]), np.concatenate([p, [0.05] * 9])
    alone = edge_scores(x, labels, p, 0.5, Criteria(neighbours=9))
    assert alone.agreement[stray] == 1  # its nine copies
    groups = [f"patient {min(i, stray)}" for i in range(len(x))]
    assert edge_scores(x, labels, p, 0.5, Criteria(neighbours=9), groups=groups).between_clusters[stray]


def test_too_few_images_single_class_and_bad_criteria_are_refused() -> None:
    x, labels, p, _ = two_clusters()
    with pytest.raises(DataError, match="choose a smaller number"):
        edge_scores(x[195:205], labels[195:205], p[195:205], 0.5, Criteria())
    with pytest.raises(DataError, match="one only"):
        edge_scores(x[:50], labels[:50], p[:50], 0.5, Criteria())
    for change, field in (
        ({"neighbours": 0}, "neighbours"),
        ({"agreement": 2.0}, "agreement"),
        ({"odds": 0.5}, "odds"),
    ):
        with pytest.raises(DataError, match=field):
            Criteria(**change)  # type: ignore[arg-type]


def test_edge_case_list_round_trips_and_sheet_shows_neighbours() -> None:
    x, labels, p, _ = two_clusters()
    names = ("benign", "malignant")
    items = tuple(
        Item(f"a;{i}", "generated", names[label], source="b", seed=5, index=i, label=int(label))
        for i, label in enumerate(labels)
    )
    thumbnails = np.full((len(x), 10, 10, 3), np.arange(len(x))[:, None, None, None], np.uint8)
    embedded = Embedded(items, x, p, thumbnails)
    scores = edge_scores(x, labels, p, 0.5, Criteria(neighbours=9))
    rows = edge_case_rows(embedded, scores, names, 0.5)
    assert from_csv(to_csv(rows), "x") == rows
    assert [float(row["score"]) for row in rows] == sorted((float(row["score"]) for row in rows), reverse=True)
    first = int(scores.order[0])
    assert (rows[0]["id"], rows[0]["index"], rows[0]["label"]) == (f"a;{first}", str(first), str(labels[first]))
    assert rows[0]["neighbours"].split("; ") == [f"a;{j}" for j in scores.neighbours[first]]
    sheet = edge_case_sheet(embedded, scores, names, 3)
    assert sheet.shape[:2] == (3 * 18 + 2, 8 * 18 + 2)  # a case and seven neighbours, framed
    assert sheet[10, 10, 0] == first
    assert sheet[10, 28, 0] == scores.neighbours[first, 0]
    with pytest.raises(DataError, match="lists no"):
        from_csv(to_csv([]), "x")
    with pytest.raises(DataError, match="no column"):
        from_csv("id,score\n1,2\n", "x")


@pytest.mark.full
def test_edge_cases_command_lists_only_held_out_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from commands.main import app
    from tiny import make_bundle
    from tiny_skin import make_skin

    monkeypatch.chdir(tmp_path)
    make_skin(tmp_path / "skin", count=48)
    make_bundle(tmp_path / "bundle")
    tiny_classifier.make_classifier(tmp_path / "c")
    lines = [f"ISIC_{i:07d},{'validation' if i < 12 else 'test'},0,0,0,0" for i in range(24)]
    Path("predictions.csv").write_text("isic_id,part,label,logit,probability,calibrated\n" + "\n".join(lines) + "\n")
    base = "explain edge-cases --classifier c --neighbours 5 --threads 1 --device cpu"
    run = CliRunner()
    result = run.invoke(app, f"{base} --data skin --predictions predictions.csv --out real".split())
    assert result.exit_code == 0, (result.output, result.exception)
    rows = rows_of("real/edge-cases.csv")
    assert rows
    assert {row["part"] for row in rows} <= {"validation", "test"}
    assert all(int(row["id"][-7:]) < 24 for row in rows)
    for row in rows:  # two images a patient
        assert f"ISIC_{int(row['id'][-7:]) ^ 1:07d}" not in row["neighbours"].split("; ")
    result = run.invoke(app, f"{base} --generator bundle --generate 20 --out drawn".split())
    assert result.exit_code == 0, (result.output, result.exception)
    assert Image.open("real/edge-cases.png").info.get("xmp") is None
    xmp = Image.open("drawn/edge-cases.png").info["xmp"]
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in xmp and b"AISystemUsed" in xmp
    rows = rows_of("drawn/edge-cases.csv")
    assert all(row["id"] == f"GEN_0_{int(row['index']):08d}" for row in rows)
    for wrong, what in (
        ("", "give one of"),
        (" --data skin --generator bundle", "give one of"),
        (" --data skin --part test", "--predictions or --split"),
        (" --generator bundle --part test", "--part need --data"),
    ):
        assert what in str(run.invoke(app, f"{base} --out x{wrong}".split()).exception)
    assert not Path("x").exists()
