"""Site hook: the reference pages that are generated from the programs, so that they cannot differ from them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

COMMAND_LINE = "reference/command-line.md"
HTTP = "reference/http-operations.md"
OPENAPI = "reference/openapi.json"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    document = _openapi()
    files.append(File.generated(config, COMMAND_LINE, content="\n".join(_command_line())))
    files.append(File.generated(config, HTTP, content="\n".join(_operations(document))))
    files.append(File.generated(config, OPENAPI, content=json.dumps(document, indent=1)))
    return files


# -- command line


def _command_line() -> Iterator[str]:
    from dermis_client import cli as dermis_client

    from commands import main as dermis

    yield from (
        "# Command line",
        "",
        "`dermis` and `dermis-client` with all commands and options, as `--help` prints them.",
        "",
    )
    for name, app in (("dermis", dermis.app), ("dermis-client", dermis_client.app)):
        yield from _command(typer.main.get_command(app), [name])


def _command(command: click.Command, path: list[str]) -> Iterator[str]:
    context = click.Context(command, info_name=" ".join(path))
    yield from (f"{'#' * min(len(path) + 1, 4)} {' '.join(path)}", "")
    yield from ("```text", " ".join(command.get_usage(context).split()), "```", "")
    yield from (inspect.cleandoc(command.help or "").replace("\b", ""), "")
    rows = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    if rows:
        yield from ("| argument or option | |", "| --- | --- |")
        for name, text in rows:
            plain = text.replace("\\[", "[")  # Typer escapes brackets for Rich
            yield f"| `{_cell(name)}` | {_cell(_escaped(plain))} |"
        yield ""
    for name, child in sorted(getattr(command, "commands", {}).items()):
        if not child.hidden:
            yield from _command(child, [*path, name])


# -- HTTP API


def _openapi() -> dict[str, Any]:
    from services.gateway.app import create_app
    from services.settings import Settings

    def running() -> Any:
        raise RuntimeError("the application is only described, not run")

    document: dict[str, Any] = create_app(Settings(), running).openapi()
    return document


def _operations(document: Mapping[str, Any]) -> Iterator[str]:
    operations = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method in ("get", "head", "post", "put", "patch", "delete")
    ]
    yield from (
        "# HTTP operations",
        "",
        "All operations of the [HTTP API](../api.md), from the OpenAPI document ([openapi.json](openapi.json)). A running",
        "service has it at `/openapi.json`, and at `/docs` a page that can send requests.",
        "",
        "| operation | |",
        "| --- | --- |",
    )
    for method, path, operation in operations:
        yield f"| [`{method} {path}`](#{operation['operationId']}) | {_cell(_escaped(operation.get('summary', '')))} |"
    yield ""
    for method, path, operation in operations:
        yield from (
            f"## {method} {_escaped(path)} {{ #{operation['operationId']} }}",
            "",
            operation.get("summary", ""),
            "",
        )
        yield from (operation.get("description", ""), "")
        if scopes := operation.get("x-dermis-scopes"):
            yield from (f"Scope: {' or '.join(f'`{scope}`' for scope in scopes)}", "")
        yield from _parameters(operation)
        yield from _body(operation, document)
        yield from ("| status | |", "| --- | --- |")
        for status, response in sorted(operation["responses"].items()):
            yield f"| {status} | {_cell(_escaped(response.get('description', '')))} |"
        yield ""


def _parameters(operation: Mapping[str, Any]) -> Iterator[str]:
    if parameters := operation.get("parameters"):
        yield from ("| parameter | in | |", "| --- | --- | --- |")
        for parameter in parameters:
            text = parameter.get("description") or parameter.get("schema", {}).get("description", "")
            yield f"| `{parameter['name']}` | {parameter['in']} | {_cell(_escaped(text))} |"
        yield ""


def _body(operation: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content.get("schema", {})
        if reference := schema.get("$ref"):
            schema = document["components"]["schemas"][reference.rpartition("/")[2]]
        if not schema.get("properties"):
            yield from (f"Body: `{media_type}`.", "")
            continue
        yield from (f"| field of the body (`{media_type}`) | |", "| --- | --- |")
        for name, field in schema["properties"].items():
            required = " (required)" if name in schema.get("required", ()) else ""
            yield f"| `{name}`{required} | {_cell(_escaped(field.get('description', '')))} |"
        yield ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _escaped(text: str) -> str:
    """The text with characters escaped that are markup in Markdown outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<>*_\[\]{}])", r"\\\1", part) for part in parts)
