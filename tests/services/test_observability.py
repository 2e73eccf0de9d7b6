"""Tests of the metrics of a service, of the alerts and the board that use them, and of the page that lists them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from dermis.errors import StorageError
from service_kit import Service, service, wait_for
from services import metrics
from services.errors import DatabaseUnavailableError, InferenceUnreachableError
from services.jobs import dataset
from services.observed_store import ObservedStore
from tiny import make_bundle

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s/observability"
PAGE = (ROOT / "docs/observability.md").read_text()
NAME = re.compile(r"\bdermis_[a-z0-9_]+")
# Labels of every series that a ServiceMonitor scrapes. Prometheus renames a label of ours with one of these names.
TARGET_LABELS = {"namespace", "service", "pod", "container", "endpoint", "job", "instance", "node"}
BODY = {"classes": {"benign": 6}, "shard_size": 3}


def value(name: str, **labels: str) -> float:
    """The present value of a sample of this process; 0 if there is none."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def families(text: str) -> dict[str, Any]:
    """The metrics of dermis. A single process also has the times at which its counters began, the service has not."""
    return {
        family.name: family
        for family in text_string_to_metric_families(text)
        if family.name.startswith("dermis_") and not family.name.endswith("_created")
    }


def sample_names(text: str) -> set[str]:
    """The names that expressions can use."""
    names: set[str] = set()
    for family in families(text).values():
        suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((FOLDER / "prometheus-rule.yaml").read_text())
    return [rule for group in document["spec"]["groups"] for rule in group["rules"]]


def board_expressions() -> list[str]:
    board = json.loads((FOLDER / "dermis-board.json").read_text())
    texts = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return [text.replace("$__rate_interval", "5m").replace("$namespace", ".*") for text in texts]


def scaler_expression() -> str:
    """The query by which the component `prometheus-scaler` lets KEDA read the queue depth."""
    component = yaml.safe_load((ROOT / "k8s/components/prometheus-scaler/kustomization.yaml").read_text())
    ((operation,), _) = (yaml.safe_load(each["patch"]) for each in component["patches"])
    return str(operation["value"][0]["metadata"]["query"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("observed")
    make_bundle(folder / "tiny")
    with service(folder / "tiny", folder / "data") as running:
        yield running


def test_metrics_of_jobs_requests_database_and_storage(served: Service) -> None:
    ended = value("dermis_job_duration_seconds_count", kind="dataset", outcome="succeeded")
    refused = value("dermis_rejected_requests_total", reason="unknown-class")
    writes = value("dermis_storage_operation_duration_seconds_count", operation="write", outcome="ok")
    transactions = value("dermis_database_transaction_duration_seconds_count", access="write", outcome="ok")
    served.generator.gate.clear()
    waiting = served.ask(BODY)
    text = served.client.get("/metrics").text
    assert re.search(r'^dermis_unfinished_shards\{kind="dataset"\} 2\.0$', text, re.MULTILINE)
    assert "dermis_live_workers 1.0" in text
    served.generator.gate.set()
    assert served.wait(waiting)["state"] == "succeeded"
    assert served.client.post("/v1/datasets", json={"classes": {"none": 1}}).status_code == 422
    wait_for(lambda: value("dermis_job_duration_seconds_count", kind="dataset", outcome="succeeded") == ended + 1)
    assert value("dermis_rejected_requests_total", reason="unknown-class") == refused + 1
    assert value("dermis_storage_operation_duration_seconds_count", operation="write", outcome="ok") > writes
    assert value("dermis_database_transaction_duration_seconds_count", access="write", outcome="ok") > transactions
    text = served.client.get("/metrics").text
    model = served.models.bundles[0]
    assert f'dermis_model_info{{digest="{model.digest}",model="tiny",resolution="16"}} 1.0' in text
    assert re.search(r"^dermis_stored_bytes [1-9]", text, re.MULTILINE)
    assert 'dermis_oldest_queued_job_age_seconds{kind="dataset"} 0.0' in text


def test_shard_that_is_begun_again_is_counted(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    before = value("dermis_shard_retries_total", kind="dataset")
    interrupted: list[int] = []
    write_shard = dataset.write_shard

    def interrupt_once(plan: Any, shard: int, *arguments: Any, **options: Any) -> Any:
        if not interrupted:
            interrupted.append(shard)
            raise InferenceUnreachableError("the generator does not answer")
        return write_shard(plan, shard, *arguments, **options)

    monkeypatch.setattr(dataset, "write_shard", interrupt_once)
    assert served.wait(served.ask(BODY))["state"] == "succeeded"
    assert value("dermis_shard_retries_total", kind="dataset") == before + 1


@pytest.mark.parametrize("place", ["{folder}", "memory://observed"])
def test_file_that_does_not_exist_and_a_refused_write_are_no_errors_of_the_storage(place: str, tmp_path: Path) -> None:
    """An alert reports each error. Every new dataset looks for shards that do not exist yet."""

    def errors() -> float:
        name = "dermis_storage_operation_duration_seconds_count"
        return sum(value(name, operation=operation, outcome="error") for operation in ("open", "read", "write"))

    def refuse() -> None:
        raise KeyError("made elsewhere")

    before, store = errors(), ObservedStore(place.format(folder=tmp_path))
    assert store.read_if_exists("shard.json") is None
    with pytest.raises(KeyError, match="made elsewhere"), store.writing("shard.json", refuse) as path:
        path.write_bytes(b"1")
    assert (store.size("shard.json"), errors()) == (None, before)
    with pytest.raises(StorageError), store.open("shard.json"):
        pass
    with pytest.raises(StorageError), store.writing("shard.json") as path:
        path.unlink()
    assert errors() == before + 2


def test_metrics_do_not_need_database_or_storage(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise DatabaseUnavailableError("no database")

    monkeypatch.setattr(served.jobs.datasets, "statistics", fail)
    monkeypatch.setattr(served.jobs.datasets, "free_bytes", fail)
    answer = served.client.get("/metrics")
    assert answer.status_code == 200
    assert "dermis_build_info{" in answer.text and "dermis_live_workers" not in answer.text


def test_gpu_memory_is_that_of_used_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = types.SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        memory_reserved=lambda device: 10 * device,
        mem_get_info=lambda _device: (30, 100),
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(metrics, "_gpu_read", float("-inf"))
    metrics.observe_batch("generator", 4)
    assert value("dermis_gpu_memory_free_bytes", device="1") == 30
    assert value("dermis_gpu_memory_size_bytes", device="1") == 100
    assert REGISTRY.get_sample_value("dermis_gpu_memory_free_bytes", {"device": "0"}) is None


def test_alerts_board_and_page_name_the_metrics_that_exist(served: Service) -> None:
    text = served.client.get("/metrics").text
    existing = sample_names(text)
    expressions = [*(rule["expr"] for rule in rules()), *board_expressions(), scaler_expression()]
    used = {name for expression in expressions for name in NAME.findall(expression)}
    assert used - existing == set()
    listed = re.findall(r"^\| `(dermis_[a-z0-9_]+)", PAGE, re.MULTILINE)
    named = {name + ("_total" if family.type == "counter" else "") for name, family in families(text).items()}
    assert sorted(listed) == sorted(named)
    for family in families(text).values():
        assert family.documentation and not {"tenant", "id", "subject"} & {
            label for sample in family.samples for label in sample.labels
        }
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            assert not TARGET_LABELS & set(metric._labelnames)


def test_first_failure_of_the_database_is_an_increase() -> None:
    """Without the 0 before it, `rate` would not show it."""
    for access in ("read", "write"):
        labels = {"access": access, "outcome": "unavailable"}
        assert REGISTRY.get_sample_value("dermis_database_transaction_duration_seconds_count", labels) is not None


def test_each_alert_has_a_runbook() -> None:
    headings = {heading.lower() for heading in re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)}
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/observability.md#{rule['alert'].lower()}"
        assert rule["alert"].lower() in headings, rule["alert"]


@pytest.mark.full
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_promtool_accepts_rules_board_and_metrics(served: Service, tmp_path: Path) -> None:
    def promtool(*arguments: str, text: str | None = None) -> None:
        done = subprocess.run(["promtool", *arguments], cwd=tmp_path, capture_output=True, text=True, input=text)
        assert done.returncode == 0, done.stdout + done.stderr

    spec = yaml.safe_load((FOLDER / "prometheus-rule.yaml").read_text())["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    shutil.copy(FOLDER / "rules-test.yaml", tmp_path)
    promtool("check", "rules", "rules.yaml")
    promtool("test", "rules", "rules-test.yaml")
    expressions = [*board_expressions(), scaler_expression()]
    recorded = [{"record": f"panel_{number}", "expr": text} for number, text in enumerate(expressions)]
    (tmp_path / "board.yaml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": recorded}]}))
    promtool("check", "rules", "board.yaml")
    own = "\n".join(
        line for line in served.client.get("/metrics").text.splitlines() if re.match(r"(# \w+ )?dermis_", line)
    )
    promtool("check", "metrics", text=own + "\n")
