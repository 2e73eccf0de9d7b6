"""One log line for each event: time, level, logger, message and key=value pairs. Bodies and images are never logged.

Everyone who knows the id of a projection can read and delete it, so ids of datasets and projections are shortened to their
first characters, which are enough to see which lines belong together. API keys and access tokens are cut as well: no line is
meant to contain one, but the text of an error could.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Any

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {"message", "asctime", "taskName"}
_JOB_ID = re.compile(r"((?:ds|pr)_[0-9a-f]{6})[0-9a-f]{26}")
_API_KEY = re.compile(r"(dermis_sk_[a-z0-9]{12})_[A-Za-z0-9_-]+")
_ACCESS_TOKEN = re.compile(r"(eyJ[A-Za-z0-9_-]{4})[A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+){1,2}")
_HANDLER_NAME = "dermis"


class LineFormatter(logging.Formatter):
    """`2026-11-23T08:00:00.123Z INFO dermis.http request method=GET route=/v1/models status=200 ms=1.2`"""

    converter = time.gmtime  # type: ignore[assignment]

    def format(self, record: logging.LogRecord) -> str:
        stamp = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z"
        parts = [stamp, record.levelname, record.name, _plain(record.getMessage())]
        extra = {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        parts += [f"{key}={_value(value)}" for key, value in extra.items() if value is not None]
        if record.exc_info:
            parts.append(f"trace={_value(self.formatException(record.exc_info))}")
        return without_secrets(_JOB_ID.sub(r"\1...", " ".join(parts)))


def without_secrets(text: str) -> str:
    """A text in which API keys and access tokens are cut to their first characters."""
    if "dermis_sk_" in text:
        text = _API_KEY.sub(r"\1_...", text)
    return _ACCESS_TOKEN.sub(r"\1...", text) if "eyJ" in text else text


def configure(level: str) -> None:
    """Write the log of the service and of its libraries to stderr. Further calls replace the level."""
    handler = logging.StreamHandler()
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(LineFormatter())
    quiet = ("dbos", "httpx", "uvicorn.error", "asyncio")
    for name, least in (("dermis", level), *((name, "WARNING") for name in quiet)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(least)
        # BentoML's configuration disables the loggers that exist when it is applied.
        for each in logging.root.manager.loggerDict.values():
            if isinstance(each, logging.Logger) and (each is logger or each.name.startswith(f"{name}.")):
                each.disabled = False


def _plain(text: str) -> str:
    """One line: control characters, which can come from a request or a file, are escaped."""
    text = text.replace("\\", "\\\\")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = _plain(str(value))
    if text and all(character.isprintable() and character not in ' "=' for character in text):
        return text
    return '"' + text.replace('"', '\\"') + '"'
