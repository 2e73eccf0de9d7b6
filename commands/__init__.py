"""The `dermis` program: a composition root over `dermis` and `training`."""
