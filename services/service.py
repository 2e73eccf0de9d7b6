"""The composition root: the gateway in front, all other services behind it, in one BentoML deployment.

`bentoml serve services.service:Gateway` runs it, `python -m services.serve` does so with a message for people.
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

import bentoml
from starlette.types import ASGIApp, Receive, Scope, Send

from services import logs
from services.authenticity import Authenticity
from services.classifier import Classifier
from services.data_folder import prepare_data_folder, private_temporary_files, restrict_new_files
from services.explainer import Explainer
from services.gateway.app import create_app
from services.gateway.comparisons import Comparisons
from services.gateway.dependencies import Context
from services.gateway.heat_maps import HeatMaps
from services.gateway.uploads import Uploads
from services.generator import Generator
from services.jobs.projection_jobs import ProjectionJobs
from services.jobs.service import DatasetJobs
from services.jobs.table import JobTable
from services.jobs.workshop import Workshop
from services.models import Models
from services.orphans import exit_with_parent
from services.projector import Projector
from services.remote import RemoteAuthenticity, RemoteClassifier, RemoteExplainer, RemoteGenerator, RemoteProjector
from services.settings import SettingsError, settings_of_process

logger = logging.getLogger("dermis.service")

_settings = settings_of_process()
_FOREVER_SECONDS = 1e9  # downloads and event streams have no natural end; /v1/images has a limit of its own


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
    shop = Workshop(
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
    jobs = DatasetJobs(_settings, shop)

    parts = (generator, classifier, authenticity, explainer, projector)

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

    async def not_alive() -> str | None:
        found = await asyncio.gather(*(part.not_alive() for part in parts))
        return "; ".join(filter(None, found)) or None

    with private_temporary_files(_settings), _announcing(stopping):
        await asyncio.to_thread(jobs.start)
        try:
            yield Context(
                settings=_settings,
                models=models,
                jobs=jobs,
                projections=ProjectionJobs(_settings, shop),
                generate=generator.images,
                draw=generator.draw,
                classify=classifier.logits,
                nearest=authenticity.nearest,
                comparisons=Comparisons(_settings.max_compared_per_minute),
                uploads=uploads,
                heat_maps=HeatMaps(_settings, explainer.heat_map),
                not_ready=not_ready,
                not_alive=not_alive,
                stopping=stopping,
            )
        finally:
            uploads.close()
            await asyncio.to_thread(jobs.stop)


@contextmanager
def _announcing(stopping: threading.Event) -> Iterator[None]:
    """Set `stopping` when the process is told to end: the server then waits for open streams, which wait for this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def announce(number: int, frame: FrameType | None) -> Any:
        stopping.set()
        handler = before[signal.Signals(number)]
        return handler(number, frame) if callable(handler) else None

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
        await (app if scope["type"] == "http" else self._bento)(scope, receive, send)


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


Gateway.add_asgi_middleware(GatewayOnly)  # type: ignore[attr-defined]  # a BentoML service by now
