"""Benchmarks: one program for each claim. Each prints a table, or JSON with --json."""
