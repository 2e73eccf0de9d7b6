"""Tests of datasets that many processes make in parts: the same bytes as of one process, and exit statuses for Jobs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import kubernetes_validate
import numpy as np
import pytest
import yaml

from commands.batch import part_of, shards_of
from dermis.bundle import Bundle
from dermis.errors import RequestError, StorageError
from painter import Painter
from pod_admission import quantity
from tiny_index import make_complete_bundle

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def complete_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With classifier, index of training images and held-out images."""
    pytest.importorskip("faiss", reason="FAISS is not installed")
    pictures = np.random.default_rng(0).integers(0, 256, (64, 12, 12, 3), dtype=np.uint8)
    return make_complete_bundle(tmp_path_factory.mktemp("bundles"), pictures[:40], held_out=pictures[40:])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def asked_of(bundle: Bundle, *options: object) -> tuple[object, ...]:
    """Arguments of a dataset of 4 shards."""
    return ("generate", "--bundle", bundle.location, "--classes", "malignant=8,benign=6", "--shard-size", 4, *options)


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        ("--format", "imagefolder"),
        ("--format", "webdataset", "--gate", "authentic", "--on-reject", "drop"),
        ("--format", "parquet", "--gate", "min_distance", "--percentile", 50, "--keep", "agreeing", "--tries", 4),
    ],
    ids=["imagefolder", "webdataset with gate", "parquet with gate and filter"],
)
def test_parts_give_the_bytes_of_one_process(
    run: Run, complete_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Sequence[object]
) -> None:
    """In any order, with a part that is lost and repeated, and finished twice."""
    asked = asked_of(complete_bundle, "--device", "cpu", *options, "--out")
    one, parts = tmp_path / "one", tmp_path / "parts"
    assert run(*asked, one)[0] == 0
    assert run(*asked, parts, "--shards", "2/3")[0] == 0
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert run(*asked, parts, "--shards", "auto/3")[0] == 0
    status, _, err = run(*asked, parts, "--finalize")
    assert status == 2 and "shard 1 of 4 is missing" in err and not (parts / "manifest.json").exists()
    assert run(*asked, parts, "--shards", "1/3")[0] == 0
    for number in range(2):
        assert run(*asked, parts, "--finalize")[0] == 0, number
        assert contents(parts) == contents(one)
    assert run(*asked, parts, "--shards", "1/3")[0] == 0
    assert contents(parts) == contents(one)


def test_repeated_or_late_part_changes_nothing(
    run: Run, painter: type[Painter], tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that was finished is not drawn again; one that ends after the dataset was finished leaves no file."""
    asked = asked_of(tiny_bundle, "--format", "webdataset", "--out", tmp_path / "out")
    assert run(*asked, "--shards", "0/2")[0] == 0
    before, drawn = contents(tmp_path / "out"), painter.drawn
    assert run(*asked, "--shards", "0/2")[0] == 0
    assert painter.drawn == drawn and contents(tmp_path / "out") == before
    assert run(*asked, "--shards", "1/2")[0] == 0
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "out", copy)
    assert run(*asked, "--finalize")[0] == 0
    finished = contents(tmp_path / "out")
    assert run(*asked[:-1], tmp_path / "one")[0] == 0
    assert contents(tmp_path / "one") == finished

    def finish_meanwhile(*_: object, **__: object) -> None:
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(copy, tmp_path / "out")
        for name, data in finished.items():
            (tmp_path / "out" / name).write_bytes(data)

    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("commands.generate._make", finish_meanwhile)
    assert run(*asked, "--shards", "0/2")[0] == 0
    assert contents(tmp_path / "out") == finished


@pytest.mark.full
def test_missing_shards_and_other_requests_are_refused_with_status_2(
    run: Run, painter: type[Painter], tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_of(tiny_bundle, "--out", tmp_path / "out")
    status, _, err = run(*asked, "--finalize")
    assert status == 2 and "shard 0 of 4 is missing, as are 3 others: 1-3" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run(*asked, "--shards", "0/1")[0] == 0
    before = contents(tmp_path / "out")
    for option in (("--shards", "0/2"), ("--finalize",)):
        status, _, err = run(*asked, "--seed", 5, *option)
        assert status == 2 and "--seed 0" in err
        assert run(*asked, "--classes", "nothing=5", *option)[0] == 2
        assert run("generate", "--bundle", tmp_path / "none", *asked[3:], *option)[0] == 2
    assert run(*asked, "--shards", "2/2")[0] == 2
    assert run(*asked, "--shards", "0/2", "--finalize")[0] == 2
    assert contents(tmp_path / "out") == before

    def unreachable(*_: object, **__: object) -> None:
        raise StorageError("s3://bucket: cannot be reached at the moment", kind="storage-unavailable")

    monkeypatch.setattr("commands.generate._make", unreachable)
    assert run(*asked, "--shards", "0/2")[0] == 1, "a Job would not repeat this"


def test_every_shard_is_in_one_part() -> None:
    for number in (1, 2, 3, 7, 20):
        parts = [shards_of(part_of(f"{index}/{number}"), 10) for index in range(number)]
        assert sorted(shard for part in parts for shard in part) == list(range(10))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert part_of("auto/4", {"JOB_COMPLETION_INDEX": "3"}) == (3, 4)
    for text, environment in (("auto/4", {}), ("4/4", {}), ("0/0", {}), ("-1/4", {}), ("1", {}), ("a/b", {}), ("", {})):
        with pytest.raises(RequestError, match="--shards"):
            part_of(text, environment)


EXAMPLE = ROOT / "k8s/batch/lesions.yaml"
EXAMPLE_OPTIONS = ("--bundle", "demo", "--classes", "malignant=50000,benign=50000", "--format", "parquet")
EXAMPLE_OPTIONS += (
    "--gate",
    "authentic",
    "--out",
    "s3://datasets/lesions",
    "--shards",
    "auto/16",
    "--job-image",
    "registry.example.com/hospital/dermis:0.2.0",
    "--queue",
    "research",
)


def test_printed_jobs_are_valid_restricted_and_equal_to_the_example(run: Run) -> None:
    status, text, _ = run("generate", *EXAMPLE_OPTIONS, "--print-job")
    assert status == 0 and text == EXAMPLE.read_text()
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        kubernetes_validate.validate(document, "1.37", strict=True)
        pod = document["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert limits["memory"]
        # A pod that needs more disk than is free on its node is evicted, and made again without an end.
        (disk,) = (volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume)
        assert requests["ephemeral-storage"] == disk
        assert quantity(limits["ephemeral-storage"]) > quantity(disk)
        failure, disruption = document["spec"]["podFailurePolicy"]["rules"]
        statuses = [1, 2] if container["name"] == "verify" else [2]
        assert failure["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": statuses}
        assert (failure["action"], disruption["action"]) == ("FailJob", "Ignore")
    parts, finish, verify = (document["spec"] for document in documents)
    assert (parts["completionMode"], parts["completions"]) == ("Indexed", 16)
    assert finish["suspend"] and verify["suspend"]
    assert parts["backoffLimitPerIndex"] and parts["maxFailedIndexes"] == 1
    assert verify["template"]["spec"]["containers"][0]["args"] == ["verify", "s3://datasets/lesions"]
    queues = [document["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") for document in documents]
    assert queues == ["research", None, None]


@pytest.mark.parametrize(
    ("conditions", "printed"),
    [("SuccessCriteriaMet Complete", "Complete\n"), ("FailureTarget Failed", "Failed\n"), ("Suspended", ""), ("", "")],
)
def test_printed_commands_notice_the_end_of_a_job(conditions: str, printed: str, tmp_path: Path) -> None:
    """Also that of a Job that failed, which `kubectl wait --for=condition=complete` does not."""
    commands = [line[4:] for line in EXAMPLE.read_text().splitlines() if line.startswith("#   until ")]
    assert len(commands) == 3
    (tmp_path / "kubectl").write_text(f'#!/bin/sh\necho -n "{conditions}"\n')
    (tmp_path / "sleep").write_text("#!/bin/sh\nkill $PPID\n")  # the Job has not ended
    for name in ("kubectl", "sleep"):
        (tmp_path / name).chmod(0o755)
    path = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for command in commands:
        done = subprocess.run(["bash", "-c", command], env=path, capture_output=True, text=True, timeout=60)
        status = {"Complete\n": 0, "Failed\n": 1, "": -signal.SIGTERM}[printed]
        assert (done.stdout, done.returncode) == (printed, status)


def test_jobs_can_be_bound_to_nodes_of_one_kind(run: Run) -> None:
    place = ("generate", "--bundle", "demo", "--classes", "benign=9", "--out", "s3://datasets/lesions", "--print-job")
    labels = ("--node-selector", "hospital.example/cpu=epyc-9654", "--node-selector", "disk=")
    status, text, err = run(*place, *labels, "--job-gpus", 1)
    assert status == 0, err
    parts, finish, verify = yaml.safe_load_all(text)
    for document in (parts, finish, verify):
        kubernetes_validate.validate(document, "1.37", strict=True)
        chosen = document["spec"]["template"]["spec"]["nodeSelector"]
        assert chosen == {"hospital.example/cpu": "epyc-9654", "disk": ""}
    (container,) = verify["spec"]["template"]["spec"]["containers"]  # it computes nothing
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert "nodeSelector" not in run(*place)[1]


def test_image_that_no_cluster_can_pull_is_named(run: Run) -> None:
    place = ("generate", "--bundle", "demo", "--classes", "benign=9", "--out", "s3://datasets/lesions", "--print-job")
    assert "name yours with --job-image" in run(*place)[1]
    assert "--job-image" not in EXAMPLE.read_text()


@pytest.mark.parametrize(
    "options",
    [
        "--classes benign=7,malignant=9 --keep agreeing --tries 3 --max-probability 0.75 --seed 9 --image-format jpeg",
        "--classes malignant=9 --gate min_distance --no-detect-copies --score --c2pa --edit hair=0.00001@0-4 --edit frame=-1",
    ],
)
def test_arguments_of_the_pods_make_the_same_request(run: Run, options: str) -> None:
    """The name of the Jobs holds the digest of the plan, so that it would differ otherwise."""
    place = ("--bundle", "demo", "--out", "s3://datasets/lesions", "--shards", "auto/4")
    status, text, err = run("generate", *place, *options.split(), "--print-job")
    assert status == 0, err
    documents = list(yaml.safe_load_all(text))
    assert documents[0]["spec"]["completions"] == 4
    for document in documents[:2]:
        arguments = document["spec"]["template"]["spec"]["containers"][0]["args"]
        kept = [argument for argument in arguments if argument != "--finalize"]
        again = run(*kept, *(() if "--shards=auto/4" in kept else ("--shards", "auto/4")), "--print-job")
        assert again == (0, text, "")


def test_pods_that_sign_have_the_certificate_of_a_secret(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """--print-job needs no certificate here, and one that is here decides as for a dataset that is made here."""
    place = ("generate", "--bundle", "demo", "--classes", "benign=9", "--out", "s3://datasets/lesions", "--print-job")
    unsigned, signed = run(*place)[1], run(*place, "--c2pa")[1]
    for document in list(yaml.safe_load_all(signed))[:2]:
        kubernetes_validate.validate(document, "1.37", strict=True)
        pod = document["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert "--c2pa" in container["args"]
        (secret,) = (volume for volume in pod["volumes"] if "secret" in volume)
        assert secret["secret"] == {"secretName": "dermis-c2pa", "defaultMode": 0o440}
        (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == secret["name"])
        files = {each["name"]: each["value"] for each in container["env"] if each["name"].startswith("DERMIS_C2PA_")}
        names = {"CERTIFICATE": "certificate.pem", "KEY": "key.pem"}
        assert mount["readOnly"] and files == {
            f"DERMIS_C2PA_{name}": f"{mount['mountPath']}/{file}" for name, file in names.items()
        }
    assert "secret generic dermis-c2pa --from-file=certificate.pem --from-file=key.pem" in signed
    assert "c2pa" not in unsigned
    monkeypatch.setenv("DERMIS_C2PA_CERTIFICATE", "certificate.pem")
    assert run(*place)[1] == signed


def test_jobs_that_could_not_run_are_refused(run: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    asked = ("generate", "--classes", "benign=7", "--print-job")
    there = ("--bundle", "demo", "--out", "s3://datasets/lesions")
    for options, name in (
        (("--bundle", "demo", "--out", tmp_path), "--out"),
        (("--bundle", "bundles/demo", "--out", "s3://datasets/lesions"), "--bundle"),
        ((*there, "--shards", "1/4"), "--shards"),
        ((*there, "--queue", "a b"), "--queue"),
        ((*there, "--node-selector", "kind"), "--node-selector"),
        ((*there, "--node-selector", "-a=b"), "--node-selector"),
        ((*there, "--node-selector", "a=b/c"), "--node-selector"),
        ((*there, "--node-selector", "a=b", "--node-selector", "a=c"), "--node-selector"),
        ((*there, "--finalize"), "--print-job"),
    ):
        status, out, err = run(*asked, *options)
        assert status in (1, 2) and out == "" and err.startswith(f"error: {name}: "), options
    for option in (("--queue", "research"), ("--node-selector", "kind=a")):
        status, _, err = run(*asked[:-1], *there, *option)
        assert status == 1 and "is an option of --print-job" in err
