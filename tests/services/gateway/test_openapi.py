"""Tests the API against its OpenAPI document with schemathesis."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from service_kit import assemble, listening
from tiny_index import make_complete_bundle

pytest.importorskip("faiss", reason="FAISS is not installed")

# No check that everything that fits the schema is accepted: the schema lacks limits of the service and of the model.
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


@pytest.mark.full
@pytest.mark.parametrize(
    ("examples", "phases"),
    [(4, "examples,fuzzing"), pytest.param(20, "examples,coverage,fuzzing,stateful", marks=pytest.mark.full)],
)
def test_every_answer_is_documented_and_none_is_a_server_error(tmp_path: Path, examples: int, phases: str) -> None:
    training = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    bundle = make_complete_bundle(tmp_path, training)
    limits = {"max_samples_per_dataset": 1000, "max_images": 8, "max_projection_steps": 20}
    limits |= {"max_active_projections": 2, "max_active_datasets": 4}  # full queues are not errors of the server
    parts = assemble(bundle.location, tmp_path / "data", **limits)
    with listening(parts) as url:
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        options = [
            "--checks",
            ",".join(CHECKS),
            "--phases",
            phases,
            "--max-examples",
            str(examples),
            "--seed",
            "1",
            "--no-color",
        ]
        options += ["--generation-database", "none", "--request-timeout", "60"]
        done = subprocess.run(
            [*command, f"{url}/openapi.json", *options], capture_output=True, text=True, timeout=900, cwd=tmp_path
        )
    assert done.returncode == 0, done.stdout + done.stderr


def test_openapi_document_describes_uploads_and_full_queues(tmp_path: Path) -> None:
    parts = assemble(tmp_path / "none", tmp_path / "data", max_upload_images=7, max_projection_images=3)
    paths = parts.app.openapi()["paths"]
    for path, most in (("/v1/classifications", 7), ("/v1/authenticity", 7), ("/v1/projections", 3)):
        form = paths[path]["post"]["requestBody"]["content"]["multipart/form-data"]
        assert (form["schema"]["properties"]["files"]["minItems"], form["schema"]["required"]) == (1, ["files"])
        assert form["schema"]["properties"]["files"]["maxItems"] == most
        assert form["encoding"]["files"]["contentType"] == "image/png, image/jpeg, image/webp"
    for path in ("/v1/projections", "/v1/datasets", "/v1/authenticity"):
        assert "Retry-After" in paths[path]["post"]["responses"]["429"]["headers"]
