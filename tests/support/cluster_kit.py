"""A real S3 server for a test; the test is skipped where it is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.components import MissingComponentError
from benchmarks.components import s3 as component
from benchmarks.components.s3 import S3Server

__all__ = ["S3Server", "running_s3"]


@contextmanager
def running_s3(bucket: str = "datasets") -> Iterator[S3Server]:
    """A new S3 server, running."""
    try:
        with component.running_s3(bucket) as running:
            yield running
    except MissingComponentError as error:
        pytest.skip(str(error))
