"""`dermis generate --print-job`: Kubernetes Jobs that make a dataset in parts, finish it and verify it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.batch import BAD_INPUT
from commands.console import option_of
from dermis import __version__
from dermis.errors import RequestError, escape

if TYPE_CHECKING:
    from dermis.dataset.plan import DatasetPlan
    from dermis.dataset.request import DatasetRequest

MAX_PARTS = 32  # parts of a Job if --shards does not say how many
_IMAGE = f"registry.example.com/dermis:{__version__}"
_GPU_IMAGE = f"registry.example.com/dermis-gpu:{__version__}"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_GIB = 1 << 30
_LABEL_PREFIX = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/"
_SIGNER_FOLDER = "/etc/dermis-c2pa"
_AUTHORITY_FOLDER = "/etc/dermis-ca"

PrintJobOption = Annotated[
    bool,
    typer.Option(
        "--print-job",
        help="Make nothing: print Kubernetes Jobs for this dataset. --shards auto/N says how many pods make it.",
    ),
]
QueueOption = Annotated[str | None, typer.Option(help="With --print-job: name of the Kueue queue of the Job.")]
JobImageOption = Annotated[
    str | None,
    typer.Option(
        help=f"With --print-job: container image with the command dermis. Default {_IMAGE}, with GPUs {_GPU_IMAGE}."
    ),
]
JobGpusOption = Annotated[int | None, typer.Option(help="With --print-job: GPUs of each pod. Default 0.", min=0)]
NodeSelectorOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LABEL=VALUE",
        help="With --print-job: label of the nodes on which the dataset is made, which must be of one kind; may be repeated.",
    ),
]


@dataclass(frozen=True)
class JobOptions:
    """Options of `--print-job` that do not change the dataset."""

    bundle: str
    out: str
    shards: str | None
    queue: str | None
    image: str | None
    gpus: int | None
    node_selector: Sequence[str] = ()


def job_yaml(plan: DatasetPlan, resolution: int, options: JobOptions) -> str:
    """Write the Jobs of a dataset: an Indexed Job for its parts, and suspended Jobs that finish and verify it.

    Args:
        plan: The plan of the dataset.
        resolution: Side of the images in px.
        options: Places of bundle and dataset, and what the pods need.

    Raises:
        RequestError: The pods could not use an option.
    """
    parts = _check(plan, options)
    name = f"dermis-{plan.digest[:10]}"
    places = [f"--bundle={options.bundle}", f"--out={options.out}"]
    places.append(f"--device={'cuda' if options.gpus else 'cpu'}")  # the bytes depend on it
    arguments = ["generate", *places, *request_arguments(plan.request)]
    queue = "" if options.queue is None else f"\n    kueue.x-k8s.io/queue-name: {json.dumps(options.queue)}"
    shard_gib, finish_gib = _temporary_gib(plan, resolution)
    signed = plan.request.signed
    parts_pod = _pod("generate", [*arguments, f"--shards=auto/{parts}"], options, shard_gib, signed)
    finish_pod = _pod("finish", [*arguments, "--finalize"], options, finish_gib, signed)
    without_gpu = replace(options, image=_image(options), gpus=None)
    verify_pod = _pod("verify", ["verify", options.out], without_gpu, _CACHES_GIB, signed=False)
    example = "" if options.image is not None else _EXAMPLE_NOTE
    return f"""# {plan.samples:,} images in {plan.shards:,} shards, made by {parts} pods, finished and verified by one each.
# Free disk that nodes need: {shard_gib} GiB for each pod that makes a part, {finish_gib} GiB for the one that finishes.
# The commands use the namespace `dermis` of the service, whose network policies let these pods reach S3; for another one
# replace `-n dermis`. FILE is this file.{example}{"" if options.queue is None else _queue_note(options)}
# s3.env has the variables that the S3 library reads, as lines NAME=VALUE (docs/batch.md); without the secret the pods' own
# identity is used.
#   kubectl -n dermis create secret generic dermis-s3 --from-env-file=s3.env{_SIGNER_NOTE if signed else ""}
#   kubectl -n dermis apply -f FILE
#   {_await(name)}
# This prints Complete or Failed when the parts have ended, and ends with status 0 only after Complete. Then finish the dataset
# in the same way, and verify it:
#   kubectl -n dermis patch job/{name}-finish -p '{{"spec": {{"suspend": false}}}}'
#   {_await(f"{name}-finish")}
#   kubectl -n dermis patch job/{name}-verify -p '{{"spec": {{"suspend": false}}}}'
#   {_await(f"{name}-verify")}
#   kubectl -n dermis logs job/{name}-verify
# After Failed, these say why; for the other Jobs add `-finish` or `-verify` to the name. Meanwhile they show the progress, and
# pods that cannot start:
#   kubectl -n dermis describe job/{name}
#   kubectl -n dermis get pods -l app.kubernetes.io/name=dermis-batch
#   kubectl -n dermis logs --prefix --tail=5 -l batch.kubernetes.io/job-name={name}
# Then delete all Jobs and apply the file again: shards that are complete are kept.
#   kubectl -n dermis delete -f FILE
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
  labels:
    app.kubernetes.io/name: dermis-batch{queue}
spec:
  completionMode: Indexed
  completions: {parts}
  parallelism: {parts}
  backoffLimitPerIndex: 6 # a part that is repeated keeps its complete shards
  maxFailedIndexes: {max(1, parts // 10)}
{_JOB_RULES.format(container="generate", status=BAD_INPUT, reason=_FAILS_AGAIN)}
{parts_pod}
---
# Suspended until all parts are complete. It has no queue: Kueue would start it at once.
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}-finish
  labels:
    app.kubernetes.io/name: dermis-batch
spec:
  suspend: true
  backoffLimit: 6
{_JOB_RULES.format(container="finish", status=BAD_INPUT, reason=_FAILS_AGAIN)}
{finish_pod}
---
# Suspended until the dataset is finished. It reads every byte of the dataset, and fails if a file differs.
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}-verify
  labels:
    app.kubernetes.io/name: dermis-batch
spec:
  suspend: true
  backoffLimit: 6
{_JOB_RULES.format(container="verify", status=f"1, {BAD_INPUT}", reason=_READS_ALL_AGAIN)}
{verify_pod}
"""


def _await(name: str) -> str:
    """Write a command that ends when a Job has ended. `kubectl wait` waits for one condition, and so misses the other."""
    conditions = f"kubectl -n dermis get job/{name} -o jsonpath='{{.status.conditions[*].type}}'"
    return f"until end=$({conditions} | grep -owE 'Complete|Failed'); do sleep 10; done; echo $end; [ $end = Complete ]"


def _queue_note(options: JobOptions) -> str:
    """Write what a ClusterQueue of Kueue must have, which refuses pods that request a resource that it does not cover."""
    gpus = " and nvidia.com/gpu" if options.gpus else ""
    return f"""
# The ClusterQueue must cover cpu, memory, ephemeral-storage{gpus}; otherwise no pod starts, and this shows the resource:
#   kubectl -n dermis get workloads -o yaml"""


def _image(options: JobOptions) -> str:
    return options.image or (_GPU_IMAGE if options.gpus else _IMAGE)


_FAILS_AGAIN = "options that do not fit, another dataset in the folder, missing shards: a repetition fails again"
_READS_ALL_AGAIN = "also if the storage failed: a repetition reads the whole dataset again"
_CACHES_GIB = 2

_EXAMPLE_NOTE = """
# No cluster can pull the image `registry.example.com/...`, which is an example: name yours with --job-image."""

_JOB_RULES = """\
  ttlSecondsAfterFinished: 604800
  podFailurePolicy:
    rules:
      - action: FailJob # {reason}
        onExitCodes: {{containerName: {container}, operator: In, values: [{status}]}}
      - action: Ignore # preemption, eviction, a drained node: not counted
        onPodConditions:
          - {{type: DisruptionTarget, status: "True"}}"""

_GPU_NODES = """
      runtimeClassName: nvidia
      tolerations: # nodes with GPUs usually have this taint
        - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}"""


_SIGNER_NOTE = """
# The certificate and the key with which the pods sign the images:
#   kubectl -n dermis create secret generic dermis-c2pa --from-file=certificate.pem --from-file=key.pem"""

_SIGNER_ENV = f"""
            - {{name: DERMIS_C2PA_CERTIFICATE, value: {_SIGNER_FOLDER}/certificate.pem}}
            - {{name: DERMIS_C2PA_KEY, value: {_SIGNER_FOLDER}/key.pem}}"""

_SIGNER_MOUNT = f"""
            - {{name: c2pa, mountPath: {_SIGNER_FOLDER}, readOnly: true}}"""

_SIGNER_VOLUME = """
        - name: c2pa
          secret: {secretName: dermis-c2pa, defaultMode: 0440}"""


def _pod(container: str, arguments: list[str], options: JobOptions, temporary_gib: int, signed: bool) -> str:
    """Write the pod template of a Job. `$(` in an argument is escaped, as Kubernetes would replace variables."""
    args = "\n".join(f"            - {json.dumps(each.replace('$(', '$$('))}" for each in arguments)
    gpus = f", nvidia.com/gpu: {options.gpus}" if options.gpus else ""
    nodes = [f"        {json.dumps(name)}: {json.dumps(value)}" for name, value in _labels(options)]
    selector = "\n".join(["", "      nodeSelector:", *nodes]) if nodes else ""
    return f"""  template:
    metadata:
      labels:
        app.kubernetes.io/name: dermis-batch
    spec:
      restartPolicy: Never
      automountServiceAccountToken: false
      enableServiceLinks: false{_GPU_NODES if options.gpus else ""}{selector}
      securityContext:
        runAsNonRoot: true
        runAsUser: 1034
        runAsGroup: 1034
        fsGroup: 1034
        seccompProfile: {{type: RuntimeDefault}}
      containers:
        - name: {container}
          image: {json.dumps(_image(options))}
          command: [dermis]
          args:
{args}
          workingDir: /tmp
          env:
            - {{name: HOME, value: /tmp}} # the root file system is read-only
            - {{name: TORCHINDUCTOR_CACHE_DIR, value: /tmp/inductor}}
            - {{name: TRITON_CACHE_DIR, value: /tmp/triton}}{_SIGNER_ENV if signed else ""}
          envFrom:
            - secretRef: {{name: dermis-s3, optional: true}}
          resources:
            requests: {{cpu: "2", memory: 3Gi, ephemeral-storage: {temporary_gib}Gi{gpus}}}
            # It uses as many threads as its CPU limit allows. The disk: `tmp` below, and the log.
            limits: {{cpu: "4", memory: 8Gi, ephemeral-storage: {temporary_gib + 1}Gi{gpus}}}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {{drop: [ALL]}}
          volumeMounts:
            - {{name: tmp, mountPath: /tmp}}
            - {{name: ca, mountPath: {_AUTHORITY_FOLDER}, readOnly: true}}{_SIGNER_MOUNT if signed else ""}
      volumes:
        - name: tmp
          emptyDir: {{sizeLimit: {temporary_gib}Gi}}
        - name: ca # ca.crt, if the storage has a certificate of a private authority
          configMap: {{name: dermis-ca, optional: true}}{_SIGNER_VOLUME if signed else ""}"""


def _check(plan: DatasetPlan, options: JobOptions) -> int:
    """Return the number of parts. Raises RequestError if the pods could not use an option."""
    if "://" not in options.out:
        raise RequestError("--out", "must be a URL that all pods can write to, such as s3://bucket/folder")
    bundle = options.bundle
    if "://" not in bundle and not Path(bundle).is_absolute() and Path(bundle).exists():
        message = (
            f"{escape(bundle)} is a folder of this machine; give a URL, or the name or path of a bundle in the image"
        )
        raise RequestError("--bundle", message)
    if options.queue is not None and not re.fullmatch(_LABEL, options.queue):
        raise RequestError("--queue", f"{escape(options.queue)!r} cannot be the name of a queue")
    labels = _labels(options)
    for name, value in labels:
        if sum(name == other for other, _ in labels) > 1:
            raise RequestError("--node-selector", f"the label {escape(name)!r} is given more than once")
        if not (re.fullmatch(f"({_LABEL_PREFIX})?{_LABEL}", name) and re.fullmatch(f"({_LABEL})?", value)):
            raise RequestError("--node-selector", f"{escape(f'{name}={value}')!r} is not of the form LABEL=VALUE")
    if options.shards is None:
        return min(plan.shards, MAX_PARTS)
    match = re.fullmatch(r"auto/([1-9][0-9]{0,5})", options.shards)
    if match is None:
        raise RequestError("--shards", "must be auto/N with --print-job, such as auto/16")
    return int(match[1])


def _labels(options: JobOptions) -> list[tuple[str, str]]:
    """Return the labels that nodes must have. A text without `=` has the label "", which is refused."""
    split = (each.partition("=") for each in options.node_selector)
    return [(name, value) if equals else ("", name) for name, equals, value in split]


def _temporary_gib(plan: DatasetPlan, resolution: int) -> tuple[int, int]:
    """Return the sizes of the temporary folder in GiB, for a part and for the end of the dataset.

    A shard is written there before it is uploaded, and at the end images.zip, metadata.csv and the embeddings of the gate.
    """
    from dermis.dataset.shards import MAX_C2PA_BYTES, max_dataset_bytes, max_image_bytes
    from dermis.latents import MAX_INDEX

    request = plan.request
    image = max_image_bytes(request.image_format, request.image_quality, resolution, plan.origin(MAX_INDEX))
    image += MAX_C2PA_BYTES if request.signed else 0
    shard = min(request.shard_size, plan.samples) * 2 * image
    dim = plan.authenticity.dim if plan.authenticity is not None and plan.gated else 0
    finish = plan.samples * (1000 + 2 * dim)
    if request.format == "imagefolder":
        finish += max_dataset_bytes(plan, resolution)
    return _CACHES_GIB + math.ceil(shard / _GIB), _CACHES_GIB + math.ceil(finish / _GIB)


def request_arguments(request: DatasetRequest) -> list[str]:
    """Return the options of `dermis generate` that make the same request.

    Raises:
        RequestError: The name of a class has a comma, or a space at an end.
    """
    for name in request.classes:
        if "," in name or name != name.strip():
            raise RequestError("--classes", f"{escape(name)!r} cannot be written as an option")
    arguments = ["--classes=" + ",".join(f"{name}={count}" for name, count in request.classes.items())]
    parts = {"model", "classes", "edits", "classifier", "privacy", "provenance"}
    values = request.model_dump(exclude=parts, exclude_none=True)
    if request.classifier is not None:
        values |= {f"classifier.{name}": value for name, value in request.classifier.model_dump().items()}
    if request.privacy is not None:
        values |= {f"privacy.{name}": value for name, value in request.privacy.model_dump().items()}
    for field, value in values.items():
        option = option_of(field)
        if field == "privacy.detect_copies":
            arguments.append("--detect-copies" if value else "--no-detect-copies")
        elif isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-", 1))
        else:
            arguments.append(f"{option}={value}")
    if request.signed:
        arguments.append("--c2pa")
    for edit in request.edits or ():
        layers = "" if edit.layers is None else "@{}-{}".format(*edit.layers)
        arguments.append(f"--edit={edit.direction}={Decimal(repr(edit.strength)):f}{layers}")
    return arguments
