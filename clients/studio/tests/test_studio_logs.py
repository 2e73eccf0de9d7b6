"""Tests of the log of `dermis studio`."""

from __future__ import annotations

import json
import logging
import socket
import sys
import warnings
from collections.abc import Iterator

import pytest
from dermis_studio import serve
from fastapi import FastAPI


@pytest.fixture
def logging_of_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before, level, hook = logging.root.handlers, logging.getLogger("dermis").level, sys.excepthook
    monkeypatch.setattr(logging.getLogger("dermis"), "handlers", [])  # of services that other tests ran in this process
    monkeypatch.setattr(logging.getLogger("dermis"), "propagate", True)
    yield
    logging.root.handlers, sys.excepthook = before, hook
    logging.getLogger("dermis").setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.usefixtures("logging_of_process")
def test_every_line_of_a_json_log_is_an_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def create_app(*_: object) -> FastAPI:
        warnings.warn("odd", stacklevel=1)
        return FastAPI()

    monkeypatch.setattr(serve, "create_app", create_app)
    with socket.create_server(("0.0.0.0", 0)) as taken, pytest.raises(SystemExit):
        serve.run("http://127.0.0.1:1", host="0.0.0.0", port=taken.getsockname()[1], json_log=True)
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    output = capsys.readouterr()
    lines = [json.loads(line) for line in output.err.splitlines()]
    assert not output.out
    assert {"time", "level", "logger", "message"} == set.intersection(*map(set, lines))
    expected = [
        ("WARNING", "dermis.studio", "keys of visitors cross the network"),
        ("WARNING", "dermis.studio", "links for readers"),
        ("WARNING", "py.warnings", "UserWarning: odd"),
        ("INFO", "dermis.studio", "the studio for http://127.0.0.1:1 is at http://0.0.0.0:"),
        ("ERROR", "uvicorn.error", "address already in use"),
        ("CRITICAL", "dermis.studio", "uncaught exception"),
    ]
    for line, (level, name, part) in zip(lines, expected, strict=True):
        assert (line["level"], line["logger"]) == (level, name) and part in line["message"]
    assert "ValueError: first\nsecond" in lines[-1]["exception"]
