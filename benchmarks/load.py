"""The calls of many clients on one service, made with locust. `benchmarks.soak` runs it as a process of its own.

`python -m benchmarks.load --url URL --keys FILE --rate N --seconds N --out FILE`. Each call is a line of JSON in the output:
time, route, status, milliseconds, what was wrong, and the kind of problem of a refused call. Importing locust replaces parts of
Python by those of gevent, so nothing else may import this module.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust import events, task
from locust.contrib.fasthttp import FastHttpUser
from locust.env import Environment
from locust.exception import StopUser
from PIL import Image

CALL_PERIOD, DATASET_PERIOD = 2.0, 60.0
"""Seconds from one operation of a caller to its next one."""
PROJECTION_PERIOD = 60.0
"""Seconds from one projection to the next one, at any load: a projection takes as long as hundreds of other operations, so with
a weight of its own the load of a minute would depend on chance."""
REFUSALS = (429, 503)
SURPLUS = ("overloaded", "too-many-requests")
"""The kinds of problems that refuse surplus load. Any other one with such a status, as "not-ready", is an error."""
_FORMATS = ("imagefolder", "webdataset", "parquet")
_PHOTOGRAPHS = 12
_STOP_SECONDS = 180
_SPAWN_RATE = 100.0  # callers that begin in a second
clock = time.monotonic


class Recorder:
    """Writes one line for each call and each other error, and one for each operation and whether it was completed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._lock = threading.Lock()

    def add(self, *values: Any) -> None:
        """Write a line."""
        with self._lock:
            self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Complete the file."""
        self._file.close()


class Inputs:
    """What the calls send: classes and directions of the model, photographs, and the digests of known answers."""

    def __init__(self, url: str, keys: Sequence[str], seed: int) -> None:
        self.url, self.keys, self.random = url, keys, random.Random(seed)
        self.classes: list[str] = []
        self.directions: list[str] = []
        self.photographs: list[bytes] = []
        self.known: dict[str, str] = {}
        self._callers: Counter[str] = Counter()
        self._following: list[str] = []

    def part_of_period(self, kind: str) -> float:
        """A number from 0 to 1 for each caller of a kind: 0 for the first one, and all are spread evenly (golden ratio)."""
        self._callers[kind] += 1
        return (self._callers[kind] - 1) * 0.618034 % 1

    def following(self) -> str:
        """The next call. Soon each kind has had exactly its share, so that minutes can be compared."""
        if not self._following:
            self._following += [name for name in CALLS for _ in range(OPERATIONS[name][0])]
            self.random.shuffle(self._following)
        return self._following.pop()

    def is_repeatable(self, request: str, answer: bytes) -> bool:
        """Whether an answer equals the first one on the same request."""
        digest = hashlib.sha256(answer).hexdigest()
        return self.known.setdefault(request, digest) == digest


inputs: Inputs
recorder: Recorder
ended = Event()


class Caller(FastHttpUser):
    """One client with the key of a tenant. It records every call."""

    abstract = True
    network_timeout = 300.0
    connection_timeout = 30.0
    period = 0.0
    route = ""  # that of the last call

    def on_start(self) -> None:
        """Choose a tenant, and begin at a moment apart from those of the others, unless the time has ended before."""
        self.key = inputs.random.choice(inputs.keys)
        self.completed = True
        if ended.wait(self.period * inputs.part_of_period(type(self).__name__)):
            raise StopUser
        self._due = clock()

    def wait_time(self) -> float:
        """Seconds until the next operation, which begins one period after the one before, or at once if that took longer.

        `constant_pacing` of locust counts from the creation of the caller, so all would begin their second one together.
        """
        now = clock()
        self._due = max(self._due + self.period, now)
        return self._due - now

    def ask(
        self,
        route: str,
        path: str | None = None,
        *,
        expect: int = 200,
        check: Callable[[bytes], bool] | None = None,
        persist: bool = False,
        **options: Any,
    ) -> bytes | None:
        """Send a request and record it.

        Args:
            route: Method and route, for the record.
            path: The path; default: that of the route.
            expect: The status of an answer without error.
            check: Whether the content is right.
            persist: Repeat a request that was refused.
            options: Body and headers.

        Returns:
            The content; None if it was refused or wrong.
        """
        self.route = route
        method, _, template = route.partition(" ")
        headers = {"Authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        while True:
            began, content, broken = time.perf_counter(), b"", ""
            # With `stream` locust leaves the body to this method. Otherwise it hides the error of a body that was cut.
            response = self.client.request(
                method, path or template.partition("#")[0], name=route, headers=headers, stream=True, **options
            )
            try:
                content = response.content or b""
            except Exception as error:
                broken = f"the content was cut: {error!r}"
            milliseconds = 1000 * (time.perf_counter() - began)
            status, wrong, kind = response.status_code, "", ""
            refused = status in REFUSALS
            if refused:
                kind, detail = _problem(content)
                if kind not in SURPLUS:
                    wrong = f"{kind or 'no problem document'}: {detail}"
                elif not response.headers.get("Retry-After"):
                    wrong = f"{kind} without Retry-After"
            elif status != expect:
                wrong = str(getattr(response, "error", None) or content[:300].decode(errors="replace") or status)
            else:
                wrong = broken or _wrong(content, check)
            recorder.add(time.time(), route, status, round(milliseconds, 2), wrong, kind)
            if refused and persist and not wrong:
                gevent.sleep(min(float(response.headers["Retry-After"]), 10))
                continue
            if refused or wrong:
                self.completed = False
                return None
            return content

    def run_one(self, name: str, operation: Callable[[Caller], None]) -> None:
        """Do one operation and record it. An exception is an error, and so is one that does not end and is killed."""
        began, self.completed, wrong = time.time(), True, ""
        try:
            operation(self)
        except gevent.GreenletExit:
            wrong = f"the operation {name!r} did not end within {_STOP_SECONDS} s after the load"
            raise
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        finally:
            ended_at = time.time()
            if wrong:
                recorder.add(ended_at, self.route, 0, round(1000 * (ended_at - began), 2), wrong, "")
            recorder.add("operation", name, began, ended_at, self.completed and not wrong)


def _wrong(content: bytes, check: Callable[[bytes], bool] | None) -> str:
    """What is wrong with a content; empty if nothing is."""
    try:
        return "" if check is None or check(content) else "the content is not what it has to be"
    except Exception as error:  # such as one without a field that is read
        return f"the content is not what it has to be: {error!r}"


def _problem(content: bytes) -> tuple[str, str]:
    """The kind and the detail of a problem document; no kind if the content is none."""
    try:
        document = json.loads(content)
        return str(document["type"]).rpartition(":")[2], str(document.get("detail", ""))
    except (ValueError, LookupError, TypeError):
        return "", content[:300].decode(errors="replace")


def _sample(count: int, seed: int) -> dict[str, Any]:
    return {"classes": {inputs.random.choice(inputs.classes): count}, "seed": seed}


def one_image(caller: Caller) -> None:
    """Generate one image as a PNG; every repetition of a seed has the same bytes."""
    body = {"classes": {inputs.classes[0]: 1}, "seed": inputs.random.randrange(200)}
    key = json.dumps(body)
    headers = {"Accept": "image/png"}
    caller.ask("POST /v1/images#one", json=body, headers=headers, check=lambda data: inputs.is_repeatable(key, data))


def four_images(caller: Caller) -> None:
    """Generate four images in one call."""
    body = _sample(4, inputs.random.randrange(1 << 40))
    caller.ask("POST /v1/images#four", json=body, check=lambda data: len(json.loads(data)["data"]) == 4)


def classify(caller: Caller) -> None:
    """Classify a photograph; every repetition has the same answer."""
    number = inputs.random.randrange(len(inputs.photographs))
    caller.ask(
        "POST /v1/classifications",
        data=inputs.photographs[number],
        headers={"Content-Type": "image/jpeg"},
        check=lambda data: inputs.is_repeatable(
            f"classification {number}", json.dumps(json.loads(data)["data"]).encode()
        ),
    )


def compare(caller: Caller) -> None:
    """Compare a generated image with the training images."""
    body = _sample(1, inputs.random.randrange(1 << 40))
    caller.ask("POST /v1/authenticity", json=body, check=lambda data: len(json.loads(data)["data"]) == 1)


def edit(caller: Caller) -> None:
    """Edit a generated image along a direction."""
    sample = {"class": inputs.classes[0], "seed": inputs.random.randrange(1 << 40), "index": 0}
    body = {"samples": [sample], "edits": [{"direction": inputs.random.choice(inputs.directions), "strength": 1.0}]}
    caller.ask("POST /v1/edits", json=body, headers={"Accept": "image/png"}, check=lambda data: data[:4] == b"\x89PNG")


def read_lists(caller: Caller) -> None:
    """Read the models, the datasets and the use of quotas."""
    for route in ("GET /v1/models", "GET /v1/datasets", "GET /v1/usage"):
        caller.ask(route)


def _has_digest(digest: str, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == digest


def dataset(caller: Caller) -> None:
    """Request a dataset, follow its events, download all files, compare their hashes, and delete it."""
    body = _sample(12, inputs.random.randrange(1 << 40)) | {"format": inputs.random.choice(_FORMATS), "shard_size": 6}
    if inputs.random.random() < 0.3:
        body["privacy"] = {"gate": "authentic"}
    created = caller.ask("POST /v1/datasets", json=body, expect=202)
    if created is None:
        return
    links = json.loads(created)["links"]
    caller.ask("GET /v1/datasets/ID/events", links["events"], persist=True)
    caller.ask(
        "GET /v1/datasets/ID", links["self"], persist=True, check=lambda data: json.loads(data)["state"] == "succeeded"
    )
    listed = caller.ask("GET /v1/datasets/ID/files", links["files"], persist=True)
    for file in json.loads(listed)["data"] if listed else []:
        caller.ask(
            "GET /v1/datasets/ID/files/NAME",
            file["url"],
            persist=True,
            check=partial(_has_digest, file["sha256"]),
        )
    caller.ask("DELETE /v1/datasets/ID", links["self"], persist=True, expect=204)


def projection(caller: Caller) -> None:
    """Project a photograph with few steps, read its latents and delete it."""
    data = inputs.random.choice(inputs.photographs)
    headers = {"Content-Type": "image/jpeg"}
    route = "POST /v1/projections"
    created = caller.ask(route, "/v1/projections?steps=10", data=data, headers=headers, expect=202)
    if created is None:
        return
    path = f"/v1/projections/{json.loads(created)['id']}"
    job: dict[str, Any] = {"state": "queued"}
    while job["state"] in ("queued", "running"):
        gevent.sleep(1)
        content = caller.ask("GET /v1/projections/ID", path, persist=True)
        if content is None:
            return
        job = json.loads(content)
    if job["state"] != "succeeded":
        raise RuntimeError(f"the projection has failed: {job['error']}")
    caller.ask("GET /v1/projections/ID/files/NAME", job["data"][0]["files"]["latents"], persist=True)
    caller.ask("DELETE /v1/projections/ID", path, persist=True, expect=204)


# How often each operation is done, relative to the others.
OPERATIONS: Mapping[str, tuple[int, Callable[[Caller], None]]] = {
    "image": (60, one_image),
    "four images": (20, four_images),
    "classification": (40, classify),
    "authenticity": (20, compare),
    "edit": (20, edit),
    "lists": (20, read_lists),
    "dataset": (5, dataset),
}
CALLS = tuple(name for name in OPERATIONS if name != "dataset")


def dataset_share() -> float:
    """The share of datasets in all operations."""
    return OPERATIONS["dataset"][0] / sum(weight for weight, _ in OPERATIONS.values())


class CallingCaller(Caller):
    """Makes calls that are answered at once, at a fixed rate."""

    period = CALL_PERIOD

    @task
    def work(self) -> None:
        """Do one operation."""
        name = inputs.following()
        self.run_one(name, OPERATIONS[name][1])


class DatasetCaller(Caller):
    """Makes datasets, at a fixed rate."""

    period = DATASET_PERIOD

    @task
    def work(self) -> None:
        """Make one."""
        self.run_one("dataset", dataset)


class ProjectionCaller(Caller):
    """Makes projections, the first one at once, at a fixed rate."""

    period = PROJECTION_PERIOD

    @task
    def work(self) -> None:
        """Make one."""
        self.run_one("projection", projection)


class PreparingCaller(Caller):
    """Reads what the others need."""

    def prepare(self) -> None:
        """Fill `inputs`."""
        self.key = inputs.keys[0]
        model = json.loads(self.ask("GET /v1/models") or b"{}")["data"][0]
        inputs.classes = model["classes"]
        directions = json.loads(self.ask("GET /v1/directions") or b"{}")["data"]
        inputs.directions = [each["name"] for each in directions]
        for seed in range(_PHOTOGRAPHS):
            body = {"classes": {inputs.classes[seed % len(inputs.classes)]: 1}, "seed": seed}
            png = self.ask("POST /v1/images#one", json=body, headers={"Accept": "image/png"}, persist=True)
            out = io.BytesIO()
            with Image.open(io.BytesIO(png or b"")) as image:
                image.convert("RGB").resize((600, 450)).save(out, "JPEG", quality=92)
            inputs.photographs.append(out.getvalue())


def run(rate: float, seconds: float) -> None:
    """Make calls for a time, and let the operations end that were begun."""
    Caller.host = inputs.url
    environment = Environment(user_classes=[], host=inputs.url, stop_timeout=_STOP_SECONDS, events=events)
    PreparingCaller(environment).prepare()
    share = dataset_share()
    counts: dict[type[Caller], int] = {
        ProjectionCaller: 1,
        CallingCaller: math.ceil(rate * (1 - share) * CALL_PERIOD),
        DatasetCaller: math.ceil(rate * share * DATASET_PERIOD),
    }
    for user_class, count in counts.items():
        user_class.fixed_count = count
    environment.user_classes = list(counts)
    runner = environment.create_local_runner()
    recorder.add("began", time.time())
    runner.start(sum(counts.values()), spawn_rate=_SPAWN_RATE)
    gevent.sleep(seconds)
    recorder.add("ended", time.time())
    ended.set()
    runner.quit()
    runner.greenlet.join()


def main() -> None:
    """Run the program."""
    global inputs, recorder  # noqa: PLW0603
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--keys", required=True, type=Path, help="file with an API key of each tenant, one a line")
    parser.add_argument("--rate", type=float, required=True, help="operations begun in a second")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    inputs = Inputs(options.url, options.keys.read_text().split(), options.seed)
    recorder = Recorder(options.out)
    try:
        run(options.rate, options.seconds)
    finally:
        recorder.close()


if __name__ == "__main__":
    main()
