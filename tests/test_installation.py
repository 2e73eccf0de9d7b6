"""Tests of bundles found by name, `dermis serve`, shell completion, and the wheels outside of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from benchmarks.components import free_port
from commands.main import app
from dermis.bundle import open_bundle
from dermis.bundle.installed import installed_bundles, resolve_bundle
from dermis.errors import BundleError, install_command
from launched_service import Launched
from services import serve
from services.models import locate
from tiny import make_bundle

ROOT = Path(__file__).resolve().parents[1]


def install_distribution(site: Path, bundle: Path, name: str) -> None:
    """The files that pip installs from a wheel with a bundle."""
    shutil.copytree(bundle, site / "bundle_package")
    info = site / "bundle_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bundle-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dermis.bundles]\n{name} = bundle_package\nmissing = no_such_package\n")


def test_bundle_of_installed_distribution_opens_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "tiny")
    install_distribution(tmp_path / "site", tmp_path / "tiny", "hospital")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path / "site")
    assert open_bundle("hospital").digest == bundle.digest
    assert locate(["hospital"]) == [str(tmp_path / "site/bundle_package")]
    assert "missing" not in installed_bundles()
    # A folder of this name in the working directory takes precedence, and paths are never names.
    (tmp_path / "site/hospital").mkdir()
    assert resolve_bundle("hospital") == "hospital"
    assert resolve_bundle("./hospital") == "./hospital"
    assert resolve_bundle("s3://bucket/hospital") == "s3://bucket/hospital"
    with pytest.raises(BundleError, match="nowhere"):
        open_bundle("nowhere")


def test_service_without_a_bundle_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"bundles": str(tmp_path / "none"), "data_dir": str(tmp_path / "data")}
    environment = dict(os.environ)
    try:
        assert serve.serve(options) == 2
    finally:
        os.environ.clear()
        os.environ.update(environment)
    message = capsys.readouterr().err
    assert f"DERMIS_BUNDLES: there is no bundle at {tmp_path / 'none'}" in message
    assert "demo" in message
    assert not (tmp_path / "data").exists()


def test_serve_refuses_an_unknown_setting() -> None:
    result = CliRunner().invoke(app, ["serve", "--set", "max_image=16"])
    assert result.exit_code == 2
    assert "max_image=16" in result.output


@pytest.mark.parametrize(("module", "program"), [("commands.main", "dermis"), ("dermis_client.cli", "dermis-client")])
def test_completion_offers_commands(module: str, program: str) -> None:
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    words = {variable: "complete_bash", "COMP_WORDS": f"{program} d", "COMP_CWORD": "1"}
    run = f"import sys; sys.argv[0] = {program!r}; from {module} import main; main()"
    path = os.pathsep.join([str(ROOT), str(ROOT / "clients/python/src")])
    done = subprocess.run(
        [sys.executable, "-c", run], env=os.environ | words | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    expected = {"dermis": {"data", "directions"}, "dermis-client": {"datasets"}}[program]
    assert expected <= set(done.stdout.split())


def test_install_command_names_the_packages_of_an_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, requirements in extras.items():
        command = install_command(extra)
        assert not re.search(r"\bdermis(?!-)", command)
        for requirement in requirements:
            assert f'"{requirement.split(">=")[0]}' in command


def test_install_hints_do_not_require_dermis_on_package_index() -> None:
    for folder in ("dermis", "training", "services", "commands", "docs", "clients/python/src"):
        for file in (ROOT / folder).rglob("*.*"):
            if file.suffix in (".py", ".md"):
                assert 'pip install "dermis[' not in file.read_text().replace('f\'"dermis[{extra}]"', ""), file


@pytest.mark.full
def test_wheels_work_beside_folders_named_like_their_packages(tmp_path: Path) -> None:
    """Built, unpacked into a folder of their own, and started where `services`, `dermis` and others are other packages."""
    source, site, here = tmp_path / "source", tmp_path / "site", tmp_path / "here"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", "demo")
    for name in ("dermis", "training", "services", "commands", "clients"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "LICENSE", "docs/package.md"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    make_bundle(source / "bundles/demo")
    shutil.copy(ROOT / "bundles/pyproject.toml", source / "bundles")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    for project in (".", "clients/python", "bundles"):
        build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(source / project)]
        subprocess.run([*pip, *build], check=True, cwd=tmp_path)
    wheels = sorted(map(str, (tmp_path / "dist").glob("*.whl")))
    assert len(wheels) == 3
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), *wheels], check=True, cwd=tmp_path)
    assert not (site / "benchmarks").exists()
    assert not (site / "tests").exists()
    for name in ("services", "dermis", "training", "commands", "bentoml"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise SystemExit('the wrong package')\n")

    program = [sys.executable, "-P", "-c", "from commands.main import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    generate = ["generate", "--bundle", "demo", "--classes", "benign=2", "--out", "lesions", "--device", "cpu"]
    subprocess.run([*program, *generate], check=True, cwd=here, env=environment, timeout=300)
    port = free_port()
    arguments = ["serve", "--port", str(port), "--data-dir", "data"]
    log = tmp_path / "log"
    with (
        log.open("w") as file,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client,
        subprocess.Popen(
            [*program, *arguments], cwd=here, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        service = Launched(process, client, log)
        try:
            service.wait_until(service.ready)
            response = client.post("/v1/images", json={"classes": {"benign": 1}, "seed": 1})
            assert response.status_code == 200
        finally:
            process.terminate()
            assert process.wait(timeout=90) == 0
