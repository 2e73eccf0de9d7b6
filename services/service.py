"""The BentoML application: the public gateway, and the inference services, which only the gateway can reach.

`python -m services.serve` runs it and prints its address; `bentoml serve services.service:Gateway` runs it without that.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any

import _bentoml_impl.server  # type: ignore[import-untyped]
import bentoml
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dermis.errors import DermisError
from services import logs, tracing
from services.composition import compose
from services.data_folder import prepare_data_folder, restrict_new_files
from services.gateway.app import create_app
from services.gateway.dependencies import Context
from services.image_measuring import AppearanceProcesses
from services.inference.authenticity import AuthenticityService
from services.inference.classifier import ClassifierService
from services.inference.client import InferenceClients
from services.inference.dispatching import use_batch_dispatcher
from services.inference.explainer import ExplainerService
from services.inference.generator import GeneratorService
from services.inference.projector import ProjectorService
from services.models import ServedModels, signers_of
from services.parent_watchdog import exit_with_parent
from services.settings import SettingsError, settings_of_process
from services.supervisor import check_access, serve_bento, stop_pause
from services.worker import cancel_timers_of_requests

logger = logging.getLogger("dermis.service")

_settings = settings_of_process()
_UNLIMITED_SECONDS = 1e9  # routes have their own limits


@asynccontextmanager
async def _running() -> AsyncIterator[Context]:
    """Start everything that the routes need, and stop it when the service ends."""
    logs.configure(_settings.log_level, _settings.log_format)
    tracing.configure("gateway")
    exit_with_parent()
    restrict_new_files()
    try:
        check_access(_settings)  # also when another program than our supervisor starts this process
        await asyncio.to_thread(prepare_data_folder, _settings)
    except SettingsError as error:
        logger.error("cannot start", extra={"problem": str(error)})
        raise
    models = await asyncio.to_thread(_open_models)
    for location, problem in models.check().items():
        logger.error("model not served", extra={"location": location, "problem": problem})
    service = bentoml.get_current_service()

    def client_of(name: str) -> Any:
        return getattr(service, name).to_async if _settings.inference else None

    inference = InferenceClients.connect(client_of, models)
    measure_images = AppearanceProcesses(log=(_settings.log_level, _settings.log_format))
    composition = compose(_settings, models, inference, measure_images)
    try:
        with _delayed_shutdown(composition.context.stopping, stop_pause(_settings)):
            async with composition.running() as context:
                app.state.studio.prepare(context.not_ready)
                yield context
    finally:
        await asyncio.to_thread(measure_images.close)
        await asyncio.to_thread(tracing.stop)


def _open_models() -> ServedModels:
    try:
        return ServedModels(_settings.bundles, _settings.default_model, _settings.model_tenants, signers_of(_settings))
    except DermisError as error:
        logger.error("cannot start", extra={"problem": str(error)})
        raise


@contextmanager
def _delayed_shutdown(stopping: threading.Event, pause_seconds: float) -> Iterator[None]:
    """Delay the shutdown after a signal: set `stopping` at once, and pass the signal to the server after a pause.

    During the pause /readyz fails while requests are still answered, so that a load balancer sends no more. Open streams
    end when `stopping` is set. A second signal ends the pause.

    Args:
        stopping: The event to set.
        pause_seconds: Length of the pause.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop_server(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            stop_server(number, frame)
            return
        stopping.set()
        loop.call_soon_threadsafe(loop.call_later, pause_seconds, stop_server, number, None)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


app = create_app(_settings, _running)


class GatewayOnly:
    """ASGI middleware that sends every request to the gateway, because the routes of BentoML must not be public."""

    def __init__(self, app: ASGIApp) -> None:
        self._bento = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._bento(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            # A client that keeps its connection would send its next request while the service closes it.
            context: Context | None = getattr(app.state, "context", None)
            if message["type"] == "http.response.start" and context is not None and context.stopping.is_set():
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await app(scope, receive, send_and_close)


@bentoml.service(
    name="gateway",
    workers=1,  # it also runs the jobs; to scale, run more deployments on one database
    traffic={"timeout": _UNLIMITED_SECONDS},
    http={"host": _settings.host, "port": _settings.port},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(app, path="/", name="gateway")  # BentoML starts and stops mounted applications with the service
class Gateway:
    """The public HTTP API. It has no BentoML endpoints.

    The names of the attributes are the fields of `services.inference.client.InferenceClients`.
    """

    if _settings.inference:  # BentoML would load a service that has no process of its own in the gateway
        generator = bentoml.depends(GeneratorService)
        classifier = bentoml.depends(ClassifierService)
        authenticity = bentoml.depends(AuthenticityService)
        explainer = bentoml.depends(ExplainerService)
        projector = bentoml.depends(ProjectorService)


# BentoML uses these after it has imported this module. Without them `bentoml serve` would listen on further TCP ports.
_bentoml_impl.server.serve_http = serve_bento
cancel_timers_of_requests()
use_batch_dispatcher()
tracing.disable_spans_of_bentoml()

Gateway.add_asgi_middleware(GatewayOnly)  # type: ignore[attr-defined]  # the class is a BentoML service now
