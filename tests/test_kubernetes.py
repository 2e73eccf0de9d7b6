"""Tests of the manifests in k8s/ as `kubectl kustomize` renders them: schemas, references, security, networks, limits."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import click
import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from commands.main import app
from kubernetes_manifests import (
    COLLECTOR,
    DATABASE,
    DNS,
    INGRESS,
    INTERNET,
    OVERLAYS,
    PROMETHEUS,
    ROOT,
    SCALED,
    STORAGE,
    Document,
    Peer,
    allows,
    containers,
    documents_of,
    environment,
    load_all,
    matches,
    of_kind,
    pods,
    render,
    render_with,
    rendered,
    rendered_with,
)
from pod_admission import quantity, violations_of_restricted
from services.jobs.table import JobTable
from services.settings import Settings
from services.supervisor import _Times, stop_pause
from services.tracing import exporter_names

SETTINGS = {f"DERMIS_{name.upper()}" for name in Settings.model_fields}
CUSTOM_SCHEMAS = json.loads((ROOT / "tests/support/custom_resources.json").read_text())
CUSTOM_KINDS = sorted(set(CUSTOM_SCHEMAS) - {"$comment"})
CHECKOV = Path(os.environ.get("CHECKOV") or shutil.which("checkov") or ROOT / "build/checkov/bin/checkov")
ACCEPTED_FINDINGS = {
    "CKV_K8S_15": "imagePullPolicy: tags are never moved, and pods can start while the registry cannot be reached",
    "CKV_K8S_35": "secrets in the environment: the settings of the database and the storage are read from there",
    "CKV_K8S_40": "uid 1034: the account of the BentoML image and the owner of existing volumes",
    "CKV_K8S_43": "image digest: there is no published image; docs/kubernetes.md shows how to set one",
}
ACCEPTED_FINDINGS_OF_RESTORE = {
    name: ACCEPTED_FINDINGS[name] for name in ("CKV_K8S_15", "CKV_K8S_40", "CKV_K8S_43")
} | {
    "CKV_K8S_8": "liveness: the pod only waits for commands",
    "CKV_K8S_9": "readiness: the pod only waits for commands",
}
ACCEPTED_FINDINGS_OF_ALERTS = {"CKV_K8S_21": "default namespace: the command in the folder names one"}
ACCEPTED_FINDINGS_OF_BATCH = ACCEPTED_FINDINGS | {"CKV_K8S_21": "default namespace: the commands in the file name one"}
ACCEPTED_FINDINGS_OF_FEDERATION = {
    name: ACCEPTED_FINDINGS[name] for name in ("CKV_K8S_15", "CKV_K8S_40", "CKV_K8S_43")
} | {
    "CKV_K8S_8": "liveness: a client has no port; the process ends when it cannot continue",
    "CKV_K8S_9": "readiness: a client has no port, and clients of the server repeat their requests",
    "CKV_K8S_11": "CPU limit: training uses all processors that a hospital has free",
    "CKV_K8S_21": "default namespace: the commands in the files make and choose one",
}
ACCEPTED_FINDINGS_OF_IMAGE = {
    "CKV_DOCKER_2": "HEALTHCHECK: the manifests have probes, and images in the format of OCI have no such field",
    "CKV_DOCKER_7": "tag of the base image: it is in an argument, with a version",
}


def validate(document: Document) -> None:
    """Compare a document with the schema of its kind."""
    if document["kind"] in CUSTOM_KINDS:
        jsonschema.validate(document, CUSTOM_SCHEMAS[document["kind"]])
    else:
        kubernetes_validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_render_and_agree_with_the_schemas(overlay: str) -> None:
    documents = rendered(overlay)
    validated = [each for earlier in OVERLAYS[: OVERLAYS.index(overlay)] for each in rendered(earlier)]
    for document in documents:
        if document in validated:  # validating takes a moment
            continue
        validate(document)
    names = [(each["kind"], each["metadata"]["name"]) for each in documents]
    assert len(set(names)) == len(names)
    (namespace,) = of_kind(documents, "Namespace")
    for document in documents:
        if document["kind"] not in ("Namespace", "PriorityClass"):
            assert document["metadata"]["namespace"] == namespace["metadata"]["name"]


def observability() -> list[Document]:
    """The documents of k8s/observability."""
    return load_all(render("k8s/observability"))


def test_alerts_and_board_render_and_agree_with_the_schemas() -> None:
    documents = observability()
    assert {(each["kind"], each["metadata"]["name"]) for each in documents} == {
        ("ConfigMap", "dermis-board"),
        ("PrometheusRule", "dermis"),
    }
    for document in documents:
        validate(document)
    (board,) = of_kind(documents, "ConfigMap")
    assert board["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(board["data"]["dermis-board.json"])["panels"]
    (rule,) = of_kind(documents, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "k8s/observability/prometheus-rule.yaml").read_text())["spec"]


@pytest.mark.parametrize("kind", CUSTOM_KINDS)
def test_schemas_of_custom_resources_refuse_unknown_fields(kind: str) -> None:
    (document,) = of_kind([*rendered("scaled"), *observability()], kind)
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
    assert violations_of_restricted(template) == []
    pod = template["spec"]
    assert "shareProcessNamespace" not in pod
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False  # they would set DERMIS_PORT
    safe = pod["securityContext"]
    assert safe["runAsNonRoot"] is True
    assert safe["runAsUser"] > 0 and safe["runAsGroup"] > 0 and safe["fsGroup"] > 0
    assert safe["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    # Volumes of the kind emptyDir are on the disk of the node: a pod that fills them is evicted at its limit.
    disk = sum(quantity(volume["emptyDir"]["sizeLimit"]) for volume in pod["volumes"] if "emptyDir" in volume)
    assert disk < sum(quantity(each["resources"]["limits"]["ephemeral-storage"]) for each in containers(template))
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
            if role == "gateway":  # a call that was accepted in the last moment ends by itself
                longest = settings.upload_timeout_seconds + settings.upload_decode_seconds
                longest += max(settings.image_timeout_seconds, settings.heat_map_timeout_seconds)
                assert _Times(settings.shutdown_seconds, stop_pause(settings)).requests >= longest
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


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_policies_allow_what_is_needed_and_nothing_else(overlay: str) -> None:
    documents = rendered(overlay)
    own: dict[str, Peer] = {name: ("dermis", template["metadata"]["labels"]) for name, template in pods(documents)}
    client: Peer = ("dermis", {"dermis-client": "true"})
    stranger: Peer = ("dermis", {"app.kubernetes.io/name": "other"})
    elsewhere: Peer = ("default", {"dermis-client": "true"})
    batch: Peer = ("dermis", {"app.kubernetes.io/name": "dermis-batch"})
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
            "database": allows(documents, pod, DATABASE, 5432),
            "storage": allows(documents, pod, STORAGE, 443),
            "names": allows(documents, pod, DNS, 53, "UDP") and allows(documents, pod, DNS, 53),
        }
        assert outside == dict.fromkeys(outside, overlay in SCALED)
        assert not allows(documents, pod, INTERNET, 443) and not allows(documents, pod, DATABASE, 22)
        assert not allows(documents, batch, pod, 3000)
    assert allows(documents, client, DNS, 53, "UDP") and not allows(documents, client, INTERNET, 443)
    assert not allows(documents, stranger, DNS, 53, "UDP")


def test_component_for_metrics_gives_one_replica_the_service_monitor_of_the_scaled_overlays(tmp_path: Path) -> None:
    documents, before = rendered_with("metrics", tmp_path / "site", "cpu"), rendered("cpu")
    (monitor,) = [each for each in documents if each not in before]
    validate(monitor)
    assert [monitor] == of_kind(rendered("scaled"), "ServiceMonitor")
    (service,) = of_kind(documents, "Service")
    assert matches(monitor["spec"]["selector"], service["metadata"]["labels"])
    ports = [each["name"] for each in service["spec"]["ports"]]
    assert [each["port"] for each in monitor["spec"]["endpoints"]] == ports


def test_component_for_an_ingress_gives_one_replica_that_of_the_scaled_overlays(tmp_path: Path) -> None:
    documents, before = rendered_with("ingress", tmp_path / "site", "cpu"), rendered("cpu")
    (ingress,) = [each for each in documents if each not in before]
    assert [ingress] == of_kind(rendered("scaled"), "Ingress")
    backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    (service,) = of_kind(documents, "Service")
    assert backend["name"] == service["metadata"]["name"]
    assert backend["port"]["name"] in [port["name"] for port in service["spec"]["ports"]]


@pytest.mark.parametrize("overlay", ["cpu", "scaled-gpu"])
def test_component_for_a_private_authority_mounts_its_certificates(overlay: str, tmp_path: Path) -> None:
    documents, before = rendered_with("private-authority", tmp_path / "site", overlay), rendered(overlay)
    changed = [each for each in documents if each not in before]
    assert {each["kind"] for each in changed} == {"Deployment"} and len(changed) == len(of_kind(before, "Deployment"))
    for document in changed:
        validate(document)
        template = document["spec"]["template"]
        assert_restricted(template)
        (container,) = containers(template)
        (volume,) = [each for each in template["spec"]["volumes"] if "configMap" in each]
        (mount,) = [each for each in container["volumeMounts"] if each["name"] == volume["name"]]
        variables = environment(container)
        assert variables["AWS_CA_BUNDLE"] == variables["PGSSLROOTCERT"] == f"{mount['mountPath']}/ca.crt"
        assert volume["configMap"]["name"] == "dermis-ca" and mount["readOnly"]
    for job in documents_of("batch/lesions.yaml"):  # the pods of batch Jobs have the same path
        pod = job["spec"]["template"]["spec"]
        assert {"name": "ca", "configMap": {"name": "dermis-ca", "optional": True}} in pod["volumes"]
        assert {"name": "ca", "mountPath": mount["mountPath"], "readOnly": True} in pod["containers"][0]["volumeMounts"]


@pytest.mark.parametrize("overlay", SCALED)
def test_pods_start_without_s3_keys(overlay: str) -> None:
    """Then the S3 library uses the identity of the pod."""
    for _, template in pods(rendered(overlay)):
        (container,) = containers(template)
        secrets = {
            each["name"]: each["valueFrom"]["secretKeyRef"].get("optional", False)
            for each in container["env"]
            if "valueFrom" in each
        }
        required = {name for name, optional in secrets.items() if not optional}
        assert required == {"DERMIS_DATABASE_URL", "DERMIS_STORAGE_URL"}
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(secrets)


@pytest.mark.parametrize("overlay", ["cpu", "scaled-gpu"])
def test_component_for_traces_adds_the_variable_and_the_connection_and_nothing_else(
    overlay: str, tmp_path: Path
) -> None:
    documents, before = rendered_with("traces", tmp_path / "site", overlay), rendered(overlay)
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
    documents, before = rendered_with("studio", tmp_path / "site", overlay), rendered(overlay)
    changed = {(each["kind"], each["metadata"]["name"]): each for each in documents if each not in before}
    added = {(kind, "dermis-studio") for kind in ("Deployment", "Service", "ServiceAccount", "NetworkPolicy")}
    assert set(changed) == added | {("Ingress", "dermis")}
    for document in changed.values():
        kubernetes_validate.validate(document, "1.37", strict=True)
    (gateway,) = containers(dict(pods(before))["dermis-gateway"])
    assert (
        environment(gateway)["DERMIS_STUDIO"] == "false"
    )  # also without the component: several gateways cannot have it

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
    assert options["public_url"] == f"https://{rule['host']}"
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
    assert not allows(documents, studio, DATABASE, 5432) and not allows(documents, studio, INTERNET, 443)


@pytest.mark.parametrize("overlay", SCALED)
def test_component_without_inference_changes_the_gateways_alone(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, before = rendered_with("gateway-without-inference", tmp_path / "site", overlay), rendered(overlay)
    (changed,) = [each for each in documents if each not in before]
    validate(changed)
    (earlier,) = [each for each in before if each not in documents]
    (container,), (container_before,) = (containers(each["spec"]["template"]) for each in (changed, earlier))
    assert_restricted(changed["spec"]["template"])
    added = [each for each in container["env"] if each not in container_before["env"]]
    assert added == [{"name": "DERMIS_INFERENCE", "value": "false"}]
    for name, value in environment(container).items():
        monkeypatch.setenv(name, value)
    settings = Settings(_env_file=None)  # type: ignore[call-arg]
    assert (settings.role, settings.inference, settings.studio) == ("gateway", False, False)
    # Uploads in all calls at one time, parsed, the decoders of the largest images, and all downloads (docs/settings.md).
    most = 2 * settings.max_upload_calls * settings.max_upload_bytes
    most += settings.upload_decoders * settings.max_upload_pixels * 12 + settings.max_downloads * (8 << 20)
    limits, requests = container["resources"].pop("limits"), container["resources"].pop("requests")
    assert quantity(requests["memory"]) + most < quantity(limits["memory"])
    limits_before, requests_before = (container_before["resources"].pop(each) for each in ("limits", "requests"))
    for smaller, larger in ((limits, limits_before), (requests, requests_before)):
        assert set(smaller) == set(larger)
        assert all(quantity(smaller[name]) < quantity(larger[name]) for name in ("cpu", "memory"))
    container["env"] = container_before["env"]
    assert changed == earlier


def test_network_policies_cover_the_pods_that_scripts_do_not_know() -> None:
    """A pod without labels of dermis is denied everything, in every overlay."""
    for overlay in OVERLAYS:
        documents = rendered(overlay)
        assert not allows(documents, ("dermis", {}), INTERNET, 443)
        assert not allows(documents, INGRESS, ("dermis", {}), 3000)


def test_scaler_counts_the_remaining_shards_of_unfinished_jobs(tmp_path: Path) -> None:
    """The query of KEDA is the sum of the metrics `dermis_unfinished_shards` and `dermis_ending_jobs`."""
    (scaler,) = of_kind(rendered("scaled"), "ScaledObject")
    (trigger,) = scaler["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    table = JobTable(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    table.open()

    def counted() -> int:
        with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
            ((number,),) = connection.execute(query).fetchall()
        statistics = table.statistics()
        assert number == sum(statistics.shards_left.values()) + sum(statistics.jobs_ending.values())
        return int(number)

    assert counted() == 0
    for number, (kind, shards) in enumerate(
        (("dataset", 5), ("projection", 7), ("dataset", 11), ("dataset", 3), ("dataset", 2))
    ):
        table.create(
            f"ds_{number}",
            {},
            tenant="default",
            kind=kind,
            model=("demo", "0" * 64),
            samples=shards,
            shards=shards,
            body_hash=str(number),
            max_active=9,
        )
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.execute("UPDATE dermis_jobs SET state = 'running', shards_done = 2 WHERE id = 'ds_1'")
        connection.execute("UPDATE dermis_jobs SET state = 'failed', shards_done = 1 WHERE id = 'ds_2'")
        # Without a unit for its end, the workers would be removed while one of them completes the files of a large dataset.
        connection.execute("UPDATE dermis_jobs SET state = 'running', shards_done = 3 WHERE id = 'ds_3'")
        connection.execute("UPDATE dermis_jobs SET state = 'succeeded', shards_done = 2 WHERE id = 'ds_4'")
    assert counted() == 5 + (7 - 2) + 1
    table.close()
    assert int(trigger["metadata"]["targetQueryValue"]) == 2 * Settings.model_fields["shard_concurrency"].default


@pytest.mark.parametrize("overlay", SCALED)
def test_component_for_prometheus_scales_by_the_metric_and_reads_no_database(overlay: str, tmp_path: Path) -> None:
    documents, before = rendered_with("prometheus-scaler", tmp_path / "site", overlay), rendered(overlay)
    assert not of_kind(documents, "TriggerAuthentication")
    (scaler,) = [each for each in documents if each not in before]
    validate(scaler)
    (earlier,) = of_kind(before, "ScaledObject")
    (by_query,) = earlier["spec"].pop("triggers")
    (trigger,) = scaler["spec"].pop("triggers")
    assert scaler == earlier
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", by_query["metricType"])
    settings = trigger["metadata"]
    assert settings["threshold"] == by_query["metadata"]["targetQueryValue"] and settings["ignoreNullValues"] == "false"
    assert settings["query"].count(f'namespace="{scaler["metadata"]["namespace"]}"') == 2
    assert "dermis_unfinished_shards" in settings["query"] and "dermis_ending_jobs" in settings["query"]


@pytest.mark.full
def test_examples_of_the_documentation_render(tmp_path: Path) -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    parts = re.findall(r"^#+ (.*)\n((?:(?!^#+ )(?:^```(?:.*\n)+?```\n|.*\n))*)", text, re.MULTILINE)
    examples = {
        heading: each for heading, part in parts for each in re.findall(r"^```yaml\n(.*?)^```", part, re.M | re.S)
    }
    assert len(examples) == text.count("\n```yaml\n")
    single, scaled = examples["One replica"], examples["4. Your overlay"].partition("images:")[0]
    one_replica = {"One replica", "A public name", "From the manifest of earlier versions"}
    documents, texts = {}, {}
    for number, (heading, example) in enumerate(examples.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "dermis").symlink_to(ROOT)
        base = "" if "kind: Kustomization" in example else single if heading in one_replica else scaled
        studio = heading in ("DNS elsewhere", "Another ingress controller", "A registry with a login")
        more = "components: [dermis/k8s/components/studio]\n" if studio else ""
        (folder / "kustomization.yaml").write_text(base + example + more)
        texts[heading] = render(folder)
        documents[heading] = load_all(texts[heading])
        for document in documents[heading]:
            validate(document)
    site = documents["4. Your overlay"]
    assert "203.0.113." not in texts["4. Your overlay"] and "example.org" not in texts["4. Your overlay"]
    assert {template["spec"]["containers"][0]["image"] for _, template in pods(site)} == {
        "registry.example.com/hospital/dermis@sha256:" + "0" * 64
    }
    ((_, template),) = pods(documents["One replica"])
    assert containers(template)[0]["image"] == "registry.example.com/hospital/dermis:0.2.0"

    earlier = documents["From the manifest of earlier versions"]
    assert not of_kind(earlier, "Namespace")
    assert {each["metadata"]["namespace"] for each in earlier} == {"default"}
    assert "dermis.dermis" not in texts["From the manifest of earlier versions"]

    public = documents["A public name"]
    (ingress,) = of_kind(public, "Ingress")
    ((name, template),) = pods(public)
    assert ingress["spec"]["rules"][0]["host"] in environment(containers(template)[0])["DERMIS_TRUSTED_HOSTS"].split(
        ","
    )
    assert allows(public, INGRESS, ("dermis", template["metadata"]["labels"]), 3000) and name == "dermis"

    less = documents["1. What the cluster needs"]
    assert not of_kind(less, "ScaledObject", "TriggerAuthentication")
    assert {each["metadata"]["name"]: each["spec"].get("replicas") for each in of_kind(less, "Deployment")} == {
        "dermis-gateway": None,
        "dermis-worker": 4,
    }

    (container,) = containers(dict(pods(documents["Studio"]))["dermis-studio"])
    assert "--trusted-host=dermis.hospital.example" in container["args"]
    assert "--public-url=https://dermis.hospital.example" in container["args"]
    assert environment(container)["FORWARDED_ALLOW_IPS"] == "10.42.7.0/28"

    accounts = of_kind(documents["A registry with a login"], "ServiceAccount")
    assert {each["metadata"]["name"] for each in accounts} == {"dermis-gateway", "dermis-worker", "dermis-studio"}
    assert all(each["imagePullSecrets"] == [{"name": "registry"}] for each in accounts)
    accounts = of_kind(documents["Identity of pods in place of S3 keys"], "ServiceAccount")
    assert len(accounts) == 2 and all(each["metadata"]["annotations"] for each in accounts)
    bound = {name: template["spec"].get("nodeSelector") for name, template in pods(documents["Nodes of one kind"])}
    assert bound["dermis-worker"] and not bound["dermis-gateway"]

    other = documents["Another ingress controller"]
    nginx = ("ingress-nginx", {"app.kubernetes.io/name": "ingress-nginx"})
    for name, port in (("dermis-gateway", 3000), ("dermis-studio", 3080)):
        pod: Peer = ("dermis", dict(pods(other))[name]["metadata"]["labels"])
        assert allows(other, nginx, pod, port) and not allows(other, INGRESS, pod, port)
    (ingress,) = of_kind(other, "Ingress")
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert not any("traefik" in name for name in ingress["metadata"]["annotations"])

    balancer = documents["Without an ingress controller"]
    assert not of_kind(balancer, "Ingress")
    (service,) = [each for each in of_kind(balancer, "Service") if each["metadata"]["name"] == "dermis"]
    assert (service["spec"]["type"], service["spec"]["ports"][0]["port"]) == ("LoadBalancer", 443)
    for name, template in pods(balancer):
        (container,) = containers(template)
        assert "DERMIS_TRUSTED_PROXIES" not in environment(container)
        files = {environment(container)[f"DERMIS_TLS_{each}"] for each in ("CERTIFICATE", "KEY")}
        assert files == {"/run/secrets/dermis-tls/tls.crt", "/run/secrets/dermis-tls/tls.key"}
        assert {"secretName": "dermis-tls", "defaultMode": 0o440} in [
            each.get("secret") for each in template["spec"]["volumes"]
        ]
        probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
        assert [(probe["scheme"], probe["port"]) for probe in probes] == [("HTTPS", "http")] * 3
        pod = ("dermis", template["metadata"]["labels"])
        assert allows(balancer, "10.1.2.3", pod, 3000) == (name == "dermis-gateway")
        assert not allows(balancer, INGRESS, pod, 3000)

    dns = documents["DNS elsewhere"]
    for name in ("dermis-gateway", "dermis-worker", "dermis-studio"):
        pod = ("dermis", dict(pods(dns))[name]["metadata"]["labels"])
        assert allows(dns, pod, "169.254.20.10", 53, "UDP")
        assert not allows(rendered("scaled"), pod, "169.254.20.10", 53, "UDP")


def test_pod_that_restores_a_backup_is_like_that_of_the_service() -> None:
    (pod,) = documents_of("base/restore.yaml")
    validate(pod)
    assert not violations_of_restricted(pod)
    documents = rendered("cpu")
    ((_, template),) = pods(documents)
    ((service,), (restore,)) = containers(template), containers(pod)
    assert restore["image"] == service["image"]
    assert pod["spec"]["securityContext"] == template["spec"]["securityContext"]
    volumes = {each["name"]: each for each in template["spec"]["volumes"]}
    assert pod["spec"]["volumes"] == [volumes["data"]] and restore["volumeMounts"][0] in service["volumeMounts"]
    (claim,) = of_kind(documents, "PersistentVolumeClaim")
    assert claim["metadata"]["name"] == volumes["data"]["persistentVolumeClaim"]["claimName"]
    assert pod["metadata"]["namespace"] == claim["metadata"]["namespace"]
    assert not any(
        matches(each["spec"]["selector"], pod["metadata"]["labels"]) for each in of_kind(documents, "Deployment")
    )


@pytest.mark.full
def test_checkov_finds_nothing_but_what_is_accepted(tmp_path: Path) -> None:
    if not CHECKOV.exists():
        pytest.skip("checkov is not installed; docs/kubernetes.md shows how")
    for folder in ("overlays", "observability", "batch", "federation", "image", "restore"):
        (tmp_path / folder).mkdir()
    for overlay in OVERLAYS:
        (tmp_path / "overlays" / f"{overlay}.yaml").write_text(render(f"k8s/overlays/{overlay}"))
    for component in ("traces", "studio", "prometheus-scaler", "gateway-without-inference", "private-authority"):
        text = render_with(component, tmp_path / f"site-{component}", "scaled")
        (tmp_path / "overlays" / f"{component}.yaml").write_text(text)
    shutil.copy(ROOT / "k8s/batch/lesions.yaml", tmp_path / "batch")
    (tmp_path / "observability/rendered.yaml").write_text(render("k8s/observability"))
    for name in ("server", "hospital"):
        shutil.copy(ROOT / f"k8s/federation/{name}.yaml", tmp_path / "federation")
    shutil.copy(ROOT / "Dockerfile", tmp_path / "image")
    shutil.copy(ROOT / "k8s/base/restore.yaml", tmp_path / "restore")
    command = [CHECKOV, "--directory", tmp_path, "--framework", "kubernetes", "dockerfile", "--skip-download"]
    result = subprocess.run(
        [*command, "--output", "json", "--quiet", "--compact"], capture_output=True, text=True, timeout=600
    )
    reports = {report["check_type"]: report for report in json.loads(result.stdout)}
    assert reports["kubernetes"]["summary"]["passed"] > 300
    findings: dict[str, set[str]] = {
        path.name: set() for path in tmp_path.iterdir() if not path.name.startswith("site-")
    }
    for report in reports.values():
        assert report["summary"]["parsing_errors"] == 0
        for each in report["results"]["failed_checks"]:
            findings[each["file_path"].split("/")[1]].add(each["check_id"])
    assert findings == {
        "overlays": set(ACCEPTED_FINDINGS),
        "observability": set(ACCEPTED_FINDINGS_OF_ALERTS),
        "batch": set(ACCEPTED_FINDINGS_OF_BATCH),
        "federation": set(ACCEPTED_FINDINGS_OF_FEDERATION),
        "image": set(ACCEPTED_FINDINGS_OF_IMAGE),
        "restore": set(ACCEPTED_FINDINGS_OF_RESTORE),
    }, "remove what is no longer found, correct or accept what is new"
