"""Tests of embeddings: features, the map, nearest neighbours, the page and the files for TensorBoard."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import tiny_classifier
from benchmarks.components import chromium
from dermis.classifier.onnx_session import Classifier
from dermis.errors import DataError
from dermis.explain.embeddings import Embedded, Item, embed, map_in_3d
from dermis.explain.embeddings_page import NEIGHBOURS, embeddings_page, sprite
from dermis.explain.nearest import nearest_by_cosine
from dermis.explain.tensorboard_projector import write_projector

CLUSTERS, EACH, WIDE = 3, 30, 12


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of three clusters, each about a direction of its own, of very different lengths; and their clusters."""
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(CLUSTERS), EACH)
    x = np.eye(CLUSTERS, WIDE)[cluster] + rng.normal(scale=0.08, size=(len(cluster), WIDE))
    return (x * rng.uniform(0.1, 10, (len(cluster), 1))).astype(np.float32), cluster


def some_embedded(count: int = 30, thumbnail: int = 8) -> Embedded:
    rng = np.random.default_rng(1)
    names = ("benign", "malignant", "")
    items = tuple(
        Item(
            f"id</script>{i}",
            "real" if i % 2 else "generated",
            names[i % 3],
            source="a\tb",
            part="test" if i % 2 else "",
        )
        for i in range(count)
    )
    thumbnails = np.repeat(rng.integers(0, 256, (count, 1, 1, 3)), thumbnail, 1).repeat(thumbnail, 2).astype(np.uint8)
    return Embedded(items, rng.normal(size=(count, 5)).astype(np.float32), rng.uniform(size=count), thumbnails)


def a_page(embedded: Embedded, **change: Any) -> tuple[str, dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    positions = map_in_3d(embedded.features, iterations=(20, 20))
    similarities, neighbours = nearest_by_cosine(embedded.features, min(NEIGHBOURS, len(embedded) - 1))
    description = tiny_classifier.describe()
    text = embeddings_page(
        embedded, positions, similarities, neighbours, description, **{"title": "A & B", "threshold": 0.5, **change}
    )
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    return text, data, positions, similarities, neighbours


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def test_cosine_neighbours_are_in_planted_cluster_for_any_length() -> None:
    x, cluster = planted()
    similarities, indices = nearest_by_cosine(x, 8)
    assert (cluster[indices] == cluster[:, None]).all()
    assert (indices != np.arange(len(x))[:, None]).all()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(similarities, np.take_along_axis(unit @ unit.T, indices, 1), atol=1e-5)
    assert (np.diff(similarities, axis=1) <= 0).all()


def test_neighbours_do_not_depend_on_blocks_and_exclude_own_group() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1100, 6)).astype(np.float32)  # more than two blocks
    unit = x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    np.testing.assert_array_equal(nearest_by_cosine(x, 4)[1], np.argsort(-cosine, axis=1, kind="stable")[:, :4])
    copies = np.repeat(np.array([[1.0, 0], [0, 1]], np.float32), 4, axis=0)
    assert nearest_by_cosine(copies, 3)[1][0].tolist() == [1, 2, 3]
    groups = ["p", "p", "p", "", "", "q", "", ""]
    assert nearest_by_cosine(copies, 2, groups=groups)[1][0].tolist() == [3, 4]
    with pytest.raises(ValueError, match="6 neighbours were requested, but there are only 5"):
        nearest_by_cosine(copies, 6, groups=groups)


def test_map_separates_planted_clusters_and_is_deterministic() -> None:
    x, cluster = planted()
    positions = map_in_3d(x, seed=3, iterations=(50, 50))
    assert positions.shape == (len(x), 3)
    assert positions.dtype == np.float32
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=2) + 10 * np.eye(len(x))
    assert (cluster[apart.argmin(axis=1)] == cluster).all()
    np.testing.assert_allclose(positions.mean(axis=0), 0, atol=1e-5)
    assert np.linalg.norm(positions, axis=1).max() == pytest.approx(1, abs=1e-5)
    assert (map_in_3d(x, seed=3, iterations=(50, 50)) == positions).all()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_few_or_identical_images_have_a_finite_map(count: int) -> None:
    for x in (np.random.default_rng(0).normal(size=(count, 4)), np.ones((count, 4)), np.zeros((count, 4))):
        positions = map_in_3d(x.astype(np.float32), iterations=(10, 10))
        assert positions.shape == (count, 3)
        assert np.isfinite(positions).all()
        assert np.linalg.norm(positions, axis=1).max() <= 1 + 1e-6


def test_embedding_has_classifier_features_in_order(tmp_path: Path) -> None:
    tiny_classifier.make_classifier(tmp_path / "c")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + i % 3, 24, 3), dtype=np.uint8) for i in range(70)]  # more than one chunk
    items = [Item(str(i), "real") for i in range(70)]
    counted: list[int] = []
    with Classifier(tmp_path / "c", device="cpu") as classifier:
        embedded = embed(classifier, zip(items, images, strict=True), thumbnail=12, done=counted.append)
        expected = classifier.classify(images)
        assert (embedded.features == expected.features).all()
        assert (embedded.calibrated == expected.calibrated).all()
        assert [item.id for item in embedded.items] == [str(i) for i in range(70)]
        assert embedded.thumbnails.shape == (70, 12, 12, 3)
        assert sum(counted) == 70
        with pytest.raises(DataError, match="no image"):
            embed(classifier, [])
        with pytest.raises(DataError, match="two images"):
            embed(classifier, [(items[0], images[0]), (items[0], images[1])])


def test_page_holds_its_data_and_loads_no_other_resource() -> None:
    embedded = some_embedded()
    text, data, positions, similarities, neighbours = a_page(embedded, reasons=["misclassified"] + [""] * 29)
    n, k = neighbours.shape
    assert data["ids"] == [item.id for item in embedded.items]
    assert (unpacked(data["positions"], "<f4").reshape(n, 3) == positions).all()
    assert (unpacked(data["neighbours"], "<u4").reshape(n, k) == neighbours).all()
    assert (unpacked(data["similarities"], "<f4").reshape(n, k) == similarities).all()
    assert (unpacked(data["numbers"][0]["values"], "<f4") == embedded.calibrated.astype(np.float32)).all()
    columns = {each["name"]: each for each in data["categories"]}
    for name, expected in {
        "kind": [item.kind for item in embedded.items],
        "class": [item.class_name or "unknown" for item in embedded.items],
        "part": [item.part or "unknown" for item in embedded.items],
        "predicted": ["malignant" if p >= 0.5 else "benign" for p in embedded.calibrated],
        "edge case": ["misclassified"] + ["none"] * 29,
    }.items():
        labels = [columns[name]["labels"][code] for code in unpacked(columns[name]["codes"], "<u2")]
        assert labels == expected, name
    right = [item.class_name == said for item, said in zip(embedded.items, columns["predicted"], strict=False)]
    assert right  # "classified" follows from class and predicted
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["sprite"].partition(",")[2]))).convert("RGB"), int)
    side, across = data["side"], data["columns"]
    for i in range(n):
        y, x = i // across * side, i % across * side
        tile = picture[y + 2 : y + side - 2, x + 2 : x + side - 2].mean(axis=(0, 1))
        assert np.abs(tile - embedded.thumbnails[i, 0, 0]).max() < 40, i
    assert "training images" in data["warning"]
    assert "Not a medical device" in data["notice"]
    assert not re.search(r"(src|href)\s*=\s*[\"']|https?://|@import|fetch\(|XMLHttp", text)
    assert "default-src 'none'" in text
    assert text.count("</script>") == 2  # an id cannot end the element


def test_page_labels_generated_images_and_limits_thumbnails() -> None:
    embedded = some_embedded()
    generated = embedded.select(np.arange(0, 30, 2))
    _, data, *_ = a_page(generated)
    assert "generated" in data["warning"]
    with Image.open(io.BytesIO(base64.b64decode(data["sprite"].partition(",")[2]))) as picture:
        assert b"digitalsourcetype/trainedAlgorithmicMedia" in picture.info["xmp"]
    with pytest.raises(DataError, match="16 do; give fewer images or --thumbnail 1638"):
        sprite(np.broadcast_to(np.uint8(0), (17, 2048, 2048, 3)))


def test_tensorboard_files_hold_same_embedding(tmp_path: Path) -> None:
    embedded = some_embedded()
    write_projector(tmp_path, embedded, ["benign"] * 30)
    np.testing.assert_allclose(np.loadtxt(tmp_path / "tensors.tsv", delimiter="\t"), embedded.features, rtol=1e-5)
    header, *rows = [line.split("\t") for line in (tmp_path / "metadata.tsv").read_text().splitlines()]
    assert [row[header.index("id")] for row in rows] == [item.id for item in embedded.items]
    assert {len(row) for row in rows} == {len(header)}
    assert b"digitalsourcetype/compositeSynthetic" in Image.open(tmp_path / "sprite.png").info["xmp"]
    picture = np.asarray(Image.open(tmp_path / "sprite.png"))
    assert (picture[8:16, 0:8] == embedded.thumbnails[6]).all()  # six columns
    tensorboard = pytest.importorskip("tensorboard.plugins.projector.projector_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), tensorboard.ProjectorConfig())
    assert config.embeddings[0].sprite.single_image_dim == [8, 8]
    assert all((tmp_path / name).is_file() for name in (config.embeddings[0].tensor_path, "metadata.tsv"))


@pytest.mark.full
def test_embeddings_command_maps_real_generated_and_added_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from commands.main import app
    from tiny import make_bundle
    from tiny_skin import make_skin

    monkeypatch.chdir(tmp_path)
    make_skin(tmp_path / "skin", count=24)
    make_bundle(tmp_path / "bundle")
    tiny_classifier.make_classifier(tmp_path / "c")
    folder = tmp_path / "projections"
    folder.mkdir()
    shutil.copy(next((tmp_path / "skin" / "images").glob("*.png")), folder / "one.png")
    options = (
        "explain embeddings --classifier c --data skin --generator bundle --generate 6 --add projected=projections"
    )
    monkeypatch.setattr("dermis.explain.embeddings.ITERATIONS", (10, 10))
    for out in ("a", "b"):
        result = CliRunner().invoke(app, [*options.split(), "--out", out, "--device", "cpu", "--threads", "1"])
        assert result.exit_code == 0, (result.output, result.exception)
    assert "training images" in result.output
    with np.load("a/features.npz", allow_pickle=False) as first, np.load("b/features.npz") as second:
        assert {name: first[name].tobytes() for name in first} == {name: second[name].tobytes() for name in second}
        assert first["features"].shape == (31, tiny_classifier.FEATURES)
        ids = first["ids"].tolist()
    rows = list(csv.DictReader(io.StringIO(Path("a/metadata.csv").read_text())))
    assert [row["id"] for row in rows] == ids
    assert [row["kind"] for row in rows] == ["real"] * 24 + ["generated"] * 6 + ["projected"]
    assert [row["class"] for row in rows[24:30]] == ["benign", "malignant"] * 3
    assert [row["index"] for row in rows[24:30]] == list("012345")
    assert Path("a/index.html").read_text() == Path("b/index.html").read_text()
    result = CliRunner().invoke(
        app, ["explain", "embeddings", "--classifier", "c", "--out", "x", "--data", "skin", "--thumbnail", "4096"]
    )
    assert "do not fit" in str(result.exception)
    assert not Path("x").exists()


BROWSER = chromium()


@pytest.mark.full
@pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page with")
def test_embeddings_page_works_in_browser(tmp_path: Path) -> None:
    embedded = some_embedded()
    text, _, _, _, neighbours = a_page(embedded)
    probe = """<script>
    const report = {};
    choose(4); report.near = [...document.querySelectorAll("#near span")].map((e) => e.textContent.split(" ")[0]);
    rotate(0.7, 0.4); rotate(-1.1, 2.0); projected(600, 600);
    const m = view.turn; report.determinant = m[0] * (m[4] * m[8] - m[5] * m[7]) - m[1] * (m[3] * m[8] - m[5] * m[6])
      + m[2] * (m[3] * m[7] - m[4] * m[6]);
    report.order = sorted(); report.under = pointAt(screenX[7], screenY[7], 1);
    kind.hidden.add(kind.labels.indexOf("real")); refilter(); report.visible = visible.reduce((a, b) => a + b, 0);
    search(data.ids[2]); report.found = state.chosen;
    colourBy("probability"); report.colours = new Set(data.ids.map((_, i) => colourOf(i))).size;
    report.box = (() => { kind.hidden.clear(); refilter(); reset(); projected(space.clientWidth, space.clientHeight);
      return Math.max((Math.max(...screenX) - Math.min(...screenX)) / space.clientWidth,
        (Math.max(...screenY) - Math.min(...screenY)) / space.clientHeight); })();
    select((i) => within(screenX[i], screenY[i], [[-1e6, -1e6], [1e6, -1e6], [1e6, 1e6], [-1e6, 1e6]]));
    report.all = state.count;
    const [x, y] = [screenX[3], screenY[3]], near = 0.01;
    select((i) => within(screenX[i], screenY[i], [[x - near, y - near], [x + near, y - near], [x, y + near]]));
    report.saved = table().split("\\n");
    draw(); document.title = JSON.stringify(report);
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", probe), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", profile, "--dump-dom", page.as_uri()]
    shown = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120).stdout
    report = json.loads(re.search(r"<title>(.*?)</title>", shown)[1].replace("&lt;", "<").replace("&gt;", ">"))  # type: ignore[index]
    assert report["near"] == [embedded.items[j].id for j in neighbours[4]]
    assert report["determinant"] == pytest.approx(1, abs=1e-6)
    assert report["order"] == 30
    assert report["under"] == 7
    assert report["visible"] == 15
    assert report["found"] == 2
    assert report["colours"] > 5
    assert 0.85 < report["box"] < 1.1  # the first view fills the canvas
    assert report["all"] == 30
    assert report["saved"][0].startswith("id,") and report["saved"][1].startswith(f"{embedded.items[3].id},")
    assert len(report["saved"]) == 3  # with the end of the last line
