"""A separate PostgreSQL server for a test; the test is skipped where there is none to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.components import MissingComponentError
from benchmarks.components import postgres as component
from benchmarks.components.postgres import Postgres

__all__ = ["Postgres", "running_postgres"]


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A new server, running."""
    try:
        with component.running_postgres() as running:
            yield running
    except MissingComponentError as error:
        pytest.skip(str(error))
