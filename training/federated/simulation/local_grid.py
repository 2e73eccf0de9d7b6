"""A grid in one process: it calls the ClientApp of each client in turn, without Flower's servers and without Ray.

Simulations and tests use it. Server and clients are the same code as in a deployment, and messages hold the same arrays;
only the network and the processes are missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_CRASHED = 1002


class LocalGrid(Grid):
    """A grid whose node i, from 1, is a client with `node_configs[i - 1]`.

    An exception on a client becomes an error reply, as in a deployment.

    Attributes:
        connected: Nodes that receive messages; tests change it.
    """

    def __init__(
        self, app: ClientApp, node_configs: Sequence[Mapping[str, Any]], run_config: Mapping[str, Any]
    ) -> None:
        self.app = app
        self.contexts = {
            node: Context(1, node, dict(config), RecordDict(), dict(run_config))
            for node, config in enumerate(node_configs, 1)
        }
        self.connected = set(self.contexts)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.connected)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for number, message in enumerate(messages):
            node = message.metadata.dst_node_id
            if node not in self.connected:
                continue
            message.metadata.__dict__["_message_id"] = str(number)
            message.content = _copy(message.content)
            try:
                replies.append(self.app(message, self.contexts[node]))
            except Exception as error:
                replies.append(Message(Error(_CRASHED, f"{type(error).__name__}: {error}"), reply_to=message))
        return replies

    # The rest of the interface, which the server of dermis does not call.
    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        raise RuntimeError("a local grid has no Flower run")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return Message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise RuntimeError("a local grid replies immediately: call send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise RuntimeError("a local grid replies immediately: call send_and_receive")


def _copy(content: RecordDict) -> RecordDict:
    """Copy the records for one client, since handlers change them. Arrays are shared, as nothing changes them."""
    copied: dict[str, Any] = {name: cast(Any, type(record))(dict(record)) for name, record in content.items()}
    return RecordDict(copied)
