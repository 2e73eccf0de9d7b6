"""Tests of the manifests with a real API server: it accepts them, and admits their pods within quotas and Pod Security.

KUBE_APISERVER names the program kube-apiserver, ETCD names etcd. With a server before 1.30 the documents and checks are
left out that it does not know.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from api_server import ApiServer, custom_resource_definitions, running_api_server
from kubernetes_manifests import (
    NAMESPACE,
    OVERLAYS,
    ROOT,
    Document,
    documents_of,
    of_kind,
    pods,
    render,
    rendered,
    rendered_with,
)
from pod_admission import refusals
from real_servers import skipped_if_missing

pytestmark = pytest.mark.full
RUNTIME_CLASS = {
    "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}, "handler": "nvidia",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    """With the definitions of custom resources, and the namespace, quotas and priorities of the overlay `scaled`."""
    with skipped_if_missing(), running_api_server() as running:
        definitions = custom_resource_definitions()
        running.apply(definitions, dry_run=False)
        names = [f"crd/{each['metadata']['name']}" for each in definitions]
        running.done("wait", "--for=condition=Established", "--timeout=60s", *names)
        documents = rendered("scaled")
        running.apply([*of_kind(documents, "Namespace"), RUNTIME_CLASS], dry_run=False)
        running.apply(of_kind(documents, "ResourceQuota", "PriorityClass"), dry_run=False)
        running.enforce(of_kind(documents, "ResourceQuota"))
        yield running


@pytest.fixture
def jobs(run: Callable[..., tuple[int, str, str]]) -> list[Document]:
    """The Jobs of k8s/batch, and printed ones with GPUs."""
    options = ("--bundle", "demo", "--classes", "malignant=9000", "--out", "s3://datasets/lesions", "--job-gpus", 1)
    status, text, err = run("generate", *options, "--print-job")
    assert status == 0, err
    return [*documents_of("batch/lesions.yaml"), *yaml.safe_load_all(text)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_server_accepts_overlays(server: ApiServer, overlay: str) -> None:
    documents = server.served(rendered(overlay))
    assert server.apply(documents).count("(server dry run)") == len(documents)


@pytest.mark.parametrize("component", ["batch", "prometheus-scaler", "studio", "traces"])
def test_server_accepts_components(server: ApiServer, component: str, tmp_path: Path) -> None:
    overlay = "cpu" if component == "batch" else "scaled"
    before = rendered(overlay)
    changed = [each for each in rendered_with(component, tmp_path / "site", overlay) if each not in before]
    assert changed
    server.apply(server.served(changed))


def test_server_accepts_jobs_alerts_and_federations(server: ApiServer, jobs: list[Document]) -> None:
    server.done("apply", "-n", NAMESPACE, "--dry-run=server", f"--validate={'strict' if server.complete else 'ignore'}",
                "-f", str(ROOT / "k8s/batch"))  # fmt: skip
    for documents in ([jobs[2]], [jobs[3]], list(yaml.safe_load_all(render("k8s/observability")))):
        server.apply(server.served(documents))
    for name in ("server", "hospital"):
        server.apply(documents_of(f"federation/{name}.yaml"))


def test_server_refuses_what_is_wrong(server: ApiServer) -> None:
    (scaler,) = of_kind(rendered("scaled"), "ScaledObject")
    wrong = copy.deepcopy(scaler)
    wrong["spec"]["maxReplicaCount"] = "many"
    with pytest.raises(AssertionError, match="maxReplicaCount"):
        server.apply([wrong])
    (rule,) = of_kind(yaml.safe_load_all(render("k8s/observability")), "PrometheusRule")
    rule["spec"]["groups"][0]["rules"][0]["for"] = "soon"
    with pytest.raises(AssertionError, match="for"):
        server.apply([rule])


def test_server_admits_every_pod(server: ApiServer, jobs: list[Document], tmp_path: Path) -> None:
    templates = [template for overlay in ("scaled", "scaled-gpu") for _, template in pods(rendered(overlay))]
    templates += [template for _, template in pods(rendered_with("studio", tmp_path / "site", "scaled"))]
    templates += [template for _, template in pods(jobs)]
    for number, template in enumerate(templates):
        assert server.create_pod(NAMESPACE, f"pod-{number}", template) is None
    for name in ("server", "hospital"):
        ((_, template),) = pods(documents_of(f"federation/{name}.yaml"))
        text = (ROOT / f"k8s/federation/{name}.yaml").read_text()
        namespace = text.partition("kubectl create namespace ")[2].split()[0]
        server.done("create", "namespace", namespace)
        server.done("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
        assert server.create_pod(namespace, "pod", template) is None
        assert "must specify limits.cpu" in str(server.create_pod(NAMESPACE, "pod", template))


def test_server_and_test_refuse_the_same_pods(server: ApiServer, jobs: list[Document]) -> None:
    """The rules of tests/support/pod_admission.py are those of the server."""
    documents = rendered("scaled")
    (worker,) = (template for name, template in pods(documents) if name == "dermis-worker")
    for template, message in ((jobs[0]["spec"]["template"], "must specify"), (worker, "must specify")):
        for resource in ("cpu", "memory"):
            changed = copy.deepcopy(template)
            (container,) = changed["spec"]["containers"]
            del container["resources"]["limits"][resource]
            for refused in (refusals(documents, [changed])[0], str(server.create_pod(NAMESPACE, "pod", changed))):
                assert f"{message} limits.{resource}" in refused
    changed = copy.deepcopy(jobs[0]["spec"]["template"])
    changed["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    assert "Pod Security: generate: allowPrivilegeEscalation" in refusals(documents, [changed])
    if server.complete:
        assert "violates PodSecurity" in str(server.create_pod(NAMESPACE, "pod", changed))


def test_batch_pods_fill_their_quota_and_leave_that_of_the_service(server: ApiServer, jobs: list[Document]) -> None:
    template = jobs[0]["spec"]["template"]
    for number in range(32):
        assert server.create_pod(NAMESPACE, f"part-{number}", template, dry_run=False) is None
    assert "exceeded quota: dermis-batch" in str(server.create_pod(NAMESPACE, "part-32", template))
    for _, service in pods(rendered("scaled")):
        assert server.create_pod(NAMESPACE, "pod", service) is None
