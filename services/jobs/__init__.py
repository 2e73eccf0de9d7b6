"""Durable jobs: datasets and projections that continue after crashes and restarts.

`service` is what the gateway uses. `workflow` makes jobs durable with DBOS, `execution` runs their shards, `dataset` and
`projection` do the work of one kind each, and `table` stores what callers see of a job.
"""
