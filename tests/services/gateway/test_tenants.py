"""Tests that no tenant can see, use or change what belongs to another, in any route of the OpenAPI document."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dermis.bundle import Bundle
from dermis.errors import RequestError
from dermis.imaging import encode
from service_kit import Service, service, wait_for
from services.composition import _readiness
from services.gateway.auth.principal import SCOPES
from services.models import ServedModels
from services.serve import _prepare
from services.settings import SettingsError, read_settings
from services.tenants import folder_of, read_model_tenants
from tiny import make_bundle
from tiny_index import make_complete_bundle

pytest.importorskip("faiss", reason="FAISS is not installed")

# What belongs to a tenant, or is limited to some tenants, that each operation can reach. A new operation needs an entry here.
REACHES: dict[str, set[str]] = {
    "post /v1/datasets": {"model"},
    "get /v1/datasets": {"list"},
    "get /v1/datasets/{dataset_id}": {"dataset"},
    "delete /v1/datasets/{dataset_id}": {"dataset"},
    "get /v1/datasets/{dataset_id}/events": {"dataset"},
    "get /v1/datasets/{dataset_id}/files": {"dataset"},
    "get /v1/datasets/{dataset_id}/files/{name}": {"dataset"},
    "head /v1/datasets/{dataset_id}/files/{name}": {"dataset"},
    "get /v1/datasets/{dataset_id}/report": {"dataset"},
    "post /v1/images": {"model"},
    "get /v1/directions": {"model"},
    "post /v1/edits": {"model", "projection"},
    "post /v1/edits/interpolations": {"model"},
    "post /v1/edits/neighbours": {"model"},
    "post /v1/projections": {"model"},
    "get /v1/projections/{projection_id}": {"projection"},
    "delete /v1/projections/{projection_id}": {"projection"},
    "get /v1/projections/{projection_id}/files/{name}": {"projection"},
    "post /v1/classifications": {"model"},
    "post /v1/authenticity": {"model"},
    "get /v1/embeddings": {"model"},
    "post /v1/embeddings": {"model"},
    "post /v1/embeddings/projections": {"model", "projection"},
    "get /v1/models": {"list"},
    "get /v1/models/{name}": {"model"},
    "post /v1/webhooks": set(),
    "get /v1/webhooks": {"list"},
    "get /v1/webhooks/{webhook_id}": {"webhook"},
    "delete /v1/webhooks/{webhook_id}": {"webhook"},
    "get /v1/webhooks/{webhook_id}/messages": {"webhook"},
    "post /v1/webhooks/{webhook_id}/messages/{message_id}/retry": {"webhook"},
    "post /v1/studies": {"model"},
    "get /v1/studies": {"list"},
    "get /v1/studies/{study_id}": {"study"},
    "delete /v1/studies/{study_id}": {"study"},
    "post /v1/studies/{study_id}/images": {"study"},
    "post /v1/studies/{study_id}/open": {"study"},
    "post /v1/studies/{study_id}/close": {"study"},
    "get /v1/studies/{study_id}/results": {"study"},
    "get /v1/studies/{study_id}/answers": {"study"},
    "post /v1/studies/{study_id}/invitations": {"study"},
    "get /v1/studies/{study_id}/invitations": {"study"},
    "delete /v1/studies/{study_id}/invitations/{name}": {"study"},
    # Whoever has the link of a study: tests/services/test_studies.py
    "get /v1/reading": set(),
    "get /v1/reading/images/{position}": set(),
    "put /v1/reading/answers/{position}": set(),
    "get /v1/usage": set(),  # tests/services/gateway/test_quotas.py
    # The operator's: keys and trail of all tenants, with the scope `admin`.
    "post /v1/admin/keys": set(),
    "get /v1/admin/keys": set(),
    "get /v1/admin/keys/{key_id}": set(),
    "delete /v1/admin/keys/{key_id}": set(),
    "post /v1/admin/keys/{key_id}/rotate": set(),
    "get /v1/admin/audit": set(),
    "get /metrics": set(),
    "get /livez": set(),
    "get /readyz": set(),
}
UNKNOWN = {"dataset": f"ds_{'0' * 32}", "projection": f"pr_{'0' * 32}", "webhook": f"wh_{'0' * 32}"}
UNKNOWN |= {"study": f"st_{'0' * 32}"}
SECRET, NO_MODEL = "secret", "nothing"
PICTURE = encode(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
DATASET = {"classes": {"benign": 2, "malignant": 1}, "seed": 3}


@dataclass
class Tenant:
    """A tenant with a key that has every scope, and what it has made."""

    served: Service
    name: str
    made: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = self.served.client.app.state.context.auth.keys  # type: ignore[attr-defined]
        self.key = keys.create(tenant=self.name, name="n", scopes=tuple(SCOPES), created_by="test")[1]

    def send(self, method: str, path: str, **values: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.key}"} | values.pop("headers", {})
        return self.served.client.request(method, path, headers=headers, **values)

    def make(self, path: str, **values: Any) -> str:
        answer = self.send("post", path, **values)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def wait(self, path: str) -> None:
        wait_for(lambda: self.send("get", path).json()["state"] == "succeeded")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    training = np.random.default_rng(1).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    return {name: make_complete_bundle(root / name, training, name=name) for name in (SECRET, "tiny")}


@pytest.fixture(scope="module")
def served(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {
        "model_tenants": f"{SECRET}=radiology,research",
        "default_model": SECRET,
        "auth": "keys",
        "max_webhooks": 1,
    }
    locations = ",".join(str(bundle.location) for bundle in bundles.values())
    with service(locations, tmp_path_factory.mktemp("data"), authenticity_uploads=True, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def radiology(served: Service) -> Tenant:
    """Has a finished dataset and a finished projection of the model that is limited to it."""
    tenant = Tenant(served, "radiology")
    tenant.made["dataset"] = tenant.make("/v1/datasets", json=DATASET)
    tenant.wait(f"/v1/datasets/{tenant.made['dataset']}")
    tenant.made["projection"] = tenant.make(
        "/v1/projections?steps=2", files=[("files", ("a.png", PICTURE, "image/png"))]
    )
    tenant.wait(f"/v1/projections/{tenant.made['projection']}")
    webhook = tenant.send("post", "/v1/webhooks", json={"url": "https://example.org/", "events": ["dataset.succeeded"]})
    assert webhook.status_code == 201, webhook.text
    tenant.made["webhook"] = webhook.json()["id"]
    study = tenant.send("post", "/v1/studies", json={"name": "n", "images": 2})
    assert study.status_code == 201, study.text
    tenant.made["study"] = study.json()["id"]
    return tenant


@pytest.fixture(scope="module")
def derma(served: Service) -> Tenant:
    """Has a key with every scope, and nothing else."""
    return Tenant(served, "derma")


def variants(operation: str, model: str, ids: Mapping[str, str]) -> list[dict[str, Any]]:
    """Requests of an operation that succeed if the model and the ids may be used."""
    method, template = operation.split(" ")
    files = {"files": [("files", ("a.png", PICTURE, "image/png"))]}
    sample = {
        "samples": [{"class": "benign", "seed": 0, "index": 0}],
        "edits": [{"direction": "axis-0", "strength": 1.0}],
    }
    projected = {"projections": [{"id": ids["projection"]}], "edits": sample["edits"]}
    special: dict[str, list[dict[str, Any]]] = {
        "post /v1/datasets": [{"json": DATASET | {"model": model}}],
        "post /v1/studies": [{"json": {"name": "n", "images": 2, "model": model}}],
        "post /v1/studies/{study_id}/invitations": [{"json": {"label": "n"}}],
        "post /v1/studies/{study_id}/images": [files | {"params": {"class": "benign"}}],
        "post /v1/images": [{"json": {"classes": {"benign": 1}, "model": model}}],
        "get /v1/directions": [{"params": {"model": model}}],
        "post /v1/edits": [{"json": sample | {"model": model}}, {"json": projected | {"model": model}}],
        "post /v1/edits/interpolations": [
            {"json": {"start": sample["samples"][0], "end": {"class": "malignant"}, "images": 2, "model": model}}
        ],
        "post /v1/edits/neighbours": [{"json": {"sample": sample["samples"][0], "count": 2, "model": model}}],
        "post /v1/projections": [{"params": {"model": model, "steps": 2}} | files],
        "post /v1/classifications": [
            {"params": {"model": model}} | files,
            {"params": {"model": model, "heat_map": "xrai"}} | files,
        ],
        "post /v1/authenticity": [
            {"json": {"classes": {"benign": 1}, "model": model}},
            {"params": {"model": model}} | files,
        ],
        "get /v1/embeddings": [{"params": {"model": model}}],
        "post /v1/embeddings": [
            {"json": {"classes": {"benign": 1}, "model": model}},
            {"params": {"model": model}} | files,
        ],
        "post /v1/embeddings/projections": [
            {"json": {"projections": [{"id": ids["projection"]}], "model": model}},
        ],
        "get /v1/datasets/{dataset_id}/report": [{}, {"params": {"format": "html"}}],
        "get /v1/datasets/{dataset_id}/files/{name}": [{}, {"headers": {"Range": "bytes=0-3"}}],
    }
    name = model if template.startswith("/v1/models") else "manifest.json"
    if template.startswith("/v1/projections"):
        name = "00000.png"
    path = template.format(
        dataset_id=ids["dataset"],
        projection_id=ids["projection"],
        webhook_id=ids["webhook"],
        study_id=ids["study"],
        position=1,
        message_id=f"msg_{'0' * 32}",
        name=name,
        key_id="0" * 12,
    )
    return [{"method": method, "path": path} | variant for variant in special.get(operation, [{}])]


def shown(answer: Any, *hidden: str) -> tuple[Any, ...]:
    """Everything that an answer shows, without ids, names and times that differ in any case."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "content-length")}
    text = answer.text
    if answer.headers.get("content-type") == "application/problem+json" and text:
        text = text.replace(answer.headers["x-request-id"], "REQUEST")
    for each in hidden:
        text = text.replace(each, "HIDDEN")
    return answer.status_code, sorted(headers.items()), text


def test_every_operation_has_an_entry_that_fits_its_parameters(served: Service) -> None:
    document = served.client.app.openapi()  # type: ignore[attr-defined]
    operations = {
        f"{method} {path}": each for path, each_of in document["paths"].items() for method, each in each_of.items()
    }
    assert operations.keys() == REACHES.keys()
    for operation, described in operations.items():
        names = {parameter["name"] for parameter in described.get("parameters", ())}
        bodies = [
            each.get("schema", {}).get("$ref", "")
            for each in described.get("requestBody", {}).get("content", {}).values()
        ]
        for reference in filter(None, bodies):
            names |= document["components"]["schemas"][reference.rpartition("/")[2]]["properties"].keys()
        expected = {kind for name, kind in PARAMETERS.items() if name in names}
        assert expected <= REACHES[operation], operation


PARAMETERS = {
    "dataset_id": "dataset",
    "projection_id": "projection",
    "projections": "projection",
    "webhook_id": "webhook",
    "study_id": "study",
    "model": "model",
}


def of(kind: str) -> list[str]:
    return [operation for operation, kinds in REACHES.items() if kind in kinds]


# There is no message, no invitation, and the study has no images yet.
IMPOSSIBLE = ("/retry", "/open", "/close", "/results", "/invitations/{name}")


@pytest.mark.parametrize("kind", ["dataset", "projection", "webhook", "study"])
def test_foreign_id_is_answered_as_an_unknown_one(kind: str, radiology: Tenant, derma: Tenant) -> None:
    """Also in operations that change something; what belongs to the other tenant stays as it is."""
    own, foreign = radiology.made, radiology.made[kind]
    path = f"/v1/{'studies' if kind == 'study' else f'{kind}s'}/{foreign}"
    before = radiology.send("get", path).text
    leaks = []
    for operation in of(kind):
        # A tenant that may not use the model of the projection may use another one.
        requests = zip(variants(operation, "tiny", own), variants(operation, "tiny", UNKNOWN), strict=True)
        for request, unknown in requests:
            if "samples" in str(request):
                continue
            answer = derma.send(**request)
            if answer.status_code != 404 or shown(answer, foreign) != shown(derma.send(**unknown), UNKNOWN[kind]):
                leaks.append((operation, answer.status_code, answer.text))
    assert leaks == []
    assert radiology.send("get", path).text == before
    # The same requests succeed for the tenant that the id belongs to, so they were refused for the right reason.
    for operation in of(kind):
        if not operation.startswith("delete") and not operation.endswith(IMPOSSIBLE):
            answers = [radiology.send(**request) for request in variants(operation, SECRET, own)]
            assert {answer.status_code for answer in answers} <= {200, 201, 206}, operation


def test_validators_of_a_foreign_file_do_not_show_that_it_exists(radiology: Tenant, derma: Tenant) -> None:
    path = f"/v1/datasets/{radiology.made['dataset']}/files/manifest.json"
    etag = {"If-None-Match": radiology.send("get", path).headers["etag"]}
    assert radiology.send("get", path, headers=etag).status_code == 304
    assert [derma.send(method, path, headers=etag).status_code for method in ("get", "head")] == [404, 404]
    assert derma.send("get", path, headers={"If-None-Match": "*"}).status_code == 404
    assert derma.send("get", path, headers={"Range": "bytes=9999999-"}).status_code == 404


def test_model_of_other_tenants_is_answered_as_an_unknown_one(radiology: Tenant, derma: Tenant) -> None:
    leaks = []
    for operation in of("model"):
        requests = zip(
            variants(operation, SECRET, radiology.made), variants(operation, NO_MODEL, radiology.made), strict=True
        )
        for request, unknown in requests:
            refused = derma.send(**request)
            if refused.status_code < 400 or shown(refused, SECRET) != shown(derma.send(**unknown), NO_MODEL):
                leaks.append((operation, refused.status_code, refused.text))
            if SECRET in refused.text.replace(f"/v1/models/{SECRET}", ""):
                leaks.append((operation, "named", refused.text))
            allowed = radiology.send(**request)
            assert allowed.status_code in (200, 201, 202), (operation, allowed.text)
    assert leaks == []


def test_lists_show_what_is_the_tenants_own(radiology: Tenant, derma: Tenant) -> None:
    everything = {operation: derma.send(*operation.split(" ")).json()["data"] for operation in of("list")}
    assert [model["name"] for model in everything.pop("get /v1/models")] == ["tiny"]
    assert everything == {"get /v1/datasets": [], "get /v1/webhooks": [], "get /v1/studies": []}
    assert [(model["name"], model["default"]) for model in radiology.send("get", "/v1/models").json()["data"]] == [
        (SECRET, True),
        ("tiny", False),
    ]
    assert derma.send("get", "/v1/models/tiny").json()["default"]
    made = [derma.make("/v1/datasets", json={"classes": {"benign": 1}, "seed": 1})]  # of its own default model
    radiology.make("/v1/datasets", json={"classes": {"benign": 1}})
    made.insert(0, derma.make("/v1/datasets", json={"classes": {"benign": 1}, "seed": 2}))
    pages, cursor = [], None
    while True:
        page = derma.send("get", "/v1/datasets", params={"limit": 1, **({"cursor": cursor} if cursor else {})}).json()
        pages += [(dataset["id"], dataset["model"]["name"]) for dataset in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert pages == [(each, "tiny") for each in made]
    for each in made:
        derma.wait(f"/v1/datasets/{each}")
    succeeded = derma.send("get", "/v1/datasets", params={"state": "succeeded"}).json()["data"]
    assert [dataset["id"] for dataset in succeeded] == made


def test_same_idempotency_key_of_two_tenants_names_two_requests(radiology: Tenant, derma: Tenant) -> None:
    headers = {"Idempotency-Key": "monday"}
    first = radiology.make("/v1/datasets", json=DATASET | {"model": "tiny"}, headers=headers)
    second = derma.make("/v1/datasets", json=DATASET | {"seed": 4, "model": "tiny"}, headers=headers)
    assert first != second
    assert radiology.make("/v1/datasets", json=DATASET | {"model": "tiny"}, headers=headers) == first
    assert derma.make("/v1/datasets", json=DATASET | {"seed": 4, "model": "tiny"}, headers=headers) == second
    assert derma.send("post", "/v1/datasets", json=DATASET | {"model": "tiny"}, headers=headers).status_code == 409
    upload = {"files": [("files", ("a.png", PICTURE, "image/png"))], "headers": {"Idempotency-Key": "scan"}}
    projections = [
        tenant.make("/v1/projections?steps=2&model=tiny", **upload) for tenant in (radiology, derma, radiology)
    ]
    assert projections[0] == projections[2] != projections[1]


def test_files_lie_in_the_folder_of_the_tenant_and_are_removed_with_the_job(served: Service, radiology: Tenant) -> None:
    storage = Path(served.settings.storage)
    tenant, default = Tenant(served, "research"), Tenant(served, "default")
    made = [(each, each.make("/v1/datasets", json=DATASET | {"model": "tiny"})) for each in (radiology, default)]
    projection = tenant.make("/v1/projections?steps=2", files=[("files", ("a.png", PICTURE, "image/png"))])
    tenant.wait(f"/v1/projections/{projection}")
    for each, job_id in made:
        each.wait(f"/v1/datasets/{job_id}")
    assert (storage / "tenants" / "radiology" / made[0][1] / "manifest.json").exists()
    assert (storage / made[1][1] / "manifest.json").exists()
    assert (storage / "tenants" / "research" / projection / "00000.png").exists()
    for each, job_id in made:
        assert each.send("delete", f"/v1/datasets/{job_id}").status_code == 204
        assert list(storage.rglob(job_id)) == []
    served.jobs.projections.remove_expired(-1)
    assert (
        list(storage.rglob(projection)) == [] and tenant.send("get", f"/v1/projections/{projection}").status_code == 404
    )


def test_metrics_have_no_names_of_tenants(radiology: Tenant) -> None:
    text = radiology.send("get", "/metrics").text
    assert "dermis_dataset_jobs" in text and "radiology" not in text and "tenant" not in text


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "a\n", "-a", "a" * 64])
def test_other_names_than_those_of_tenants_are_in_no_path(name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a tenant"):
        folder_of(name, "ds_1")


def test_setting_of_tenants_by_model_is_read_strictly() -> None:
    assert read_model_tenants("demo=radiology, derma,other=lab") == {"demo": ("radiology", "derma"), "other": ("lab",)}
    for wrong in ("demo", "demo=", "=a", "demo=A", "demo=a,demo=b", "demo=a;other=b", "demo=a b", "a,demo=b"):
        with pytest.raises(SettingsError, match="DERMIS_MODEL_TENANTS"):
            read_settings(model_tenants=wrong)


def test_bundle_that_cannot_be_opened_is_unknown_to_other_tenants(tmp_path: Path) -> None:
    good, broken = make_bundle(tmp_path / "good", name="good"), make_bundle(tmp_path / "secret", name="secret")
    locations = [str(good.location), str(broken.location)]
    with pytest.raises(SettingsError, match="no bundle is called 'secert'"):
        _prepare(read_settings(bundles=",".join(locations), data_dir=tmp_path / "data", model_tenants="secert=a"))
    shutil.rmtree(tmp_path / "secret")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "bundle.json").write_text("{")
    models = ServedModels(locations, "good", {"secret": ["a"]})
    assert models.check() != {}

    def refusal(tenant: str, name: str) -> str:
        with pytest.raises(Exception, match=r".") as caught:
            models.serving_for(tenant, name)
        return f"{type(caught.value).__name__}: {caught.value}"

    assert refusal("b", "secret") == refusal("b", "nothing") and "secret" not in refusal("b", "secret")
    assert "BundleError" in refusal("a", "secret")
    # Everyone can read /readyz.
    models = ServedModels([str(broken.location)], "secret", {"secret": ["a"]})
    ctx: Any = SimpleNamespace(stopping=threading.Event(), models=models)
    reason = asyncio.run(_readiness(ctx, ctx)())
    assert reason is not None and "secret" not in reason


def test_tenant_without_any_model_is_told_so(tmp_path: Path) -> None:
    models = ServedModels([str(make_bundle(tmp_path / "only", name="only").location)], "only", {"only": ["a"]})
    assert models.bundles_for("b") == [] and models.serving_for("a", None).name == "only"
    with pytest.raises(RequestError, match="no model for this tenant"):
        models.serving_for("b", None)
