"""The composition root: the gateway in front, all other services behind it, in one BentoML deployment.

`python -m services.serve` runs it, with a message for people; `bentoml serve services.service:Gateway` does so without.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType

import _bentoml_impl.server  # type: ignore[import-untyped]
import bentoml
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import logs
from services.composition import compose
from services.data_folder import prepare_data_folder, restrict_new_files
from services.gateway.app import create_app
from services.gateway.dependencies import Context
from services.inference.authenticity import Authenticity
from services.inference.classifier import Classifier
from services.inference.client import InferenceClients
from services.inference.explainer import Explainer
from services.inference.generator import Generator
from services.inference.projector import Projector
from services.models import Models
from services.parent_watchdog import exit_with_parent
from services.settings import SettingsError, settings_of_process
from services.supervisor import serve_bento, stop_pause
from services.worker import cancel_timers_of_requests

logger = logging.getLogger("dermis.service")

_settings = settings_of_process()
_FOREVER_SECONDS = 1e9  # routes have limits of their own


@asynccontextmanager
async def _running() -> AsyncIterator[Context]:
    """Everything that the routes need, started; stopped again when the service ends."""
    logs.configure(_settings.log_level)
    exit_with_parent()
    restrict_new_files()
    try:
        await asyncio.to_thread(prepare_data_folder, _settings)
    except SettingsError as error:
        logger.error("cannot start", extra={"problem": str(error)})
        raise
    models = await asyncio.to_thread(Models, _settings.bundles, _settings.default_model)
    for location, problem in models.check().items():
        logger.error("model not served", extra={"location": location, "problem": problem})
    service = bentoml.get_current_service()
    inference = InferenceClients.connect(lambda name: getattr(service, name).to_async, models)
    composition = compose(_settings, models, inference)
    with _announcing(composition.context.stopping, stop_pause(_settings)):
        async with composition.running() as context:
            yield context


@contextmanager
def _announcing(stopping: threading.Event, pause_seconds: float) -> Iterator[None]:
    """When the process gets a signal to end, set `stopping` at once and let the server know after a pause.

    In the pause /readyz fails while requests are still answered, so that whoever distributes them sends no more. Open streams
    end when `stopping` is set. A second signal ends the pause.
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

    def announce(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            stop_server(number, frame)
            return
        stopping.set()
        loop.call_soon_threadsafe(loop.call_later, pause_seconds, stop_server, number, None)

    for number in before:
        signal.signal(number, announce)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


app = create_app(_settings, _running)


class GatewayOnly:
    """ASGI middleware that gives every request to the gateway: BentoML's own routes are not for the public."""

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
    workers=1,  # it also works on the dataset jobs; more of them are more deployments on one database
    traffic={"timeout": _FOREVER_SECONDS},
    http={"host": _settings.host, "port": _settings.port},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(app, path="/", name="gateway")  # BentoML starts and stops what is mounted with the service
class Gateway:
    """The public HTTP API. It has no endpoints of BentoML's own."""

    generator = bentoml.depends(Generator)
    classifier = bentoml.depends(Classifier)
    authenticity = bentoml.depends(Authenticity)
    explainer = bentoml.depends(Explainer)
    projector = bentoml.depends(Projector)


# BentoML looks these up after it has imported this module. `bentoml serve` would listen on further TCP ports by itself.
_bentoml_impl.server.serve_http = serve_bento
cancel_timers_of_requests()

Gateway.add_asgi_middleware(GatewayOnly)  # type: ignore[attr-defined]  # a BentoML service by now
