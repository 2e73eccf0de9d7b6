"""Tests of datasets in a real S3 bucket: parts have the bytes of one local process, also if one or the server is killed."""

from __future__ import annotations

import hashlib
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
from dermis.dataset.manifest import finalize
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.dataset.verify import verify
from dermis.errors import StorageError
from painted_dataset import IDENTITY, paint, planned
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
    from aiobotocore.client import AioBaseClient

    call = AioBaseClient._make_api_call

    async def refuse(self: AioBaseClient, operation: str, options: dict[str, Any]) -> Any:
        if operation != "DeleteObjects":
            return await call(self, operation, options)
        objects = options["Delete"]["Objects"]
        kept = [each for each in objects if each["Key"].endswith(".png")]
        options["Delete"] = {"Objects": [each for each in objects if each not in kept], "Quiet": True}
        answer = await call(self, operation, options)
        return answer | {"Errors": [{**each, "Code": "AccessDenied", "Message": "Access Denied"} for each in kept]}

    store = Store(bucket.url("kept"))
    for name in ("job/a.png", "job/b.json", "job/part/c.png", "jobs.png"):
        store.write(name, b"1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AioBaseClient, "_make_api_call", refuse)
        with pytest.raises(
            StorageError, match=r"job: 2 objects are left .*Access Denied.* permission to delete"
        ) as refused:
            store.remove("job")
    assert refused.value.kind == "storage-unavailable"  # it is tried again
    for _ in range(2):
        store.remove("job")
    assert store.entries() == ["jobs.png"]


@pytest.mark.full
@pytest.mark.parametrize("bucket", ["moto"], indirect=True)
def test_upload_that_the_storage_has_given_up_is_repeated(bucket: MotoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a rule of the bucket for incomplete uploads. A job and a part of a dataset repeat what fails in this way."""
    from aiobotocore.client import AioBaseClient

    call = AioBaseClient._make_api_call
    requests: list[str] = []

    async def give_up(self: AioBaseClient, operation: str, options: dict[str, Any]) -> Any:
        requests.append(operation)
        if operation == "CompleteMultipartUpload" and requests.count(operation) == 1:
            await call(self, "AbortMultipartUpload", {name: options[name] for name in ("Bucket", "Key", "UploadId")})
        return await call(self, operation, options)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", give_up)
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: 5 << 20)  # the least that S3 accepts
    store, data = Store(bucket.url("parts")), bytes(10 << 20) + b"end"

    def write() -> None:
        with store.writing("file") as path:
            path.write_bytes(data)

    with pytest.raises(StorageError) as lost:
        write()
    assert lost.value.kind == "storage-unavailable"
    write()
    assert store.sha256("file") == hashlib.sha256(data).hexdigest() and requests.count("UploadPart") == 6


@pytest.mark.parametrize("moment", ["put_file", "cp_file"])
def test_late_upload_replaces_no_signed_shard_of_a_finished_dataset(
    bucket: S3Server | MotoServer, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A process is suspended while it uploads a shard, and another one finishes the dataset with other signatures."""
    plan_ = planned(tiny_bundle, format="parquet", provenance={"c2pa": True})
    store = Store(bucket.url(f"late/{moment}"))
    call, finished = getattr(store._fs, moment), dict[str, bytes]()

    def sign(data: bytes, *_: object) -> bytes:
        return data + os.urandom(8)

    def write(shard: int) -> None:
        write_shard(plan_, shard, paint, store, identity=IDENTITY, sign=sign)

    def finish_first(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(store._fs, moment, call)
        for shard in range(plan_.shards):
            write(shard)
        finalize(plan_, store, tiny_bundle, IDENTITY, sign=sign)
        finished.update(contents(store.location))
        return call(*arguments, **options)

    monkeypatch.setattr(store._fs, moment, finish_first)
    if moment == "cp_file":  # it has been checked before that nobody has finished the dataset
        with pytest.raises(StorageError, match="another process") as late:
            write(0)
        assert late.value.kind == "storage-unavailable"
    write(0)
    assert finished and contents(store.location) == finished


@pytest.mark.parametrize("refused", [False, True])
def test_removal_ends_uploads_that_killed_processes_have_left(
    bucket: S3Server | MotoServer, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """Storage that does not know how to list them is no error."""
    from aiobotocore.client import AioBaseClient
    from botocore.exceptions import ClientError

    call = AioBaseClient._make_api_call

    async def refuse(self: AioBaseClient, operation: str, options: dict[str, Any]) -> Any:
        if operation == "ListMultipartUploads":
            answer = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
            raise ClientError(answer, operation)
        return await call(self, operation, options)

    prefix = f"uploads-{refused}"
    store = Store(bucket.url(prefix))
    kept = [f"{prefix}/jobs/images.zip"]
    left = [f"{prefix}/job/.partial/writing-1", f"{prefix}/job/images.zip"]
    for key in kept + left:
        store._fs.call_s3("create_multipart_upload", Bucket=bucket.bucket, Key=key)
    store.write("job/metadata.csv", b"1")
    with monkeypatch.context() as patch:
        if refused:
            patch.setattr(AioBaseClient, "_make_api_call", refuse)
        store.remove("job")
    assert store.entries() == []
    keys = {upload["Key"] for upload in store._fs.list_multipart_uploads(bucket.bucket)}
    assert {key for key in keys if key.startswith(f"{prefix}/")} == {*kept, *(left if refused else ())}


@pytest.mark.parametrize("bucket", ["moto"], indirect=True)
def test_end_of_a_dataset_ends_uploads_of_its_files_on_every_page_of_their_list(
    bucket: MotoServer, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aiobotocore.client import AioBaseClient

    call = AioBaseClient._make_api_call

    async def in_pages(self: AioBaseClient, operation: str, options: dict[str, Any]) -> Any:
        if operation != "ListMultipartUploads" or "Prefix" not in options:
            return await call(self, operation, options)
        listed = (await call(self, operation, {"Bucket": options["Bucket"]})).get("Uploads", [])
        listed = sorted(
            (each for each in listed if each["Key"].startswith(options["Prefix"])), key=lambda each: each["Key"]
        )
        rest = [each for each in listed if each["Key"] > options.get("KeyMarker", "")]
        last = {"NextKeyMarker": rest[0]["Key"], "NextUploadIdMarker": rest[0]["UploadId"]} if rest else {}
        return {"Uploads": rest[:1], "IsTruncated": len(rest) > 1, **last}

    monkeypatch.setattr(AioBaseClient, "_make_api_call", in_pages)
    plan_, store = planned(tiny_bundle), Store(bucket.url("ended/job"))
    names = [".partial/shard-00000.zip", "data-00001-of-00002.tar", "images.zip"]
    for key in [f"ended/job/{name}" for name in names] + ["ended/jobs/images.zip"]:
        store._fs.call_s3("create_multipart_upload", Bucket=bucket.bucket, Key=key)
    for shard in range(plan_.shards):
        write_shard(plan_, shard, paint, store, identity=IDENTITY)
    for left in ([], ["ended/job/images.zip"]):  # of a process that was killed after the manifest was written
        for key in left:
            store._fs.call_s3("create_multipart_upload", Bucket=bucket.bucket, Key=key)
        finalize(plan_, store, tiny_bundle, IDENTITY)
        keys = {upload["Key"] for upload in store._fs.list_multipart_uploads(bucket.bucket)}
        assert {key for key in keys if key.startswith("ended/")} == {"ended/jobs/images.zip"}
    assert verify(store.location).ok


def test_few_requests_are_made(bucket: S3Server | MotoServer) -> None:
    """Each request takes milliseconds of a processor, and tens of them from a distant bucket."""
    from aiobotocore.client import AioBaseClient

    call = AioBaseClient._make_api_call
    requests: list[str] = []

    async def counted(self: AioBaseClient, operation: str, options: dict[str, Any]) -> Any:
        requests.append(operation)
        return await call(self, operation, options)

    def requests_of(action: Callable[[], object]) -> list[str]:
        requests.clear()
        action()
        return list(requests)

    store = Store(bucket.url("requests"))
    store.write("folder/one", b"1")
    store.write("folder/none", b"")

    def read_with_size() -> None:
        with store.open("folder/one", size=1) as file:
            assert (file.read(), file.seek(0), file.read()) == (b"1", 0, b"1")

    def write(staged: bool) -> None:
        with store.writing("folder/one", staged=staged) as path:
            path.write_bytes(b"1")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AioBaseClient, "_make_api_call", counted)
        assert requests_of(lambda: store.size("folder/one")) == ["HeadObject"]
        assert requests_of(lambda: store.size("folder/missing")) == ["HeadObject"]
        assert requests_of(lambda: store.read("folder/one")) == ["GetObject"]
        assert requests_of(lambda: store.read_if_exists("folder/missing")) == ["GetObject"]
        assert requests_of(lambda: store.sha256("folder/one", size=1)) == ["GetObject"]
        assert requests_of(read_with_size) == ["GetObject"]
        assert requests_of(lambda: write(staged=False)) == ["PutObject"]
        by_copy = ["PutObject", "HeadObject", "CopyObject", "DeleteObject"]
        assert requests_of(lambda: write(staged=True)) == by_copy
        assert requests_of(store.entries) == ["ListObjectsV2"]
        assert requests_of(store.total_bytes) == ["ListObjectsV2"]
        assert requests_of(store.check) == ["ListObjectsV2"]
        removal = ["ListObjectsV2", "ListMultipartUploads", "DeleteObjects"]
        assert requests_of(lambda: store.remove("folder")) == removal


@pytest.mark.parametrize("bucket", ["moto"], indirect=True)
def test_check_tells_a_bucket_without_files_from_one_that_does_not_exist(bucket: MotoServer) -> None:
    Store(bucket.url("nothing/here")).check()
    with pytest.raises(StorageError) as missing:
        Store("s3://no-such-bucket/here").check()
    assert missing.value.kind == "storage"


def test_files_that_are_empty_or_missing(bucket: S3Server | MotoServer) -> None:
    store = Store(bucket.url("empty"))
    assert store.entries() == [] and store.total_bytes() == 0
    store.write("empty", b"")
    assert store.read("empty") == b"" and store.read("empty", limit=5) == b"" and store.size("empty") == 0
    assert store.sha256("empty", size=0) == hashlib.sha256(b"").hexdigest()
    store.write("five", b"12345")
    assert store.read("five", limit=5) == b"12345"
    with pytest.raises(StorageError, match="larger than allowed"):
        store.read("five", limit=4)
    with pytest.raises(StorageError, match="missing: No such file"):
        store.read("missing")
    with pytest.raises(StorageError, match="missing: "), store.open("missing", size=5):
        pass
    with store.open("five", size=4) as file:  # another process has replaced it by a longer one: its hash has to differ
        assert file.read() != b"1234"


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
