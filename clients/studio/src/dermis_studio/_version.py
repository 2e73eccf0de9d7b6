"""The version of the studio, the same as that of the client."""

__version__ = "0.2.0"
