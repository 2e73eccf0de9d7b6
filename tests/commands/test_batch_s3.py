"""Tests of datasets in a real S3 bucket: parts have the bytes of one local process, also if one or the server is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.components.moto_s3 import MotoServer
from benchmarks.components.s3 import S3Server
from dermis.bundle import Bundle
from dermis.dataset.store import Store
from dermis.dataset.verify import verify
from dermis.errors import StorageError
from painter import Painter
from real_servers import running_moto, running_s3

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
FORMATS = ("imagefolder", "webdataset", "parquet")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def moto() -> Iterator[MotoServer]:
    with running_moto() as server:
        yield server


@pytest.fixture(params=[pytest.param("s3", marks=pytest.mark.full), "moto"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server | MotoServer:
    """A server that the processes of the test use: SeaweedFS or moto, which starts faster."""
    server: S3Server | MotoServer = request.getfixturevalue(request.param)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    forget_servers()
    return server


def forget_servers() -> None:
    """Let fsspec open its file systems again, with the environment as it is now."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


def start(*arguments: object) -> subprocess.Popen[str]:
    """A `dermis` command in a process of its own, that finds the packages of this one."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return subprocess.Popen(
        [sys.executable, "-m", "commands.main", *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def done(process: subprocess.Popen[str]) -> int:
    output, _ = process.communicate(timeout=SECONDS)
    print(output)
    return process.returncode


def contents(location: str | Path) -> dict[str, bytes]:
    store = Store(location)
    return {name: store.read(name) for name in store.entries()}


def asked_of(bundle: Bundle, file_format: str) -> tuple[object, ...]:
    """Arguments of a dataset of 24 shards, up to its location."""
    asked = ("generate", "--bundle", bundle.location, "--classes", "malignant=300,benign=300", "--shard-size", 25)
    return (*asked, "--device", "cpu", "--format", file_format, "--out")


@pytest.fixture(scope="module")
def local(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """The files of the same dataset in a folder, made by one process; a format is made once."""

    @cache
    def files(file_format: str) -> dict[str, bytes]:
        out = tmp_path_factory.mktemp("local") / file_format
        assert done(start(*asked_of(tiny_bundle, file_format), out)) == 0
        return contents(out)

    return files


def test_parts_in_a_bucket_have_the_bytes_of_a_folder(
    run: Callable[..., tuple[int, str, str]],
    painter: type[Painter],
    bucket: S3Server | MotoServer,
    tiny_bundle: Bundle,
    tmp_path: Path,
) -> None:
    asked = ("generate", "--bundle", tiny_bundle.location, "--classes", "malignant=8,benign=6", "--shard-size", 4)
    url = bucket.url("short")
    for option in (("--shards", "1/2"), ("--shards", "0/2"), ("--finalize",)):
        assert run(*asked, "--out", url, *option)[0] == 0
    assert run(*asked, "--out", tmp_path / "one")[0] == 0
    assert contents(url) == contents(tmp_path / "one")
    assert verify(url).ok


@pytest.mark.full
@pytest.mark.parametrize("file_format", FORMATS)
def test_parts_in_a_bucket_survive_a_kill(
    bucket: S3Server | MotoServer, tiny_bundle: Bundle, local: Callable[[str], dict[str, bytes]], file_format: str
) -> None:
    url = bucket.url(f"kills/{file_format}")
    asked = (*asked_of(tiny_bundle, file_format), url)
    store = Store(url)
    parts = [start(*asked, "--shards", f"{index}/3") for index in range(3)]
    deadline = time.monotonic() + SECONDS
    while not any(f"shard-{shard:05d}.json" in name for name in store.entries() for shard in range(1, 24, 3)):
        assert parts[1].poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    parts[1].kill()
    assert [done(part) for part in parts] == [0, -9, 0]
    assert done(start(*asked, "--finalize")) == 2, "the killed part was complete"
    assert done(start(*asked, "--seed", "5", "--shards", "1/3")) == 2
    assert done(start(*asked, "--shards", "1/3")) == 0
    for _ in range(2):
        assert done(start(*asked, "--finalize")) == 0
    assert verify(url).ok
    assert contents(url) == local(file_format)


def test_files_of_another_process_are_seen(bucket: S3Server | MotoServer) -> None:
    """Also if the driver has listed the folder before."""
    url = bucket.url("listings")
    here = Store(url)
    here.write("one", b"1")
    assert here.entries() == ["one"]
    write = (
        f"from dermis.dataset.store import Store; s = Store({url!r}); s.write('two', b'22'); s.write('one', b'changed')"
    )
    subprocess.run([sys.executable, "-c", write], cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                   check=True, timeout=SECONDS)  # fmt: skip
    assert here.size("two") == 2
    assert here.size("one") == 7 and here.read("one") == b"changed"
    here.remove("two")
    assert here.size("two") is None


def test_objects_that_a_bucket_keeps_are_an_error(bucket: S3Server | MotoServer) -> None:
    """S3 answers 200 although it has not deleted some objects, for example without the permission, and s3fs ignores which."""
    from s3fs import S3FileSystem

    call = S3FileSystem._call_s3

    async def refuse(self: S3FileSystem, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "delete_objects":
            objects = options["Delete"]["Objects"]
            kept = [each for each in objects if each["Key"].endswith(".png")]
            options["Delete"] = {"Objects": [each for each in objects if each not in kept], "Quiet": True}
        return await call(self, method, *arguments, **options)

    store = Store(bucket.url("kept"))
    for name in ("job/a.png", "job/b.json", "job/part/c.png", "jobs.png"):
        store.write(name, b"1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3FileSystem, "_call_s3", refuse)
        with pytest.raises(StorageError, match="job: 2 objects are left .* permission to delete") as refused:
            store.remove("job")
    assert refused.value.kind == "storage-unavailable"  # it is tried again
    for _ in range(2):
        store.remove("job")
    assert store.entries() == ["jobs.png"]


def test_a_file_that_is_read_keeps_little_memory(bucket: S3Server | MotoServer) -> None:
    store = Store(bucket.url("large"))
    data = os.urandom(1 << 20) * 20
    store.write("file", data)
    with store.open("file") as file:
        assert file.read(1000) == data[:1000]
        assert len(cast(Any, file).cache.cache) < 5 << 20
        file.seek(3 << 20)
        assert file.read(6 << 20) == data[3 << 20 : 9 << 20]


@pytest.mark.full
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_dataset_is_finished_after_the_server_was_killed(
    bucket: S3Server, tiny_bundle: Bundle, local: Callable[[str], dict[str, bytes]], file_format: str
) -> None:
    """The parts end with status 1, which a Job repeats, or wait for the server; then the same command continues."""
    url = bucket.url(f"server/{file_format}")
    asked = (*asked_of(tiny_bundle, file_format), url)
    part = start(*asked, "--shards", "0/1")
    deadline = time.monotonic() + SECONDS
    while sum(name.endswith(".json") for name in Store(url).entries()) < 4:
        assert part.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    bucket.kill()
    bucket.start()
    assert done(part) in (0, 1)
    assert done(start(*asked, "--shards", "0/1")) == 0
    assert done(start(*asked, "--finalize")) == 0
    assert verify(url).ok
    assert contents(url) == local(file_format)
