"""Tests of authenticity: results equal brute force, the index is bound to its inputs, a generator that copies is detected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from typer.testing import CliRunner

from commands.main import app
from dermis.authenticity.attack import attack, evenly_spaced_indices, identifiability, nearest_generated
from dermis.authenticity.baseline import Copies
from dermis.authenticity.build import build_index, write_index
from dermis.authenticity.checker import Checker, Embedder
from dermis.authenticity.index import Index, open_index
from dermis.authenticity.verdict import baseline_problem, baseline_sentence, verdicts_of
from dermis.bundle import Bundle, amend_bundle, open_bundle
from dermis.bundle.index import DESCRIPTOR, INDEX, RADII
from dermis.classifier.preprocess import batch as squares
from dermis.errors import BundleError, DermisError, RequestError
from dermis.imaging import encode
from dermis.networks import Generator, GeneratorConfig
from dermis.synthesizer.network import to_uint8
from lesions import lesion
from tiny import make_bundle
from tiny_classifier import make_classifier
from tiny_skin import make_skin

pytest.importorskip("faiss", reason="FAISS is not installed")

Floats = NDArray[np.float32]
SPACE = {"extractor": "lite0", "extractor_identity": "x", "resolution": 16}


def rows(count: int, dim: int = 24, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def index_of(folder: Path, features: Floats, **options: Any) -> Index:
    write_index(folder, build_index(features, **{**SPACE, **options}))
    return open_index(folder, device="cpu", threads=1)


def distances(a: Floats, b: Floats) -> Floats:
    values: Floats = cdist(a, b).astype(np.float32)
    return values


# -- the index


@pytest.mark.full
@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(12, 30), st.sampled_from(["cosine", "l2"]), st.booleans())
def test_a_flat_index_agrees_with_brute_force(
    tmp_path_factory: pytest.TempPathFactory, count: int, dim: int, metric: str, grouped: bool
) -> None:
    base, queries = rows(count, dim, seed=count), rows(7, dim, seed=1)
    groups = [str(i // 3 if grouped and count > 3 else i) for i in range(count)]
    index = index_of(tmp_path_factory.mktemp("i") / "x", base, metric=metric, dim=None, storage="float", groups=groups)
    if metric == "cosine":
        base, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (base, queries))
    apart = distances(base, base)
    apart[np.array(groups)[:, None] == np.array(groups)[None]] = np.inf
    assert np.allclose(index.radii, apart.min(axis=1), atol=2e-3)
    nearest, exact = index.nearest(queries), distances(queries, base)
    assert np.allclose(nearest.distances, exact.min(axis=1), atol=2e-3)
    assert np.allclose(exact[np.arange(7), nearest.neighbours], exact.min(axis=1), atol=2e-3)
    assert np.array_equal(nearest.radii, index.radii[nearest.neighbours])


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_compact_index_approximates_exact_neighbours(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dermis.authenticity.build.MIN_APPROXIMATE", 0)
    mixing = rows(12, 48, seed=3)
    # 12 of the 48 dimensions have nearly all variance.
    base, queries = rows(3000, 12) @ mixing, rows(200, 12, seed=1) @ mixing
    index = index_of(tmp_path / "x", base, kind=kind, dim=12, metric="l2")
    assert (index.description.kind, index.description.exact_radii) == (kind, 1)
    assert index.description.explained == pytest.approx(1, abs=1e-4)
    to_others = distances(base, base)
    np.fill_diagonal(to_others, np.inf)
    assert (
        np.abs(index.radii / to_others.min(axis=1) - 1) < 0.1
    ).mean() > 0.99  # though the search itself is approximate
    exact = distances(queries, base)
    nearest = index.nearest(queries)
    assert (exact.argmin(axis=1) == nearest.neighbours).mean() > 0.9
    assert np.median(np.abs(nearest.distances - exact.min(axis=1)) / exact.min(axis=1)) < 0.02
    stored = index.stored(np.arange(50))
    assert np.abs(distances(stored, index.projected(base[:50])).diagonal()).max() < 0.05 * np.linalg.norm(stored[0])


def test_index_of_same_embeddings_has_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        index_of(tmp_path / name, rows(300), held_out=rows(40, seed=9))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_index_baseline_matches_its_embeddings(tmp_path: Path) -> None:
    index = index_of(tmp_path / "x", rows(200), held_out=rows(50, seed=2))
    description = index.description
    assert description.radii[50] == pytest.approx(float(np.median(index.radii)), rel=1e-5)
    assert (description.radii[0], description.radii[100]) == (
        pytest.approx(index.radii.min()),
        pytest.approx(index.radii.max()),
    )
    assert description.held_out == 50 and index.held_out is not None and index.held_out.shape == (50, 24)
    verdicts = verdicts_of(index.nearest(rows(50, seed=2)), description)
    assert description.held_out_distances[50] == pytest.approx(float(np.median(verdicts.distances)), rel=1e-4)


def test_verdicts_separate_copies_from_distant_images(tmp_path: Path) -> None:
    base = rows(200)
    index = index_of(tmp_path / "x", base, metric="l2", dim=None, storage="float")
    near = base + rows(200, seed=5) * 0.01
    far = base * 3
    copies, others = (verdicts_of(index.nearest(x), index.description) for x in (near, far))
    assert not copies.authentic.any() and (copies.percentiles < 1).all()
    assert others.authentic.mean() > 0.9 and (others.distances > others.radii).mean() == others.authentic.mean()
    placed = verdicts_of(index.nearest(base[:1]), index.description)
    assert placed.percentiles[0] == 0 and not placed.authentic[0]
    assert index.nearest(np.empty((0, 24), np.float32)).distances.shape == (0,)


def test_damaged_index_is_refused_with_reason(tmp_path: Path) -> None:
    index_of(tmp_path / "good", rows(100))
    descriptor = json.loads((tmp_path / "good" / DESCRIPTOR).read_text())

    def broken(change: Any) -> str:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        change(folder)
        with pytest.raises(BundleError) as error:
            open_index(folder, device="cpu")
        return str(error.value)

    def rewritten(**fields: Any) -> Any:
        return lambda folder: (folder / DESCRIPTOR).write_text(json.dumps({**descriptor, **fields}))

    assert "index.faiss: differs" in broken(lambda folder: (folder / INDEX).write_bytes(b"x" * 100))
    assert "radii.npy is missing" in broken(lambda folder: (folder / RADII).unlink())
    assert "does not list extra" in broken(lambda folder: (folder / "extra").write_text("x"))
    assert "kind: 'tree' is none of" in broken(rewritten(kind="tree"))
    assert "is not of the kind hnsw" in broken(rewritten(kind="hnsw"))
    assert "holds other vectors" in broken(rewritten(vectors=99))
    assert "must rise" in broken(rewritten(radii=descriptor["radii"][::-1]))
    assert "dim: 30 is above" in broken(rewritten(dim=30))
    with pytest.raises(RequestError, match="1 images; an index needs at least 2"):
        build_index(rows(1), **SPACE)  # type: ignore[arg-type]
    with pytest.raises(DermisError, match="FAISS finds no GPU"):
        open_index(tmp_path / "good", device="cuda")


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_of_few_images_is_exact(tmp_path: Path, kind: str) -> None:
    base = rows(300)
    index = index_of(tmp_path / "x", base, kind=kind, metric="l2", dim=None, storage="float")
    apart = distances(base, base)
    np.fill_diagonal(apart, np.inf)
    assert (index.description.kind, index.description.exact_radii) == ("flat", 1)
    assert np.allclose(index.radii, apart.min(axis=1), atol=2e-3)


def test_share_of_exact_radii_is_measured_for_large_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dermis.authenticity.build.MIN_APPROXIMATE", 0)
    monkeypatch.setattr("dermis.authenticity.baseline.EXACT_RADII", 0)
    good = index_of(tmp_path / "good", rows(1500), kind="hnsw", storage="float").description
    assert good.exact_radii is not None and good.exact_radii > 0.95 and baseline_problem(good) is None
    # It searches 9 of 154 lists.
    poor = index_of(tmp_path / "poor", rows(1500), kind="ivf", storage="float").description
    assert (
        poor.exact_radii is not None
        and poor.exact_radii < 0.95
        and "of the radii are exact" in str(baseline_problem(poor))
    )


# -- near-duplicates among the training images


def again(base: Floats, copies: Floats) -> Floats:
    """`base`, and `copies` that differ slightly, like embeddings of a file that was saved again."""
    noise = np.random.default_rng(7).normal(size=copies.shape).astype(np.float32)
    return np.concatenate([base, copies + 0.01 * noise])


@pytest.mark.parametrize("name", ["three", "a third", "all twice", "ten of each"])
def test_duplicate_embeddings_do_not_disable_authenticity_check(tmp_path: Path, name: str) -> None:
    base = rows(200)
    copies = {"three": base[:3], "a third": base[:66], "all twice": base, "ten of each": np.tile(base, (9, 1))}[name]
    clean = index_of(tmp_path / "clean", base)
    index = index_of(tmp_path / "dup", again(base, copies))
    first, description = clean.description.radii[1], index.description
    assert description.radii[1] == pytest.approx(first, rel=0.05) and baseline_problem(description) is None
    duplicates = description.duplicates
    assert duplicates is not None and duplicates.distinct == 200
    assert duplicates.groups == min(len(copies), 200) and duplicates.images == len(copies) + duplicates.groups
    saved_again = verdicts_of(index.nearest(again(base, base)[200:]), description)
    assert not saved_again.authentic.any() and (saved_again.percentiles < 1).all()
    fresh = verdicts_of(index.nearest(rows(200, seed=3)), description)
    assert fresh.authentic.mean() > 0.3 and (fresh.percentiles < 1).mean() < 0.1


def test_duplicates_and_patients_are_joined_into_groups(tmp_path: Path) -> None:
    base = rows(100)
    base[1] = base[0] * 1.02  # a copy that is listed as another patient's, and a second photograph of that patient
    base[2] = base[1] + 0.5 * base[50]
    names = [str(i) for i in range(100)]
    names[2] = names[1]
    index = index_of(tmp_path / "x", base, groups=names, metric="l2", dim=None, storage="float")
    apart = distances(base, base)
    assert index.radii[0] == pytest.approx(apart[0, 3:].min(), rel=1e-4)
    assert index.description.duplicates is not None and index.description.duplicates.distinct == 98


def test_pixel_pairs_count_as_copies_only_if_features_are_near(tmp_path: Path) -> None:
    base = rows(200)
    base[1] = base[0] + 0.3 * rows(1, seed=8)[0]  # farther than the same image, not farther than a re-compressed one
    copied = base[:50] + 0.4 * rows(50, seed=9)
    pixels = Copies(copied, np.arange(50), np.array([[0, 1], [2, 3]]))
    by_distance = index_of(tmp_path / "a", base).description
    by_pixels = index_of(tmp_path / "b", base, copies=pixels).description
    assert by_distance.duplicates is not None and by_distance.duplicates.images == 0
    assert by_pixels.duplicates is not None and by_pixels.duplicates.images == 2  # 2 and 3 are too far apart for copies
    assert by_pixels.duplicates.copies == 50 and by_pixels.duplicates.copies_nearer > 0.9
    assert (
        by_pixels.duplicates.copy_median
        < by_pixels.duplicates.copy_distance
        < 0.5 * by_pixels.duplicates.typical_distance
    )


@pytest.mark.parametrize("share", [0.6, 0.9, 1.0])
def test_an_index_without_a_trustworthy_radius_is_refused(share: float) -> None:
    base = rows(200)
    base[: int(200 * share)] = base[0]
    with pytest.raises(RequestError, match="near-duplicates of one another|copies of one image"):
        build_index(base, **SPACE)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="all of one patient"):
        pairs = again(rows(2), rows(2))
        build_index(pairs, groups=["a", "b", "b", "c"], **SPACE)  # type: ignore[arg-type]


def test_a_weak_baseline_is_named(tmp_path: Path) -> None:
    few = index_of(tmp_path / "few", rows(10)).description
    assert "only 10 different training images" in str(baseline_problem(few))
    views = np.repeat(rows(50), 4, axis=0)  # four photographs of each lesion; none is a copy, and no id connects them
    views += 0.075 * rows(200, seed=4)
    close = index_of(tmp_path / "close", views).description
    assert "photographs of one lesion" in str(baseline_problem(close)) and f"{close.radii[1]:.4f}" in baseline_sentence(
        close
    )
    named = index_of(tmp_path / "named", views, groups=[str(i // 4) for i in range(200)]).description
    assert baseline_problem(named) is None
    held = index_of(
        tmp_path / "held", rows(100), held_out=np.concatenate([rows(100)[:5], rows(50, seed=2)])
    ).description
    assert held.duplicates is not None and held.duplicates.held_out == 5


def test_an_index_of_the_first_format_is_read(tmp_path: Path) -> None:
    index_of(tmp_path / "x", rows(100))
    file = tmp_path / "x" / DESCRIPTOR
    descriptor = json.loads(file.read_text())
    del descriptor["duplicates"], descriptor["exact_radii"]
    file.write_text(json.dumps({**descriptor, "format_version": 1}))
    old = open_index(tmp_path / "x", device="cpu").description
    assert (
        old.duplicates is None
        and baseline_problem(old) is None
        and "built by an older version" in baseline_sentence(old)
    )
    spoilt = [0.0, 0.0, *descriptor["radii"][2:]]
    file.write_text(json.dumps({**descriptor, "radii": spoilt, "format_version": 1}))
    assert "build the index again" in str(baseline_problem(open_index(tmp_path / "x", device="cpu").description))


# -- in a bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("bundles")
    make_classifier(root / "c")
    return amend_bundle(make_bundle(root / "tiny"), parts={"classifier": root / "c"})


def test_index_build_command_adds_index_to_bundle(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.location, tmp_path / "b")
    skin = make_skin(tmp_path / "skin", count=60)
    command = ["index", "build", "--data", str(skin), "--bundle", str(tmp_path / "b"), "--cache", str(tmp_path / "c")]
    done = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "60" in done.output and "attacks cannot be measured" in done.output
    indexed = open_bundle(tmp_path / "b")
    assert indexed.authenticity is not None and indexed.digest != bundle.digest
    description = indexed.authenticity
    assert (description.vectors, description.extractor, description.resolution) == (60, "classifier", 16)
    assert description.provenance["grouped"] is True  # two images a patient
    data = b"".join(file.read_bytes() for file in (tmp_path / "b" / "authenticity").iterdir())
    assert b"ISIC_" not in data and b"IP_0" not in data
    with Checker(indexed, device="cpu") as checker:
        images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
        assert checker.check(images).distances.shape == (5,)
        assert {"authenticity", "faiss"} <= set(checker.identity) <= {"authenticity", "faiss", "distant_images"}


@pytest.mark.full
def test_duplicate_training_images_do_not_make_copies_authentic(tmp_path: Path) -> None:
    def indexed(name: str, again: int) -> tuple[str, list[str]]:
        data = tmp_path / name / "benign"
        (tmp_path / name / "malignant").mkdir(parents=True)
        data.mkdir()
        for seed in range(60):
            (data / f"a{seed:02d}.png").write_bytes(encode(lesion(seed)))
        (tmp_path / name / "malignant" / "m.png").write_bytes(encode(lesion(60)))
        for seed in range(again):  # the same pictures from another archive: smaller, and compressed again
            small = squares([lesion(seed)], 128)[0]
            (data / f"b{seed:02d}.jpg").write_bytes(encode(small, "jpeg", quality=80))
        out = tmp_path / f"{name}-index"
        command = ["index", "build", "--data", str(data.parent), "--out", str(out), "--extractor", "lite0"]
        built = CliRunner().invoke(
            app, [*command, "--resolution", "64", "--cache", str(tmp_path / "c"), "--kind", "ivf"]
        )
        assert built.exit_code == 0, built.output
        assert "--kind ivf: fewer than 25,000 images" in built.output
        checked = CliRunner().invoke(app, ["authenticity", "check", str(tmp_path / "copies"), "--bundle", str(out)])
        assert checked.exit_code == 0, checked.output
        return built.output, checked.output.splitlines()

    (tmp_path / "copies").mkdir()
    for seed in range(10):
        (tmp_path / "copies" / f"{seed}.jpg").write_bytes(encode(lesion(seed), "jpeg", quality=90))
    clean, of_clean = indexed("clean", 0)
    assert "dermis data leaks" not in clean
    mixed, of_mixed = indexed("mixed", 6)
    assert "12 of the 67 training images are near-duplicates, in 6 groups" in mixed
    assert "dermis data leaks" in mixed and "--remove" in mixed
    for lines in (of_clean, of_mixed):
        assert any("0 authentic, 10 not; 10 are nearer" in line for line in lines)
    assert any("no near-duplicates among them" in line for line in of_clean)
    assert any("12 near-duplicates in 6 groups, each group counts as one image" in line for line in of_mixed)


def test_an_index_of_another_classifier_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    embedder = Embedder("classifier", bundle, device="cpu")
    write_index(
        tmp_path / "i",
        build_index(rows(30, 4), extractor="classifier", extractor_identity=embedder.identity, resolution=16),
    )
    shutil.copytree(tmp_path / "i", tmp_path / "alone" / "authenticity")  # its folder is not that of a bundle
    Checker(tmp_path / "alone" / "authenticity", classifier=bundle, device="cpu").close()
    shutil.copytree(bundle.location, tmp_path / "b")
    whole = amend_bundle(open_bundle(tmp_path / "b"), parts={"authenticity": tmp_path / "i"})
    Checker(whole, device="cpu").close()
    make_classifier(tmp_path / "other", temperature=3.0)
    changed = amend_bundle(whole, parts={"classifier": tmp_path / "other"})
    with pytest.raises(BundleError, match="built with other weights of the extractor classifier"):
        Checker(changed, device="cpu")
    with pytest.raises(BundleError, match="has no index of its training images"):
        Checker(bundle, device="cpu")


# -- attacks


def test_attack_measures_match_computation_by_hand() -> None:
    members, held_out = np.linspace(0, 1, 40, dtype=np.float32), np.linspace(2, 3, 50, dtype=np.float32)
    sure = attack(members, held_out)
    assert (sure.auc, sure.low, sure.members, sure.held_out) == (1.0, 1.0, 40, 50)
    blind = attack(members, members[::-1].copy())
    assert blind.auc == pytest.approx(0.5) and blind.low < 0.5 < blind.high
    with pytest.raises(ValueError, match="at least 20"):
        attack(members[:5], held_out)
    radii = np.array([1.0, 1.0, 2.0, 0.5], np.float32)
    assert identifiability(radii, np.array([0.5, 1.0, 1.9, 0.6], np.float32)) == 0.5
    real, generated = rows(10), rows(33, seed=4)
    pieces = [generated[:20], generated[20:20], generated[20:]]
    assert np.allclose(nearest_generated(real, pieces), distances(real, generated).min(axis=1), atol=1e-3)
    assert evenly_spaced_indices(5).tolist() == [0, 1, 2, 3, 4] and len(evenly_spaced_indices(10**6)) == 10_000


@pytest.mark.full
def test_memorising_generator_fails_and_ideal_generator_passes(tmp_path: Path) -> None:
    """A small generator is overfitted on purpose: each of its latents learns to draw one training image."""
    real = squares([lesion(seed) for seed in range(60)], 16)
    train, held_out = real[:20], real[20:40]
    honest = real[40:]  # what an ideal generator would draw: other images of the same kind
    copies = overfitted(train)
    assert 0.5 < np.abs(copies.astype(int) - train).mean() < 4  # it did learn them, though not exactly
    embedder = Embedder("lite0", None, device="cpu")
    sets = {"train": train, "held_out": held_out, "honest": honest, "copies": copies}
    features = {name: embedder.embed(images, 16) for name, images in sets.items()}
    index = index_of(tmp_path / "x", features["train"], held_out=features["held_out"])
    caught = verdicts_of(index.nearest(features["copies"]), index.description)
    passed = verdicts_of(index.nearest(features["honest"]), index.description)
    assert caught.authentic.mean() < 0.2 and passed.authentic.mean() > 0.3
    assert np.median(caught.percentiles) < 5 and np.median(passed.percentiles) > 20
    assert index.held_out is not None
    outcomes = {}
    for name in ("copies", "honest"):
        generated = [index.projected(features[name])]
        to_members = nearest_generated(index.stored(np.arange(20)), generated)
        outcomes[name] = attack(to_members, nearest_generated(index.held_out, generated))
        share = identifiability(index.radii, to_members)
        assert share > 0.8 if name == "copies" else share < 0.75
    assert outcomes["copies"].low > 0.5 and outcomes["copies"].auc > 0.8
    assert outcomes["honest"].low < 0.5


def overfitted(images: NDArray[np.uint8], steps: int = 700) -> NDArray[np.uint8]:
    """Images of a generator after `steps` of training to reproduce image i of [N, R, R, 3] from latent i."""
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(images.shape[1], z_dim=32, w_dim=32, mapping_layers=2, channel_base=512))
    z = torch.randn(len(images), 32)
    target = torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 127.5 - 1
    adam = torch.optim.Adam(generator.parameters(), lr=0.02, betas=(0.5, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 0.02, total_steps=steps)
    for _ in range(steps):
        loss = (generator(z, None, noise_mode="none") - target).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
    with torch.no_grad():
        return to_uint8(generator(z, None, noise_mode="none")).numpy()
