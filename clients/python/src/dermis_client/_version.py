"""The version of this client: sent in User-Agent, shown by `dermis-client --version`."""

__version__ = "0.2.0"
