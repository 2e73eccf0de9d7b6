"""Tests that deployment files and documents state the versions and settings of the code."""

from __future__ import annotations

import re
import runpy
import shutil
import tomllib
from pathlib import Path
from typing import get_args

import kubernetes_validate
import pathspec
import pytest
import yaml
from typer.testing import CliRunner

from commands.main import app
from dermis.synthesizer.choice import BACKENDS
from services.settings import Settings, SettingsError, read_settings, settings_table

ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = ["federation/server.yaml", "federation/hospital.yaml"]  # test_kubernetes.py has the others


def packages(file: str) -> set[str]:
    return set(re.findall(r"^    - ([A-Za-z][^\s#]*)$", (ROOT / file).read_text(), re.MULTILINE))


def test_bentos_pin_tested_versions_and_differ_only_in_variant() -> None:
    constraints = {line.lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    gpu, cpu = packages("bentofile.yaml"), packages("bentofile.cpu.yaml")
    for pin in gpu | cpu:
        if "==" in pin:
            assert re.sub(r"\[.*\]", "", pin).lower() in constraints
    assert {re.split(r"[=>\[]", pin)[0] for pin in gpu - cpu} == {"faiss-gpu", "onnxruntime-gpu"}
    assert {re.split(r"[=>\[]", pin)[0] for pin in cpu - gpu} == {"faiss-cpu", "onnxruntime", "openvino"}


@pytest.mark.parametrize("file", ["bentofile.yaml", "bentofile.cpu.yaml"])
def test_bentos_contain_the_service_and_the_library_only(file: str) -> None:
    content = yaml.safe_load((ROOT / file).read_text())
    include, exclude = (pathspec.PathSpec.from_lines("gitignore", content[key]) for key in ("include", "exclude"))
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    modules = [str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.py")]
    chosen = [name for name in modules if include.match_file(name) and not exclude.match_file(name)]
    assert {name.partition("/")[0] for name in chosen} == {"dermis", "services"}


def test_image_finds_the_bundle_of_the_batch_job_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (folder,) = re.findall(r"^WORKDIR (/opt.*)$", dockerfile, re.MULTILINE)
    ((bundles, link),) = re.findall(r"^RUN ln -s (\S+) (\S+)$", dockerfile, re.MULTILINE)
    assert bundles == f"{folder}/bundles" and "COPY bundles bundles" in dockerfile
    site, name = Path(link).parent, re.findall(r"--bundle=([\w-]+)", (ROOT / "k8s/batch/lesions.yaml").read_text())[0]
    # The image in a folder: the installed package without a checkout around it, and the link.
    installed = tmp_path / site.relative_to("/") / "dermis/bundle/installed.py"
    installed.parent.mkdir(parents=True)
    shutil.copy(ROOT / "dermis/bundle/installed.py", installed)
    copied = tmp_path / bundles.lstrip("/") / name
    copied.mkdir(parents=True)
    shutil.copy(ROOT / "bundles" / name / "bundle.json", copied)
    (tmp_path / link.lstrip("/")).symlink_to(copied.parent)
    monkeypatch.chdir(tmp_path)
    namespace = runpy.run_path(str(installed))
    assert Path(namespace["resolve_bundle"](name)).resolve() == copied


def test_deployment_files_name_settings_that_exist() -> None:
    known = {f"DERMIS_{name.upper()}" for name in Settings.model_fields}
    known |= {"DERMIS_API_KEY", "DERMIS_BASE_URL"}  # of the client
    files = [
        "bentofile.yaml",
        "bentofile.cpu.yaml",
        "Dockerfile",
        "docs/deployment.md",
        "docs/settings.md",
        "docs/backup.md",
        "docs/audit.md",
        "docs/kubernetes.md",
        "docs/api.md",
        "docs/problems.md",
        "docs/webhooks.md",
    ]
    manifests = [str(path.relative_to(ROOT)) for path in (ROOT / "k8s").rglob("*.yaml")]
    assert manifests
    for file in files + manifests:
        assert set(re.findall(r"\bDERMIS_[A-Z0-9_]+", (ROOT / file).read_text())) <= known, file


def test_image_is_built_from_files_and_extras_that_exist() -> None:
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    sources = {name for names in copied for name in names}
    allowed = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert sources == allowed
    assert all((ROOT / name).exists() for name in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["project"]["license-files"], "constraints.txt", "pyproject.toml"}
    assert needed <= sources
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= sources
    extras = {
        extra
        for line in re.findall(r"\b(?:EXTRAS|VARIANT)=([a-z0-9,]+)", (ROOT / "Dockerfile").read_text())
        for extra in line.split(",")
    }
    assert extras <= set(project["project"]["optional-dependencies"])
    assert {line.split()[1] for line in lines if line.startswith("USER")} == {"1034:1034"}
    assert lines[-1] == 'CMD ["serve"]'


def test_documented_settings_match_code() -> None:
    assert settings_table() in (ROOT / "docs/settings.md").read_text()


def test_invalid_setting_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMIS_MAX_IMAGES", "many")
    with pytest.raises(SettingsError, match="DERMIS_MAX_IMAGES"):
        read_settings()


def test_settings_take_the_backends_and_devices_of_the_library_and_no_others() -> None:
    assert get_args(Settings.model_fields["backend"].annotation) == BACKENDS
    for device in ("auto", "cpu", "mps", "cuda", "cuda:1", "xpu:1"):
        assert read_settings(device=device).device == device
    for name, value in (("backend", "onnx"), ("device", "gpu"), ("device", "cuda:"), ("device", "cpu:0")):
        with pytest.raises(SettingsError, match=f"^DERMIS_{name.upper()}: "):
            read_settings(**{name: value})


def test_settings_split_lists_and_add_postgres_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMIS_BUNDLES", "a, s3://b/c")
    monkeypatch.setenv("DERMIS_DATABASE_URL", "postgres://user@host/jobs")
    settings = read_settings()
    assert settings.bundles == ("a", "s3://b/c")
    assert settings.jobs_url == "postgresql+psycopg://user@host/jobs"


@pytest.mark.parametrize("file", MANIFESTS)
def test_kubernetes_manifests_are_valid(file: str) -> None:
    for document in yaml.safe_load_all((ROOT / "k8s" / file).read_text()):
        kubernetes_validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize("file", MANIFESTS)
def test_pods_are_unprivileged_and_mount_declared_volumes(file: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / "k8s" / file).read_text()))
    pods = [each["spec"]["template"]["spec"] for each in documents if each["kind"] == "Deployment"]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"] + pod.get("initContainers", []):
            safe = container["securityContext"]
            assert safe["readOnlyRootFilesystem"]
            assert not safe["allowPrivilegeEscalation"]
            assert safe["capabilities"] == {"drop": ["ALL"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["limits"]["memory"]
    selectors = [each["spec"]["selector"] for each in documents if each["kind"] == "Service"]
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in documents if each["kind"] == "Deployment"]
    assert all(selector in labels for selector in selectors)


def test_hospital_pod_accepts_no_ingress_and_limits_egress() -> None:
    documents = list(yaml.safe_load_all((ROOT / "k8s/federation/hospital.yaml").read_text()))
    assert not [each for each in documents if each["kind"] == "Service"]
    (policy,) = (each["spec"] for each in documents if each["kind"] == "NetworkPolicy")
    assert policy["ingress"] == []
    assert sorted(port["port"] for rule in policy["egress"] for port in rule["ports"]) == [53, 53, 8800]
    (pod,) = (each["spec"]["template"]["spec"] for each in documents if each["kind"] == "Deployment")
    mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["/data"]["readOnly"]


def test_commands_and_options_of_federation_manifests_exist() -> None:
    """The options of `join` in the manifest, and of the commands in its comments."""
    for name in ("server", "hospital"):
        text = (ROOT / f"k8s/federation/{name}.yaml").read_text()
        for command in re.findall(r"dermis federate (\w+)", text):
            assert CliRunner().invoke(app, ["federate", command, "--help"]).exit_code == 0
    arguments = CliRunner().invoke(app, ["federate", "join", "--help"], env={"COLUMNS": "200"}).output
    (pod,) = (
        each["spec"]["template"]["spec"]
        for each in yaml.safe_load_all((ROOT / "k8s/federation/hospital.yaml").read_text())
        if each["kind"] == "Deployment"
    )
    for argument in pod["containers"][0]["args"][2:]:
        assert argument.partition("=")[0] in arguments
