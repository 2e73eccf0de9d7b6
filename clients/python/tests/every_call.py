"""A call of each method of each resource, and a service in memory that answers all of them."""

from __future__ import annotations

import base64
import re
from typing import Any

import httpx
from fake_gateway import MODEL, USAGE, png, report_of, sha256

NOW = "2026-01-01T00:00:00Z"
LATER = "2026-02-01T00:00:00Z"
PICTURE = {"media_type": "image/png", "sha256": sha256(png(1)), "b64": base64.b64encode(png(1)).decode()}
DATASET = {
    "id": "ds_1", "state": "succeeded", "request": {"model": "demo", "classes": {"benign": 1}}, "model": MODEL,
    "progress": {"samples_done": 1, "samples_total": 1},
}  # fmt: skip
INDEXED = MODEL | {"index": "i" * 64}
EDITED = {"model": MODEL, "data": [{"sample": 0, "strength": None, **PICTURE}]}
PLACED = {"model": INDEXED, "data": [{"index": 0, "position": [0.0, 1.0, 2.0]}]}
VERDICTS = {"model": INDEXED, "data": [{"index": 0, "authentic": True, "distance": 0.5, "percentile": 40}]}
PROJECTION = {
    "id": "pr_1", "state": "succeeded", "model": MODEL,
    "data": [
        {"index": 0, "distance": 0.1, "distance_name": "lpips", "pixel_error": 0.1, "steps": 2, "start": "mean",
         "space": "w", "files": {"image": "/v1/projections/pr_1/files/00000.png"}}
    ],
}  # fmt: skip
STUDY = {
    "id": "st_1", "name": "n", "state": "open", "images": 2, "model": MODEL, "seed": 1, "created_at": NOW,
    "expires_at": LATER,
}  # fmt: skip
INVITATION = {"id": "in_1", "label": "reader", "state": "active", "created_at": NOW, "expires_at": LATER}
RATE = {"count": 1, "total": 2, "share": 0.5, "low": 0.0, "high": 1.0}
RATES = dict.fromkeys(("accuracy", "sensitivity", "specificity", "called_generated"), RATE)
ANSWER = {
    "reader": "reader", "invitation": "in_1", "position": 1, "image": 0, "class": "benign", "truth": "real",
    "answer": "real", "right": True, "confidence": 5, "seconds": 2.5, "answered_at": NOW,
}  # fmt: skip
WEBHOOK = {"id": "wh_1", "url": "https://receiver.example/", "events": ["dataset.failed"], "created_at": NOW}
MESSAGE = {"id": "msg_1", "event": "dataset.failed", "state": "dead", "created_at": NOW}
MAP = {
    "model": INDEXED, "extractor": "e", "metric": "cosine", "explained": [0.5, 0.3, 0.1],
    "training": {"counted": 10, "side": 1.0, "smallest": 5, "cubes": [{"centre": [0.0, 0.0, 0.0], "images": 10}]},
}  # fmt: skip
CLASSIFIED = {
    "model": MODEL | {"classifier": "c" * 64}, "positive_class": "malignant", "threshold": {"name": None, "value": 0.5},
    "data": [{"index": 0, "probability": 0.1, "calibrated": 0.2, "class": "benign"}], "notice": "Not a medical device.",
}  # fmt: skip

# "METHOD path" -> the JSON of the response; None: 204; bytes: a file
ANSWERS: dict[str, Any] = {
    "GET /v1/models": {"data": [MODEL | {"default": True}]},
    "GET /v1/models/demo": MODEL | {"card": "# demo\n"},
    "GET /v1/usage": USAGE,
    "POST /v1/images": {"model": MODEL, "data": [{"class": "benign", "seed": 3, "index": 0, **PICTURE}]},
    "POST /v1/classifications": CLASSIFIED,
    "POST /v1/authenticity": VERDICTS,
    "GET /v1/directions": {"data": [{"name": "sefa-1", "method": "sefa", "layers": [0, 2], "scale": 1.0}]},
    "POST /v1/edits": EDITED,
    "POST /v1/edits/interpolations": EDITED,
    "POST /v1/edits/neighbours": EDITED,
    "GET /v1/embeddings": MAP,
    "POST /v1/embeddings": PLACED,
    "POST /v1/embeddings/projections": PLACED,
    "POST /v1/datasets": DATASET,
    "GET /v1/datasets": {"data": [DATASET], "next_cursor": None},
    "GET /v1/datasets/ds_1": DATASET,
    "GET /v1/datasets/ds_1/files": {"data": [{"name": "images.zip", "bytes": 1, "sha256": "0" * 64}]},
    "GET /v1/datasets/ds_1/report": report_of({"classes": {"benign": 1}}),
    "DELETE /v1/datasets/ds_1": None,
    "POST /v1/projections": PROJECTION,
    "GET /v1/projections/pr_1": PROJECTION,
    "GET /v1/projections/pr_1/files/00000.png": png(2),
    "GET /v1/projections/pr_1/files/preview-00000.png": png(3),
    "DELETE /v1/projections/pr_1": None,
    "POST /v1/studies": STUDY,
    "GET /v1/studies": {"data": [STUDY], "max_images": 10},
    "GET /v1/studies/st_1": STUDY,
    "DELETE /v1/studies/st_1": None,
    "POST /v1/studies/st_1/open": STUDY,
    "POST /v1/studies/st_1/close": STUDY | {"state": "closed"},
    "POST /v1/studies/st_1/images": {"study": STUDY, "added": 1},
    "POST /v1/studies/st_1/invitations": INVITATION | {"token": "t", "path": "/read#t"},
    "GET /v1/studies/st_1/invitations": {"data": [INVITATION]},
    "DELETE /v1/studies/st_1/invitations/in_1": INVITATION | {"state": "revoked"},
    "GET /v1/studies/st_1/results": {"answers": 1, "rates": RATES},
    "GET /v1/studies/st_1/answers": {"data": [ANSWER]},
    "POST /v1/webhooks": WEBHOOK | {"secret": "whsec_x"},
    "GET /v1/webhooks": {"data": [WEBHOOK]},
    "GET /v1/webhooks/wh_1": WEBHOOK,
    "DELETE /v1/webhooks/wh_1": None,
    "GET /v1/webhooks/wh_1/messages": {"data": [MESSAGE]},
    "POST /v1/webhooks/wh_1/messages/msg_1/retry": MESSAGE | {"state": "waiting"},
}

SAMPLE = ("benign", 3, 0)
KEY = {"idempotency_key": "k1"}
SIGNED = {"provenance": {"c2pa": True}}
GENERATION = {"seed": 3, "start_index": 4, "model": "demo", "truncation_psi": 0.5}

# "resource.method" -> its arguments; FOLDER is replaced by a folder of the test
FOLDER = object()
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "datasets.create": (
        ({"benign": 1},),
        {
            "seed": 3, "model": "demo", "format": "parquet", "image_format": "webp", "image_quality": 80,
            "truncation_psi": 0.5, "truncation_cutoff": 2, "noise_mode": "const", "shard_size": 10,
            "classifier": {"keep": "agreeing", "tries": 8}, "edits": {"sefa-1": 1},
            "privacy": {"gate": "min_distance", "percentile": 5.0}, "extra_body": {"later": [1]}, **SIGNED, **KEY,
        },
    ),
    "datasets.retrieve": (("ds_1",), {}),
    "datasets.list": ((), {"state": "succeeded", "limit": 1}),
    "datasets.files": (("ds_1",), {}),
    "datasets.report": (("ds_1",), {}),
    "datasets.wait": (("ds_1",), {}),
    "datasets.cancel": (("ds_1",), {}),
    "datasets.delete": (("ds_1",), {}),
    "images.generate": (
        ({"benign": 1},),
        {
            **GENERATION, "truncation_cutoff": 2, "noise_mode": "none", "image_format": "png", "image_quality": 90,
            "edits": [{"direction": "sefa-1", "strength": -1, "layers": [0, 2]}], "privacy": {"gate": "authentic"}, **SIGNED,
        },
    ),
    "images.generate_pixels": (
        ({"benign": 1},),
        {
            **GENERATION, "truncation_cutoff": 2, "noise_mode": "none", "edits": {"sefa-1": 1},
            "privacy": {"gate": "min_distance", "percentile": 5.0},
        },
    ),
    "classifications.create": ((png(9),), {"model": "demo", "threshold": 0.25}),
    "authenticity.check": ((png(9),), {"model": "demo"}),
    "authenticity.check_generated": (({"benign": 1},), {**GENERATION, "edits": {"sefa-1": 1}}),
    "edits.directions": (("demo",), {}),
    "edits.create": (
        (),
        {
            "samples": [SAMPLE], "edits": {"sefa-1": 1}, "sweep": {"direction": "sefa-2", "strengths": [-1, 1]},
            "model": "demo", "truncation_psi": 0.5, "noise_mode": "const", "image_format": "png", **SIGNED,
        },
    ),
    "edits.interpolate": (
        (SAMPLE, ("malignant", 1, 2)),
        {"images": 3, "model": "demo", "truncation_psi": 0.5, "noise_mode": "const", "image_format": "png", **SIGNED},
    ),
    "edits.neighbours": (
        (SAMPLE,),
        {
            "count": 3, "distance": 0.5, "model": "demo", "truncation_psi": 0.5, "noise_mode": "const",
            "image_format": "png", **SIGNED,
        },
    ),
    "embeddings.retrieve": (("demo",), {}),
    "embeddings.place": ((png(9),), {"model": "demo"}),
    "embeddings.place_generated": (({"benign": 1},), {**GENERATION, "noise_mode": "const"}),
    "embeddings.place_projections": ((["pr_1", ("pr_2", 1)],), {"model": "demo"}),
    "projections.create": (
        (png(9),),
        {
            "model": "demo", "schedule": "official", "steps": 2, "space": "w+", "start": "mean", "class_name": "benign",
            "video": True, **KEY,
        },
    ),
    "projections.retrieve": (("pr_1",), {}),
    "projections.wait": (("pr_1",), {}),
    "projections.preview": (("pr_1",), {"image": 0}),
    "projections.download": (("pr_1", FOLDER), {}),
    "projections.delete": (("pr_1",), {}),
    "models.list": ((), {}),
    "models.default": ((), {}),
    "models.retrieve": (("demo",), {}),
    "studies.create": (
        ("n",),
        {
            "images": 2, "real_images": "folder", "model": "demo", "equal_classes": True, "truncation_psi": 0.5,
            "seed": 4, "keep_days": 2,
        },
    ),
    "studies.list": ((), {}),
    "studies.retrieve": (("st_1",), {}),
    "studies.add_images": (("st_1", [png(9)]), {"class_name": "benign"}),
    "studies.open": (("st_1",), {}),
    "studies.wait": (("st_1",), {}),
    "studies.close": (("st_1",), {}),
    "studies.delete": (("st_1",), {}),
    "studies.invite": (("st_1", "reader"), {"expires_in_days": 2}),
    "studies.invitations": (("st_1",), {}),
    "studies.revoke": (("st_1", "in_1"), {}),
    "studies.results": (("st_1",), {}),
    "studies.answers": (("st_1",), {}),
    "studies.export_csv": (("st_1", FOLDER), {}),
    "usage.retrieve": ((), {}),
    "webhooks.create": (("https://receiver.example/",), {"events": ["dataset.failed"]}),
    "webhooks.list": ((), {}),
    "webhooks.retrieve": (("wh_1",), {}),
    "webhooks.delete": (("wh_1",), {}),
    "webhooks.messages": (("wh_1",), {"state": "dead"}),
    "webhooks.retry": (("wh_1", "msg_1"), {}),
}  # fmt: skip
# What cannot be compared in this way; test_sdk_client.py and test_sdk_download.py call it with both clients.
NOT_HERE = {"datasets.download", "datasets.events"}


class MemoryService:
    """Answers requests with ANSWERS and keeps their lines, headers and bodies: httpx.MockTransport(MemoryService())."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = request.read()
        headers = dict(request.headers)
        if (boundary := re.search("boundary=(.*)", headers.get("content-type", ""))) is not None:
            body = body.replace(boundary[1].encode(), b"boundary")  # it is random
            headers["content-type"] = "multipart/form-data"
        self.requests.append((request.method, str(request.url), headers, body))
        answer = ANSWERS[f"{request.method} {request.url.path}"]
        number = {"X-Request-Id": f"req-{len(self.requests)}"}
        if answer is None:
            return httpx.Response(204, headers=number)
        if isinstance(answer, bytes):
            return httpx.Response(200, headers=number, content=answer)
        return httpx.Response(202 if request.method == "POST" else 200, headers=number, json=answer)
