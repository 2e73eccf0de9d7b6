"""A real API server of Kubernetes with its etcd on the loopback address; there are no nodes and no controllers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.components import MissingComponentError, free_ports
from kubernetes_manifests import ROOT, Document, kubectl_program, why_kubectl_cannot_render

PROGRAM, ETCD = "KUBE_APISERVER", "ETCD"
"""Environment variables with the paths of the two programs; etcd is else searched in the path."""
_START_SECONDS = 120.0
_OLDEST_COMPLETE = 30  # 1.30: every version of the manifests is served, and unknown fields are refused by the server


@dataclass(frozen=True)
class ApiServer:
    """A running server."""

    folder: Path
    port: int

    def kubectl(self, *arguments: str, stdin: object = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl with the rights of an administrator."""
        return subprocess.run(
            [str(kubectl_program()), f"--kubeconfig={self.folder / 'kubeconfig'}", *arguments],
            input=None if stdin is None else json.dumps(stdin),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def done(self, *arguments: str, stdin: object = None) -> str:
        """Run kubectl, which must succeed, and return what it prints."""
        result = self.kubectl(*arguments, stdin=stdin)
        assert result.returncode == 0, result.stderr
        return result.stdout

    @cached_property
    def minor(self) -> int:
        """The minor version of the server."""
        return int(json.loads(self.done("get", "--raw", "/version"))["minor"].rstrip("+"))

    @property
    def complete(self) -> bool:
        """Whether it serves every version of the manifests."""
        return self.minor >= _OLDEST_COMPLETE

    def served(self, documents: Iterable[Document]) -> list[Document]:
        """The documents whose version an old server knows; for a complete one all."""
        versions = set(self.done("api-versions").split())
        known = [each for each in documents if each["apiVersion"] in versions]
        assert not self.complete or known == list(documents)
        return known

    def apply(self, documents: Iterable[Document], *, dry_run: bool = True) -> str:
        """Apply documents. Unknown fields are errors, if the server can find them."""
        options = [f"--validate={'strict' if self.complete else 'ignore'}", *(["--dry-run=server"] if dry_run else [])]
        return self.done(
            "apply", *options, "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": [*documents]}
        )

    def create_pod(self, namespace: str, name: str, template: Document, *, dry_run: bool = True) -> str | None:
        """Create a pod of a template, and return why it is refused, or None."""
        pod = {
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "labels": template["metadata"]["labels"]}, "spec": template["spec"],
        }  # fmt: skip
        options = ["--dry-run=server"] if dry_run else []
        result = self.kubectl("create", "-n", namespace, "--validate=ignore", *options, "-f", "-", stdin=pod)
        return result.stderr if result.returncode else None

    def enforce(self, quotas: Iterable[Document]) -> None:
        """Do what the quota controller does with new quotas: copy their limits to their status, by which admission works."""
        for quota in quotas:
            place = f"/api/v1/namespaces/{quota['metadata']['namespace']}/resourcequotas/{quota['metadata']['name']}"
            stored = json.loads(self.done("get", "--raw", place))
            hard = stored["spec"]["hard"]
            stored["status"] = {"hard": hard, "used": dict.fromkeys(hard, "0")}
            self.done("replace", "--raw", f"{place}/status", "-f", "-", stdin=stored)


def server_program() -> Path | None:
    """The path of kube-apiserver, if the environment names one."""
    return Path(os.environ[PROGRAM]) if os.environ.get(PROGRAM) else None


@contextmanager
def running_api_server() -> Iterator[ApiServer]:
    """A new server.

    Raises:
        MissingComponentError: No kube-apiserver is named, or etcd or kubectl is not installed.
        RuntimeError: The server does not start.
    """
    program, etcd = server_program(), os.environ.get(ETCD) or shutil.which("etcd")
    if program is None:
        raise MissingComponentError(f"{PROGRAM} names no kube-apiserver")
    if reason := why_kubectl_cannot_render():
        raise MissingComponentError(reason)
    if etcd is None:
        raise MissingComponentError(f"etcd is not installed (Debian package etcd-server), and {ETCD} names none")
    folder = Path(tempfile.mkdtemp(prefix="dermis-apiserver-"))
    port, client, peer = free_ports(3)
    _write_key(folder / "service-accounts.key")
    (folder / "tokens.csv").write_text("secret,admin,admin,system:masters\n")
    _write_kubeconfig(folder / "kubeconfig", port)
    database = f"http://127.0.0.1:{client}"
    commands: Mapping[str, list[str]] = {
        "etcd": [
            str(etcd), "--data-dir", str(folder / "etcd"),
            "--listen-client-urls", database, "--advertise-client-urls", database,
            "--listen-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", f"default=http://127.0.0.1:{peer}",
        ],
        "server": [
            str(program), f"--etcd-servers={database}", f"--secure-port={port}", "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none", f"--cert-dir={folder / 'certificates'}",
            "--service-cluster-ip-range=10.0.0.0/24", "--service-account-issuer=https://localhost",
            f"--service-account-key-file={folder / 'service-accounts.key'}",
            f"--service-account-signing-key-file={folder / 'service-accounts.key'}",
            f"--token-auth-file={folder / 'tokens.csv'}", "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount",  # it waits for accounts that a controller makes
        ],
    }  # fmt: skip
    processes = []
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        server = ApiServer(folder, port)
        deadline = time.monotonic() + _START_SECONDS
        while server.kubectl("get", "--raw", "/readyz").returncode:
            if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
                logs = "\n".join((folder / f"{name}.log").read_text()[-2000:] for name in commands)
                raise RuntimeError(f"the API server does not start:\n{logs}")
            time.sleep(0.2)
        yield server
    finally:
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def custom_resource_definitions() -> list[Document]:
    """Definitions of the custom resources in k8s/, from the schemas of tests/support/custom_resources.json."""
    schemas = json.loads((ROOT / "tests/support/custom_resources.json").read_text())
    definitions = []
    for kind, schema in schemas.items():
        if kind == "$comment":
            continue
        group, version = schema["properties"]["apiVersion"]["const"].split("/")
        plural = f"{kind.lower()}s"
        properties = {"spec": _structural(schema["properties"]["spec"], schema["$defs"])}
        definitions.append({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{group}"},
            "spec": {
                "group": group, "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"},
                "versions": [{
                    "name": version, "served": True, "storage": True,
                    "schema": {"openAPIV3Schema": {"type": "object", "properties": properties, "required": ["spec"]}},
                }],
            },
        })  # fmt: skip
    return definitions


def _structural(schema: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without references, in the form that definitions of custom resources have."""
    if "$ref" in schema:
        return _structural(named[schema["$ref"].removeprefix("#/$defs/")], named)
    if "anyOf" in schema:
        return {"x-kubernetes-int-or-string": True}
    result = {
        key: value for key, value in schema.items() if key in ("type", "enum", "pattern", "required", "minLength")
    }
    if "const" in schema:
        result["enum"] = [schema["const"]]
    if "properties" in schema:
        result["properties"] = {name: _structural(each, named) for name, each in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), Mapping):
        result["additionalProperties"] = _structural(schema["additionalProperties"], named)
    if "items" in schema:
        result["items"] = _structural(schema["items"], named)
    if result.get("type") == "object" and not {"properties", "additionalProperties"} & set(result):
        result["x-kubernetes-preserve-unknown-fields"] = True
    return result


def _write_key(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )


def _write_kubeconfig(path: Path, port: int) -> None:
    path.write_text(
        json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{
                "name": "test",
                "cluster": {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True},
            }],
            "users": [{"name": "admin", "user": {"token": "secret"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        })
    )  # fmt: skip
