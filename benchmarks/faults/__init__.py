"""Faults on real components: the replicas, the scenarios and the comparison for `benchmarks.chaos`."""
