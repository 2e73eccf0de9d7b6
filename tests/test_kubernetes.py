"""Tests of the overlays in k8s/ as `kubectl kustomize` renders them: schemas, references, security, networks, limits."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from commands.main import app
from services.jobs.table import JobTable
from services.settings import Settings
from services.tracing import exporter_names

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = ("cpu", "gpu", "scaled", "scaled-gpu")
SCALED = ("scaled", "scaled-gpu")
SETTINGS = {f"DERMIS_{name.upper()}" for name in Settings.model_fields}
CUSTOM_SCHEMAS = json.loads((ROOT / "tests/support/custom_resources.json").read_text())
CUSTOM_KINDS = sorted(set(CUSTOM_SCHEMAS) - {"$comment"})
RESTRICTED_VOLUMES = {
    "configMap",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
CHECKOV = Path(os.environ.get("CHECKOV") or shutil.which("checkov") or "/tmp/checkov-venv/bin/checkov")
ACCEPTED_FINDINGS = {
    "CKV_K8S_15": "imagePullPolicy: tags are never moved, and pods can start while the registry cannot be reached",
    "CKV_K8S_35": "secrets in the environment: the settings of the database and the storage are read from there",
    "CKV_K8S_40": "uid 1034: the account of the BentoML image and the owner of existing volumes",
    "CKV_K8S_43": "image digest: there is no published image; docs/kubernetes.md shows how to set one",
}
ACCEPTED_FINDINGS_OF_FEDERATION = {
    name: ACCEPTED_FINDINGS[name] for name in ("CKV_K8S_15", "CKV_K8S_40", "CKV_K8S_43")
} | {
    "CKV_K8S_8": "liveness: a client has no port; the process ends when it cannot continue",
    "CKV_K8S_9": "readiness: a client has no port, and clients of the server repeat their requests",
    "CKV_K8S_11": "CPU limit: training uses all processors that a hospital has free",
    "CKV_K8S_21": "default namespace: the commands in the manifests take the current one",
}
ACCEPTED_FINDINGS_OF_IMAGE = {
    "CKV_DOCKER_2": "HEALTHCHECK: the manifests have probes, and images in the format of OCI have no such field",
    "CKV_DOCKER_7": "tag of the base image: it is in an argument, with a version",
}

Document = dict[str, Any]


@lru_cache
def _why_kubectl_cannot_render() -> str | None:
    if shutil.which("kubectl") is None:
        return "kubectl is not installed"
    version = subprocess.run(
        ["kubectl", "version", "--client", "-o", "json"], capture_output=True, text=True, check=True
    )
    number = json.loads(version.stdout)["clientVersion"]
    if int(re.sub(r"\D", "", number["minor"])) < 27:
        return f"kubectl {number['gitVersion']} renders no components and labels; 1.27 or newer does"
    return None


@lru_cache
def _render(folder: str | Path) -> str:
    if reason := _why_kubectl_cannot_render():
        pytest.skip(reason)
    result = subprocess.run(["kubectl", "kustomize", folder], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not result.stderr  # warnings of deprecated fields
    return result.stdout


def rendered(overlay: str) -> list[Document]:
    return list(yaml.safe_load_all(_render(f"k8s/overlays/{overlay}")))


def of_kind(documents: Iterable[Document], *kinds: str) -> list[Document]:
    return [each for each in documents if each["kind"] in kinds]


def pods(documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """Name and template of the pods of every workload, also of kinds that the overlays do not contain today."""
    for each in documents:
        spec = each.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            yield each["metadata"]["name"], spec["template"]


def containers(template: Document) -> list[Document]:
    spec = template["spec"]
    return [*spec["containers"], *spec.get("initContainers", []), *spec.get("ephemeralContainers", [])]


def environment(container: Document) -> dict[str, str]:
    """The variables of a container; a value from a secret is an example of its kind."""
    secrets = {
        "DERMIS_DATABASE_URL": "postgresql://user:secret@db:5432/dermis",
        "DERMIS_STORAGE_URL": "s3://bucket/prefix",
    }
    return {each["name"]: each.get("value") or secrets.get(each["name"], "") for each in container["env"]}


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    assert selector is None or set(selector) <= {"matchLabels"}, "the test evaluates matchLabels only"
    return selector is not None and (selector.get("matchLabels") or {}).items() <= labels.items()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_render_and_agree_with_the_schemas(overlay: str) -> None:
    documents = rendered(overlay)
    validated = [each for earlier in OVERLAYS[: OVERLAYS.index(overlay)] for each in rendered(earlier)]
    for document in documents:
        if document in validated:  # validating takes a moment
            continue
        if document["kind"] in CUSTOM_KINDS:
            jsonschema.validate(document, CUSTOM_SCHEMAS[document["kind"]])
        else:
            kubernetes_validate.validate(document, "1.37", strict=True)
    names = [(each["kind"], each["metadata"]["name"]) for each in documents]
    assert len(set(names)) == len(names)
    (namespace,) = of_kind(documents, "Namespace")
    for document in documents:
        if document["kind"] not in ("Namespace", "PriorityClass"):
            assert document["metadata"]["namespace"] == namespace["metadata"]["name"]


@pytest.mark.parametrize("kind", CUSTOM_KINDS)
def test_schemas_of_custom_resources_refuse_unknown_fields(kind: str) -> None:
    (document,) = of_kind(rendered("scaled"), kind)
    document["spec"]["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.validate(document, CUSTOM_SCHEMAS[kind])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_meet_the_restricted_level_of_pod_security(overlay: str) -> None:
    documents = rendered(overlay)
    (namespace,) = of_kind(documents, "Namespace")
    for mode in ("enforce", "audit", "warn"):
        assert namespace["metadata"]["labels"][f"pod-security.kubernetes.io/{mode}"] == "restricted"
    templates = dict(pods(documents))
    assert set(templates) == ({"dermis-gateway", "dermis-worker"} if overlay in SCALED else {"dermis"})
    accounts = {each["metadata"]["name"]: each for each in of_kind(documents, "ServiceAccount")}
    assert not of_kind(documents, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")
    for template in templates.values():
        assert accounts[template["spec"]["serviceAccountName"]]["automountServiceAccountToken"] is False
        assert_restricted(template)
        for container in containers(template):
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            for path in ("/tmp", environment(container)["DERMIS_DATA_DIR"]):
                assert not mounts[path].get("readOnly")


def assert_restricted(template: Document) -> None:
    """Assert that pods meet the level `restricted`, have limits, and write to mounted folders alone."""
    pod = template["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(pod)
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False  # they would set DERMIS_PORT
    safe = pod["securityContext"]
    assert safe["runAsNonRoot"] is True
    assert safe["runAsUser"] > 0 and safe["runAsGroup"] > 0 and safe["fsGroup"] > 0
    assert safe["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for volume in volumes.values():
        assert set(volume) - {"name"} <= RESTRICTED_VOLUMES
    for container in containers(template):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["requests"])
        assert not [port for port in container["ports"] if "hostPort" in port]
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        written = [value for name, value in environment(container).items() if name.endswith(("_CACHE_DIR", "HOME"))]
        assert written and all(value.startswith(("/tmp", "/data/")) for value in written)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_settings_ports_and_times_agree(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = rendered(overlay)
    for name in [name for name in os.environ if name.startswith("DERMIS_")]:
        monkeypatch.delenv(name)
    for name, template in pods(documents):
        for container in containers(template):
            variables = environment(container)
            assert {each for each in variables if each.startswith("DERMIS_")} <= SETTINGS
            assert len(variables) == len(container["env"])
            with monkeypatch.context() as patch:
                for variable, value in variables.items():
                    patch.setenv(variable, value)
                settings = Settings(_env_file=None)  # type: ignore[call-arg]
            assert settings.auth == "keys"
            assert settings.host == "0.0.0.0"
            assert settings.stop_pause_seconds >= 5
            assert (
                template["spec"]["terminationGracePeriodSeconds"]
                > settings.shutdown_seconds
                > settings.stop_pause_seconds
            )
            assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"http": settings.port}
            paths = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
            assert paths["readiness"] == {"path": "/readyz", "port": "http"}
            assert paths["startup"] == paths["liveness"] == {"path": "/livez", "port": "http"}
            role = {"dermis-gateway": "gateway", "dermis-worker": "worker"}.get(name)
            assert variables.get("DERMIS_ROLE") == role
            if role is not None:
                assert settings.jobs_url.startswith("postgresql+psycopg://")
                assert settings.storage.startswith("s3://")
            files = {
                f"{mount['mountPath']}/{item['path']}"
                for mount in container["volumeMounts"]
                for volume in template["spec"]["volumes"]
                if volume["name"] == mount["name"]
                for source in volume.get("projected", {}).get("sources", [])
                for item in source["secret"]["items"]
            }
            keys = [settings.audit_key_file, *([] if role == "worker" else [settings.bootstrap_key_file])]
            assert files == {str(path) for path in keys}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_references_between_documents_resolve(overlay: str) -> None:
    documents = rendered(overlay)
    labels = {name: template["metadata"]["labels"] for name, template in pods(documents)}
    existing = {(each["kind"], each["metadata"]["name"]) for each in documents}
    for each in of_kind(documents, "Deployment"):
        selected = [name for name, of_pod in labels.items() if matches(each["spec"]["selector"], of_pod)]
        assert selected == [each["metadata"]["name"]]
        spec = each["spec"]["template"]["spec"]
        assert "priorityClassName" not in spec or ("PriorityClass", spec["priorityClassName"]) in existing
        for volume in spec["volumes"]:
            claim = volume.get("persistentVolumeClaim")
            assert claim is None or ("PersistentVolumeClaim", claim["claimName"]) in existing
        for constraint in spec.get("topologySpreadConstraints", []):
            assert [name for name, of_pod in labels.items() if matches(constraint["labelSelector"], of_pod)] == selected
    for each in of_kind(documents, "PodDisruptionBudget"):
        assert [name for name, of_pod in labels.items() if matches(each["spec"]["selector"], of_pod)] == [
            each["metadata"]["name"]
        ]
    services = {each["metadata"]["name"]: each["spec"] for each in of_kind(documents, "Service")}
    selected = {
        service: [name for name, of_pod in labels.items() if spec["selector"].items() <= of_pod.items()]
        for service, spec in services.items()
    }
    assert selected["dermis"] == (["dermis-gateway"] if overlay in SCALED else ["dermis"])
    assert all(len(names) == 1 for names in selected.values())
    for spec in services.values():
        assert [port["targetPort"] for port in spec["ports"]] == ["http"]
    for each in of_kind(documents, "HorizontalPodAutoscaler", "ScaledObject"):
        target = each["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in existing
        deployment = next(one for one in of_kind(documents, "Deployment") if one["metadata"]["name"] == target["name"])
        assert "replicas" not in deployment["spec"]  # applying the overlay again would undo the scaling
        for trigger in each["spec"].get("triggers", []):
            assert ("TriggerAuthentication", trigger["authenticationRef"]["name"]) in existing
    for each in of_kind(documents, "Ingress"):
        hosts = {rule["host"] for rule in each["spec"]["rules"]}
        assert {host for tls in each["spec"]["tls"] for host in tls["hosts"]} == hosts
        for rule in each["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                assert backend["port"]["name"] in [port["name"] for port in services[backend["name"]]["ports"]]
        (gateway,) = (template for name, template in pods(documents) if name == "dermis-gateway")
        trusted = environment(containers(gateway)[0])
        assert hosts <= set(trusted["DERMIS_TRUSTED_HOSTS"].split(","))
        assert trusted["DERMIS_TRUSTED_PROXIES"]
    for each in of_kind(documents, "ServiceMonitor"):
        monitored = [
            one for one in of_kind(documents, "Service") if matches(each["spec"]["selector"], one["metadata"]["labels"])
        ]
        assert {one["metadata"]["name"] for one in monitored} == {"dermis", "dermis-worker"}
        for endpoint in each["spec"]["endpoints"]:
            assert endpoint["path"] == "/metrics"
            assert all(endpoint["port"] in [port["name"] for port in one["spec"]["ports"]] for one in monitored)


@pytest.mark.parametrize("overlay", SCALED)
def test_scaled_pods_share_no_volume_and_have_autoscaler_budget_and_spread(overlay: str) -> None:
    documents = rendered(overlay)
    assert not of_kind(documents, "PersistentVolumeClaim")
    assert {each["metadata"]["name"] for each in of_kind(documents, "PodDisruptionBudget")} == {
        "dermis-gateway",
        "dermis-worker",
    }
    assert {each["spec"]["scaleTargetRef"]["name"] for each in of_kind(documents, "HorizontalPodAutoscaler")} == {
        "dermis-gateway"
    }
    assert {each["spec"]["scaleTargetRef"]["name"] for each in of_kind(documents, "ScaledObject")} == {"dermis-worker"}
    priorities = {each["metadata"]["name"]: each["value"] for each in of_kind(documents, "PriorityClass")}
    assert priorities["dermis-gateway"] > priorities["dermis-worker"]
    for _, template in pods(documents):
        assert template["spec"]["topologySpreadConstraints"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_pods_that_generate_datasets_get_a_gpu(overlay: str) -> None:
    expected = {"cpu": set(), "gpu": {"dermis"}, "scaled": set(), "scaled-gpu": {"dermis-worker"}}[overlay]
    with_gpu = set()
    for name, template in pods(rendered(overlay)):
        (container,) = containers(template)
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits.get("nvidia.com/gpu") == requests.get("nvidia.com/gpu")
        assert ("runtimeClassName" in template["spec"]) == ("nvidia.com/gpu" in limits)
        assert container["image"].split(":")[0].endswith("/dermis-gpu") == ("nvidia.com/gpu" in limits)
        assert (environment(container).get("DERMIS_DEVICE") == "cuda") == ("nvidia.com/gpu" in limits)
        if "nvidia.com/gpu" in limits:
            with_gpu.add(name)
    assert with_gpu == expected


DNS = ("kube-system", {"k8s-app": "kube-dns"})
INGRESS = ("traefik", {"app.kubernetes.io/name": "traefik"})
PROMETHEUS = ("monitoring", {"app.kubernetes.io/name": "prometheus"})
Peer = tuple[str, Mapping[str, str]] | str  # namespace and labels of a pod, or an address outside of the cluster


def allows(documents: Iterable[Document], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the network policies let `source` connect to `target`. Policies of other namespaces are not known."""
    policies = of_kind(documents, "NetworkPolicy")
    return _permits(policies, "Egress", source, target, port, protocol) and _permits(
        policies, "Ingress", target, source, port, protocol
    )


def _permits(policies: list[Document], direction: str, own: Peer, other: Peer, port: int, protocol: str) -> bool:
    if isinstance(own, str) or own[0] != "dermis":
        return True
    chosen = [each["spec"] for each in policies if matches(each["spec"]["podSelector"], own[1])]
    chosen = [spec for spec in chosen if direction in spec["policyTypes"]]
    if not chosen:  # Kubernetes then allows everything
        return True
    rules = [rule for spec in chosen for rule in spec.get(direction.lower(), [])]
    peers = "to" if direction == "Egress" else "from"
    return any(
        any(_is_peer(peer, other) for peer in rule[peers])
        and any((one["port"], one["protocol"]) == (port, protocol) for one in rule["ports"])
        for rule in rules
    )


def _is_peer(peer: Document, other: Peer) -> bool:
    if isinstance(other, str):
        return "ipBlock" in peer and ipaddress.ip_address(other) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
    if "ipBlock" in peer:
        return False
    namespace = {"kubernetes.io/metadata.name": other[0]}
    same = other[0] == "dermis" if "namespaceSelector" not in peer else matches(peer["namespaceSelector"], namespace)
    return same and matches(peer.get("podSelector", {}), other[1])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_policies_allow_what_is_needed_and_nothing_else(overlay: str) -> None:
    documents = rendered(overlay)
    own: dict[str, Peer] = {name: ("dermis", template["metadata"]["labels"]) for name, template in pods(documents)}
    client: Peer = ("dermis", {"dermis-client": "true"})
    stranger: Peer = ("dermis", {"app.kubernetes.io/name": "other"})
    elsewhere: Peer = ("default", {"dermis-client": "true"})
    database, storage, internet = "203.0.113.20", "203.0.113.30", "198.51.100.1"
    everyone = {
        "ingress": INGRESS,
        "prometheus": PROMETHEUS,
        "client": client,
        "stranger": stranger,
        "elsewhere": elsewhere,
    }
    for name, pod in own.items():
        reach = {source for source, peer in everyone.items() if allows(documents, peer, pod, 3000)}
        assert reach == ({"prometheus"} if name == "dermis-worker" else {"ingress", "prometheus", "client"})
        assert not [source for source, peer in everyone.items() if allows(documents, peer, pod, 22)]
        assert not [target for target in own.values() if allows(documents, pod, target, 3000)]
        outside = {
            "database": allows(documents, pod, database, 5432),
            "storage": allows(documents, pod, storage, 443),
            "names": allows(documents, pod, DNS, 53, "UDP") and allows(documents, pod, DNS, 53),
        }
        assert outside == dict.fromkeys(outside, overlay in SCALED)
        assert not allows(documents, pod, internet, 443) and not allows(documents, pod, database, 22)
    assert allows(documents, client, DNS, 53, "UDP") and not allows(documents, client, internet, 443)
    assert not allows(documents, stranger, DNS, 53, "UDP")


COLLECTOR = ("observability", {"app.kubernetes.io/name": "opentelemetry-collector"})


def _rendered_with(component: str, folder: Path, overlay: str) -> str:
    """An overlay of a site with a component."""
    folder.mkdir()
    (folder / "dermis").symlink_to(ROOT)
    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [dermis/k8s/overlays/{overlay}]\ncomponents: [dermis/k8s/components/{component}]\n"
    )
    return _render(folder)


@pytest.mark.parametrize("overlay", ["cpu", "scaled-gpu"])
def test_component_for_traces_adds_the_variable_and_the_connection_and_nothing_else(
    overlay: str, tmp_path: Path
) -> None:
    documents, before = (
        list(yaml.safe_load_all(_rendered_with("traces", tmp_path / "site", overlay))),
        rendered(overlay),
    )
    changed = [each for each in documents if each not in before]
    assert {(each["kind"], each["metadata"]["namespace"]) for each in changed} == {
        ("Deployment", "dermis"),
        ("NetworkPolicy", "dermis"),
    }
    for document in changed:
        kubernetes_validate.validate(document, "1.37", strict=True)
    earlier = dict(pods(before))
    for name, template in pods(documents):
        (container,) = containers(template)
        (container_before,) = containers(earlier[name])
        added = [each for each in container["env"] if each not in container_before["env"]]
        assert [each["name"] for each in added] == ["OTEL_EXPORTER_OTLP_ENDPOINT"]
        address = urlsplit(added[0]["value"])
        assert (address.scheme, address.hostname) == ("http", "opentelemetry-collector.observability")
        assert (
            exporter_names(environment(container)) == ["otlp"] and exporter_names(environment(container_before)) == []
        )
        pod = ("dermis", template["metadata"]["labels"])
        assert allows(documents, pod, COLLECTOR, address.port) and not allows(before, pod, COLLECTOR, address.port)
        assert allows(documents, pod, DNS, 53, "UDP")
        assert not allows(documents, pod, COLLECTOR, 22)
        assert not allows(documents, pod, ("default", COLLECTOR[1]), address.port)
        assert not allows(documents, pod, ("observability", {}), address.port)
        assert not allows(documents, COLLECTOR, pod, 3000)
    assert not allows(documents, ("dermis", {"app.kubernetes.io/name": "other"}), COLLECTOR, 4318)


@pytest.mark.parametrize("overlay", SCALED)
def test_component_for_the_studio_adds_one_pod_that_reaches_the_gateways_alone(overlay: str, tmp_path: Path) -> None:
    documents, before = (
        list(yaml.safe_load_all(_rendered_with("studio", tmp_path / "site", overlay))),
        rendered(overlay),
    )
    changed = {(each["kind"], each["metadata"]["name"]): each for each in documents if each not in before}
    added = {(kind, "dermis-studio") for kind in ("Deployment", "Service", "ServiceAccount", "NetworkPolicy")}
    assert set(changed) == added | {("Deployment", "dermis-gateway"), ("Ingress", "dermis")}
    for document in changed.values():
        kubernetes_validate.validate(document, "1.37", strict=True)
    (gateway,) = containers(dict(pods(documents))["dermis-gateway"])
    assert environment(gateway)["DERMIS_STUDIO"] == "false"

    deployment = changed["Deployment", "dermis-studio"]
    template = deployment["spec"]["template"]
    assert_restricted(template)
    assert (deployment["spec"]["replicas"], deployment["spec"]["strategy"]) == (1, {"type": "Recreate"})
    (container,) = containers(template)
    rule = changed["Ingress", "dermis"]["spec"]["rules"][0]
    command = typer.main.get_command(app)
    assert isinstance(command, click.Group)
    options = command.commands["studio"].make_context("studio", container["args"][1:]).params
    assert container["args"][0] == "studio" and options["allow_plain_http"]
    assert options["trusted_host"] == (rule["host"],)
    assert urlsplit(options["url"]).hostname in environment(gateway)["DERMIS_TRUSTED_HOSTS"].split(",")
    assert container["ports"][0]["containerPort"] == options["port"]
    assert environment(container)["FORWARDED_ALLOW_IPS"] == environment(gateway)["DERMIS_TRUSTED_PROXIES"]
    paths = [(path["path"], path["backend"]["service"]["name"]) for path in rule["http"]["paths"]]
    assert paths == [("/studio", "dermis-studio"), ("/", "dermis")]
    service = changed["Service", "dermis-studio"]["spec"]
    assert matches({"matchLabels": service["selector"]}, template["metadata"]["labels"])

    studio: Peer = ("dermis", template["metadata"]["labels"])
    gateways: Peer = ("dermis", dict(pods(documents))["dermis-gateway"]["metadata"]["labels"])
    workers: Peer = ("dermis", dict(pods(documents))["dermis-worker"]["metadata"]["labels"])
    assert allows(documents, INGRESS, studio, options["port"]) and not allows(documents, PROMETHEUS, studio, 3080)
    assert allows(documents, studio, gateways, 3000) and allows(documents, studio, DNS, 53, "UDP")
    assert not allows(documents, studio, workers, 3000)
    assert not allows(documents, studio, "203.0.113.20", 5432) and not allows(documents, studio, "198.51.100.1", 443)


def test_network_policies_cover_the_pods_that_scripts_do_not_know() -> None:
    """A pod without labels of dermis is denied everything, in every overlay."""
    for overlay in OVERLAYS:
        documents = rendered(overlay)
        assert not allows(documents, ("dermis", {}), "198.51.100.1", 443)
        assert not allows(documents, INGRESS, ("dermis", {}), 3000)


def test_scaler_counts_the_remaining_shards_of_unfinished_jobs(tmp_path: Path) -> None:
    (scaler,) = of_kind(rendered("scaled"), "ScaledObject")
    (trigger,) = scaler["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    table = JobTable(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    table.open()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        assert connection.execute(query).fetchone() == (0,)
    for number, shards in enumerate((5, 7, 11)):
        table.create(
            f"ds_{number}",
            {},
            tenant="default",
            kind="dataset",
            model=("demo", "0" * 64),
            samples=shards,
            shards=shards,
            body_hash=str(number),
            max_active=9,
        )
    table.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.execute("UPDATE dermis_jobs SET state = 'running', shards_done = 2 WHERE id = 'ds_1'")
        connection.execute("UPDATE dermis_jobs SET state = 'failed', shards_done = 1 WHERE id = 'ds_2'")
        assert connection.execute(query).fetchone() == (5 + 7 - 2,)
    assert int(trigger["metadata"]["targetQueryValue"]) == 2 * Settings.model_fields["shard_concurrency"].default


def _quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1.0, "m": 0.001, "Mi": 2.0**20, "Gi": 2.0**30}[unit]


@pytest.mark.parametrize("overlay", SCALED)
def test_quota_has_room_for_all_replicas_and_a_rolling_update(overlay: str) -> None:
    documents = rendered(overlay)
    (quota,) = of_kind(documents, "ResourceQuota")
    most = {
        each["spec"]["scaleTargetRef"]["name"]: each["spec"] for each in of_kind(documents, "HorizontalPodAutoscaler")
    }
    replicas = {name: spec["maxReplicas"] for name, spec in most.items()}
    for each in of_kind(documents, "ScaledObject"):
        replicas[each["spec"]["scaleTargetRef"]["name"]] = each["spec"]["maxReplicaCount"]
    needed: dict[str, float] = {}
    for deployment in of_kind(documents, "Deployment"):
        name = deployment["metadata"]["name"]
        pods_at_once = replicas[name] + deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
        needed["pods"] = needed.get("pods", 0) + pods_at_once
        (container,) = containers(deployment["spec"]["template"])
        for kind, amounts in container["resources"].items():
            for resource, amount in amounts.items():
                key = f"{kind}.{resource}"
                needed[key] = needed.get(key, 0) + pods_at_once * _quantity(amount)
    hard = {name: _quantity(amount) for name, amount in quota["spec"]["hard"].items()}
    assert {name: hard[name] for name in hard.keys() & needed.keys() if needed[name] > hard[name]} == {}


def test_examples_of_the_documentation_render(tmp_path: Path) -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    without, site, studio, single = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    without = site.partition("images:")[0] + without
    results = []
    for name, content in (("site", site), ("single", single), ("without", without), ("studio", studio)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kustomization.yaml").write_text(content)
        (tmp_path / name / "dermis").symlink_to(ROOT)
        results.append(_render(tmp_path / name))
    assert "203.0.113." not in results[0] and "example.org" not in results[0]
    assert {template["spec"]["containers"][0]["image"] for _, template in pods(yaml.safe_load_all(results[0]))} == {
        "registry.hospital.example/dermis@sha256:" + "0" * 64
    }
    documents = list(yaml.safe_load_all(results[1]))
    assert not of_kind(documents, "Namespace")
    assert {each["metadata"]["namespace"] for each in documents} == {"default"}
    assert "dermis.dermis" not in results[1]
    documents = list(yaml.safe_load_all(results[2]))
    assert not of_kind(documents, "ScaledObject", "TriggerAuthentication")
    assert {each["metadata"]["name"]: each["spec"].get("replicas") for each in of_kind(documents, "Deployment")} == {
        "dermis-gateway": None,
        "dermis-worker": 4,
    }
    (container,) = containers(dict(pods(yaml.safe_load_all(results[3])))["dermis-studio"])
    assert "--trusted-host=dermis.hospital.example" in container["args"]
    assert environment(container)["FORWARDED_ALLOW_IPS"] == "10.42.0.0/16"


@pytest.mark.full
def test_checkov_finds_nothing_but_what_is_accepted(tmp_path: Path) -> None:
    if not CHECKOV.exists():
        pytest.skip("checkov is not installed; docs/kubernetes.md shows how")
    for folder in ("overlays", "federation", "image"):
        (tmp_path / folder).mkdir()
    for overlay in OVERLAYS:
        (tmp_path / "overlays" / f"{overlay}.yaml").write_text(_render(f"k8s/overlays/{overlay}"))
    for component in ("traces", "studio"):
        text = _rendered_with(component, tmp_path / f"site-{component}", "scaled")
        (tmp_path / "overlays" / f"{component}.yaml").write_text(text)
    for name in ("server", "hospital"):
        shutil.copy(ROOT / f"k8s/federation/{name}.yaml", tmp_path / "federation")
    shutil.copy(ROOT / "Dockerfile", tmp_path / "image")
    command = [CHECKOV, "--directory", tmp_path, "--framework", "kubernetes", "dockerfile", "--skip-download"]
    result = subprocess.run(
        [*command, "--output", "json", "--quiet", "--compact"], capture_output=True, text=True, timeout=600
    )
    reports = {report["check_type"]: report for report in json.loads(result.stdout)}
    assert reports["kubernetes"]["summary"]["passed"] > 300
    findings: dict[str, set[str]] = {"overlays": set(), "federation": set(), "image": set()}
    for report in reports.values():
        assert report["summary"]["parsing_errors"] == 0
        for each in report["results"]["failed_checks"]:
            findings[each["file_path"].split("/")[1]].add(each["check_id"])
    assert findings == {
        "overlays": set(ACCEPTED_FINDINGS),
        "federation": set(ACCEPTED_FINDINGS_OF_FEDERATION),
        "image": set(ACCEPTED_FINDINGS_OF_IMAGE),
    }, "remove what is no longer found, correct or accept what is new"
