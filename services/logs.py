"""One log line for each event, as text or as JSON: time, level, logger, message and fields. Bodies and images are never logged.

Everyone who knows the id of a projection can read and delete it, so ids of datasets and projections are shortened to their
first characters, which are enough to see which lines belong together. API keys and access tokens are cut as well: no line is
meant to contain one, but the text of an error could.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal, TextIO

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {"message", "asctime", "taskName"}
_JOB_ID = re.compile(r"((?:ds|pr)_[0-9a-f]{6})[0-9a-f]{26}")
_API_KEY = re.compile(r"(dermis_(?:sk|rd)_[a-z0-9]{12})_[A-Za-z0-9_-]+")  # and invitations to reader studies
_ACCESS_TOKEN = re.compile(r"(eyJ[A-Za-z0-9_-]{4})[A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+){1,2}")
_HANDLER_NAME = "dermis"
# Who sent a request: the text has it for people who read the log of one machine. JSON is for collectors, which store lines
# for longer and for more readers; there the audit trail is the record of who did what.
_NOT_IN_JSON = _STANDARD | {"subject", "client"}

Format = Literal["text", "json"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that this code works on."""


class LineFormatter(logging.Formatter):
    """`2026-11-23T08:00:00.123Z INFO dermis.http request method=GET route=/v1/models status=200 ms=1.2`"""

    def format(self, record: logging.LogRecord) -> str:
        parts = [_time_of(record), record.levelname, record.name, _plain(record.getMessage())]
        extra = {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        parts += [f"{key}={_value(value)}" for key, value in extra.items() if value is not None]
        if record.exc_info:
            parts.append(f"trace={_value(self.formatException(record.exc_info))}")
        return without_secrets(without_whole_ids(" ".join(parts)))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the other fields, request_id, trace_id and span_id."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {key: value for key, value in record.__dict__.items() if key not in _NOT_IN_JSON}
        line |= {"request_id": extra.pop("id", None) or request_id.get()} | _trace_ids()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        line |= {f"{key}_" if key in line else key: value for key, value in extra.items()}
        kept = {key: _json_value(value) for key, value in line.items() if value is not None}
        # Escapes of ASCII: a text can contain a lone surrogate, which UTF-8 cannot encode.
        return without_secrets(without_whole_ids(json.dumps(kept, ensure_ascii=True)))


def _time_of(record: logging.LogRecord) -> str:
    """The time of a line in UTC, with milliseconds."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _trace_ids() -> dict[str, str]:
    """The ids of the current span, which may be that of a caller."""
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry.trace import format_span_id, format_trace_id, get_current_span

    context = get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": format_trace_id(context.trace_id), "span_id": format_span_id(context.span_id)}


def _json_value(value: Any) -> Any:
    """A value that JSON can represent: NaN and infinities, which it has no number for, become texts."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else str(value)
    return value if isinstance(value, bool | int) else str(value)


def without_whole_ids(text: str) -> str:
    """A text in which the ids of datasets and projections are cut to their first characters."""
    return _JOB_ID.sub(r"\1...", text)


def without_secrets(text: str) -> str:
    """A text in which API keys, invitations and access tokens are cut to their first characters."""
    if "dermis_sk_" in text or "dermis_rd_" in text:
        text = _API_KEY.sub(r"\1_...", text)
    return _ACCESS_TOKEN.sub(r"\1...", text) if "eyJ" in text else text


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what is stderr at the time of a line. Programs that call the service in their process may replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The current stderr."""
        return sys.stderr


def configure(level: str, log_format: Format = "text") -> None:
    """Write the log of the service and of its libraries to stderr. Further calls replace level and format.

    Args:
        level: The least severe level of the loggers of dermis.
        log_format: With "json" everything that this process logs is JSON: the lines of all libraries, warnings of Python and
            exceptions that end a thread or the process.
    """
    handler = _StderrHandler()
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(JsonFormatter() if log_format == "json" else LineFormatter())
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
    if log_format == "json":
        _log_everything(handler)


def _log_everything(handler: logging.Handler) -> None:
    """Let the loggers of all libraries, Python's warnings and uncaught exceptions use `handler`."""
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    for each in list(logging.root.manager.loggerDict.values()):
        if isinstance(each, logging.Logger) and handler not in each.handlers:
            each.handlers = []  # such as those of BentoML, which have a format of their own
            each.propagate = True
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger("dermis.process").critical("uncaught exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(details: threading.ExceptHookArgs) -> None:
    if details.exc_value is not None and not isinstance(details.exc_value, SystemExit):
        _log_uncaught(details.exc_type, details.exc_value, details.exc_traceback)


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
