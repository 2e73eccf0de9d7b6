"""The generator as the gateway sees it: a call may wait, may fail, and says which of the two it was."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from bentoml.exceptions import BentoMLException, ServiceUnavailable

from services.gateway.metrics import images_generated
from services.models import Models
from services.samples import GeneratorFailedError, GeneratorUnavailableError, Image, Samples, to_bytes

# Rows of one call: what a shard asks for at a time, so that a large request of one user does not hold up the others.
_PIECE = 32
_DESCRIBE_SECONDS = 4.0  # less than the probes in k8s/dermis.yaml wait
_FRESH_SECONDS = 2.0
# A generator that has been away for so long will not come back by itself.
_LOST_SECONDS = 600.0


class RemoteGenerator:
    """Calls to the generator service through BentoML's asynchronous client. Use it on one event loop."""

    def __init__(self, client: Any, models: Models) -> None:
        self._client = client
        self._models = models
        self._described: Mapping[str, Any] | None = None
        self._described_at = float("-inf")
        self._seen = time.monotonic()

    async def images(self, rows: Samples) -> list[Image]:
        """Images of rows, in their order. GeneratorUnavailableError or GeneratorFailedError."""
        pieces = [rows[start : start + _PIECE] for start in range(0, len(rows), _PIECE)]
        made = [item for part in await asyncio.gather(*map(self._images, pieces)) for item in part]
        for item in made:
            if isinstance(item, str):
                raise GeneratorUnavailableError(item)
        for bundle in self._models.bundles:
            count = int((rows["model"] == bundle.digest.encode("ascii")).sum())
            if count:
                images_generated.labels(bundle.name).inc(count)
        return made

    async def _images(self, rows: Samples) -> list[Any]:
        made: list[Any] = await self._call("generate", to_bytes(rows))
        if len(made) != len(rows):
            raise GeneratorFailedError(f"the generator gave {len(made)} images for {len(rows)} samples")
        return made

    async def identity(self, digest: str) -> Mapping[str, str]:
        """What draws the images of this bundle, for manifests. Errors as in `images`."""
        described = await self._describe()
        found = described["identities"].get(digest)
        if found is None:
            reasons = "; ".join(described["problems"]) or "restart the service to load it"
            raise GeneratorUnavailableError(f"the generator has no model with digest {digest[:12]}: {reasons}")
        return dict(found)

    async def not_ready(self) -> str | None:
        """Why the generator cannot draw every served model now; None if it can."""
        try:
            async with asyncio.timeout(_DESCRIBE_SECONDS):
                described = await self._describe()
        except (TimeoutError, GeneratorUnavailableError, GeneratorFailedError):
            return "the generator is starting or does not answer"
        missing = [bundle.name for bundle in self._models.bundles if bundle.digest not in described["identities"]]
        if missing:
            reasons = "; ".join(described["problems"]) or "restart the service to load them"
            return f"the generator did not load {', '.join(missing)}: {reasons}"
        return None

    async def not_alive(self) -> str | None:
        """Why only a restart can help; None if the generator answers or may yet."""
        if await self.not_ready() is None or time.monotonic() - self._seen < _LOST_SECONDS:
            return None
        return f"the generator has not answered for {_LOST_SECONDS:.0f} s"

    async def _describe(self) -> Mapping[str, Any]:
        now = time.monotonic()
        if self._described is None or now - self._described_at > _FRESH_SECONDS:
            self._described = await self._call("describe")
            self._described_at = now
        return self._described

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            result = await getattr(self._client, method)(*arguments)
        except ServiceUnavailable:
            raise GeneratorUnavailableError("the generator is overloaded; try again") from None
        except BentoMLException as error:
            raise GeneratorFailedError(f"the generator failed: {error}") from error
        except (OSError, EOFError, TimeoutError) as error:  # aiohttp's errors of connections are OSErrors
            raise GeneratorUnavailableError("the generator does not answer; try again") from error
        self._seen = time.monotonic()
        return result
