"""Tests, benchmarks and training on a machine with a GPU that is available for minutes: see `docs/gpu.md`."""
