"""The log of `dermis studio` as JSON, one object for each line, with the names of fields that the log of the service has."""

from __future__ import annotations

import json
import logging
import sys
import time
from types import TracebackType


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, and the stack trace of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(line | ({"exception": self.formatException(record.exc_info)} if record.exc_info else {}))


def configure_json() -> None:
    """Write what the studio and its libraries log, warnings of Python and an exception that ends the process to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.root.handlers = [handler]
    logging.getLogger("dermis").setLevel(logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        logging.getLogger("dermis.studio").critical("uncaught exception", exc_info=(kind, error, trace))
