"""What calls to the inference services (generator, classifier, explainer) may end with."""

from __future__ import annotations

from dermis.errors import DermisError


class InferenceUnavailableError(DermisError):
    """A called service did not answer; it may answer later."""


class InferenceFailedError(DermisError):
    """A called service answered with an error of its own."""


class NotInstalledError(DermisError):
    """A called service lacks a package that this needs; the operator has to install it."""
