"""Benchmarks: one program for each claim. Each prints a table, or JSON with --json."""

from pathlib import Path

DEMO = Path("bundles/demo")
