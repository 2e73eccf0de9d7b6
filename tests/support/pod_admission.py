"""Which pods an API server with Pod Security, ResourceQuota and PriorityClass refuses, as its documentation states it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kubernetes_manifests import Document, containers, of_kind

_UNITS = {"": 1.0, "m": 0.001, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_COMPUTE = {"cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"}


def quantity(text: object) -> float:
    """The number of a quantity of Kubernetes, such as 250m or 4Gi."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * _UNITS[unit]


def violations_of_restricted(template: Document) -> list[str]:
    """What the level `restricted` of Pod Security refuses in a pod."""
    pod = template["spec"]
    safe = pod.get("securityContext", {})
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    found += [f"sysctl {each['name']}" for each in safe.get("sysctls", [])]
    for volume in pod.get("volumes", []):
        found += [f"volume {kind}" for kind in set(volume) - {"name"} - _VOLUMES]
    for container in containers(template):
        found += [f"{container['name']}: {problem}" for problem in _violations(safe, container)]
    return found


def _violations(pod: Mapping[str, Any], container: Document) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = {**pod, **own}
    if own.get("privileged") or own.get("procMount", "Default") != "Default":
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield "runAsNonRoot"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "hostPort"


def refusals(documents: Iterable[Document], templates: Iterable[Document]) -> list[str]:
    """Create pods one after the other in the namespace of `documents`, and return why some are refused.

    Args:
        documents: Manifests of the namespace, with its quotas and priority classes.
        templates: Pods that exist at the same time.
    """
    documents = list(documents)
    assert not of_kind(documents, "LimitRange"), "defaults of a LimitRange are not evaluated"
    quotas = of_kind(documents, "ResourceQuota")
    classes = {each["metadata"]["name"] for each in of_kind(documents, "PriorityClass")}
    used: dict[str, Counter[str]] = {quota["metadata"]["name"]: Counter() for quota in quotas}
    messages = []
    for template in templates:
        pod = template["spec"]
        problems = [f"Pod Security: {each}" for each in violations_of_restricted(template)]
        if (name := pod.get("priorityClassName")) not in (None, *classes):
            problems.append(f"no PriorityClass {name}")
        usage = usage_of(template)
        chosen = [quota for quota in quotas if _in_scope(quota["spec"], name)]
        for quota in chosen:
            hard = quota["spec"]["hard"]
            problems += [f"{quota['metadata']['name']}: {each}" for each in _missing(template, _COMPUTE & set(hard))]
            total = used[quota["metadata"]["name"]] + usage
            problems += [
                f"{quota['metadata']['name']}: exceeds {each}" for each in hard if total[each] > quantity(hard[each])
            ]
        if not problems:
            for quota in chosen:
                used[quota["metadata"]["name"]] += usage
        messages += problems
    return messages


def usage_of(template: Document) -> Counter[str]:
    """What a pod uses of a quota. Init containers run before the others, one after the other."""
    totals: Counter[str] = Counter({"pods": 1})
    for kind in ("requests", "limits"):
        together: Counter[str] = Counter()
        for container in template["spec"]["containers"]:
            together.update(_amounts(container, kind))
        for container in template["spec"].get("initContainers", []):
            together |= Counter(_amounts(container, kind))
        totals.update({f"{kind}.{name}": amount for name, amount in together.items()})
        if kind == "requests":
            totals.update({name: together[name] for name in ("cpu", "memory") if name in together})
    return totals


def _amounts(container: Document, kind: str) -> dict[str, Any]:
    resources = container.get("resources", {})
    amounts = dict(resources.get(kind, {}))
    if kind == "requests":  # a request that is not set is that of the limit
        amounts = {**resources.get("limits", {}), **amounts}
    return {name: quantity(amount) for name, amount in amounts.items()}


def _missing(template: Document, required: set[str]) -> Iterator[str]:
    for container in containers(template):
        for name in sorted(required):
            kind, _, resource = name.rpartition(".")
            if resource not in _amounts(container, kind or "requests"):
                yield f"must specify {name} for {container['name']}"


def _in_scope(quota: Document, priority_class: str | None) -> bool:
    assert "scopes" not in quota
    for each in quota.get("scopeSelector", {}).get("matchExpressions", []):
        assert each["scopeName"] == "PriorityClass"
        chosen = {
            "In": priority_class in each.get("values", []),
            "NotIn": priority_class not in each.get("values", []),
            "Exists": priority_class is not None,
            "DoesNotExist": priority_class is None,
        }
        if not chosen[each["operator"]]:
            return False
    return True
