"""The composition root: the FastAPI gateway and the dataset jobs around the generator, as one BentoML deployment."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

import bentoml
import httpx
from bentoml.exceptions import BentoMLException, ServiceUnavailable
from starlette.types import ASGIApp, Receive, Scope, Send

from services import samples
from services.gateway.app import create_app
from services.gateway.dependencies import Context
from services.generator import Generator
from services.jobs.service import DatasetJobs
from services.jobs.table import JobTable
from services.jobs.work import Workshop
from services.logs import configure
from services.models import Models
from services.orphans import exit_with_parent
from services.samples import GeneratorFailedError, GeneratorUnavailableError, Image, Samples
from services.settings import settings_of_process

_settings = settings_of_process()
_READY_SECONDS = 5.0
_FOREVER_SECONDS = 1e9  # downloads and event streams have no natural end; /v1/images has a limit of its own

T = TypeVar("T")


class GatewayOnly:
    """ASGI middleware that gives every request to the gateway: BentoML's own routes are not for the public."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            gateway: Gateway = bentoml.get_current_service()
            await gateway.app(scope, receive, send)
        else:
            await self._app(scope, receive, send)


@bentoml.service(
    name="gateway",
    workers=1,
    traffic={"timeout": _FOREVER_SECONDS},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Gateway:
    """The public HTTP API. One process: it also works on the dataset jobs."""

    generator = bentoml.depends(Generator)

    def __init__(self) -> None:
        exit_with_parent()
        configure(_settings.log_level)
        self._stopping = threading.Event()

    @bentoml.on_startup
    async def start(self) -> None:
        """Build the application and start the jobs, on the event loop that serves."""
        self._models = Models(_settings.bundles)
        shop = Workshop(
            table=JobTable(_settings.jobs_url),
            models=self._models,
            generate=self._generate,
            identity=self._identity,
            loop=asyncio.get_running_loop(),
            storage=_settings.storage,
            min_free_bytes=_settings.min_free_bytes,
        )
        self._jobs = DatasetJobs(_settings, shop)
        await asyncio.to_thread(self._jobs.start)
        self.app = create_app(
            Context(
                settings=_settings,
                models=self._models,
                jobs=self._jobs,
                generate=self._generate,
                not_ready=self._not_ready,
                not_alive=self._not_alive,
                stopping=self._stopping,
            )
        )

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """Stop the jobs between two batches; they go on at the next start."""
        self._stopping.set()
        await asyncio.to_thread(self._jobs.stop)

    async def _generate(self, rows: Samples) -> list[Image]:
        """Images of rows. A batch never holds more than the generator takes at once."""
        size = _settings.max_batch_size
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        calls = (_answer(self._remote.generate(rows=samples.to_bytes(part))) for part in parts)
        return [image for images in await asyncio.gather(*calls) for image in images]

    async def _identity(self, digest: str) -> Mapping[str, str]:
        found: dict[str, str] = await _answer(self._remote.identity(digest=digest))
        if not found:
            raise GeneratorFailedError(f"the generator has no model with digest {digest[:12]}; restart the service")
        return found

    @property
    def _remote(self) -> Any:
        return self.generator.to_async

    async def _not_ready(self) -> str | None:
        problems = await asyncio.to_thread(self._models.check)
        if problems:
            return "; ".join(problems.values())
        digest = self._models.find(self._models.default).digest
        try:
            await asyncio.wait_for(self._identity(digest), _READY_SECONDS)
        except (TimeoutError, GeneratorUnavailableError, GeneratorFailedError):
            return "the generator does not answer yet"
        return None

    async def _not_alive(self) -> str | None:
        return (
            None  # this process answers; a worker that hangs is not restarted by it, one that died is by its supervisor
        )


Gateway.add_asgi_middleware(GatewayOnly)  # type: ignore[attr-defined]  # a BentoML service by now


async def _answer(call: Awaitable[T]) -> T:
    """The generator's answer, or why there is none, in our own terms."""
    try:
        return await call
    except ServiceUnavailable as error:
        raise GeneratorUnavailableError("the generator is starting or overloaded; try again") from error
    except BentoMLException as error:
        raise GeneratorFailedError(f"the generator failed: {error}") from error
    except (httpx.TransportError, OSError) as error:
        raise GeneratorUnavailableError("the generator is not running; it is started again by itself") from error
