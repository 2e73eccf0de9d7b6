"""Base of the inference services: the start of a process, the models that it loads, and the description of them.

The services exchange pickled bodies, as BentoML services do among themselves. They listen on Unix sockets in a private folder
only; everything public belongs to the gateway.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Generic, TypeVar

import bentoml
from _bentoml_sdk.method import APIMethod  # type: ignore[import-untyped]
from bentoml.exceptions import BentoMLException, ServiceUnavailable

from dermis.bundle import Bundle, open_bundle
from dermis.errors import DermisError
from dermis.resources import has_lost_device, lacks_resources
from services import logs, tracing
from services.callers import CallerMiddleware
from services.data_folder import restrict_new_files
from services.errors import LoadPostponedError
from services.models import check_signer, locate, passing_error, signers_of, without_place
from services.parent_watchdog import exit_with_parent
from services.settings import settings_of_process

CALL_SECONDS = 300.0
# Errors in the files of one bundle.
LOAD_ERRORS = (DermisError, OSError, RuntimeError, MemoryError)
_NICE = 10
LACKS_MEMORY = HTTPStatus.INSUFFICIENT_STORAGE
"""The status of a call for which there is too little memory. Unlike 503 it may be the answer to each call of this size."""
_END_SECONDS = 0.2  # for the answer to a call; callers wait for longer before they try again
_settings = settings_of_process()

ModelT = TypeVar("ModelT")
ServiceT = TypeVar("ServiceT")


def inference_service(
    name: str, workers: int, *, call_seconds: float = CALL_SECONDS, **options: Any
) -> Callable[[type[ServiceT]], type[ServiceT]]:
    """Decorator that makes a class an inference service. Its calls know whether their callers are still there.

    Args:
        name: The BentoML name, which is also a key of `services.inference.worker_counts`.
        workers: Number of processes.
        call_seconds: Time limit of a call.
        **options: Further options of `bentoml.service`.
    """
    decorator: Callable[[type[ServiceT]], Any] = bentoml.service(
        name=name,
        workers=workers,
        traffic={"timeout": call_seconds},
        # By default the caller closes its connections every 100 calls, including those with calls that are not finished.
        runner_connection={"max_requests": 10**9, "max_age": 1e9},
        logging={"access": {"enabled": False}},
        **options,
    )

    def make(inner: type[ServiceT]) -> type[ServiceT]:
        for method in vars(inner).values():
            if isinstance(method, APIMethod) and not inspect.iscoroutinefunction(method.func):
                method.func = _handling_machine_errors(method.func)
        service = decorator(inner)
        if tracing.exporter_names():
            service.add_asgi_middleware(tracing.TraceCalls, service=name)
        service.add_asgi_middleware(CallerMiddleware)
        made: type[ServiceT] = service
        return made

    return make


def _handling_machine_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let callers of a method try again if it lacks memory, and end this process after an error that every later call has."""

    @functools.wraps(function)
    def call(service: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return function(service, *arguments, **options)
        except Exception as error:
            if lacks_resources(error):
                service.logger.error("too little memory for a call", extra={"error": str(error)})
                raise BentoMLException("too little memory for this call", error_code=LACKS_MEMORY) from error
            if has_lost_device(error):
                service.logger.error("the device has failed; this process ends", extra={"error": str(error)})
                # The call itself fails, so that one which always breaks the device is not repeated forever.
                threading.Timer(_END_SECONDS, os._exit, (1,)).start()
            raise

    return call


def raise_passing(error: Exception, location: str) -> None:
    """Raise an error of loading a model in a call, if it is not one of the bundle: the same call can succeed later.

    Args:
        error: The error.
        location: Where the bundle is.

    Raises:
        ServiceUnavailable: The reason can pass.
        BentoMLException: There is too little memory.
        Exception: The error itself, if the device has failed.
    """
    passing = passing_error(error, location)
    if isinstance(passing, LoadPostponedError):
        raise BentoMLException("too little memory for the model", error_code=LACKS_MEMORY) from error
    if passing is not None:
        raise ServiceUnavailable("the model cannot be loaded at the moment") from error
    if has_lost_device(error):
        raise error


# A method whose concurrent calls run as one batch. It takes an array with one row per input and returns a list with one result
# per row. The latency is not a delay but the age at which BentoML refuses a call; the gateway limits how many calls wait.
batch_api = bentoml.api(
    batchable=True, max_batch_size=_settings.max_batch_size, max_latency_ms=int(CALL_SECONDS * 1000)
)


class InferenceService(Generic[ModelT]):
    """Base class of the inference services. A bundle whose model cannot be loaded does not stop the others.

    A process that cannot load a model for a reason that can pass does not start (`services.models.passing_error`), nor does one
    whose device has failed. One that lacks memory serves the models that it has loaded.

    Attributes:
        logger: The logger of the service.
        failure: Log message for a model that cannot be loaded.
    """

    logger: ClassVar[logging.Logger]
    failure: ClassVar[str]

    def __init__(self) -> None:
        logs.configure(_settings.log_level, _settings.log_format)
        tracing.configure(self.logger.name.removeprefix("dermis."))
        exit_with_parent()
        restrict_new_files()
        self._models: dict[str, ModelT] = {}
        self._problems: list[str] = []
        signers = signers_of(_settings)
        postponed: LoadPostponedError | None = None
        for location in locate(_settings.bundles):
            try:
                if not self.has_model(location):
                    continue
                source: Bundle | str = location
                if signers is not None:
                    source = open_bundle(location)
                    check_signer(source, signers)
                digest, model = self.load(source)
            except LOAD_ERRORS as error:
                passing = passing_error(error, location)
                self.logger.error(self.failure, extra={"location": location, "error": str(passing or error)})
                if isinstance(passing, LoadPostponedError):
                    postponed = passing  # perhaps there is never enough memory for all models
                elif passing is not None:
                    raise passing from error
                elif has_lost_device(error):
                    raise
                self._problems.append(without_place(error, location))
                continue
            self._models[digest] = model
        if postponed is not None and not self._models:
            raise postponed

    @bentoml.on_shutdown
    def export_spans(self) -> None:
        """Export the last spans of this process."""
        tracing.stop()

    def has_model(self, location: str) -> bool:
        """Whether the bundle has a model of this kind. One without it is not a problem."""
        return True

    def load(self, source: Bundle | str) -> tuple[str, ModelT]:
        """The model of a bundle, and the digest by which calls name it.

        Args:
            source: The location of the bundle, or the opened bundle if a trusted signer must have signed it. Then every file
                is compared with what this object says.

        Raises:
            Exception: One of `LOAD_ERRORS`.
        """
        raise NotImplementedError

    def identity(self, model: ModelT) -> Mapping[str, str]:
        """The software and the device that run the model, for manifests."""
        return {}

    @bentoml.api
    async def describe(self) -> dict[str, Any]:  # on the event loop, so that probes do not wait for other calls
        """The loaded models.

        Returns:
            {"identities": {digest: identity}, "problems": [...]}.
        """
        identities = {digest: dict(self.identity(model)) for digest, model in self._models.items()}
        return {"identities": identities, "problems": self._problems}


def part_folder(location: str, part: str) -> str:
    """The folder of a part of the bundle at `location`, such as its classifier."""
    return f"{location.rstrip('/')}/{part}"


def part_source(source: Bundle | str, part: str) -> Bundle | str:
    """What to load a part of: the opened bundle, or the folder of the part."""
    return source if isinstance(source, Bundle) else part_folder(source, part)


def opened(source: Bundle | str) -> Bundle:
    """The bundle, opened if it is not yet.

    Raises:
        BundleError: It cannot be opened.
    """
    return source if isinstance(source, Bundle) else open_bundle(source)


def lower_priority() -> None:
    """Let all other work run before that of this thread and, on Linux, of the threads that torch starts from it."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
