"""Tests that the documentation agrees with the programs (commands, options, Python names, links) and that the tutorials run.

Info strings of code fences name a language, and can have a flag: `no-run` (checked, but not executed with the tutorial)
or `no-check` (neither).
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from dermis_client import AsyncDermisClient, DermisClient, cli

from benchmarks.components import free_port
from commands import main
from dermis.bundle import amend_bundle, open_bundle
from launched_service import Launched
from service_kit import assemble, listening
from services.settings import Settings
from tiny import make_bundle
from tiny_classifier import make_classifier

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = ("researcher", "engineer", "operator")
PAGES = [
    *(
        ROOT / f"{name}.md"
        for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT", "examples/README")
    ),
    *sorted(DOCS.rglob("*.md")),
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
LANGUAGES = {"bash", "console", "dockerfile", "http", "ini", "json", "python", "sh", "text", "toml", "yaml"}
SHELLS = {"bash", "sh", "console"}
FLAGS = {"no-run", "no-check"}
PACKAGES = ("dermis", "dermis_client", "training", "services", "benchmarks")
ADDRESS = "http://127.0.0.1:3000"
COMMANDS = {"dermis": typer.main.get_command(main.app), "dermis-client": typer.main.get_command(cli.app)}


@dataclass(frozen=True)
class Fence:
    """A fenced code block, at a line of a page."""

    where: str
    language: str
    flags: frozenset[str]
    text: str


def fences(page: Path) -> list[Fence]:
    result: list[Fence] = []
    start, info, lines = "", "", list[str]()
    opened = 0
    for number, line in enumerate(page.read_text().splitlines(), 1):
        match = re.match(r"^\s*(```+)(.*)$", line)
        if match and not start:
            start, info, lines, opened = match[1], match[2].strip(), [], number
        elif match and match[1] == start and not match[2].strip():
            language, *flags = info.split() or [""]
            text = inspect.cleandoc("\n".join(lines))
            result.append(Fence(f"{page.relative_to(ROOT)}:{opened}", language, frozenset(flags), text))
            start = ""
        elif start:
            lines.append(line)
    assert not start, f"{page}:{opened}: the fence is not closed"
    return result


# -- fences and links


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_fences_name_a_known_language(page: Path) -> None:
    without = re.sub(r"^\s*(```+).*?^\s*\1\s*$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    indented = re.search(r"^(?![-*]|\d+\.).*\n\n+    \S.*", without, re.MULTILINE)
    assert not indented, f"a code block without a fence: {indented[0].splitlines()[-1] if indented else ''}"
    unnamed = [fence.where for fence in fences(page) if fence.language not in LANGUAGES or fence.flags - FLAGS]
    assert not unnamed, f"no known language or flag: {', '.join(unnamed)}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_documentation_links_resolve_to_files_and_headings(page: Path) -> None:
    prose = re.sub(r"^\s*(```+).*?^\s*\1\s*$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
        assert not anchor or anchor in _anchors(target), f"{page.relative_to(ROOT)}: {link}: no such heading"


def test_navigation_has_every_page() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text()
    pages = [
        page.relative_to(DOCS) for page in DOCS.rglob("*.md") if page.name != "package.md"
    ]  # the wheel's description
    missing = [page for page in pages if f": {page}\n" not in configuration]
    assert not missing, f"not in the navigation of mkdocs.yml: {missing}"


# -- tests that pages name


def missing_tests(text: str) -> list[str]:
    """The tests `path::name` that a text names and that do not exist."""
    missing = []
    for path, name in re.findall(r"\b([\w./-]+\.py)::(\w+)", text):
        file = ROOT / path
        tree = ast.parse(file.read_text()) if file.is_file() else ast.Module([], [])
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        if not name.startswith("test_") or name not in functions:
            missing.append(f"{path}::{name}")
    return missing


def test_tests_that_prove_the_threat_model_exist() -> None:
    """Each item of the OWASP list names tests, and all of them exist."""
    items = (DOCS / "threat-model.md").read_text().split("\n### API")[1:]
    assert [item.partition(":")[0] for item in items] == [str(number) for number in range(1, 11)]
    assert all("::test_" in item for item in items)
    assert not missing_tests("\n".join(items))
    assert missing_tests("`tests/test_docs.py::test_nothing`, tests/none.py::test_x") == [
        "tests/test_docs.py::test_nothing",
        "tests/none.py::test_x",
    ]


# -- shell


def simple_commands(fence: Fence) -> Iterator[list[str]]:
    """The commands of a shell fence as lists of words, without redirections and assignments."""
    text = fence.text.replace("\\\n", " ")
    if fence.language == "console":
        prompts = re.findall(r"^\$ (.*(?:\n {4,}.*)*)", fence.text, re.MULTILINE)
        text = "\n".join(prompts).replace("\\\n", " ")
    text = re.sub(r"(^|\s)#.*$", "", text, flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&<>()\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    redirected = False
    for word in [*lexer, ";"]:
        if set(word) <= set(";|&()\n") and word not in ("(", ")", "&"):
            if words:
                yield words
            words = []
        elif set(word) <= set("<>&()"):
            redirected = "<" in word or ">" in word
        elif redirected:
            redirected = False
        elif words or not re.match(r"\w+=", word):
            words.append(word)


def check_command(words: list[str]) -> str | None:
    """The reason why a command cannot work, or None. Commands of other projects are not checked."""
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "torchrun":
        if "-m" not in arguments:
            return None
        arguments = arguments[arguments.index("-m") :]
        program = "python"
    if program in ("python", "python3") and arguments[:1] == ["-m"]:
        return _check_module(arguments[1], arguments[2:])
    if program == "python" and arguments and arguments[0].endswith(".py"):
        return None if (ROOT / arguments[0]).exists() else f"no file {arguments[0]}"
    if program == "make":
        targets = [word for word in arguments if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        unknown = [target for target in targets if not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)]
        return f"no target {unknown[0]} in the Makefile" if unknown else None
    if program in COMMANDS:
        return check_program(COMMANDS[program], program, arguments)
    return None


def _check_module(module: str, arguments: list[str]) -> str | None:
    if module == "commands.main":
        return check_program(COMMANDS["dermis"], "dermis", arguments)
    if module.partition(".")[0] in (*PACKAGES, "commands"):
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            return f"no module {module}"
    if module == "services.serve":
        options = {f"--{name.replace('_', '-')}" for name in Settings.model_fields} | {"--table", "--help"}
        unknown = [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in options]
        return f"no option {unknown[0]} of services.serve" if unknown else None
    return None


def check_program(command: click.Command, path: str, arguments: list[str], complete: bool = True) -> str | None:
    """Whether a command exists and has the options. With `complete` no argument may be left over."""
    arguments = [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if word != "..." or before.startswith("--")
    ]
    while isinstance(command, click.Group):
        if not arguments or arguments[0].startswith("-"):
            break
        child = command.commands.get(arguments[0])
        if child is None:
            return f"`{path}` has no command `{arguments[0]}`"
        command, path, arguments = child, f"{path} {arguments[0]}", arguments[1:]
    context = click.Context(command, info_name=path)
    try:
        values, left, _ = command.make_parser(context).parse_args(arguments)
    except click.UsageError as error:
        if not complete and isinstance(error, click.BadOptionUsage):
            return None
        return f"`{path}`: {error.format_message()}"
    for parameter in command.params:
        value = values.get(parameter.name or "")
        if isinstance(parameter.type, click.Choice) and isinstance(value, str):
            try:
                parameter.type.convert(value, parameter, context)
            except click.UsageError as error:
                return f"`{path}`: {error.format_message()}"
    if complete and left and not any(set(word) & set("*{[$") for word in left):  # a shell replaces these
        return f"`{path}` does not take `{left[0]}`"
    return None


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_options_exist(page: Path) -> None:
    problems = []
    for fence in fences(page):
        if fence.language in SHELLS and "no-check" not in fence.flags:
            for words in simple_commands(fence):
                if reason := check_command(words):
                    problems.append(f"{fence.where}: {shlex.join(words)}: {reason}")
    prose = re.sub(r"^\s*(```+).*?^\s*\1\s*$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`((?:dermis|dermis-client) [^`]+)`", prose):
        program, *arguments = shlex.split(span.replace("|", " "), comments=True)
        if reason := check_program(COMMANDS[program], program, arguments, complete=False):
            problems.append(f"{page.relative_to(ROOT)}: `{span}`: {reason}")
    assert not problems, "\n".join(problems)


def test_advice_to_hide_the_training_set_removes_all_parts_that_reveal_it() -> None:
    documented = []
    for page in PAGES:
        for parts in re.findall(r"bundle detach\s+\S+((?:\s+[a-z_]+\b)+)", page.read_text()):
            if "authenticity" in parts.split():
                documented.append((page.name, parts.split()))
    assert len(documented) >= 3
    assert not [each for each in documented if "copies" not in each[1]], "copies/ holds descriptors of training images"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("dermis verify lesions --out x", "--out"),
        ("dermis bundle exhibit x", "has no command"),
        ("dermis-client images --classes a=1 --nonsense", "--nonsense"),
        ("VARIABLE=1 make nonsense", "no target"),
        ("python -m services.serve --nonsense 1", "--nonsense"),
        ("python -m benchmarks.nonsense", "no module"),
        ("echo a && dermis verify a b", "does not take"),
    ],
)
def test_wrong_commands_are_found(command: str, reason: str) -> None:
    (result,) = filter(None, map(check_command, simple_commands(Fence("", "bash", frozenset(), command))))
    assert reason in result


# -- Python


def python_problems(text: str) -> Iterator[str]:
    """Names of this project that a program uses and that do not exist, and arguments that a function does not take."""
    tree = compile(text, "fence", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    known: dict[str, Any] = {"client": DermisClient(ADDRESS)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in PACKAGES:
                    importlib.import_module(alias.name)
                    known[alias.asname or alias.name.partition(".")[0]] = sys.modules[
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    ]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    yield f"{node.module} has no {alias.name}"
                else:
                    known[alias.asname or alias.name] = getattr(module, alias.name)
    if AsyncDermisClient in known.values():
        known["client"] = AsyncDermisClient(ADDRESS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            try:
                _resolved(node, known)
            except AttributeError as error:
                yield str(error)
        if isinstance(node, ast.Call):
            yield from _unknown_keywords(node, known)


def _resolved(node: ast.expr, known: dict[str, Any]) -> Any:
    """The object that an expression such as `client.datasets.create` names; None if it is not of this project."""
    if isinstance(node, ast.Name):
        return None if hasattr(builtins, node.id) else known.get(node.id)
    if isinstance(node, ast.Attribute) and (parent := _resolved(node.value, known)) is not None:
        return getattr(parent, node.attr)
    return None


def _unknown_keywords(node: ast.Call, known: dict[str, Any]) -> Iterator[str]:
    try:
        function = _resolved(node.func, known)
        parameters = inspect.signature(function).parameters if function is not None else {}
    except (AttributeError, TypeError, ValueError):
        return
    if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for keyword in node.keywords:
            if keyword.arg and keyword.arg not in parameters:
                yield f"{ast.unparse(node.func)} has no argument {keyword.arg}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_documented_python_compiles_and_its_names_exist(page: Path) -> None:
    problems = [
        f"{fence.where}: {problem}"
        for fence in fences(page)
        if fence.language == "python" and "no-check" not in fence.flags
        for problem in python_problems(fence.text)
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("from dermis.bundle import open_bundles", "open_bundles"),
        ("client.datasets.make({})", "make"),
        ("client.images.generate({}, sead=1)", "sead"),
        ("import dermis_client\ndermis_client.Client()", "Client"),
    ],
)
def test_wrong_python_is_found(text: str, reason: str) -> None:
    assert any(reason in problem for problem in python_problems(text))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("service")
    make_bundle(root / "tiny")
    make_classifier(root / "classifier")
    amend_bundle(open_bundle(root / "tiny"), parts={"classifier": root / "classifier"})
    with listening(assemble(root / "tiny", root / "data", default_model="tiny")) as url:
        yield url


@pytest.mark.full
@pytest.mark.parametrize("name", ["README.md", *(f"docs/tutorials/{name}.md" for name in TUTORIALS)])
def test_python_of_tutorials_runs(name: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for fence in fences(ROOT / name):
        if fence.language == "python" and not fence.flags:
            program = fence.text.replace(ADDRESS, address).replace("500", "5")
            exec(compile(program, fence.where, "exec"), {"__name__": "fence"})


# -- tutorials as a whole


@pytest.mark.full
@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial_runs(name: str, launch: Callable[..., Launched], tmp_path: Path) -> None:
    """Every command of a tutorial works, in order, against a real service in place of its `make serve`."""
    folder = tmp_path / "tutorial"
    folder.mkdir()
    (folder / "bundles").symlink_to(ROOT / "bundles")
    programs = tmp_path / "programs"
    programs.mkdir()
    for program, module in (("dermis", "commands.main"), ("dermis-client", "dermis_client.cli")):
        (programs / program).write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -c "from {module} import main; main()" "$@"\n'
        )
        (programs / program).chmod(0o755)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    sources = os.pathsep.join(map(str, (ROOT, ROOT / "clients" / "python" / "src")))
    environment = os.environ | {
        "PATH": os.pathsep.join((str(programs), str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": sources,
        "DERMIS_BASE_URL": url,
    }
    for fence in fences(DOCS / "tutorials" / f"{name}.md"):
        if fence.language == "bash" and (serving := re.search(r"^(.*)make serve$", fence.text, re.MULTILINE)):
            settings = dict(word.split("=", 1) for word in serving[1].split())
            bundles = settings.get("DERMIS_BUNDLES", "bundles").split(",")
            paths = ",".join(str((folder / bundle).resolve()) for bundle in bundles)
            service = launch(paths, port, data_dir=str(folder / ".dermis"), heat_map_timeout_seconds="270")
            service.wait_until(service.ready, 300)
        elif fence.flags:
            continue
        elif fence.language in ("bash", "python"):
            command = ["bash", "-euo", "pipefail", "-c"] if fence.language == "bash" else [sys.executable, "-c"]
            done = subprocess.run(
                [*command, fence.text.replace(ADDRESS, url)],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, f"{fence.where}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("a.html", '<script src="https://cdn.example.org/a.js"></script><img src="//example.org/b.png">', 2),
        (
            "b.html",
            '<link rel="stylesheet" href="https://fonts.example.org/c"><style>@import "//example.org/d";</style>',
            2,
        ),
        ("c.css", "@font-face { src: url(https://fonts.example.org/e.woff2) }", 1),
        ("d.html", '<a href="https://example.org"><img src="assets/b.png"></a><link rel="next" href="//x.org">', 0),
    ],
)
def test_references_to_other_hosts_are_found(name: str, text: str, count: int, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    hook = runpy.run_path(str(DOCS / "_hooks" / "foreign_hosts.py"))
    assert len(hook["foreign_references"](tmp_path / name)) == count


@pytest.mark.full
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "clients" / "python" / "src")))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "site" / "reference" / "command-line.html").stat().st_size > 10_000
