"""A real PostgreSQL and a real S3 server for a test; the test is skipped where there is none to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from benchmarks.components import MissingComponentError, moto_s3, postgres, s3


@contextmanager
def skipped_if_missing() -> Iterator[None]:
    """Skip the test if a program that it needs is not installed."""
    try:
        yield
    except MissingComponentError as error:
        pytest.skip(str(error))


@contextmanager
def running_postgres() -> Iterator[postgres.Postgres]:
    """A new server, running."""
    with skipped_if_missing(), postgres.running_postgres() as server:
        yield server


@contextmanager
def running_s3() -> Iterator[s3.S3Server]:
    """A new server with a bucket, running, which this process reaches as well."""
    with skipped_if_missing(), s3.running_s3() as server, _reached(server.environment):
        yield server


@contextmanager
def running_moto() -> Iterator[moto_s3.MotoServer]:
    """A new server of another implementation with a bucket, running, which this process reaches as well."""
    with skipped_if_missing(), moto_s3.running_moto() as server, _reached(server.environment):
        yield server


@contextmanager
def _reached(environment: Mapping[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # fsspec keeps file systems, with the address of an earlier server.
        pytest.importorskip("s3fs", reason="s3fs is not installed").S3FileSystem.clear_instance_cache()
        yield
