"""Deliver the messages of webhooks in the background of the gateway process."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

from services.webhooks.outbox import Claim, Due, WebhookTable
from services.webhooks.sending import Sender

logger = logging.getLogger("dermis.webhooks")

_POLL_SECONDS = 2.0
_MOST = 8  # messages at one time, one for each endpoint
_MOST_OF_TENANT = 4  # of these for one tenant, so that slow receivers of one do not delay the messages of others
_CLEAN_SECONDS = 3600.0


class DeliveryOrder:
    """The order in which tenants and their endpoints get messages: the one whose last message is the oldest first."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._last: dict[str, int] = {}  # number of the last message to a tenant or an endpoint

    def choose(self, due: Sequence[Due], sending: Mapping[str, int]) -> list[str]:
        """The endpoints that get a message now.

        Args:
            due: The endpoints that have messages.
            sending: The number of messages that are being sent, by tenant.
        """
        sending = Counter(sending)
        waiting = list(due)
        chosen: list[str] = []
        while sending.total() < _MOST:
            waiting = [each for each in waiting if sending[each.tenant] < _MOST_OF_TENANT]
            if not waiting:
                break
            following = min(waiting, key=lambda each: (self._last_of(each.tenant), self._last_of(each.endpoint)))
            waiting.remove(following)
            chosen.append(following.endpoint)
            sending[following.tenant] += 1
            self._last[following.tenant] = self._last[following.endpoint] = next(self._numbers)
        return chosen

    def _last_of(self, name: str) -> int:
        return self._last.get(name, 0)


class Deliverer:
    """Sends messages that are due, until it is stopped. Any number of processes may run one on the same database.

    Args:
        table: The messages.
        sender: Sends one message.
    """

    def __init__(self, table: WebhookTable, sender: Sender) -> None:
        self.table = table
        self._sender = sender
        self._sending: dict[str, tuple[str, asyncio.Task[None]]] = {}  # tenant and task, by endpoint
        self._order = DeliveryOrder()
        self._task: asyncio.Task[None] | None = None
        self._cleaned = 0.0

    def start(self) -> None:
        """Start in the background."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop. Messages that are being sent are interrupted, and sent again later."""
        tasks = [task for task in (self._task, *self._tasks()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sender.close()
        self.table.close()

    async def _run(self) -> None:
        while True:
            try:
                await self.deliver_due()
            except Exception as error:  # such as a database that cannot be reached: the messages wait in it
                logger.warning("webhooks not delivered", extra={"error": str(error).partition("\n")[0]})
            await asyncio.sleep(_POLL_SECONDS)

    async def deliver_due(self) -> None:
        """Start to send the messages that are due, as many as are allowed at one time."""
        now = time.time()
        if now - self._cleaned > _CLEAN_SECONDS:
            self._cleaned = now
            self._order = DeliveryOrder()  # so that it does not grow for ever
            await asyncio.to_thread(self.table.remove_old)
        if len(self._sending) >= _MOST:
            return
        due = await asyncio.to_thread(self.table.due, list(self._sending), now)
        chosen = self._order.choose(due, Counter(tenant for tenant, _ in self._sending.values()))
        for claim in await asyncio.to_thread(self.table.claim, chosen, now):
            task = asyncio.create_task(self._deliver(claim))
            self._sending[claim.endpoint.id] = claim.endpoint.tenant, task
            task.add_done_callback(partial(self._forget, claim.endpoint.id))

    def _forget(self, endpoint: str, _task: asyncio.Task[None]) -> None:
        self._sending.pop(endpoint, None)

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [task for _, task in self._sending.values()]

    async def idle(self) -> None:
        """Return when nothing is being sent."""
        while self._sending:
            await asyncio.gather(*self._tasks(), return_exceptions=True)
            await asyncio.sleep(0)

    async def _deliver(self, claim: Claim) -> None:
        message, endpoint = claim.message, claim.endpoint
        status: int | None
        try:
            status, outcome = await self._sender.send(
                endpoint.url, endpoint.secret, message.id, int(time.time()), message.body
            )
        except Exception as error:  # a message whose attempts are not recorded would be sent for ever
            logger.exception("webhook not sent", extra={"webhook_message": message.id, "webhook_webhook": endpoint.id})
            status, outcome = None, f"failed ({type(error).__name__})"
        delivered = status is not None and 200 <= status < 300
        level = logging.INFO if delivered else logging.WARNING
        fields = {"message": message.id, "webhook": endpoint.id, "attempt": message.attempts + 1, "outcome": outcome}
        logger.log(level, "webhook", extra={f"webhook_{name}": value for name, value in fields.items()})
        try:
            await asyncio.to_thread(self.table.record, claim, outcome, status, time.time())
        except Exception as error:  # the claim ends, and the message is sent again
            logger.warning("outcome of a webhook not recorded", extra={"error": str(error).partition("\n")[0]})
