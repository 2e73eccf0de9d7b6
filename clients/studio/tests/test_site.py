"""Tests of what the studio lets through, and with whose key. Gradio is replaced by an application that records requests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from dermis_studio import bodies, frame
from dermis_studio.access import COOKIE, Visitor, Visitors
from dermis_studio.downloads import MAX_DOWNLOADS, MAX_DOWNLOADS_OF_A_KEY
from dermis_studio.service import Service
from dermis_studio.site import MAX_BODY_BYTES, MAX_CANCELLATION_BYTES, StudioSite
from dermis_studio.uploads import MAX_BYTES, MAX_UPLOADS, MAX_UPLOADS_OF_A_KEY
from fastapi import FastAPI, Request, Response
from starlette.testclient import TestClient

DOCUMENT = (
    '<html><head><meta property="og:url" content="https://gradio.app/" /><link rel="manifest" href="/manifest.json" /></head>'
    '<body><gradio-app control_page_title="true"></gradio-app></body></html>'
)
SCOPES: dict[str, list[str] | None] = {
    "right": ["images", "datasets:read", "models:read"],
    "other": ["models:read"],
    "none": [],
}
SCOPES |= {f"study-{number}": ["studies"] for number in range(4)}
WAIT = {"Retry-After": "600"}
EVENT = {"fn_index": 0, "data": ["a", 1], "session_hash": "a"}
DATASET = f"ds_{'0' * 32}"
STUDY = f"st_{'0' * 32}"
UPLOAD = f"/studio/studies/{STUDY}/images"


@dataclass
class World:
    """A service, an application in the place of Gradio, and what reached both."""

    client: TestClient
    site: Any = None
    to_gradio: list[Request] = field(default_factory=list)
    to_service: list[httpx.Request] = field(default_factory=list)

    @property
    def gradio_paths(self) -> list[str]:
        return [request.url.path for request in self.to_gradio]


def make_world(*, open_service: bool = False, check_origin: bool = False) -> World:
    world = World(TestClient(FastAPI()))
    gradio = FastAPI()

    @gradio.api_route("/{path:path}", methods=["GET", "POST"])
    async def record(request: Request) -> Response:
        world.to_gradio.append(request)
        await request.body()
        answer = Response(DOCUMENT, media_type="text/html")
        answer.headers["Access-Control-Allow-Origin"] = "http://evil.example"
        return answer

    def answer(request: httpx.Request) -> httpx.Response:
        world.to_service.append(request)
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if request.url.host == "storage.test":
            return httpx.Response(200, stream=httpx.ByteStream(b"png"))
        if request.url.path.endswith(("/answers", "/files/step.png")):
            return httpx.Response(200, stream=httpx.ByteStream(b"truth"), headers={"Cache-Control": "no-store"})
        if request.url.path.endswith("/files/preview.png"):
            return httpx.Response(
                307, headers={"Location": "http://storage.test/preview.png?signature=1"}, stream=httpx.ByteStream(b"")
            )
        if request.url.path.endswith("/files/report.html"):
            return httpx.Response(
                307, headers={"Location": "http://storage.test/report.html?signature=1"}, stream=httpx.ByteStream(b"")
            )
        if request.url.path.endswith("/files/gone.zip"):
            body = {"type": "urn:dermis:problem:not-found", "title": "Not found", "detail": "it <b>expired</b>"}
            return httpx.Response(404, json=body)
        if request.url.path.endswith("/files/broken.zip"):
            return httpx.Response(503, text="<h1>proxy</h1>", headers={"Retry-After": "9"})
        if request.url.path.endswith("/files/images.zip"):
            headers = {"ETag": '"1"', "Set-Cookie": "a=b"}
            return httpx.Response(200 if SCOPES.get(key) else 401, stream=httpx.ByteStream(b"zip"), headers=headers)
        if request.url.path.endswith(f"{STUDY}/images"):
            busy = request.url.query == b"class=busy"
            return httpx.Response(503 if busy else 200, json={"added": 1}, headers={"Retry-After": "7"} if busy else {})
        if key == "busy":
            return httpx.Response(429, json={"title": "Too many calls", "detail": "60 in a minute"}, headers=WAIT)
        if SCOPES.get(key) is None and not (open_service and not key):
            return httpx.Response(401, json={"title": "no", "status": 401})
        scopes = SCOPES.get(key, list({scope for scopes in SCOPES.values() for scope in scopes or ()}))
        return httpx.Response(200, json={"tenant": "ward-3", "scopes": scopes, "quotas": []})

    service = Service("http://service.test", allow_plain_http=True)
    service._http = service._files = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    site = StudioSite(service, Visitors(service), gradio, "/studio", check_origin=check_origin)
    world.site = site
    world.client = TestClient(site, base_url="http://localhost", follow_redirects=False)  # type: ignore[arg-type]
    return world


@pytest.fixture
def world() -> World:
    return make_world()


def sign_in(world: World, key: str = "right") -> httpx.Response:
    return world.client.post("/studio/session", data={"key": key, "page": "datasets"})


def test_nothing_of_gradio_is_reachable_without_a_key(world: World) -> None:
    page = world.client.get("/studio/datasets")
    assert page.status_code == 200
    assert 'name="key"' in page.text
    for method, path in (("POST", "queue/join"), ("GET", "queue/data?session_hash=a"), ("POST", "cancel")):
        assert world.client.request(method, f"/studio/gradio_api/{path}").status_code == 401
    assert world.to_gradio == []


def test_key_is_kept_in_a_cookie_that_scripts_and_other_sites_cannot_use(world: World) -> None:
    refused = sign_in(world, "wrong")
    assert refused.status_code == 401
    assert "does not accept" in refused.text
    assert "wrong" not in refused.text
    assert "set-cookie" not in refused.headers
    accepted = sign_in(world)
    assert (accepted.status_code, accepted.headers["location"]) == (303, "/studio/datasets")
    cookie = accepted.headers["set-cookie"].lower()
    assert all(part in cookie for part in ("httponly", "samesite=strict", "path=/studio"))
    assert "max-age" not in cookie and "expires" not in cookie
    page = world.client.get("/studio/datasets")
    assert "right" not in page.text.replace("copyright", "")
    assert "ward-3" in page.text
    out = world.client.post("/studio/sign-out")
    assert out.headers["set-cookie"].startswith(f'{COOKIE}=""')
    assert 'name="key"' in world.client.get("/studio/datasets").text


def test_sign_in_leads_only_to_pages_of_the_studio(world: World) -> None:
    for page in ("//evil.example", "https://evil.example", "../v1", ""):
        answer = world.client.post("/studio/session", data={"key": "right", "page": page})
        assert answer.headers["location"] == "/studio/"


def test_only_what_the_pages_need_reaches_gradio(world: World) -> None:
    sign_in(world)
    reached = [
        "/studio/",
        "/studio/theme.css",
        "/studio/assets/index-DphvyggB.js",
    ]
    for path in reached:
        assert world.client.get(path).status_code == 200
    stream = "/studio/gradio_api/queue/data?session_hash=a"
    count = len(world.to_gradio)
    assert '"session_not_found": true' in world.client.get(stream).text
    assert len(world.to_gradio) == count
    assert world.client.post("/studio/gradio_api/queue/join", json=EVENT).status_code == 200
    assert world.client.get(stream).status_code == 200
    assert world.gradio_paths[count:] == ["/studio/gradio_api/queue/join", "/studio/gradio_api/queue/data"]
    count = len(world.to_gradio)
    for path in (
        "gradio_api/file=/etc/passwd",
        "gradio_api/file/etc/passwd",
        "gradio_api/proxy=http://example.org",
        "gradio_api/info",
        "gradio_api/runs",
        "gradio_api/upload_progress?upload_id=a",
        "gradio_api/stream/a/b/1/playlist.m3u8",
        "config",
        "monitoring",
        "static/js/%2e%2e/%2e%2e/%2e%2e/routes.py",
        "assets/%2e%2e/%2e%2e/routes.py",
        "own/../site.py",
    ):
        assert world.client.get(f"/studio/{path}").status_code == 404, path
    # The client resolves these dots, so the address is outside of the cookie's path.
    assert world.client.get("/studio/static/js/../../../routes.py").status_code == 401
    for path in ("upload", "run/generate", "api/generate", "call/generate", "component_server", "process_recording"):
        assert world.client.post(f"/studio/gradio_api/{path}", json={}).status_code == 404, path
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    refused = world.client.post("/studio/gradio_api/queue/join", json={**EVENT, "data": [file]})
    assert (refused.status_code, "/etc" in refused.text) == (422, False)
    assert world.client.get("/studio/gradio_api/heartbeat/a").status_code == 404
    assert world.client.put("/studio/gradio_api/queue/join").status_code == 405
    assert len(world.to_gradio) == count


def test_headers_keep_pages_on_this_host(world: World) -> None:
    sign_in(world)
    page = world.client.get("/studio/", headers={"Origin": "http://evil.example", "X-Forwarded-Host": "evil.example"})
    assert "access-control-allow-origin" not in page.headers
    policy = page.headers["content-security-policy"]
    assert "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    assert {"origin", "x-forwarded-host"}.isdisjoint(world.to_gradio[-1].headers)
    assert "gradio.app" not in page.text and "manifest" not in page.text
    assert page.headers["cache-control"] == "no-store"


def test_pages_that_the_scopes_do_not_allow_are_not_offered(world: World) -> None:
    sign_in(world, "other")
    refused = world.client.get("/studio/datasets")
    assert refused.status_code == 403
    assert "datasets:read" in refused.text
    assert 'href="/studio/models"' in refused.text
    assert 'href="/studio/datasets"' not in refused.text
    assert world.to_gradio == []


def test_visitor_is_led_to_the_first_page_that_the_key_allows(world: World) -> None:
    sign_in(world, "other")
    led = world.client.get("/studio/")
    assert (led.status_code, led.headers["location"]) == (303, "/studio/models")
    sign_in(world, "none")
    refused = world.client.get("/studio/")
    assert refused.status_code == 403
    assert "<code>images</code>, and <code>models:read</code>" in refused.text
    assert "choose another page" not in refused.text


def test_large_bodies_are_refused(world: World) -> None:
    sign_in(world)
    answer = world.client.post("/studio/gradio_api/queue/join", content=b"x" * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    pieces = (b"x" * (1 << 20) for _ in range((MAX_BODY_BYTES >> 20) + 1))  # without Content-Length
    assert world.client.post("/studio/gradio_api/queue/join", content=pieces).status_code == 413
    assert world.to_gradio == []


def test_cancellations_are_small(world: World) -> None:
    sign_in(world)
    answer = world.client.post("/studio/gradio_api/cancel", content=b"x" * (MAX_CANCELLATION_BYTES + 1))
    assert (answer.status_code, world.to_gradio) == (413, [])


def test_uploads_are_passed_on_with_the_scope_only(world: World) -> None:
    assert world.client.post(UPLOAD, content=b"form").status_code == 401
    sign_in(world, "right")
    assert world.client.post(UPLOAD, content=b"form").status_code == 403
    sign_in(world, "study-0")
    calls = len(world.to_service)
    stated = world.client.post(UPLOAD, content=b"", headers={"Content-Length": str(MAX_BYTES + 1)})
    assert (stated.status_code, len(world.to_service)) == (413, calls)
    parts = (b"x" * (1 << 20) for _ in range((MAX_BYTES >> 20) + 1))  # without Content-Length
    assert world.client.post(UPLOAD, content=parts).status_code == 413
    answer = world.client.post(f"{UPLOAD}?class=busy", content=b"form", headers={"Content-Type": "multipart/form-data"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    asked = world.to_service[-1]
    assert (asked.content, asked.headers["content-length"]) == (b"form", "4")
    assert asked.headers["authorization"] == "Bearer study-0" and "cookie" not in asked.headers


def test_few_uploads_at_a_time_which_end_in_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that never end: the answer after `MAX_SECONDS` needs no further byte."""

    async def send(key: str, ended: asyncio.Event) -> tuple[int, str | None]:
        started: list[None] = []
        answers: list[tuple[int, str | None]] = []

        async def receive() -> Any:
            if not started:
                started.append(None)
                return {"type": "http.request", "body": b"a", "more_body": True}
            await ended.wait()
            return {"type": "http.request", "body": b"", "more_body": False}

        async def answered(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                answers.append((message["status"], headers.get(b"retry-after", b"").decode() or None))

        cookie = f"{COOKIE}={key}".encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": UPLOAD,
            "query_string": b"",
            "headers": [(b"cookie", cookie)],
        }
        await world.site({**scope, "root_path": "", "scheme": "http"}, receive, answered)
        return answers[-1]

    async def run() -> None:
        ended, held = asyncio.Event(), world.site._uploads._limiter._held
        tasks = []
        for number in range(MAX_UPLOADS // MAX_UPLOADS_OF_A_KEY):
            key = f"study-{number}"
            tasks += [asyncio.create_task(send(key, ended)) for _ in range(MAX_UPLOADS_OF_A_KEY)]
            while held.total() < len(tasks):
                await asyncio.sleep(0)
            if number == 0:
                assert await send(key, ended) == (429, "5")
        assert await send("study-3", ended) == (503, "5")
        ended.set()
        assert {status for status, _ in await asyncio.gather(*tasks)} == {200}
        assert not held
        monkeypatch.setattr(bodies, "MAX_SECONDS", 0.01)
        assert (await send("study-0", asyncio.Event()))[0] == 408

    asyncio.run(run())


def test_files_are_fetched_with_the_key_of_the_visitor_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMIS_API_KEY", "right")  # of the machine; a visitor without a key must not get its rights
    path = f"/studio/files/{DATASET}/images.zip"
    assert world.client.get(path).status_code == 401
    sign_in(world)
    answer = world.client.get(path)
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (200, b"zip", '"1"')
    assert "set-cookie" not in answer.headers
    assert "sandbox" in answer.headers["content-security-policy"]
    asked = world.to_service[-1]
    assert asked.url.path == f"/v1/datasets/{DATASET}/files/images.zip"
    assert "cookie" not in asked.headers
    for bad in (f"{DATASET}/..%2f..%2fkeys", f"{DATASET}/", "ds_x/images.zip"):
        assert world.client.get(f"/studio/files/{bad}").status_code == 404


def test_file_that_cannot_be_sent_is_explained_on_a_page(world: World) -> None:
    sign_in(world)
    browser = {"Accept": "text/html,*/*"}
    gone = world.client.get(f"/studio/files/{DATASET}/gone.zip", headers=browser)
    assert (gone.status_code, gone.headers["cache-control"]) == (404, "no-store")
    assert "<h1>Not found</h1>" in gone.text and "it &lt;b&gt;expired&lt;/b&gt;" in gone.text
    assert 'class="ds-remedy">It may have been deleted, have expired' in gone.text and "ds-header" in gone.text
    broken = world.client.get(f"/studio/files/{DATASET}/broken.zip", headers=browser)
    assert (broken.status_code, broken.headers["retry-after"]) == (503, "9")
    assert "<h1>proxy" not in broken.text and "Try again in 9 s" in broken.text
    script = world.client.get(f"/studio/files/{DATASET}/gone.zip").json()
    assert (script["title"], script["detail"].startswith("it <b>expired</b> It may")) == ("Not found", True)


def test_downloads_of_a_key_and_of_all_are_limited(world: World) -> None:
    """Files whose readers take nothing: each holds a connection until its reader continues or leaves."""
    path = f"/studio/files/{DATASET}/images.zip"

    async def fetch(key: str, continues: asyncio.Event, *, leaves: bool = False) -> tuple[int, dict[bytes, bytes]]:
        answers: list[tuple[int, dict[bytes, bytes]]] = []

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def answered(message: Any) -> None:
            if message["type"] == "http.response.start":
                answers.append((message["status"], dict(message["headers"])))
                if message["status"] == 200:
                    await continues.wait()
            if leaves and message.get("body"):
                raise OSError  # the connection is gone

        headers = [(b"cookie", f"{COOKIE}={key}".encode())]
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": headers}
        try:
            await world.site({**scope, "root_path": "", "scheme": "http"}, receive, answered)
        except Exception:
            assert leaves
        return answers[-1]

    async def run() -> None:
        continues, held = asyncio.Event(), world.site._downloads._limiter._held
        tasks = []
        for number in range(MAX_DOWNLOADS // MAX_DOWNLOADS_OF_A_KEY):
            key = f"study-{number}"
            tasks += [
                asyncio.create_task(fetch(key, continues, leaves=place == 0)) for place in range(MAX_DOWNLOADS_OF_A_KEY)
            ]
            while held.total() < len(tasks):
                await asyncio.sleep(0)
            if number == 0:
                status, headers = await fetch(key, continues)
                assert (status, headers[b"retry-after"]) == (429, b"5")
                assert headers[b"content-type"] == b"application/problem+json"
        assert (await fetch("study-3", continues))[0] == 503
        continues.set()
        assert {status for status, _ in await asyncio.gather(*tasks)} == {200}
        assert not held

    asyncio.run(run())


def test_what_the_service_says_of_a_refusal_is_shown(world: World) -> None:
    world.client.cookies.set(COOKIE, "busy")
    refused = world.client.get("/studio/datasets", headers={"Accept": "text/html"})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "600")
    assert "<h1>Too many calls</h1>" in refused.text and "60 in a minute" in refused.text
    assert 'class="ds-remedy">Try again in 10 min' in refused.text


def test_key_that_was_revoked_leads_to_the_sign_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sign_in(world)
    assert world.client.post("/studio/gradio_api/queue/join", json=EVENT).status_code == 200
    monkeypatch.setitem(SCOPES, "right", None)  # the service does not accept it any more
    world.site._visitors._known.clear()  # the time has passed for which the studio knows a visitor
    ended = world.client.post("/studio/gradio_api/queue/join", json=EVENT)
    assert ended.status_code == 401 and "Sign in again" in ended.json()["detail"]
    assert 'name="key"' in world.client.get("/studio/datasets").text
    assert len(world.to_gradio) == 1


def test_files_at_signed_addresses_of_the_storage(world: World) -> None:
    """The browser follows the address of a download. An image of a page comes through the studio, which sends no key there."""
    sign_in(world)
    redirect = world.client.get(f"/studio/files/{DATASET}/report.html")
    assert (redirect.status_code, redirect.headers["cache-control"]) == (307, "no-store")
    assert redirect.headers["location"].startswith("http://storage.test/")
    preview = world.client.get(f"/studio/files/{DATASET}/preview.png")
    assert (preview.status_code, preview.content) == (200, b"png")
    assert "location" not in preview.headers
    assert world.to_service[-1].url.host == "storage.test"
    assert {"authorization", "cookie"}.isdisjoint(world.to_service[-1].headers)


def test_what_the_service_forbids_to_keep_is_not_kept(world: World) -> None:
    sign_in(world)
    for path in (f"study-answers/{STUDY}.csv", f"projections/pr_{'0' * 32}/step.png", f"files/{DATASET}/report.html"):
        assert world.client.get(f"/studio/{path}").headers["cache-control"] == "no-store", path
    assert world.client.get(f"/studio/files/{DATASET}/images.zip").headers["cache-control"] == "private, no-cache"


def test_a_busy_service_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dermis_client._retry.FIRST_DELAY", 0.0)
    calls: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        if len(calls) <= 3:
            return httpx.Response(503, json={"title": "Busy", "status": 503}, headers={"Retry-After": "0"})
        return httpx.Response(200, json={"tenant": "a", "scopes": None, "quotas": []})

    async def run() -> None:
        service = Service("http://service.test", allow_plain_http=True)
        service._http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        assert (await service.client(None).usage.retrieve()).tenant == "a"
        await service.close()

    asyncio.run(run())
    assert len(calls) == 4


def test_service_without_access_control_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMIS_API_KEY", "right")
    world = make_world(open_service=True)
    assert world.client.get("/studio/").status_code == 200
    assert world.gradio_paths == ["/studio/"]
    assert "authorization" not in world.to_service[-1].headers


def test_alone_it_refuses_other_hosts_and_origins() -> None:
    world = make_world(open_service=True, check_origin=True)
    assert world.client.get("/studio/", headers={"Host": "evil.example"}).status_code == 421
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "null"}):
        answer = world.client.post("/studio/gradio_api/queue/join", json={}, headers=headers)
        assert answer.status_code == 403, headers
    assert world.client.post(
        "/studio/gradio_api/queue/join", json=EVENT, headers={"Origin": "http://localhost"}
    ).is_success
    assert world.gradio_paths == ["/studio/gradio_api/queue/join"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://other.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://other.example"}, 403),  # over plain HTTP a browser sends no Sec-Fetch-Site
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost"}, 303),
        ({"Origin": "https://localhost"}, 303),  # TLS ends before the studio
        ({"Origin": "https://public.example", "Sec-Fetch-Site": "same-origin"}, 303),
        ({}, 303),
    ],
)
def test_page_of_another_origin_signs_nobody_in(world: World, headers: dict[str, str], status: int) -> None:
    """Also where the gateway around the studio lets pages of an origin call its API (DERMIS_CORS_ORIGINS)."""
    for path in ("session", "sign-out"):
        answer = world.client.post(f"/studio/{path}", data={"key": "right", "page": ""}, headers=headers)
        assert (answer.status_code, "set-cookie" in answer.headers) == (status, status == 303), path
    assert world.to_gradio == []


def test_visitors_are_asked_for_once_in_a_while(world: World) -> None:
    sign_in(world)
    for _ in range(3):
        world.client.get("/studio/")
    assert len(world.to_service) == 1


def test_frame_refuses_another_version_of_gradio() -> None:
    with pytest.raises(ValueError, match="another form"):
        frame.framed("<html></html>", "/studio", frame.PAGES[0], Visitor(None, "a", None))
