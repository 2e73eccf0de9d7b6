"""Tests of directions: they equal the definitions in the papers, and edits have the stated effect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle import Bundle, amend_bundle, load_generator, open_bundle
from dermis.bundle.directions import Direction, decode_directions, encode_directions
from dermis.directions.edit import Edit, apply_edits, offset_of, strip
from dermis.directions.fit import class_means, ganspace, hyperplane, oriented, sample_w, sefa
from dermis.errors import BundleError, RequestError
from dermis.networks import Generator
from tiny import make_bundle

NUM_WS, W_DIM = 6, 16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def generator(bundle: Bundle) -> Generator:
    return load_generator(bundle)


def axis(k: int, scale: float = 1.0, layers: tuple[int, int] = (0, NUM_WS)) -> Direction:
    return Direction(f"axis-{k}", oriented(np.eye(W_DIM)[k]), layers, scale, "sefa")


# -- fitting


@pytest.mark.parametrize("layers", [(0, NUM_WS), (0, 2), (3, 5)])
def test_sefa_is_the_eigendecomposition_of_the_style_weights(generator: Generator, layers: tuple[int, int]) -> None:
    convolutions = [layer for block in generator.synthesis.blocks for layer in block.layers]
    rows = []
    for layer in convolutions[layers[0] : layers[1]]:
        weight = (layer.affine.weight * layer.affine.weight_gain).detach().double().numpy()
        rows.append(weight / np.linalg.norm(weight, axis=1, keepdims=True))
    matrix = np.concatenate(rows)
    _, singular, right = np.linalg.svd(matrix)  # another method with the same result
    w = sample_w(generator, 200, seed=0)
    directions = sefa(generator, w, layers=layers, count=5)
    for k, direction in enumerate(directions):
        assert abs(float(direction.vector @ right[k])) == pytest.approx(1, abs=1e-4)
        assert direction.vector[np.argmax(np.abs(direction.vector))] > 0  # the sign is fixed
        assert direction.facts["share"] == pytest.approx(singular[k] ** 2 / (singular**2).sum(), rel=1e-4)
        assert direction.scale == pytest.approx(float((w @ direction.vector).std()), rel=0.02)
        assert direction.layers == layers
    shares = [float(direction.facts["share"]) for direction in directions]
    assert shares == sorted(shares, reverse=True)


def test_ganspace_is_the_principal_components_of_w_within_classes(generator: Generator) -> None:
    w = sample_w(generator, 600, seed=3)
    centred = np.concatenate([w[k::2] - w[k::2].mean(axis=0) for k in range(2)]).astype(np.float64)
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    for k, direction in enumerate(ganspace(generator, samples=600, seed=3, count=3)):
        assert abs(float(direction.vector @ right[k])) == pytest.approx(1, abs=1e-3)
        assert direction.scale == pytest.approx(singular[k] / np.sqrt(598), rel=1e-3)


def test_class_means_direction_points_from_first_class_to_second(generator: Generator) -> None:
    w = sample_w(generator, 300, seed=0)
    (direction,) = class_means(generator, ["benign", "malignant"], w, samples=300, seed=0)
    assert direction.name == "benign-to-malignant"
    of = [sample_w(generator, 300, seed=0, labels=[label] * 300) for label in (0, 1)]
    assert (of[1] @ direction.vector).mean() > (of[0] @ direction.vector).mean()
    way = (of[1].mean(axis=0) - of[0].mean(axis=0)).astype(np.float64)
    assert direction.vector @ (way / np.linalg.norm(way)) == pytest.approx(1, abs=1e-5)


def test_hyperplane_finds_planted_and_refuses_rare_attribute() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(800, W_DIM)).astype(np.float32)
    planted = oriented(rng.normal(size=W_DIM))
    direction = hyperplane("frame", w, w @ planted > 0.5, layers=(0, NUM_WS))
    assert direction.vector @ planted > 0.97
    assert float(direction.facts["accuracy"]) > 0.9
    none = hyperplane("chance", w, rng.random(800) > 0.7, layers=(0, NUM_WS))
    assert float(none.facts["accuracy"]) < 0.65  # its stated accuracy agrees
    with pytest.raises(RequestError, match="at least 20"):
        hyperplane("rare", w, np.arange(800) < 5, layers=(0, NUM_WS))


# -- storing


def test_bundle_stores_directions_and_digest_changes(bundle: Bundle, tmp_path: Path) -> None:
    copy = make_bundle(tmp_path / "copy")
    amended = amend_bundle(copy, directions=[axis(1, 2.5, (1, 4)), axis(0)])
    again = open_bundle(amended.location)
    assert [d.name for d in again.directions] == ["axis-1", "axis-0"]
    assert (again.directions[0].scale, again.directions[0].layers) == (2.5, (1, 4))
    assert again.digest == amended.digest != copy.digest
    with pytest.raises(BundleError, match="more than once"):
        amend_bundle(again, directions=[axis(1), axis(1)])


def test_damaged_directions_file_is_refused_by_name() -> None:
    data = encode_directions([axis(0), axis(1)])
    for broken in (data[:-3], data.replace(b"axis-1", b"axis-9", 1), b""):
        with pytest.raises(BundleError, match="somewhere"):
            decode_directions(broken, "somewhere", w_dim=W_DIM, num_ws=NUM_WS)
    with pytest.raises(BundleError, match="somewhere"):
        decode_directions(data, "somewhere", w_dim=W_DIM, num_ws=2)


# -- editing

edits = st.lists(
    st.builds(
        Edit,
        st.sampled_from([f"axis-{k}" for k in range(4)]),
        st.floats(-20, 20, width=32),
        st.none() | st.tuples(st.integers(0, 2), st.integers(3, NUM_WS)),
    ),
    max_size=6,
)
KNOWN = {f"axis-{k}": axis(k, 0.5 + k) for k in range(4)}


@settings(max_examples=60, deadline=None)
@given(edits, edits)
def test_edits_are_additive_invertible_and_limited_to_layers(first: list[Edit], second: list[Edit]) -> None:
    ws = np.random.default_rng(0).normal(size=(3, NUM_WS, W_DIM)).astype(np.float32)
    both = apply_edits(ws, [*first, *second], KNOWN)
    assert np.allclose(both, apply_edits(apply_edits(ws, first, KNOWN), second, KNOWN), atol=1e-3)
    back = [Edit(edit.direction, -edit.strength, edit.layers) for edit in reversed(first)]
    assert np.allclose(apply_edits(ws, [*first, *back], KNOWN), ws, atol=1e-3)
    touched = np.zeros((NUM_WS, W_DIM), bool)
    for edit in first:
        begin, end = edit.layers or (0, NUM_WS)
        touched[begin:end, int(edit.direction[-1])] = True
    assert not offset_of(first, KNOWN, num_ws=NUM_WS, w_dim=W_DIM)[~touched].any()


def test_a_strip_holds_one_latent_at_each_strength() -> None:
    w = np.zeros((NUM_WS, W_DIM), np.float32)
    latents = strip(w, axis(2, 3.0, (0, 2)), [-1, 0, 2], base=[Edit("axis-0", 1.0)], directions=KNOWN)
    assert latents[:, 0, 2].tolist() == [-3, 0, 6] and not latents[:, 2:, 2].any() and (latents[:, :, 0] == 0.5).all()


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (Edit("nowhere", 1.0), "edits[1].direction"),
        (Edit("axis-0", float("nan")), "edits[1].strength"),
        (Edit("axis-0", 20.5), "edits[1].strength"),
        (Edit("axis-0", 1.0, (3, 3)), "edits[1].layers"),
        (Edit("axis-0", 1.0, (0, 7)), "edits[1].layers"),
    ],
)
def test_invalid_edit_is_refused_by_field(edit: Edit, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        offset_of([Edit("axis-0", 1.0), edit], KNOWN, num_ws=NUM_WS, w_dim=W_DIM)
    assert caught.value.field == field


# -- the commands


def test_directions_command_fits_lists_and_draws_strips(tmp_path: Path) -> None:
    location = make_bundle(tmp_path / "tiny").location

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["directions", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    assert "has no directions" in run("list", location)
    options = (
        "--method",
        "sefa",
        "--method",
        "ganspace",
        "--method",
        "class-means",
        "--count",
        "2",
        "--samples",
        "200",
    )
    run("fit", location, *options, "--layers", "0-6", "--layers", "2-4")
    names = [direction.name for direction in open_bundle(location).directions]
    assert names == [
        "sefa-1",
        "sefa-2",
        "sefa-l2-4-1",
        "sefa-l2-4-2",
        "ganspace-1",
        "ganspace-2",
        "benign-to-malignant",
    ]
    first = open_bundle(location).digest
    run("fit", location, *options, "--layers", "0-6", "--layers", "2-4")
    assert open_bundle(location).digest == first  # the same directions, to the bit
    run("strips", location, "--out", str(tmp_path / "s.png"), "--direction", "sefa-1", "--device", "cpu")
    assert (tmp_path / "s.png").stat().st_size > 100
    wrong = CliRunner().invoke(app, ["directions", "strips", location, "--out", "x.png", "--direction", "north"])
    assert wrong.exit_code != 0 and isinstance(wrong.exception, RequestError)
