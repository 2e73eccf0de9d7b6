"""Tests that every pod of k8s/ and of `--print-job` is admitted in its namespace and reaches what it needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import kubernetes_validate
import pytest

from kubernetes_manifests import (
    DATABASE,
    DNS,
    INGRESS,
    INTERNET,
    PROMETHEUS,
    ROOT,
    SCALED,
    STORAGE,
    Document,
    Peer,
    allows,
    documents_of,
    load_all,
    of_kind,
    pods,
    rendered,
    rendered_with,
)
from pod_admission import refusals, violations_of_restricted

Run = Callable[..., tuple[int, str, str]]
BATCH: Peer = ("dermis", {"app.kubernetes.io/name": "dermis-batch"})


def at_most(documents: list[Document]) -> Iterator[Document]:
    """The pods of the Deployments with the most replicas and during a rolling update, with those that are ending."""
    replicas = {}
    for each in of_kind(documents, "HorizontalPodAutoscaler", "ScaledObject"):
        spec = each["spec"]
        replicas[spec["scaleTargetRef"]["name"]] = spec.get("maxReplicas") or spec["maxReplicaCount"]
    for each in of_kind(documents, "Deployment"):
        update = each["spec"].get("strategy", {}).get("rollingUpdate", {})
        number = replicas.get(each["metadata"]["name"]) or each["spec"]["replicas"]
        surge, unavailable = (_pods_of(update.get(name, 0), number) for name in ("maxSurge", "maxUnavailable"))
        yield from [each["spec"]["template"]] * (number + surge + max(surge, unavailable))


def _pods_of(value: int | str, replicas: int) -> int:
    return int(value) if isinstance(value, int) else replicas * int(value.removesuffix("%")) // 100


def running(job: Document) -> list[Document]:
    """The pods of a Job that run at the same time."""
    return [job["spec"]["template"]] * job["spec"].get("parallelism", 1)


@pytest.fixture
def gpu_jobs(run: Run) -> list[Document]:
    """Jobs of pods with a GPU, as many as without the option --shards."""
    options = ("--bundle", "demo", "--classes", "malignant=9000,benign=9000", "--out", "s3://datasets/lesions")
    status, text, err = run("generate", *options, "--format", "parquet", "--job-gpus", 1, "--print-job")
    assert status == 0, err
    return load_all(text)


@pytest.mark.parametrize("component", ["studio", "traces", "gateway-without-inference"])
@pytest.mark.parametrize("overlay", SCALED)
def test_service_and_batch_jobs_fit_into_their_quotas(
    overlay: str, component: str, tmp_path: Path, gpu_jobs: list[Document]
) -> None:
    """With the most replicas, and with the most pods that `--print-job` asks for of its own accord."""
    documents = rendered_with(component, tmp_path / "site", overlay)
    service = list(at_most(documents))
    assert refusals(documents, service) == []
    for jobs in (documents_of("batch/lesions.yaml"), gpu_jobs):
        for job in jobs:
            assert refusals(documents, [*service, *running(job)]) == []
    assert gpu_jobs[0]["spec"]["parallelism"] == 32
    assert refusals(documents, [*running(gpu_jobs[0]), *running(gpu_jobs[1]), *service])[0].startswith("dermis-batch: ")


def test_refused_pods_are_found(gpu_jobs: list[Document]) -> None:
    documents = rendered("scaled")
    (pod,) = (copy.deepcopy(each) for each in running(gpu_jobs[1]))
    (container,) = pod["spec"]["containers"]
    del container["resources"]["limits"]["cpu"]
    assert refusals(documents, [pod]) == ["dermis-batch: must specify limits.cpu for finish"]
    pod["spec"]["priorityClassName"] = "dermis-worker"
    assert refusals(documents, [pod]) == ["dermis: must specify limits.cpu for finish"]
    pod["spec"]["priorityClassName"] = "high"
    assert "no PriorityClass high" in refusals(documents, [pod])
    container["securityContext"] = {}
    pod["spec"] |= {"hostNetwork": True, "securityContext": {}}
    pod["spec"]["volumes"].append({"name": "host", "hostPath": {"path": "/"}})
    problems = ("allowPrivilegeEscalation", "runAsNonRoot", "seccompProfile", "capabilities")
    assert violations_of_restricted(pod) == [
        "hostNetwork",
        "volume hostPath",
        *(f"finish: {each}" for each in problems),
    ]


def test_printed_gpu_jobs_run_on_the_nodes_of_the_gpu_overlays(gpu_jobs: list[Document]) -> None:
    (template,) = (template for name, template in pods(rendered("scaled-gpu")) if name == "dermis-worker")
    for job in gpu_jobs:
        kubernetes_validate.validate(job, "1.37", strict=True)
    for job in gpu_jobs[:2]:  # the third computes nothing
        pod = job["spec"]["template"]["spec"]
        for name in ("runtimeClassName", "tolerations", "enableServiceLinks", "automountServiceAccountToken"):
            assert pod[name] == template["spec"][name], name
        (container,), (worker,) = pod["containers"], template["spec"]["containers"]
        assert container["image"] == worker["image"]
        for resources in (container["resources"]["requests"], container["resources"]["limits"]):
            assert resources["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("overlay", ["cpu", "gpu", *SCALED])
def test_batch_pods_reach_s3_and_nothing_else(overlay: str, tmp_path: Path) -> None:
    """In `scaled` at once, in an overlay with one replica by the component `batch`."""
    before = rendered(overlay)
    documents = before if overlay in SCALED else rendered_with("batch", tmp_path / "site", overlay)
    for job in documents_of("batch/lesions.yaml"):
        assert job["spec"]["template"]["metadata"]["labels"] == BATCH[1]
    assert allows(documents, BATCH, STORAGE, 443)
    assert allows(documents, BATCH, DNS, 53, "UDP") and allows(documents, BATCH, DNS, 53)
    assert not allows(documents, BATCH, DATABASE, 5432) and not allows(documents, BATCH, INTERNET, 443)
    assert not allows(documents, INGRESS, BATCH, 3000) and not allows(documents, PROMETHEUS, BATCH, 3000)
    if overlay not in SCALED:
        (added,) = [each for each in documents if each not in before]
        kubernetes_validate.validate(added, "1.37", strict=True)
        assert not allows(before, BATCH, STORAGE, 443)


@pytest.mark.parametrize("name", ["server", "hospital"])
def test_federations_have_a_namespace_of_their_own_that_admits_their_pods(name: str) -> None:
    documents = documents_of(f"federation/{name}.yaml")
    namespace = {"server": "dermis-federation", "hospital": "dermis-hospital"}[name]
    text = (ROOT / f"k8s/federation/{name}.yaml").read_text()
    commands = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   kubectl ")]
    assert commands[:3] == [
        f"kubectl create namespace {namespace}",
        f"kubectl label namespace {namespace} pod-security.kubernetes.io/enforce=restricted",
        f"kubectl config set-context --current --namespace={namespace}",
    ]
    templates = [template for _, template in pods(documents)]
    assert templates
    assert refusals(documents, templates) == []
    # In the namespace of the service they would be refused, which is why the file says so.
    elsewhere = rendered("scaled")
    assert "dermis-batch: must specify limits.cpu for " in refusals(elsewhere, templates)[0]
    for template in templates:
        pod: Peer = ("dermis", template["metadata"]["labels"])
        assert template["spec"]["enableServiceLinks"] is False
        assert allows(documents, INTERNET, pod, 8800) == (name == "server")
        assert not allows(documents, INTERNET, pod, 9091)
        assert allows(documents, pod, "203.0.113.10", 8800) == (name == "hospital")
        assert allows(documents, pod, DNS, 53, "UDP") == (name == "hospital")
        assert not allows(documents, pod, INTERNET, 443)
