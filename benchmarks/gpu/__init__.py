"""A benchmark, test and training run for a machine with a GPU that is at hand for minutes: see `docs/gpu.md`."""
