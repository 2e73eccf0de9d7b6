"""Tests of latent neighbours: their distance, their direction, and the folder of their images."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dermis.bundle import load_generator, open_bundle
from dermis.dataset.neighbours import read_description, write_neighbours
from dermis.errors import DataError
from dermis.imaging import decode
from dermis.latent_neighbours import Anchor, anchor_ws, neighbours_of, read_projections, w_neighbour, z_neighbour
from dermis.latents import partner_z, z_for
from dermis.synthesizer import Synthesizer
from tiny import make_bundle
from training.classifier.synthetic import SyntheticSource, load_synthetic


@pytest.mark.parametrize("distance", [0.01, 0.1, 0.5, 1.9])
def test_neighbours_lie_exactly_at_the_distance(distance: float) -> None:
    rng = np.random.default_rng(0)
    ws, partner, w_avg = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 64), (6, 64), (64,)))
    moved = w_neighbour(ws, w_avg, partner, distance)
    assert np.linalg.norm(moved - ws) / np.linalg.norm(ws - w_avg) == pytest.approx(distance, rel=1e-5)
    towards = (partner - ws).ravel()
    assert (moved - ws).ravel() @ towards == pytest.approx(
        np.linalg.norm(moved - ws) * np.linalg.norm(towards), rel=1e-5
    )
    z, other = (rng.normal(size=64).astype(np.float32) for _ in range(2))
    turned = z_neighbour(z, other, distance)
    assert np.linalg.norm(turned - z) / np.linalg.norm(z) == pytest.approx(distance, rel=1e-5)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(z), rel=1e-6)


def test_partner_latents_use_separate_random_streams() -> None:
    drawn = [partner_z(seed, index, number, 8).tobytes() for seed in (0, 1) for index in (0, 1) for number in (0, 1)]
    samples = [z_for(seed, [index], 8).tobytes() for seed in (0, 1) for index in (0, 1)]
    assert len({*drawn, *samples}) == 12
    assert partner_z(1, 2, 3, 16)[:8].tobytes() == partner_z(1, 2, 3, 8).tobytes()
    with pytest.raises(ValueError, match="number"):
        partner_z(0, 0, -1, 8)


def test_neighbour_at_given_distance_does_not_depend_on_count(tmp_path: Path) -> None:
    generator = load_generator(make_bundle(tmp_path / "b"))
    generator.mapping.w_avg.fill_(0.05)
    anchor, w_avg = Anchor("a", 1, 3, 7), 0.05
    for psi in (1.0, 0.7):
        ws = anchor_ws(generator, anchor, psi)
        many = neighbours_of(generator, anchor, range(4), distance=0.1, truncation_psi=psi)
        apart = np.linalg.norm((many - ws).reshape(4, -1), axis=1) / np.linalg.norm(ws - w_avg)
        np.testing.assert_allclose(apart, 0.1, rtol=1e-4)
        np.testing.assert_allclose(
            neighbours_of(generator, anchor, [2], distance=0.1, truncation_psi=psi)[0], many[2], atol=1e-6
        )
    assert len({each.tobytes() for each in many}) == 4
    stored = Anchor("g", 1, 3, 7, ws=anchor_ws(generator, anchor))
    np.testing.assert_allclose(
        neighbours_of(generator, stored, [0], distance=0.1),
        neighbours_of(generator, anchor, [0], distance=0.1),
        atol=1e-6,
    )
    with pytest.raises(DataError, match="no z"):
        neighbours_of(generator, stored, [0], distance=0.1, space="z")
    for distance, space in ((0.0, "w"), (2.1, "z"), (0.1, "x")):
        with pytest.raises(DataError):
            neighbours_of(generator, anchor, [0], distance=distance, space=space)  # type: ignore[arg-type]


def test_neighbour_folder_resumes_to_same_bytes_and_loads(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    generator = load_generator(bundle)
    anchors = [Anchor("case, one", 0, 0, 4), Anchor("two", 1, 0, 5), Anchor("three", 1, 9, 1)]

    class StopError(Exception):
        pass

    drawn = [0]

    def stop(images: int) -> None:
        drawn.append(images)
        if sum(drawn) >= 40:
            raise StopError

    with Synthesizer(bundle, device="cpu", backend="torch", threads=1, generator=generator) as synthesizer:

        def write(out: Path, done=lambda images: None) -> int:  # type: ignore[no-untyped-def]
            return write_neighbours(
                out, bundle, generator, synthesizer, anchors, count=30, distance=0.1, truncation_psi=0.9, done=done
            )

        assert write(tmp_path / "whole") == 90
        with pytest.raises(StopError):
            write(tmp_path / "stopped", stop)
        assert not (tmp_path / "stopped").exists()
        again: list[int] = []
        write(tmp_path / "stopped", again.append)
        assert again[0] >= 32  # the earlier content
        with pytest.raises(DataError, match="exists already"):
            write(tmp_path / "whole")
        ws = neighbours_of(generator, anchors[2], [29], distance=0.1, truncation_psi=0.9)
        image = synthesizer.images_from_ws(ws)[0]
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert [path for path in files if path.suffix != ".png"] == [Path("metadata.csv"), Path("neighbours.json")]
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes(), file
    assert not list(tmp_path.glob(".*"))
    last = decode((tmp_path / "whole" / "malignant" / "NBR_00002_029.png").read_bytes())
    assert np.abs(last.astype(int) - image).max() <= 1
    rows = list(csv.DictReader(io.StringIO((tmp_path / "whole" / "metadata.csv").read_text())))
    assert [rows[0][name] for name in ("anchor", "neighbour", "target", "seed", "index")] == [
        "case, one",
        "0",
        "benign",
        "0",
        "4",
    ]
    description = read_description(tmp_path / "whole")
    assert (description["distance"], description["space"], description["bundle"]["digest"]) == (0.1, "w", bundle.digest)
    taken = load_synthetic(
        [SyntheticSource(str(tmp_path / "whole"))],
        {"benign": 30, "malignant": 60},
        16,
        cache=tmp_path / "cache",
        progress=False,
    )
    assert [len(images) for images in taken.images] == [30, 60]
    assert (taken.images[1][59] == last).all()


def test_projections_become_anchors_or_are_refused_if_invalid(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    names, num_ws, w_dim = bundle.class_names, bundle.generator.num_ws, bundle.generator.w_dim
    rng = np.random.default_rng(0)
    full, plain = rng.normal(size=(2, num_ws, w_dim)), rng.normal(size=(1, w_dim))
    folder = tmp_path / "p"
    folder.mkdir()
    np.savez(folder / "a.npz", ws=full, classes=["benign", "malignant"], ids=["x", "y"])
    np.savez(folder / "b.npz", ws=plain, classes=["malignant"])
    anchors = read_projections(folder, names, num_ws, w_dim, seed=4)
    assert [(each.id, each.label, each.seed, each.index) for each in anchors] == [
        ("x", 0, 4, 0),
        ("y", 1, 4, 1),
        ("b-0", 1, 4, 2),
    ]
    assert anchors[2].ws is not None
    np.testing.assert_allclose(anchors[2].ws, np.repeat(plain, num_ws, axis=0), rtol=1e-6)
    for arrays, what in (
        ({"ws": full}, "no array classes"),
        ({"ws": full[:, :1], "classes": ["benign"] * 2}, "takes"),
        ({"ws": full * np.nan, "classes": ["benign"] * 2}, "finite"),
        ({"ws": full, "classes": ["benign", "wart"]}, "'wart' is none"),
        ({"ws": full, "classes": np.array([{}, {}])}, "cannot be read"),
    ):
        np.savez(tmp_path / "odd.npz", **arrays, allow_pickle=True)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=what):
            read_projections(tmp_path / "odd.npz", names, num_ws, w_dim)


def test_command_makes_neighbours_of_listed_and_projected_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from commands.main import app
    from dermis.explain.edge_cases import COLUMNS, to_csv

    monkeypatch.chdir(tmp_path)
    bundle = make_bundle(tmp_path / "b")
    row = dict.fromkeys(COLUMNS, "") | {
        "id": "GEN_0_00000003",
        "source": "tiny",
        "seed": "0",
        "index": "3",
        "label": "1",
    }
    Path("cases.csv").write_text(to_csv([row]))
    base = "augment edge-cases --generator b --count 2 --threads 1 --device cpu"
    run = CliRunner()
    result = run.invoke(app, f"{base} --cases cases.csv --out listed --space z --distance 0.2".split())
    assert result.exit_code == 0, (result.output, result.exception)
    assert sorted(path.name for path in Path("listed/malignant").iterdir()) == [
        "NBR_00000_000.png",
        "NBR_00000_001.png",
    ]
    assert json.loads(Path("listed/neighbours.json").read_text())["space"] == "z"
    ws = np.zeros((1, bundle.generator.w_dim)) + 0.3
    np.savez("p.npz", ws=ws, classes=["benign"])
    result = run.invoke(app, f"{base} --projections p.npz --out projected".split())
    assert result.exit_code == 0, (result.output, result.exception)
    with np.load("projected/anchors.npz") as kept:
        np.testing.assert_allclose(kept["ws"][0, 0], ws[0])
    Path("real.csv").write_text(to_csv([row | {"seed": ""}]))
    Path("other.csv").write_text(to_csv([row | {"source": "another"}]))
    for wrong, what in (
        ("--cases real.csv", "not a generated image"),
        ("--cases other.csv", "not by tiny"),
        ("", "give one of"),
        ("--cases cases.csv --distance 0", "distance"),
    ):
        assert what in str(run.invoke(app, f"{base} --out x {wrong}".split()).exception)
    assert not Path("x").exists()
    assert open_bundle("b").digest == bundle.digest


def test_folder_of_projections_does_not_name_the_real_images(tmp_path: Path) -> None:
    from commands.main import app

    bundle = make_bundle(tmp_path / "b")
    np.savez(tmp_path / "p.npz", ws=np.full((1, bundle.generator.w_dim), 0.3), classes=["benign"], ids=["ISIC_0000068"])
    line = f"augment edge-cases --generator {tmp_path}/b --count 1 --threads 1 --device cpu --out {tmp_path}/out"
    result = CliRunner().invoke(app, [*line.split(), "--projections", str(tmp_path / "p.npz")])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "has latents of real images" in result.stderr and "protect it" in result.stderr
    table, description = ((tmp_path / "out" / name).read_text() for name in ("metadata.csv", "neighbours.json"))
    assert "ISIC_0000068" not in table + description
    assert next(csv.DictReader(io.StringIO(table)))["anchor"] == "projection-00000"
    assert json.loads(description)["anchors"][0]["id"] == "projection-00000"
