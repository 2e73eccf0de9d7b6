"""Real servers that benchmarks and tests start on the loopback address and stop again: PostgreSQL, S3, proxies with faults."""

from __future__ import annotations


class MissingComponentError(RuntimeError):
    """A program that is needed is not installed on this machine."""
