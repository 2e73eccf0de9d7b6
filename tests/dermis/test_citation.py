"""Tests of `dermis cite`: its numbers are those of the dataset or bundle, and foreign text cannot break BibTeX or LaTeX."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dermis.bundle import Bundle, amend_bundle, open_bundle
from dermis.bundle.citation import bundle_entry, tex
from dermis.citation import Publication, cite
from dermis.errors import DataError, RequestError, StorageError
from painted_dataset import make
from tiny import make_bundle

Run = Callable[..., tuple[int, str, str]]
DEMO = Path(__file__).parents[2] / "bundles" / "demo"


def test_dataset_is_cited_with_seed_counts_and_the_entry_of_its_card(tmp_path: Path, tiny_bundle: Bundle) -> None:
    manifest = make(tmp_path / "data", tiny_bundle, seed=41, truncation_psi=0.7)
    citation = cite(tmp_path / "data")
    assert citation.entries[0] in (tmp_path / "data" / "README.md").read_text()
    text = citation.methods()
    for words in (
        "20 synthetic dermoscopy images of 16 x 16 px (9 of the class benign and 11 of the class malignant)",
        "the seed 41 ",
        "truncation psi 0.7",
        "not compared with the training images",
        "licence of the training data, CC0-1.0",
        manifest.plan_digest[:16],
    ):
        assert words in text
    keys = set(re.findall(r"^@misc\{(.+),$", citation.bibtex, re.MULTILINE))
    assert set(re.findall(r"\[@(.+?)\]", text)) == keys, "every reference has its entry"
    assert r"\cite{dermis}" in citation.methods("latex") and "[@" not in citation.methods("latex")


def test_bundle_is_cited_with_its_measurements_and_their_intervals() -> None:
    text = cite(DEMO).methods()
    assert "Fréchet distance of 25.17 (95 % interval 23.62 to 27.01, real training images in their place 9.932)" in text
    assert "lite0" not in text, "the discriminator was trained in this feature space"
    assert "AUC of 0.496 (95 % interval 0.478 to 0.513; chance 0.5)" in text
    assert (
        "4,543 real images (3,969 benign and 574 malignant)" in text and "privacy audit in the bundle is: warn" in text
    )


def test_numbers_of_other_types_are_left_out(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    metrics: Any = {
        "spaces": {"odd": {"comparisons": {"generated_holdout": {"fd": "3", "kid_interval": 1}}}, "list": []}
    }
    amend_bundle(bundle, metrics=metrics)
    assert "feature space" not in cite(bundle.location).methods()


def test_audit_that_contradicts_itself_is_left_out(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    subject = {"scope": "bundle", "members": 1, "non_members": 1, "generated": 1, "bundle_digest": ""}
    verdict = {"status": "pass", "complete": True, "text": "."}
    audit = {"format_version": 2, "subject": subject, "verdict": verdict, "outcomes": []}
    amend_bundle(bundle, privacy_audit=audit)
    assert "privacy audit" not in cite(bundle.location).methods()


def test_card_of_a_bundle_has_its_entry_also_after_renaming(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    weights = bundle.files["generator.safetensors"].sha256
    assert bundle.model_card.count(bundle_entry("tiny", 16, weights)) == 1
    renamed = amend_bundle(bundle, name="other_name")
    assert renamed.model_card.count("## Citation") == 1
    assert bundle_entry("other_name", 16, weights) in renamed.model_card
    assert open_bundle(bundle.location).digest == renamed.digest


def test_published_dataset_has_authors_year_and_doi(tiny_bundle: Bundle) -> None:
    published = Publication("Doe, Jane and Skin & Co {x}", 2026, "10.5281/zenodo.1_2")
    citation = cite(tiny_bundle.location, published)
    assert r"author = {Doe, Jane and {Skin \& Co \{x\}}}" in citation.bibtex
    assert r"doi = {10.5281/zenodo.1\_2}" in citation.bibtex and citation.advice == ""
    assert "--doi" in cite(tiny_bundle.location).advice


def test_foreign_text_cannot_end_a_field_or_begin_a_command() -> None:
    assert tex("a}\\input{x} 50%\n#1_$&~^") == (
        r"a\}\textbackslash{}input\{x\} 50\% \#1\_\$\&\textasciitilde{}\textasciicircum{}"
    )


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"doi": "https://doi.org/10.5281/zenodo.1"}, "--doi"),
        ({"url": "zenodo.org"}, "--url"),
        ({"year": 26}, "--year"),
    ],
)
def test_wrong_option_is_named(fields: dict[str, Any], option: str) -> None:
    with pytest.raises(RequestError, match=f"^{option}: must"):
        Publication(**fields)


def test_what_is_not_a_dataset_or_bundle_is_refused(tmp_path: Path, tiny_bundle: Bundle) -> None:
    with pytest.raises(DataError, match=r"neither the manifest\.json of a finished dataset nor"):
        cite(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="is a file; give the folder"):
        cite(tmp_path / "manifest.json")
    with pytest.raises(StorageError, match=r"manifest\.json: "):
        cite(tmp_path)
    make(tmp_path / "data", tiny_bundle)
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    (tmp_path / "data" / "report.json").write_text(json.dumps({**report, "images": 10**6}))
    with pytest.raises(DataError, match=r"report\.json: differs from manifest\.json"):
        cite(tmp_path / "data")


def test_command_prints_or_writes(run: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    status, out, err = run("cite", tiny_bundle.location, "--show", "bibtex")
    assert status == 0 and out == cite(tiny_bundle.location).bibtex and "--author, --year, --doi" in err
    status, _, _ = run(
        "cite", tiny_bundle.location, "--show", "methods", "--style", "latex", "--out", tmp_path / "m.tex"
    )
    assert status == 0 and r"\cite{dermis-tiny}" in (tmp_path / "m.tex").read_text()
    status, out, err = run("cite", tmp_path / "missing")
    assert status == 1 and out == "" and "missing: has neither" in err
