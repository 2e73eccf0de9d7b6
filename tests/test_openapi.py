"""The API does what its OpenAPI document says: schemathesis tries it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import uvicorn

from dermis.bundle import amend_bundle
from service_kit import assemble, wait_for
from tiny import make_bundle
from tiny_classifier import make_classifier

# Not among the checks: that whatever fits the schema is accepted. Limits of the service and of the model are no schema.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "use_after_free",
    "missing_required_header",
    "unsupported_method",
)


def test_every_answer_is_documented_and_none_is_a_server_error(tmp_path: Path) -> None:
    make_classifier(tmp_path / "classifier")
    amend_bundle(make_bundle(tmp_path / "tiny"), parts={"classifier": tmp_path / "classifier"})
    parts = assemble(tmp_path / "tiny", tmp_path / "data", max_samples_per_dataset=1000, max_images=8)
    server = uvicorn.Server(uvicorn.Config(parts.app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        options = ["--checks", ",".join(CHECKS), "--max-examples", "15", "--seed", "1", "--no-color"]
        options += ["--generation-database", "none", "--request-timeout", "20"]
        done = subprocess.run(
            [*command, f"http://127.0.0.1:{port}/openapi.json", *options],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )
    finally:
        parts.running[0][1].stopping.set()
        server.should_exit = True
        thread.join()
    assert done.returncode == 0, done.stdout + done.stderr
