"""Tests of the expert survey: its pages do not reveal which images are real, and scores equal published examples."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import stat
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dermis.bundle import Bundle
from dermis.errors import DataError
from dermis.html_page import page_colours
from dermis.imaging import decode
from dermis.metrics import reader_study
from dermis.metrics.reader_study import (
    clustered_rate,
    cohen_kappa,
    fleiss_kappa,
    permutation_p_value,
    signal_detection,
    wilson,
)
from dermis.reader_study import Rate
from dermis.synthesizer import Synthesizer
from training.data.images import ImageDataset
from training.data.isic import load_isic
from training.evaluation.survey import KeyImage, SurveyKey, create_survey, plan_survey, read_key
from training.evaluation.survey_score import Answers, score_survey

Run = Callable[..., tuple[int, str, str]]
SEED = 987654321987  # long enough to be searched for in the files for experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 benign and 10 malignant JPEGs, of other sizes than the bundle's and with metadata that would give them away."""
    folder = tmp_path_factory.mktemp("isic")
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x010E] = "a photograph"
    rows = ["isic_id,target"]
    for i in range(30):
        rows.append(f"ISIC_{5550000 + i},{'malignant' if i % 3 == 0 else 'benign'}")
        pixels = rng.integers(0, 255, (40, 48 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"ISIC_{5550000 + i}.jpg", exif=exif)
    (folder / "metadata.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def dataset(folder: Path) -> ImageDataset:
    return load_isic(folder, 16, progress=False)


@pytest.fixture(scope="module")
def synthesizer(tiny_bundle: Bundle) -> Iterator[Synthesizer]:
    with Synthesizer(tiny_bundle) as synthesizer:
        yield synthesizer


@pytest.fixture(scope="module")
def survey(dataset: ImageDataset, synthesizer: Synthesizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(dataset, synthesizer, tmp_path_factory.mktemp("survey") / "survey")


def make(dataset: ImageDataset, synthesizer: Synthesizer, out: Path, seed: int = SEED, **options: Any) -> Path:
    slots = plan_survey(dataset.labels, dataset.class_names, 12, seed)
    options = {"size": 32, "pages": 2, "with_diagnosis": True, "progress": False, "data_name": "isic-folder", **options}
    create_survey(slots, dataset, synthesizer, out, seed=seed, **options)
    return out


def page_data(page: Path) -> Any:
    match = re.search(r'<script type="application/json" id="survey">(.*?)</script>', page.read_text(), re.DOTALL)
    assert match
    return json.loads(match[1])


@settings(deadline=None, max_examples=60)
@given(
    classes=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    half=st.integers(1, 60),
    seed=st.integers(0),
)
def test_real_and_generated_halves_of_survey_are_balanced(classes: list[int], half: int, seed: int) -> None:
    labels = np.repeat(np.arange(len(classes)), classes)
    names = [f"class{i}" for i in range(len(classes))]
    if half > len(labels):
        with pytest.raises(DataError, match="--count"):
            plan_survey(labels, names, 2 * half, seed)
        return
    slots = plan_survey(labels, names, 2 * half, seed)
    assert slots == plan_survey(labels, names, 2 * half, seed)
    real = [slot for slot in slots if slot.truth == "real"]
    generated = [slot for slot in slots if slot.truth == "generated"]
    assert len(real) == len(generated) == half
    assert sorted(slot.label for slot in real) == sorted(slot.label for slot in generated)
    for label, number in enumerate(classes):
        assert abs(sum(slot.label == label for slot in real) - half * number / len(labels)) < 1
    assert len({slot.index for slot in real}) == half and all(labels[slot.index] == slot.label for slot in real)
    assert {slot.index for slot in generated} == set(range(half))


def test_survey_has_equal_classes_and_refuses_impossible_counts() -> None:
    labels, names = np.repeat([0, 1], [90, 10]), ("benign", "malignant")
    drawn = plan_survey(labels, names, 40, 1, equal_classes=True)
    assert [sum((s.truth, s.label) == (t, k) for s in drawn) for t in ("real", "generated") for k in (0, 1)] == [10] * 4
    with pytest.raises(DataError, match="takes 11 real malignant images, but there are 10"):
        plan_survey(labels, names, 44, 1, equal_classes=True)
    for count in (0, 41, -2):
        with pytest.raises(DataError, match="--count: must be even"):
            plan_survey(labels, names, count, 1)


def test_image_names_in_survey_do_not_reveal_origin() -> None:
    """Over many surveys every place, hence every name, is real as often as generated, whatever its neighbour is."""
    labels = np.repeat([0, 1], [30, 10])
    plans = [plan_survey(labels, ("a", "b"), 20, seed) for seed in range(500)]
    real = np.array([[slot.truth == "real" for slot in plan] for plan in plans])
    assert np.abs(real.mean(axis=0) - 0.5).max() < 0.1  # 4.5 standard deviations
    # Without replacement a neighbour is of the other half with probability 10 / 19.
    assert abs((real[:, 1:] != real[:, :-1]).mean() - 10 / 19) < 0.02


def test_survey_key_describes_every_image(survey: Path, dataset: ImageDataset, synthesizer: Synthesizer) -> None:
    key = read_key(survey / "secret/key.json")
    assert stat.S_IMODE((survey / "secret/key.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((survey / "secret").stat().st_mode) == 0o700
    assert [*key.images] == [f"{i:03d}" for i in range(1, 13)]
    assert sorted((i.truth, i.class_name) for i in key.images.values()) == sorted(
        [(truth, name) for truth in ("real", "generated") for name in ["benign"] * 4 + ["malignant"] * 2]
    )
    for name, image in key.images.items():
        data = (survey / f"for-experts/images/{name}.png").read_bytes()
        assert hashlib.sha256(data).hexdigest() == image.sha256
        label = key.class_names.index(image.class_name)
        if image.truth == "real":
            row = dataset.ids.index(str(image.source))
            assert dataset.labels[row] == label
            pixels = dataset.images[row]
        else:
            assert image.index is not None
            pixels = synthesizer.images([key.seed], [image.index], [label])[0]
        shown = Image.fromarray(pixels).resize((32, 32), Image.Resampling.LANCZOS)
        assert np.array_equal(decode(data), np.asarray(shown))


def test_files_for_experts_do_not_reveal_origin_of_images(survey: Path, folder: Path, tiny_bundle: Bundle) -> None:
    key = read_key(survey / "secret/key.json")
    handed_out = sorted(
        path.relative_to(survey / "for-experts").as_posix() for path in survey.glob("for-experts/**/*.*")
    )
    assert handed_out == [f"images/{name}.png" for name in key.images] + ["page-1.html", "page-2.html"]
    secrets = [str(key.seed), tiny_bundle.digest, tiny_bundle.name, key.data["sha256"], key.data["name"], str(folder)]
    secrets += [str(image.source) for image in key.images.values() if image.source] + ["ISIC", "a photograph"]
    for path in (survey / "for-experts").rglob("*.*"):
        data = path.read_bytes()
        if path.suffix == ".png":
            assert chunks(data) == [b"IHDR", b"IDAT", b"paDd", b"IEND"]
            assert len(data) == (survey / "for-experts/images/001.png").stat().st_size
            assert data[:29] == (survey / "for-experts/images/001.png").read_bytes()[:29]  # size, depth, colour type
        assert not [secret for secret in secrets if secret.encode() in data]
    template = files("training.evaluation").joinpath("survey_page.html").read_text()
    template = template.replace("{{colours}}", page_colours(dark=False))
    orders = []
    for number in (1, 2):
        page = survey / f"for-experts/page-{number}.html"
        data = page_data(page)
        # Beside the template a page has these fields only, the images' names, and the images.
        assert page.read_text() == template.replace("{{survey}}", json.dumps(data))
        assert data.keys() == {"survey", "page", "size", "diagnoses", "images"}
        assert (data["survey"], data["page"], data["size"]) == (key.survey, number, 32)
        assert data["diagnoses"] == ["benign", "malignant"]
        for image in data["images"]:
            assert image.keys() == {"name", "src"}
            prefix, encoded = image["src"].split(",")
            assert prefix == "data:image/png;base64"
            assert base64.b64decode(encoded) == (survey / f"for-experts/images/{image['name']}.png").read_bytes()
        orders.append([image["name"] for image in data["images"]])
    assert sorted(orders[0]) == sorted(orders[1]) == [*key.images] and orders[0] != orders[1] != [*key.images]
    assert "http" not in re.sub(r"http-equiv", "", template), "the page must work without a network"


def chunks(png: bytes) -> list[bytes]:
    names, place = [], 8
    while place < len(png):
        kind, end = png[place + 4 : place + 8], place + 8 + int.from_bytes(png[place : place + 4], "big")
        assert int.from_bytes(png[end : end + 4], "big") == zlib.crc32(png[place + 4 : end])
        assert kind != b"paDd" or not any(png[place + 8 : end])
        names.append(kind)
        place = end + 4
    return list(dict.fromkeys(names))


def test_survey_with_same_seed_has_same_bytes(
    survey: Path, dataset: ImageDataset, synthesizer: Synthesizer, tmp_path: Path
) -> None:
    def contents(out: Path) -> dict[str, bytes]:
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.*") if path.is_file()}

    assert contents(make(dataset, synthesizer, tmp_path / "again")) == contents(survey)
    other = read_key(make(dataset, synthesizer, tmp_path / "other", seed=1) / "secret/key.json")
    plain = read_key(make(dataset, synthesizer, tmp_path / "plain", with_diagnosis=False, pages=1) / "secret/key.json")
    assert len({other.survey, plain.survey, read_key(survey / "secret/key.json").survey}) == 3
    assert (tmp_path / "plain/for-experts/index.html").is_file()
    assert page_data(tmp_path / "plain/for-experts/index.html")["diagnoses"] == []


def test_failed_survey_creation_leaves_no_files(
    dataset: ImageDataset, synthesizer: Synthesizer, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    for out, options, message in (
        (tmp_path / "taken", {}, "taken: exists already"),
        (tmp_path / "new", {"pages": 0}, "--experts"),
        (tmp_path / "new", {"size": 8}, "--size"),
    ):
        with pytest.raises(DataError, match=message):
            make(dataset, synthesizer, out, **options)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="cannot be written"):
        make(dataset, synthesizer, tmp_path / "file" / "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]


# ---- Scores ----


def simulated(survey: str, said: dict[str, str], expert: str = "ann", **fields: Any) -> dict[str, Any]:
    """An answers file as the page writes it."""
    answers = [
        {"image": name, "position": i + 1, "answer": answer, "confidence": 3, "diagnosis": None, "seconds": 2.5}
        for i, (name, answer) in enumerate(said.items())
    ]
    times = {"started": "2026-01-01T08:00:00.000Z", "saved": "2026-01-01T09:00:00.000Z"}
    return {"format_version": 1, "survey": survey, "page": 1, "expert": expert, **times, "answers": answers, **fields}


def small_key(truths: str, classes: str) -> SurveyKey:
    """A key of images 0, 1, ...: r or g, and one letter a class."""
    images = {
        str(i): KeyImage(truth="real" if truth == "r" else "generated", class_name=name, sha256="")
        for i, (truth, name) in enumerate(zip(truths, classes, strict=True))
    }
    return SurveyKey(
        survey="s",
        seed=0,
        size=16,
        resolution=16,
        truncation_psi=1.0,
        pages=1,
        class_names=sorted(set(classes)),
        with_diagnosis=True,
        bundle={},
        data={},
        synthesizer={},
        images=images,
    )


def answered(said: str, expert: str = "ann") -> Answers:
    """Answers to images 0, 1, ...: r, g, or - where it was left open."""
    words = {str(i): {"r": "real", "g": "generated"}[c] for i, c in enumerate(said) if c != "-"}
    return Answers.model_validate(simulated("s", words, expert))


def test_survey_scores_equal_values_computed_by_hand() -> None:
    #                  real gen. real gen.
    key = small_key("rrggrrgg", "aaaabbbb")
    ann, bob, eve = answered("rrggrrgg"), answered("rgrgrggg", "bob"), answered("gg--gg--", "eve")
    score = score_survey(key, [ann, bob, eve])
    shares = [(e.rates.accuracy.count, e.rates.accuracy.total, e.missing) for e in score.experts]
    assert shares == [(8, 8, 0), (5, 8, 0), (0, 4, 4)]
    bob_rates = score.experts[1].rates
    assert (bob_rates.sensitivity.share, bob_rates.specificity.share, bob_rates.called_generated.share) == (
        3 / 4,
        2 / 4,
        5 / 8,
    )
    assert (score.rates.accuracy.count, score.rates.accuracy.total) == (13, 20)
    assert (score.rates.sensitivity.count, score.rates.sensitivity.total) == (7, 8)
    assert (score.rates.specificity.count, score.rates.specificity.total) == (6, 12)
    assert (score.classes["a"].accuracy.count, score.classes["b"].accuracy.count) == (6, 7)
    assert score.called_generated["1"] == (2, 3) and score.called_generated["2"] == (1, 2)
    assert score.experts[0].p_value == pytest.approx(2 / 2**8)  # all or none of 8 right
    assert score.median_seconds == 2.5
    # All three answered images 0, 1, 4, 5: ann rrrr, bob rgrg, eve gggg.
    agreement = score.agreement
    assert agreement is not None and agreement.images == 4
    assert agreement.observed == pytest.approx(1 / 3)  # 1 pair of 3 agrees on each
    assert agreement.fleiss_kappa == pytest.approx((1 / 3 - 1 / 2) / (1 - 1 / 2))
    pairs = {(a, b): kappa for a, b, kappa in agreement.pairs}
    # ann and bob agree on 5 of 8 images; by chance on 4/8 * 3/8 + 4/8 * 5/8 = 1/2.
    assert pairs["ann", "bob"] == pytest.approx((5 / 8 - 1 / 2) / (1 / 2))
    assert pairs["ann", "eve"] == 0  # never agree, nor could they by chance
    alone = score_survey(key, [ann])
    assert alone.agreement is None and alone.rates.accuracy == wilson(8, 8)


def test_score_includes_auc_of_confidence_and_diagnosis_rates() -> None:
    key = small_key("rrgg", "abab")
    said = {"0": "real", "1": "generated", "2": "generated", "3": "real"}
    file = simulated("s", said)
    for answer, confidence, diagnosis in zip(file["answers"], (5, 1, 4, 2), "abbb", strict=True):
        answer |= {"confidence": confidence, "diagnosis": diagnosis}
    expert = score_survey(key, [Answers.model_validate(file)]).experts[0]
    # Ratings: real -5, +1; generated +4, -2. Of the four pairs the generated one is higher in three.
    assert expert.auc == 3 / 4
    assert expert.diagnosis_real == wilson(2, 2) and expert.diagnosis_generated == wilson(1, 2)
    file["answers"][0]["confidence"] = None
    assert score_survey(key, [Answers.model_validate(file)]).experts[0].auc is None


def test_kappas_equal_published_values() -> None:
    # 14 psychiatrists, 10 patients, 5 diagnoses: kappa 0.210 (the example that statistics texts give after Fleiss 1971).
    ratings = """0 0 0 0 14  0 2 6 4 2  0 0 3 5 6  0 3 9 2 0  2 2 8 1 1
                 7 7 0 0 0  3 2 6 3 0  2 5 3 2 2  6 5 2 1 0  0 2 2 3 7"""
    assert fleiss_kappa(np.array(ratings.split(), dtype=int).reshape(10, 5)) == pytest.approx(0.210, abs=0.0005)
    # 50 grant proposals, two readers: 20 both yes, 15 both no, 5 and 10 split: p_o 0.7, p_e 0.5.
    assert cohen_kappa(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    # Cohen 1960, table 1, in proportions of 200: p_o 0.70, p_e 0.41, kappa 0.492.
    cohen = np.array([[0.44, 0.05, 0.01], [0.07, 0.20, 0.03], [0.09, 0.05, 0.06]]) * 200
    assert cohen_kappa(cohen.round().astype(int)) == pytest.approx(0.492, abs=0.0005)
    assert fleiss_kappa(np.array([[3, 0], [3, 0]])) is None and cohen_kappa(np.array([[7, 0], [0, 0]])) is None
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1
    with pytest.raises(ValueError, match="same number of raters"):
        fleiss_kappa(np.array([[3, 0], [1, 1]]))


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_equal_those_of_newcombe_1998(count: int, total: int, low: float, high: float) -> None:
    rate = wilson(count, total)
    assert (rate.low, rate.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert wilson(0, 0) == Rate(0, 0, None, None, None)


def test_interval_accounts_for_dependent_answers_to_one_image() -> None:
    rng = np.random.default_rng(1)
    half = np.repeat([True, False], 100)
    right = rng.random(200) < 0.6
    alone, fourfold = wilson(int(right.sum()), 200), clustered_rate(4 * right, np.full(200, 4), half)
    assert fourfold.share == alone.share and fourfold.total == 800

    def width(rate: Rate) -> float:
        assert rate.low is not None and rate.high is not None
        return rate.high - rate.low

    # Four experts with equal answers give as much information as one; four independent experts nearly as much as 800 images.
    assert width(fourfold) == pytest.approx(width(alone), rel=0.1)
    apart = clustered_rate(rng.binomial(4, 0.6, 200), np.full(200, 4), half)
    assert width(apart) == pytest.approx(width(wilson(480, 800)), rel=0.15)
    everything = clustered_rate(np.full(20, 4), np.full(20, 4), np.repeat([True, False], 10))
    assert (everything.share, everything.low) == (1, wilson(20, 20).low)
    assert clustered_rate(np.array([0, 1]), np.array([0, 1]), np.array([True, False])) == wilson(1, 1)


def test_resampling_in_blocks_draws_the_numbers_of_one_draw_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    generated = rng.random(61) < 0.4
    total = rng.integers(2, 6, 61)
    count = rng.binomial(total, 0.6)
    draws = np.random.default_rng(0)
    parts = (np.flatnonzero(generated), np.flatnonzero(~generated))
    drawn = np.concatenate([draws.choice(part, (10_000, len(part))) for part in parts], axis=1)
    expected = np.quantile(count[drawn].sum(axis=1) / total[drawn].sum(axis=1), (0.025, 0.975))
    classes = np.full(61, "a")
    permuted = np.random.default_rng(0).permuted(np.tile(generated, (10_000, 1)), axis=1) @ (2.0 * count - total)
    mean = (2 * count - total).sum() * generated.mean()
    distance = abs((2 * count - total)[generated].sum() - mean)
    p_value = ((np.abs(permuted - mean) >= distance - 1e-9).sum() + 1) / 10_001
    for numbers in (1000, 1 << 16):  # many blocks, whose last one is smaller; few
        monkeypatch.setattr(reader_study, "_BLOCK_NUMBERS", numbers)
        rate = clustered_rate(count, total, generated)
        assert (rate.low, rate.high) == tuple(expected)
        assert permutation_p_value(count, total, generated, classes) == p_value
    half = np.arange(2000) % 2 == 0
    tracemalloc.start()
    clustered_rate(np.arange(2000) % 5, np.full(2000, 4), half)
    permutation_p_value(np.arange(2000) % 5, np.full(2000, 4), half, np.full(2000, "a"))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20  # one array of all draws has 160 MB
    tracemalloc.stop()


def test_permutation_p_values_equal_exact_values() -> None:
    generated, classes = np.repeat([False, True], 4), np.full(8, "a")
    votes = np.repeat([0, 2], 4)
    # Two experts who are always right: of the 70 ways to choose 4 images, this one and its opposite are as far off.
    assert permutation_p_value(votes, np.full(8, 2), generated, classes) == pytest.approx(2 / 70, abs=0.006)
    assert permutation_p_value(np.full(8, 2), np.full(8, 2), generated, classes) == 1  # always "generated"
    # Knowing the class is not knowing the truth: answers that follow the class alone are never significant.
    classes = np.array(["a", "b"] * 4)
    assert permutation_p_value(np.where(classes == "a", 2, 0), np.full(8, 2), generated, classes) == 1


def test_signal_detection_equals_values_computed_by_hand() -> None:
    # H = 80.5 / 101, F = 20.5 / 101 (log-linear): z = +-0.8311, so d' = 1.662, c = 0.
    d_prime, criterion = signal_detection(wilson(80, 100), wilson(80, 100))
    assert (d_prime, criterion) == (pytest.approx(1.662, abs=5e-4), pytest.approx(0, abs=1e-9))
    d_prime, criterion = signal_detection(wilson(90, 100), wilson(10, 100))  # says "generated" to nine of ten
    assert d_prime == pytest.approx(0, abs=1e-9) and criterion < -1


# ---- The command line ----


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_survey_commands_create_survey_and_score_answers(
    run: Run, tiny_bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "survey"
    asked = ["--bundle", tiny_bundle.location, "--data", folder, "--out", out, "--count", 12, "--cache", tmp_path / "c"]
    status, printed, _ = run("survey", "create", *asked)
    assert status == 0 and f"keep secret: {out / 'secret/key.json'}" in printed
    key = read_key(out / "secret/key.json")
    assert key.size == 256 and key.seed > 2**20, "a seed that is not given must not be guessed"
    page = page_data(out / "for-experts/index.html")
    truth: dict[str, str] = {name: image.truth for name, image in key.images.items()}
    lie = {name: "real" if said == "generated" else "generated" for name, said in truth.items()}
    first, second = [image["name"] for image in page["images"]][:2]
    ann = write(tmp_path / "answers-ann.json", simulated(page["survey"], truth))
    bob = write(tmp_path / "answers-bob.json", simulated(page["survey"], {**truth, first: lie[first]}, "[b]bob[/b]"))
    lazy = write(tmp_path / "answers-eve.json", simulated(page["survey"], {second: lie[second]}, "eve"))
    status, printed, err = run("survey", "score", out / "secret/key.json", ann, bob, lazy, "--json")
    assert status == 0 and err == "warning: eve did not answer 11 of 12 images\n"
    score = json.loads(printed)
    assert (score["rates"]["accuracy"]["count"], score["rates"]["accuracy"]["total"]) == (23, 25)
    assert [expert["rates"]["accuracy"]["count"] for expert in score["experts"]] == [12, 11, 0]
    assert score["classes"]["benign"]["accuracy"]["total"] + score["classes"]["malignant"]["accuracy"]["total"] == 25
    status, printed, _ = run("survey", "score", out / "secret/key.json", ann, bob)
    assert status == 0 and "95.8" in printed and "54 % over four experts" in printed and "[b]bob[/b]" in printed
    assert "Fleiss' kappa 0.83" in printed  # P = 11/12; 12 and 12 +- 1 calls of 24: P_e = 0.5017


def test_survey_shows_real_images_of_given_metadata_only(
    run: Run, tiny_bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    header, *rows = (folder / "metadata.csv").read_text().splitlines()
    part = write(tmp_path / "validation.csv", "\n".join([header, *rows[:12]]))
    asked = ["--bundle", tiny_bundle.location, "--data", folder, "--cache", tmp_path / "c", "--metadata", part]
    status, _, err = run("survey", "create", *asked, "--out", tmp_path / "survey", "--count", 12)
    assert status == 0, err
    shown = {image.source for image in read_key(tmp_path / "survey/secret/key.json").images.values() if image.source}
    assert len(shown) == 6 and shown <= {row.split(",")[0] for row in rows[:12]}
    write(part, "\n".join([header, *(row for row in rows if "benign" in row)]))
    status, _, err = run("survey", "create", *asked, "--out", tmp_path / "other", "--count", 12)
    assert status == 1 and "has the classes benign, but the bundle benign, malignant" in err


@pytest.mark.full
def test_invalid_answers_or_key_file_is_refused_by_name(run: Run, survey: Path, tmp_path: Path) -> None:
    key = survey / "secret/key.json"
    name = read_key(key).survey
    good = simulated(name, {"001": "real", "002": "generated"})
    twice = simulated(name, {"001": "real"})
    twice["answers"] *= 2
    odd = simulated(name, {"001": "real"})
    odd["answers"][0]["diagnosis"] = "freckle"
    cases: list[tuple[object, str]] = [
        ("{", "is not a file of answers: Invalid JSON"),
        ("[" * 100_000, "is not a file of answers"),
        ([], "is not a file of answers"),
        (simulated("ffff", {"001": "real"}), "answers survey ffff, but the key is of survey"),
        (simulated(name, {"099": "real"}), "an image '099' that the survey does not have"),
        (twice, "answers image 001 twice"),
        (odd, "a diagnosis 'freckle' that was not offered"),
        (simulated(name, {"001": "maybe"}), "answers.0.answer"),
        (simulated(name, {}), "answers: "),
        (simulated(name, {"001": "real"}, "\x1b[31m"), "expert: "),
        (simulated(name, {"001": "real"}, format_version=2), "format_version: "),
    ]
    for content, message in cases:
        bad = write(tmp_path / "answers-bad.json", content)
        status, printed, err = run("survey", "score", key, bad)
        assert (status, printed) == (1, "") and err.count("\n") == 1 and f"error: {bad}: " in err and message in err
    one, two = (write(tmp_path / f"answers-{i}.json", good) for i in (1, 2))
    for arguments, message in (
        ((key, one, two), f"{two}: has answers of 'ann', and so has {one}"),
        ((key, tmp_path / "none.json"), f"{tmp_path / 'none.json'}: No such file"),
        ((tmp_path / "none.json", one), "none.json: No such file or directory; give the key.json"),
        ((one, one), f"{one}: is not the key of a survey"),
    ):
        status, _, err = run("survey", "score", *arguments)
        assert status == 1 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--count", 7), "--count: must be even"),
        (("--count", 200), "--count: 200 takes 67 real benign images, but there are 20"),
        (("--seed", -1), "--seed"),
        (("--bundle", "nowhere"), "nowhere: bundle.json is missing"),
    ],
)
def test_invalid_survey_option_is_refused_by_name(
    run: Run, tiny_bundle: Bundle, folder: Path, tmp_path: Path, options: Sequence[object], message: str
) -> None:
    asked = (
        "--data",
        folder,
        "--out",
        tmp_path / "out",
        "--cache",
        tmp_path / "cache",
        "--bundle",
        tiny_bundle.location,
    )
    status, _, err = run("survey", "create", *asked, *options)
    assert status == 1 and f"error: {message}" in err.splitlines()[-1] and not (tmp_path / "out").exists()


@pytest.mark.full
def test_survey_page_in_browser_saves_answers_that_score_reads(survey: Path, tmp_path: Path) -> None:
    """The page is answered with keys and mouse, closed half way, continued and saved: `score` reads the file."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives a browser")
    browser = shutil.which("chromium") or pytest.skip("needs Chromium")
    key = read_key(survey / "secret/key.json")
    requests: list[str] = []
    with playwright.sync_playwright() as play:

        def opened() -> tuple[Any, Any]:
            context = play.chromium.launch_persistent_context(
                tmp_path / "profile", executable_path=browser, args=["--no-sandbox"], accept_downloads=True
            )
            page = context.pages[0]
            page.on("request", lambda request: requests.append(request.url))
            page.goto((survey / "for-experts/page-2.html").as_uri())
            return context, page

        context, page = opened()
        order = page.evaluate("survey.images.map((image) => image.name)")
        page.fill("#expert", "Dr. Ann O'Nym")
        page.click("text=Begin")
        page.keyboard.press("Enter")
        assert "Please answer first" in page.inner_text("#message")
        for _ in order[:5]:
            page.wait_for_timeout(60)
            for stroke in ("g", "4", "m", "Enter"):
                page.keyboard.press(stroke)
        page.keyboard.press("Backspace")
        page.click("#questions label:has-text('real')")
        page.wait_for_timeout(300)
        context.close()
        context, page = opened()
        page.click("text=Continue as Dr. Ann O'Nym (5 of 12 answered)")
        assert page.inner_text("#where") == "Image 6 of 12"
        for _ in order[5:11]:
            for stroke in ("r", "2", "b", "Enter"):
                page.keyboard.press(stroke)
        page.click("#stop")
        assert "11 of 12 images; 1 are still open" in page.inner_text("#summary")
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / download.value.suggested_filename)
        context.close()
    assert not [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]
    file = tmp_path / "answers-dr-ann-o-nym.json"
    answers = Answers.model_validate_json(file.read_bytes())
    assert [answer.image for answer in answers.answers] == order[:11] and answers.page == 2
    assert [answer.answer for answer in answers.answers] == ["generated"] * 4 + ["real"] * 7
    assert [(answer.confidence, answer.diagnosis) for answer in answers.answers[4:6]] == [
        (4, "malignant"),
        (2, "benign"),
    ]
    assert all(answer.seconds > 0 for answer in answers.answers[:4])
    assert score_survey(key, [answers]).experts[0].missing == 1
