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
from services.authenticity import Authenticity
from services.classifier import Classifier
from services.data_folder import prepare_data_folder, restrict_new_files
from services.explainer import Explainer
from services.gateway.app import create_app
from services.gateway.comparisons import Comparisons
from services.gateway.dependencies import Context
from services.gateway.heat_maps import HeatMaps
from services.gateway.uploads import Uploads
from services.generator import Generator
from services.jobs.context import JobContext
from services.jobs.service import JobService
from services.jobs.table import JobTable
from services.models import Models
from services.orphans import exit_with_parent
from services.projector import Projector
from services.remote import RemoteAuthenticity, RemoteClassifier, RemoteExplainer, RemoteGenerator, RemoteProjector
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
    here = bentoml.get_current_service()
    generator = RemoteGenerator(here.generator.to_async, models)
    classifier = RemoteClassifier(here.classifier.to_async, models)
    authenticity = RemoteAuthenticity(here.authenticity.to_async, models)
    explainer = RemoteExplainer(here.explainer.to_async, models)
    projector = RemoteProjector(here.projector.to_async, models)
    uploads = Uploads(_settings)
    stopping = threading.Event()
    ctx = JobContext(
        table=JobTable(_settings.jobs_url),
        models=models,
        generate=generator.images,
        identity=generator.identity,
        classify=classifier.logits,
        classifier_identity=classifier.identity,
        nearest=authenticity.nearest,
        expose=authenticity.expose,
        index_identity=authenticity.identity,
        project=projector.project,
        projection_steps=projector.steps,
        cancel_projection=projector.cancel,
        loop=asyncio.get_running_loop(),
        storage=_settings.storage,
        min_free_bytes=_settings.min_free_bytes,
        stopping=stopping,
    )
    jobs = JobService(_settings, ctx)

    parts = (generator, classifier, authenticity, explainer, projector)
    readiness_reason: str | None = ""

    async def not_ready() -> str | None:
        if stopping.is_set():
            return "the service is stopping"
        problems = await asyncio.to_thread(models.check)
        if problems:
            return "; ".join(problems.values())
        problem = await asyncio.to_thread(jobs.not_ready)
        if problem is not None:
            return problem
        found = await asyncio.gather(*(part.not_ready() for part in parts))
        return "; ".join(filter(None, found)) or None

    async def readiness() -> str | None:
        nonlocal readiness_reason
        reason = await not_ready()
        if reason != readiness_reason:
            logger.log(logging.WARNING if reason else logging.INFO, "readiness", extra={"missing": reason or "nothing"})
            readiness_reason = reason
        return reason

    async def not_alive() -> str | None:
        found = await asyncio.gather(*(part.not_alive() for part in parts))
        return "; ".join(filter(None, found)) or None

    with _announcing(stopping, stop_pause(_settings)):
        await asyncio.to_thread(jobs.start)
        try:
            yield Context(
                settings=_settings,
                models=models,
                jobs=jobs.datasets,
                projections=jobs.projections,
                generate=generator.images,
                draw=generator.draw,
                classify=classifier.logits,
                nearest=authenticity.nearest,
                comparisons=Comparisons(_settings.max_compared_per_minute),
                uploads=uploads,
                heat_maps=HeatMaps(_settings, explainer.heat_map),
                not_ready=readiness,
                not_alive=not_alive,
                stopping=stopping,
            )
        finally:
            uploads.close()
            await asyncio.to_thread(jobs.stop)


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
