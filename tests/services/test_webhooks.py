"""Tests of webhooks: signed messages that survive restarts, and receivers that are hostile, slow or not to be reached."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import sqlalchemy as sa
import standardwebhooks
from dermis_client import (
    AsyncDermisClient,
    DermisClient,
    InvalidRequestError,
    RateLimitError,
    UnprocessableEntityError,
    Webhook,
)

from benchmarks.components.postgres import Postgres
from dermis.bundle import Bundle
from real_servers import running_postgres
from service_kit import service, wait_for
from services.jobs.database import writing
from services.jobs.table import JobTable
from services.settings import Settings
from services.webhooks import deliverer, outbox, sending
from services.webhooks.deliverer import Deliverer, DeliveryOrder
from services.webhooks.outbox import Claim, Due, TooManyWebhooksError, WebhookTable, add_messages
from services.webhooks.sending import Allowed, Sender

LOOPBACK = Allowed.of(["127.0.0.0/8"])
JOB = f"ds_{'0' * 32}"


@dataclass
class Receiver:
    """A receiver whose answer depends on the path, and what it received."""

    port: int
    received: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)
    status: int = 200

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextmanager
def receiving(certificate: tuple[Path, Path] | None = None, clients: Path | None = None) -> Iterator[Receiver]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.received.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            if self.path == "/slow":
                stop.wait(30)
                return
            self.send_response(302 if self.path == "/redirect" else receiver.status)
            if self.path == "/redirect":
                self.send_header("Location", receiver.url("/redirected"))
            self.end_headers()
            try:
                while self.path == "/huge" and not stop.is_set():
                    self.wfile.write(b"x" * (1 << 20))
            except OSError:
                pass

        def log_message(self, *_: Any) -> None: ...

    stop = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        if clients is not None:  # the authority of the certificates that clients must have
            context.load_verify_locations(clients)
            context.verify_mode = ssl.CERT_REQUIRED
        server.socket = context.wrap_socket(server.socket, server_side=True)
    receiver = Receiver(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield receiver
    finally:
        stop.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[WebhookTable]:
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        name = f"hooks{time.monotonic_ns()}"
        with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        url = server.url_of(name)
    jobs = JobTable(url)
    jobs.open()
    jobs.close()
    made = WebhookTable(url)
    yield made
    made.close()


def end_job(table: WebhookTable, state: str = "succeeded", tenant: str = "a") -> None:
    with writing(table._engine) as connection:
        add_messages(connection, tenant=tenant, kind="dataset", job_id=JOB, state=state)


def claim_due(table: WebhookTable, now: float, busy: Sequence[str] = ()) -> list[Claim]:
    """Claim a message of every endpoint that has one."""
    return table.claim([each.endpoint for each in table.due(busy, now)], now)


def send(url: str, allowed: Allowed = LOOPBACK) -> tuple[int | None, str]:
    async def run() -> tuple[int | None, str]:
        sender = Sender(allowed)
        try:
            return await sender.send(url, f"whsec_{base64.b64encode(b'k' * 32).decode()}", "msg_1", 1, "{}")
        finally:
            await sender.close()

    return asyncio.run(run())


def deliver(table: WebhookTable, allowed: Allowed = LOOPBACK) -> None:
    """Send everything that is due now."""

    async def run() -> None:
        each = Deliverer(table, Sender(allowed))
        await each.deliver_due()
        await each.idle()
        await each._sender.close()

    asyncio.run(run())


def test_message_is_for_the_tenant_and_event_and_is_signed(table: WebhookTable, receiver: Receiver) -> None:
    wanted = table.create("a", receiver.url("/hook"), ["dataset.succeeded"], 5)
    table.create("b", receiver.url("/other-tenant"), outbox.EVENTS, 5)
    table.create("a", receiver.url("/other-event"), ["dataset.failed"], 5)
    end_job(table)
    deliver(table)
    ((path, headers, body),) = receiver.received
    assert (path, json.loads(body)["type"]) == ("/hook", "dataset.succeeded")
    assert json.loads(body)["data"] == {"object": "dataset", "id": JOB, "state": "succeeded"}
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    reference = standardwebhooks.Webhook(wanted.secret)
    assert reference.verify(body, headers) == json.loads(body)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        reference.verify(body.replace(b"succeeded", b"failed"), headers)
    (message,) = table.messages(wanted.id)
    assert (message.id, message.state, message.attempts) == (headers["webhook-id"], "delivered", 1)


def test_signature_is_that_of_standard_webhooks() -> None:
    """The example of the specification's libraries."""
    secret, message, moment = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert sending.signature(secret, message, moment, '{"test": 2432232314}') == expected


def test_failed_message_is_tried_again_and_then_dead(
    table: WebhookTable, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", (0, 0))
    endpoint = table.create("a", receiver.url(), outbox.EVENTS, 5)
    receiver.status = 500
    end_job(table)
    for _ in range(5):
        deliver(table)
    (message,) = table.messages(endpoint.id, "dead")
    assert (message.attempts, message.outcome, len(receiver.received)) == (3, "status 500", 3)
    assert len({headers["webhook-id"] for _, headers, _ in receiver.received}) == 1
    receiver.status = 204
    assert table.retry(endpoint.id, message.id) is not None
    deliver(table)
    assert table.messages(endpoint.id)[0].state == "delivered"
    table.remove_old(time.time() + 8 * 86_400)
    assert table.messages(endpoint.id) == []


def test_messages_that_waited_while_webhooks_were_off_are_not_sent_after_a_week(
    table: WebhookTable, receiver: Receiver
) -> None:
    endpoint = table.create("a", receiver.url(), outbox.EVENTS, 5)
    end_job(table)
    table.remove_old(time.time() + 6 * 86_400)
    assert [message.state for message in table.messages(endpoint.id)] == ["waiting"]
    with writing(table._engine) as connection:  # sent again by hand: it is old, and due now
        connection.execute(sa.text("UPDATE dermis_webhook_messages SET created_at = 0, state = 'dead'"))
    (message,) = table.messages(endpoint.id)
    table.retry(endpoint.id, message.id)
    table.remove_old()
    assert [message.state for message in table.messages(endpoint.id)] == ["waiting"]
    table.remove_old(time.time() + 8 * 86_400)
    assert table.messages(endpoint.id) == []


def test_next_attempt_is_later_and_later(table: WebhookTable, receiver: Receiver) -> None:
    endpoint = table.create("a", receiver.url(), outbox.EVENTS, 5)
    receiver.status = 503
    end_job(table)
    began = time.time()
    deliver(table)
    (message,) = table.messages(endpoint.id)
    assert message.state == "waiting" and began + 5 <= message.due_at <= time.time() + 5.5
    (claim,) = claim_due(table, message.due_at)
    table.record(claim, "status 503", 503, 1000.0)
    assert 1300 <= table.messages(endpoint.id)[0].due_at <= 1330


def test_gone_receiver_is_disabled(table: WebhookTable, receiver: Receiver) -> None:
    endpoint = table.create("a", receiver.url(), outbox.EVENTS, 5)
    receiver.status = 410
    end_job(table)
    deliver(table)
    end_job(table)
    disabled = table.get("a", endpoint.id)
    assert disabled is not None and disabled.disabled_at is not None
    assert [message.state for message in table.messages(endpoint.id)] == ["dead"]


def test_message_is_claimed_by_one_process_and_again_when_that_died(table: WebhookTable) -> None:
    for _ in range(4):
        table.create("a", "https://receiver.example/", outbox.EVENTS, 5)
    end_job(table)
    now, claims, barrier = time.time() + 1, list[Claim](), threading.Barrier(4)

    def claim() -> None:
        barrier.wait(30)
        claims.extend(claim_due(table, now))

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claims) == 4 == len({each.message.id for each in claims})
    assert claim_due(table, now + outbox.CLAIM_SECONDS - 1) == []
    again = claim_due(table, now + outbox.CLAIM_SECONDS)
    assert len(again) == 4
    table.record(claims[0], "status 500", 500, now)  # the first process was slow, not dead: its outcome comes too late
    of_it = next(each for each in again if each.message.id == claims[0].message.id)
    assert table.messages(of_it.endpoint.id)[0].outcome is None
    busy = [each.endpoint.id for each in again[:3]]
    assert len(claim_due(table, now + 1000, busy)) == 1


def test_claims_that_were_lost_are_no_attempts(table: WebhookTable) -> None:
    endpoint, now = table.create("a", "https://receiver.example/", outbox.EVENTS, 5), time.time() + 1
    end_job(table)
    for _ in range(len(outbox.RETRY_SECONDS) + 2):
        (claim,) = claim_due(table, now)
        now += outbox.CLAIM_SECONDS
    table.record(claim, "status 503", 503, now)
    (message,) = table.messages(endpoint.id)
    assert (message.state, message.attempts, message.outcome) == ("waiting", 1, "status 503")


def test_slow_receivers_of_a_tenant_delay_no_other_tenant(table: WebhookTable) -> None:
    """One message of another tenant is sent although ten receivers of the first one do not answer."""
    for _ in range(10):
        table.create("a", "https://slow.example/", outbox.EVENTS, 10)
    end_job(table)
    table.create("b", "https://receiver.example/", outbox.EVENTS, 10)
    end_job(table, tenant="b")
    sent = list[str]()

    class Silent(Sender):
        async def send(self, url: str, *_: Any) -> tuple[int | None, str]:
            sent.append(url)
            if "slow" in url:
                await asyncio.sleep(60)
            return 200, "status 200"

    async def run() -> None:
        each = Deliverer(table, Silent(LOOPBACK))
        await each.deliver_due()
        while "https://receiver.example/" not in sent:
            await asyncio.sleep(0.01)
        await each.deliver_due()
        await each.stop()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert sorted(sent) == ["https://receiver.example/"] + ["https://slow.example/"] * 4


def test_messages_go_to_tenants_and_endpoints_in_turn() -> None:
    order, due = DeliveryOrder(), [Due(f"a{k}", "a") for k in range(9)] + [Due("b0", "b"), Due("c0", "c")]
    assert order.choose(due, {}) == ["a0", "b0", "c0", "a1", "a2", "a3"]
    assert order.choose(due, {"a": 4}) == ["b0", "c0"]
    assert order.choose(due, {"a": 3, "b": 1, "d": 3}) == ["a4"]
    assert order.choose(due, {"d": 4, "e": 2}) == ["b0", "c0"]


def test_message_that_is_not_dead_is_not_sent_again_and_enables_nothing(table: WebhookTable) -> None:
    endpoint = table.create("a", "https://receiver.example/", outbox.EVENTS, 5)
    end_job(table)
    (claim,) = claim_due(table, time.time())
    table.record(claim, "status 410", 410, time.time())
    assert table.retry(endpoint.id, "msg_0") is None
    disabled = table.get("a", endpoint.id)
    assert disabled is not None and disabled.disabled_at is not None
    assert table.retry(endpoint.id, claim.message.id) is not None
    assert table.all("a")[0].disabled_at is None


def test_tenant_has_a_limited_number(table: WebhookTable) -> None:
    table.create("a", "https://receiver.example/", outbox.EVENTS, 1)
    with pytest.raises(TooManyWebhooksError):
        table.create("a", "https://receiver.example/", outbox.EVENTS, 1)
    table.create("b", "https://receiver.example/", outbox.EVENTS, 1)
    assert not table.delete("a", table.all("b")[0].id) and table.delete("b", table.all("b")[0].id)


def test_hostile_receivers(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr(sending, "_SECONDS", 1.0)
        assert send(receiver.url("/slow")) == (None, "no answer in 1 s")
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            assert send(url)[1] == "no answer in 1 s"
    assert send(receiver.url("/huge")) == (200, "status 200")
    assert send(receiver.url("/redirect")) == (302, "status 302")
    assert time.monotonic() - began < 30
    assert [path for path, _, _ in receiver.received if path != "/slow"] == ["/huge", "/redirect"]
    assert send(url)[1].startswith("no connection")


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "127.1"])
def test_names_of_private_addresses_are_refused(host: str, receiver: Receiver) -> None:
    assert send(f"https://{host}:{receiver.port}/", Allowed.of([]))[1].startswith("refused: ")
    assert receiver.received == []


def test_connection_is_opened_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [["198.41.0.4"], ["127.0.0.1"]]
    connected: list[str] = []

    def resolve(_host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in answers.pop(0)]

    async def post(_self: Sender, _url: str, _host: str, address: str, *_: Any) -> int:
        connected.append(address)
        return 200

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(Sender, "_post", post)
    assert send("https://rebinding.example/", Allowed.of([])) == (200, "status 200")
    assert connected == ["198.41.0.4"] and len(answers) == 1
    answers[:] = [["198.41.0.4", "10.0.0.1"]]  # one private address among public ones
    refused = send("https://rebinding.example/", Allowed.of([]))
    assert refused == (None, "refused: the host has no address, or one that is not public")
    answers[:] = [[]]
    assert send("https://rebinding.example/", Allowed.of([])) == refused  # it does not show which internal names exist
    answers.clear()

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert send("https://rebinding.example/", Allowed.of([])) == refused


def test_slow_name_servers_keep_no_thread_that_others_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are looked up for a long time end their attempts only: other work of the process goes on."""
    released = threading.Event()
    resolve = socket.getaddrinfo

    def slow(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "slow.example":
            released.wait(60)
            raise socket.gaierror
        return resolve(host, *arguments, **options)

    async def run() -> list[Any]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(2))
        sender = Sender(Allowed.of([]))
        secret = f"whsec_{base64.b64encode(bytes(32)).decode()}"
        sent = [asyncio.create_task(sender.send("https://slow.example/", secret, "m", 1, "{}")) for _ in range(3)]
        try:
            await asyncio.sleep(0.05)
            await asyncio.wait_for(asyncio.to_thread(int), 10)
            await asyncio.wait_for(loop.getaddrinfo("127.0.0.1", 1), 10)
            return await asyncio.gather(*sent)
        finally:
            released.set()
            await sender.close()

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(sending, "_SECONDS", 0.5)
    assert asyncio.run(run()) == [(None, "no answer in 0.5 s")] * 3


def test_certificate_must_be_that_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography", reason="cryptography is not installed")
    from certificates import make_authority

    authority = make_authority(tmp_path / "authority.pem")
    authority.issue(tmp_path / "tls.crt", tmp_path / "tls.key")
    resolve = socket.getaddrinfo

    def alias(host: Any, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == "receiver.example" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", alias)
    with receiving((tmp_path / "tls.crt", tmp_path / "tls.key")) as receiver:
        assert send(f"https://localhost:{receiver.port}/")[1].startswith("its certificate is not valid")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
        assert send(f"https://localhost:{receiver.port}/") == (200, "status 200")
        assert send(f"https://receiver.example:{receiver.port}/")[1].startswith("its certificate is not valid")
        assert receiver.received[0][1]["host"] == f"localhost:{receiver.port}"
        assert len(receiver.received) == 1
    with receiving((tmp_path / "tls.crt", tmp_path / "tls.key"), authority.path) as receiver:
        for _ in range(5):  # it refuses after the handshake of TLS 1.3: httpx lets the error of that through
            assert send(f"https://localhost:{receiver.port}/")[0] is None


def test_attempt_that_ends_with_an_unforeseen_error_is_recorded(
    table: WebhookTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", (0,))
    errors = [ssl.SSLError(1, "tlsv13 alert certificate required"), RuntimeError("unforeseen")]

    async def post(*_: Any) -> int:
        raise errors.pop(0)

    monkeypatch.setattr(Sender, "_post", post)
    endpoint = table.create("a", "http://127.0.0.1:9/", outbox.EVENTS, 5)
    end_job(table)
    deliver(table)
    assert table.messages(endpoint.id)[0].outcome == "the connection broke (SSLError)"
    deliver(table)
    (message,) = table.messages(endpoint.id, "dead")
    assert (message.attempts, message.outcome) == (2, "failed (RuntimeError)")


def test_routes_create_list_and_delete_webhooks(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with service(tiny_bundle.location, tmp_path, max_webhooks=1) as running:
        created = running.client.post("/v1/webhooks", json={"url": "https://receiver.example/"})
        assert created.status_code == 201 and created.headers["location"] == f"/v1/webhooks/{created.json()['id']}"
        assert running.client.post("/v1/webhooks", json={"url": "https://receiver.example/"}).status_code == 429
        for url in ("https://10.0.0.1/", "http://receiver.example/"):
            refused = running.client.post("/v1/webhooks", json={"url": url})
            assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "url")
        hook = created.headers["location"]
        assert running.client.get("/v1/webhooks").json()["data"] == [running.client.get(hook).json()]
        assert "secret" not in running.client.get(hook).json()
        assert running.client.get(f"{hook}/messages").json() == {"data": []}
        retries = [running.client.post(f"{hook}/messages/msg_0/retry") for _ in range(61)]
        assert [each.status_code for each in retries] == [404] * 60 + [429]
        assert 0 < int(retries[-1].headers["retry-after"]) <= 61
        assert running.client.delete(hook).status_code == 204 and running.client.get(hook).status_code == 404


def test_clients_of_python_make_webhooks_and_send_dead_messages_again(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with service(tiny_bundle.location, tmp_path, max_webhooks=1) as running:
        sdk = DermisClient("http://localhost", http_client=running.client, max_retries=0)
        made = sdk.webhooks.create("https://receiver.invalid/", events=["dataset.succeeded"])
        assert made.secret.startswith("whsec_") and made.secret not in repr(made)
        with pytest.raises(RateLimitError):
            sdk.webhooks.create("https://receiver.invalid/")
        with pytest.raises(UnprocessableEntityError, match="url"):
            sdk.webhooks.create("https://10.0.0.1/")
        assert sdk.webhooks.list() == [sdk.webhooks.retrieve(made.id)]
        assert sdk.webhooks.retrieve(made.id).events == ["dataset.succeeded"]
        table = WebhookTable(running.settings.jobs_url)
        end_job(table, tenant="default")
        with writing(table._engine) as connection:
            connection.execute(outbox._messages.update().values(state="dead", due_at=time.time(), ended_at=time.time()))
        table.close()
        (dead,) = sdk.webhooks.messages(made.id, state="dead")
        assert (dead.event, dead.state, dead.next_attempt_at) == ("dataset.succeeded", "dead", None)
        assert sdk.webhooks.messages(made.id, state="delivered") == []
        assert sdk.webhooks.retry(made.id, dead.id).state == "waiting"
        for bad in ("..", "a/b", ""):
            with pytest.raises(InvalidRequestError):
                sdk.webhooks.retry(made.id, bad)

        async def delete() -> list[Webhook]:
            transport = httpx.ASGITransport(app=running.client.app)
            async with httpx.AsyncClient(transport=transport) as http:
                client = AsyncDermisClient("http://localhost", http_client=http)
                await client.webhooks.delete(made.id)
                return await client.webhooks.list()

        assert asyncio.run(delete()) == []


@pytest.mark.full
def test_message_survives_a_restart_of_the_service(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deliverer, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", (0.2,) * 1000)
    values: dict[str, Any] = {"max_webhooks": 1, "webhook_hosts": ("127.0.0.1",)}
    with receiving() as receiver:
        url = receiver.url("/hook?token=secret-token")
    with service(tiny_bundle.location, tmp_path, **values) as running, caplog.at_level(logging.DEBUG):
        created = running.client.post("/v1/webhooks", json={"url": url})
        hook = created.headers["location"]
        running.wait(running.ask({"classes": {"benign": 1}}))
        wait_for(lambda: running.client.get(f"{hook}/messages").json()["data"][0]["attempts"] >= 2)
        (message,) = running.client.get(f"{hook}/messages").json()["data"]
        assert (message["event"], message["state"]) == ("dataset.succeeded", "waiting")
    with service(tiny_bundle.location, tmp_path, **values) as running, receiving() as other:
        table = WebhookTable(running.settings.jobs_url)
        with writing(table._engine) as connection:
            connection.execute(outbox._endpoints.update().values(url=other.url("/hook")))
        wait_for(lambda: other.received)
        wait_for(lambda: running.client.get(f"{hook}/messages?state=delivered").json()["data"])
        assert other.received[0][1]["webhook-id"] == message["id"]
        assert running.client.post(f"{hook}/messages/{message['id']}/retry").json()["state"] == "delivered"
        table.close()
    assert "secret-token" not in caplog.text and created.json()["secret"] not in caplog.text


def test_webhooks_are_off_by_default(tmp_path: Path) -> None:
    assert Settings(_env_file=None, data_dir=tmp_path).max_webhooks == 0
