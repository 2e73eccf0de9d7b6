"""Record the public behaviour that must not change unnoticed: `python tests/golden/record.py [SECTION ...]`.

Each section is a text file beside this program. tests/test_golden.py computes the sections again and compares:

- bundle: the digest of the demo bundle.
- help: the `--help` text of every command of `dermis` and `dermis-client`.
- client: the exported names of `dermis_client`, with the parameters of their public methods.
- openapi: operations and fields of the OpenAPI document, without descriptions.
- routes: the answer of every GET route of the HTTP API, without ids, times and other values of one run.
- dataset: the SHA-256 of every file of a dataset in each format, with edits, classifier filter and gate.

After an intended change, record the sections that it changes, read the difference with `git diff` and commit it together
with the change. Every section is computed in a process of its own, in a fixed environment.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import inspect
import io
import json
import os
import pickle
import platform
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
DEMO = ROOT / "bundles" / "demo"
FILES = {
    "bundle": "bundle.json",
    "help": "help.txt",
    "client": "client.json",
    "openapi": "openapi.json",
    "routes": "routes.json",
    "dataset": "dataset.json",
}
# Rich and Typer adapt their output to the terminal and to continuous integration.
_TERMINAL = {"COLUMNS": "1000", "LINES": "50", "TERM": "dumb", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
_UNSET = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH", "_TYPER_FORCE_DISABLE_TERMINAL")
# The fewest instructions that the libraries can be limited to, so that processors of different age round in the same way.
_ARITHMETIC = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
_TIMEOUT_SECONDS = 900.0


def path_of(section: str) -> Path:
    """The file of a section's recorded text."""
    return FOLDER / FILES[section]


def compute(section: str) -> str:
    """The present text of a section, computed in another process.

    Raises:
        RuntimeError: The process failed; the message says why.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("DERMIS_") and name not in _UNSET
    }
    sources = [str(path) for path in (ROOT, ROOT / "tests" / "support", ROOT / "clients" / "python" / "src")]
    environment |= {**_TERMINAL, **_ARITHMETIC, "PYTHONPATH": os.pathsep.join(sources)}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "section"
        done = subprocess.run(
            [sys.executable, __file__, "--write", str(output), section],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            reason = output.read_text(encoding="utf-8") if output.exists() else f"\n{done.stderr[-4000:]}"
            raise RuntimeError(f"the section {section} cannot be computed: {reason}")
        return output.read_text(encoding="utf-8")


# -- bundle


def _bundle() -> str:
    from dermis.bundle import open_bundle

    return _layout({"digest": open_bundle(DEMO).digest}, 1)


# -- help


def _help() -> str:
    import typer
    from dermis_client import cli as dermis_client

    from commands import main as dermis

    texts = []
    for name, program in (("dermis", dermis), ("dermis-client", dermis_client)):
        whole = typer.main.get_command(program.app)  # the app itself would build all commands for each help text
        for path in _command_paths(whole, name):
            arguments = [*path[1:], "--help"]
            printed = _printed(lambda: whole.main(arguments, prog_name=name, standalone_mode=False), path)  # noqa: B023
            lines = filter(None, map(_without_layout, printed.splitlines()))
            texts.append("\n".join([f"$ {' '.join(path)} --help", *lines, ""]))
    return "\n".join(texts)


def _without_layout(line: str) -> str:
    """A line of a help text without the widths of columns and frames, which change with every other line."""
    return re.sub(r"\s+", " ", re.sub("─+", "─", line)).strip(" │╭╮╰╯─")


def _command_paths(whole: Any, name: str) -> Iterator[list[str]]:
    def walk(command: Any, path: list[str]) -> Iterator[list[str]]:
        yield path
        for each, child in sorted(getattr(command, "commands", {}).items()):
            yield from walk(child, [*path, each])

    return walk(whole, [name])


def _printed(main: Callable[[], None], arguments: list[str]) -> str:
    output = io.StringIO()
    with mock.patch.object(sys, "argv", arguments), contextlib.redirect_stdout(output):
        try:
            main()
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise RuntimeError(f"{' '.join(arguments)} ended with status {stop.code}") from None
    return output.getvalue()


# -- client


def _client() -> str:
    import dermis_client

    exports: dict[str, Any] = {}
    for name in sorted(dermis_client.__all__):
        value = getattr(dermis_client, name)
        if inspect.isclass(value):
            exports[name] = _members(value)
        else:
            exports[name] = _parameters(value) if callable(value) else type(value).__name__
    client = dermis_client.DermisClient("http://127.0.0.1:1")
    resources = {
        f"{type(each).__name__}.{name}": _members(type(value))
        for each in (client, dermis_client.AsyncDermisClient("http://127.0.0.1:1"))
        for name, value in sorted(vars(each).items())
        if not name.startswith("_") and type(value).__module__.startswith("dermis_client")
    }
    return _layout({"exports": exports, "resources": resources}, 3)


def _members(kind: type) -> dict[str, str]:
    """By name, the public attributes that a class or its parents in dermis_client define, with parameters of methods."""
    parents = [each for each in kind.__mro__ if each.__module__.startswith("dermis_client")]
    names = {name for each in parents for name in (*vars(each), *inspect.get_annotations(each))}
    public = sorted(name for name in names if not name.startswith(("_", "model_")))  # pydantic's own begin with model_
    members = {name: _parameters(getattr(kind, name, None)) for name in public}
    return {"(call)": _parameters(kind), **members}


def _parameters(value: Any) -> str:
    """Parameters with their defaults, without annotations; empty for what cannot be called."""
    if not callable(value):
        return ""
    if inspect.isclass(value) and not inspect.isfunction(value.__init__):
        return "(...)"  # the constructor is Python's own
    signature = inspect.signature(value)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(inspect.Signature(bare))


# -- openapi


def _openapi() -> str:
    from service_kit import assemble

    document = assemble(DEMO, Path("data")).app.openapi()
    operations: dict[str, Any] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {})
            operations[f"{method.upper()} {path}"] = {
                "id": operation["operationId"],
                "parameters": [
                    {**{key: each.get(key) for key in ("in", "name", "required")}, "schema": _bare(each["schema"])}
                    for each in operation.get("parameters", ())
                ],
                "body": {media: _bare(entry["schema"]) for media, entry in sorted(body.items())},
                "responses": {
                    status: {
                        "headers": sorted(response.get("headers", {})),
                        "content": {
                            media: _bare(entry.get("schema", {}))
                            for media, entry in sorted(response.get("content", {}).items())
                        },
                    }
                    for status, response in sorted(operation["responses"].items())
                },
            }
    schemas = {name: _bare(schema) for name, schema in sorted(document["components"]["schemas"].items())}
    return _layout({"operations": dict(sorted(operations.items())), "schemas": schemas}, 4)


def _bare(schema: Any) -> Any:
    """A JSON schema without its texts and examples."""
    if isinstance(schema, list):
        return [_bare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key not in ("title", "description", "examples")}
    return {
        key: {name: _bare(each) for name, each in value.items()} if key in ("properties", "$defs") else _bare(value)
        for key, value in sorted(kept.items())
    }


# -- routes

_UNKNOWN = {
    "dataset_id": f"ds_{'0' * 32}",
    "projection_id": f"pr_{'0' * 32}",
    "key_id": "0" * 12,
    "name": "unknown",
    "webhook_id": f"wh_{'0' * 32}",
    "study_id": f"st_{'0' * 32}",
    "position": "0",
}
_DATASET = {
    "seed": 5,
    "shard_size": 2,
    "classifier": {"tries": 1},
    "privacy": {"gate": "min_distance", "percentile": 0.0, "on_reject": "flag"},
}
_HEADERS = ("content-type", "content-disposition", "cache-control", "accept-ranges", "vary")


def _routes() -> str:
    from dermis.bundle import open_bundle
    from service_kit import service

    bundle = open_bundle(DEMO)
    direction, (first_class, second_class, *_) = bundle.directions[0].name, bundle.class_names
    whole = _DATASET | {
        "classes": {first_class: 3, second_class: 2},
        "edits": [{"direction": direction, "strength": 0.5}],
    }
    answers: dict[str, Any] = {}
    with service(DEMO, Path("data").absolute(), default_model=bundle.name, max_projection_images=2) as running:
        running.generator.failures += [RuntimeError("broken")]
        failed = running.wait(running.ask(_DATASET | {"classes": {first_class: 1}}))["id"]
        made = running.wait(running.ask(whole))["id"]
        projected = _project(running, first_class)
        running.projector.failures += [RuntimeError("broken")]
        failed_projection = _project(running, first_class)
        study = running.client.post("/v1/studies", json={"name": "study", "images": 2, "seed": 1}).json()["id"]
        files = [each["name"] for each in running.client.get(f"/v1/datasets/{made}/files").json()["data"]]
        projection = running.client.get(f"/v1/projections/{projected}").json()
        results = [each.rpartition("/")[2] for each in projection["data"][0]["files"].values()]
        requests: dict[str, list[dict[str, str]]] = {
            "/v1/datasets/{dataset_id}": [{"dataset_id": each} for each in (made, failed)],
            "/v1/datasets/{dataset_id}/events": [{"dataset_id": made}],
            "/v1/datasets/{dataset_id}/files": [{"dataset_id": each} for each in (made, failed)],
            "/v1/datasets/{dataset_id}/files/{name}": [{"dataset_id": made, "name": each} for each in files],
            "/v1/datasets/{dataset_id}/report": [{"dataset_id": each} for each in (made, failed)],
            "/v1/projections/{projection_id}": [{"projection_id": each} for each in (projected, failed_projection)],
            "/v1/projections/{projection_id}/files/{name}": [
                {"projection_id": projected, "name": each} for each in results
            ],
            "/v1/studies/{study_id}": [{"study_id": study}],
            "/v1/studies/{study_id}/answers": [{"study_id": study}],
            "/v1/studies/{study_id}/invitations": [{"study_id": study}],
            "/v1/studies/{study_id}/results": [{"study_id": study}],
            "/v1/reading/images/{position}": [{"position": "1"}],
            "/v1/models/{name}": [{"name": bundle.name}],
            "/v1/admin/keys/{key_id}": [{"key_id": "0" * 12}],
            "/docs/{name}": [{"name": "swagger-ui.css"}],
            "/v1/webhooks/{webhook_id}": [{"webhook_id": _UNKNOWN["webhook_id"]}],
            "/v1/webhooks/{webhook_id}/messages": [{"webhook_id": _UNKNOWN["webhook_id"]}],
        }
        queries = {
            "/v1/datasets": ["?limit=1", "?state=failed", "?limit=0", "?cursor=x"],
            "/v1/directions": ["?model=unknown"],
            "/v1/embeddings": ["?model=unknown"],
        }
        routes = set(_get_routes(running.client.app))
        document = running.client.get("/openapi.json").json()
        if missing := sorted(
            path for path, methods in document["paths"].items() if "get" in methods and path not in routes
        ):
            raise RuntimeError(f"the list of GET routes lacks {', '.join(missing)}")
        for route in sorted(routes):
            if "{" not in route:
                urls = {route + query: route + query for query in ("", *queries.get(route, ()))}
            elif route not in requests:
                raise RuntimeError(f"GET {route} is new: add the values to call it with in {__file__}, `_routes`")
            else:
                urls = {f"{route} {number}": route.format(**values) for number, values in enumerate(requests[route], 1)}
                first = requests[route][0]
                urls |= {f"{route} unknown {name}": route.format(**first | {name: _UNKNOWN[name]}) for name in first}
            for name, url in urls.items():
                answers[f"GET {name}"] = _answer(route, running.client.get(url))
    return _layout(answers, 4)


def _get_routes(router: Any) -> Iterator[str]:
    """Paths of all GET routes, also of those that are not in the OpenAPI document."""
    for route in router.routes:
        included = getattr(route, "original_router", None)
        if included is not None:  # FastAPI keeps an included router as one entry
            yield from _get_routes(included)
        elif "GET" in (getattr(route, "methods", None) or ()):
            yield route.path


def _project(running: Any, class_name: str) -> str:
    """Project one image; the id of the projection once it has ended."""
    import numpy as np

    from dermis.imaging import encode
    from service_kit import wait_for

    image = encode(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    response = running.client.post(
        f"/v1/projections?steps=2&start=mean&class={class_name}", content=image, headers={"Content-Type": "image/png"}
    )
    if response.status_code != 202:
        raise RuntimeError(response.text)
    url = f"/v1/projections/{response.json()['id']}"
    wait_for(lambda: running.client.get(url).json()["state"] in ("succeeded", "failed"))
    return str(response.json()["id"])


def _answer(route: str, response: Any) -> dict[str, Any]:
    """Status, headers and body of a response; of a body that is not JSON what can be compared, or nothing."""
    kind = response.headers["content-type"]
    answer: dict[str, Any] = {
        "status": response.status_code,
        "headers": {name: _text(response.headers[name]) for name in _HEADERS if name in response.headers},
    }
    if route == "/metrics":
        answer["body"] = sorted(set(re.findall(r"^# TYPE (dermis_\w+ \w+)$", response.text, re.MULTILINE)))
    elif kind.startswith("text/event-stream"):
        events = re.findall(r"^event: (.*)\nid: (.*)\ndata: (.*)$", response.text, re.MULTILINE)
        answer["body"] = [{"event": event, "id": each, "data": _same(json.loads(data))} for event, each, data in events]
    elif kind.partition(";")[0] in ("application/json", "application/problem+json"):
        body = response.json()
        # The contents of these files are recorded by other sections.
        of_file = route.endswith(("/files/{name}", "/report")) and response.status_code == 200
        if route != "/openapi.json" and not of_file:
            answer["body"] = _same(body, route)
    return answer


# Values of one run, or of one processor's rounding, by the name of their field.
_SPEEDS = ("images_per_second", "eta_seconds")


def _same(value: Any, route: str = "", field: str = "") -> Any:
    """A JSON value with placeholders for what differs from run to run or from processor to processor."""
    if isinstance(value, dict):
        if value.get("name") == "stored_bytes":
            value = value | {"used": "<number>"}  # of files
        return {key: "<speed>" if key in _SPEEDS else _same(each, route, key) for key, each in value.items()}
    if isinstance(value, list):
        return [_same(each, route, field) for each in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        of_file = field == "bytes" and route.endswith("/files")
        of_projection = isinstance(value, float) and route.startswith("/v1/projections/")
        of_map = route.startswith("/v1/embeddings")
        return "<number>" if of_file or of_projection or of_map else value
    if isinstance(value, str):
        if field in ("request_id", "next_cursor") or (field == "sha256" and "/files" in route):
            return f"<{field}>"
        return _text(value)
    return value


def _text(value: str) -> str:
    value = re.sub(r"\b(ds|pr|st)_[0-9a-f]{32}\b", r"\1_<id>", value)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", "<time>", value)


# -- dataset

_COUNTS = (12, 8)
_FORMATS = ("imagefolder", "webdataset", "parquet")
_LIBRARIES = ("torch", "numpy", "onnxruntime", "faiss-cpu", "pillow", "pyarrow")
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
# What a manifest says of the machine and of our version.
_MACHINE = re.compile(rb'("(?:processor|instructions|dermis)": )"[^"]*"')


def environment() -> dict[str, Any]:
    """What the bytes of a dataset depend on besides our code: versions of libraries, and instructions of the processor."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2]), "zlib": zlib.ZLIB_RUNTIME_VERSION}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    try:
        match = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    flags = match[1].split() if match else []
    return {"machine": platform.machine(), **versions, "instructions": [flag for flag in _FLAGS if flag in flags]}


def _dataset() -> str:
    from commands.main import main
    from dermis import synthesizer
    from dermis.bundle import open_bundle

    bundle = open_bundle(DEMO)
    classes = ",".join(f"{name}={count}" for name, count in zip(bundle.class_names, _COUNTS, strict=True))
    options = ["--bundle", str(DEMO), "--classes", classes, "--seed", "7", "--shard-size", "8", "--device", "cpu"]
    options += ["--keep", "agreeing", "--tries", "4", "--gate", "authentic", "--gate-tries", "4"]
    options += ["--edit", f"{bundle.directions[0].name}=0.5"]
    formats: dict[str, Any] = {}
    with (
        # OpenVINO cannot be limited to fewer instructions, and "auto" chooses the arithmetic by the processor.
        synthesizer.Synthesizer(bundle, device="cpu", backend="torch", dtype="float32", threads=1) as portable,
        mock.patch.object(portable, "images", _remember(portable.images)),
        mock.patch.object(synthesizer, "Synthesizer", lambda *_, **__: contextlib.nullcontext(portable)),
        mock.patch("dermis.image_metadata.SOFTWARE", "dermis"),  # images name our version
    ):
        for file_format in _FORMATS:
            folder = Path(file_format)
            _printed(main, ["dermis", "generate", *options, "--format", file_format, "--out", str(folder)])
            formats[file_format] = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    return _layout({"recorded_with": environment(), "sha256": formats}, 3)


def _remember(images: Callable[..., Any]) -> Callable[..., Any]:
    """Draw what all formats have in common once."""
    drawn: dict[bytes, Any] = {}

    def remembered(*arguments: Any, **options: Any) -> Any:
        key = pickle.dumps((arguments, options))
        if key not in drawn:
            drawn[key] = images(*arguments, **options)
        return drawn[key]

    return remembered


def _sha256(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha256(_MACHINE.sub(rb'\1"-"', data) if path.name == "manifest.json" else data).hexdigest()


# -- recording


def _layout(value: Mapping[str, Any], depth: int) -> str:
    """JSON with a line for each entry down to `depth`, so that a difference shows the entry that differs."""
    return _lines(value, depth, "") + "\n"


def _lines(value: Any, depth: int, indent: str) -> str:
    if depth == 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(deeper + _lines(each, depth - 1, deeper) for each in value) + f"\n{indent}]"
    entries = (f"{deeper}{json.dumps(key)}: {_lines(each, depth - 1, deeper)}" for key, each in value.items())
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"


_SECTIONS: Mapping[str, Callable[[], str]] = {
    "bundle": _bundle,
    "help": _help,
    "client": _client,
    "openapi": _openapi,
    "routes": _routes,
    "dataset": _dataset,
}


def main() -> None:
    """Record the sections that are named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Record what tests/test_golden.py compares.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(FILES)}; default: all")
    parser.add_argument("--write", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.sections) - set(FILES)):
        parser.error(f"unknown section {unknown[0]}; choose from {', '.join(FILES)}")
    if arguments.write is not None:
        (section,) = arguments.sections
        try:
            arguments.write.write_text(_SECTIONS[section](), encoding="utf-8")
        except RuntimeError as error:
            arguments.write.write_text(str(error), encoding="utf-8")
            raise
        return
    with ThreadPoolExecutor(2) as pool:  # most of the time one section keeps one core busy
        try:
            for report in pool.map(_record, arguments.sections or FILES):
                print(report, flush=True)
        except RuntimeError as error:
            sys.exit(f"error: {error}")


def _record(section: str) -> str:
    started = time.monotonic()
    text, path = compute(section), path_of(section)
    state = "unchanged" if path.exists() and path.read_text(encoding="utf-8") == text else "changed"
    path.write_text(text, encoding="utf-8")
    return f"{path.relative_to(ROOT)}: {state}, {time.monotonic() - started:.0f} s"


if __name__ == "__main__":
    main()
