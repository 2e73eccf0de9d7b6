"""Tests of files about the repository: their links are valid, and they agree with the repository."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_pre_commit_hooks_run_the_programs_of_make_lint() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "hooks of other repositories are downloaded, in other versions"
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    commands = [line.strip().removeprefix("$(BIN)/").removesuffix(" .") for line in recipe[1].splitlines()]
    assert set(commands) <= {hook.removesuffix(" --force-exclude") for hook in hooks}


def test_citation_names_the_software_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert "2208.11702" in paper["url"]


def test_glossary_is_sorted_and_names_each_word_once() -> None:
    glossary = (ROOT / "CONTRIBUTING.md").read_text().partition("## Glossary")[2]
    words = [word for word in re.findall(r"^\| (.+?) \|", glossary, re.MULTILINE) if word not in ("word", "---")]
    assert words == sorted(set(words), key=str.casefold)
    assert {"bundle", "dataset", "job", "shard", "worker", "lease", "sample", "seed", "index", "latent"} <= set(words)


@pytest.mark.parametrize("name", ["bug_report.yml", "feature_request.yml"])
def test_issue_forms_are_valid(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    assert {"name", "description", "body"} <= form.keys()
    assert all(field["type"] == "markdown" or field["attributes"]["label"] for field in form["body"])


def _test_modules() -> list[Path]:
    folders = ("tests", "clients/python/tests", "clients/studio/tests")
    return [file for folder in folders for file in (ROOT / folder).rglob("test_*.py")]


def test_test_modules_have_different_names() -> None:
    """Their folders are not packages, so pytest imports them by their names. Processes of tests import them in the same way."""
    names = Counter(file.name for file in _test_modules())
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("pattern", [r"^\s*(from|import) test_", r"^\s*(from|import) openvino|importorskip\(.openvino"])
def test_no_test_module_imports_what_it_must_not(pattern: str) -> None:
    """Not each other: what several need is in tests/support. Not openvino: only `import_openvino` stops its usage reports."""
    importing = [
        file.relative_to(ROOT) for file in _test_modules() if re.search(pattern, file.read_text(), re.MULTILINE)
    ]
    assert importing == []
