"""The `dermis` program, whose commands use the packages `dermis` and `training`."""
