"""`dermis generate`: make datasets without a service, with the same plan and shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from commands.batch import ShardsOption, part_of, shards_of, with_status_of_bad_input
from commands.batch_job import (
    JobGpusOption,
    JobImageOption,
    JobOptions,
    NodeSelectorOption,
    PrintJobOption,
    QueueOption,
    job_yaml,
)
from commands.console import option_of
from commands.dataset_audit import (
    AuditClassColumnOption,
    AuditExtractorOption,
    AuditMembersMetadataOption,
    AuditMembersOption,
    AuditNonMembersMetadataOption,
    AuditNonMembersOption,
    audit_sources,
    check_audited,
    is_audited,
    prepare_audit,
)
from commands.dataset_resume import begin, differences, existing_manifest, in_format_there, is_complete
from commands.image_signing import C2paOption, CertificateOption, KeyOption, image_signer, request_with_signing
from commands.options import (
    DEMO_BUNDLE,
    BundleOption,
    DetectCopiesOption,
    DeviceOption,
    GateOption,
    GateTriesOption,
    NoiseModeOption,
    OnRejectOption,
    OptionalTruncationOption,
)
from dermis.dataset.request import DatasetFormat, ImageFormat
from dermis.errors import DermisError, MissingShardsError, RequestError, StorageError

if TYPE_CHECKING:
    from dermis.authenticity.checker import Checker
    from dermis.bundle import Bundle
    from dermis.classifier.onnx_session import Classifier
    from dermis.dataset.manifest import Audit, Manifest
    from dermis.dataset.plan import DatasetPlan
    from dermis.dataset.request import DatasetRequest
    from dermis.dataset.shards import FileEntry, Sign
    from dermis.dataset.store import Store
    from dermis.provenance.c2pa import ImageSigner
    from dermis.synthesizer import Synthesizer


@with_status_of_bad_input
def generate(
    out: Annotated[str, typer.Option(help="Folder or fsspec URL of the dataset. An unfinished dataset is continued.")],
    bundle: BundleOption = DEMO_BUNDLE,
    classes: Annotated[
        str | None, typer.Option(help="Number of images of each class, such as malignant=500,benign=500.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="Make the dataset of this manifest.json again, which replaces the options below."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed: sample i has its latent from (seed, i). Default 0.")] = None,
    file_format: Annotated[
        DatasetFormat | None, typer.Option("--format", help="Format of the dataset. Default imagefolder.")
    ] = None,
    image_format: Annotated[ImageFormat | None, typer.Option(help="Format of the images. Default png.")] = None,
    image_quality: Annotated[int | None, typer.Option(help="Quality of jpeg and webp, 1 to 100. Default 95.")] = None,
    truncation_psi: OptionalTruncationOption = None,
    truncation_cutoff: Annotated[
        int | None, typer.Option(help="Number of style layers that are truncated. Default: all.")
    ] = None,
    noise_mode: NoiseModeOption = None,
    shard_size: Annotated[int | None, typer.Option(help="Images in a shard. Default 250.")] = None,
    keep: Annotated[
        Literal["all", "agreeing"] | None,
        typer.Option(help="all (default), or agreeing: only images whose class the bundle's classifier confirms."),
    ] = None,
    threshold: Annotated[
        str | None, typer.Option(help="With --keep agreeing: name of the classifier's threshold.")
    ] = None,
    min_probability: Annotated[float | None, typer.Option(help="Minimum probability of the images to keep.")] = None,
    max_probability: Annotated[float | None, typer.Option(help="Maximum probability of the images to keep.")] = None,
    tries: Annotated[
        int | None, typer.Option(help="Maximum number of latents to try for an image, until one is kept. Default 1.")
    ] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(help="Edit images: DIRECTION=STRENGTH, or DIRECTION=STRENGTH@FIRST-LAST; may be repeated."),
    ] = None,
    gate: GateOption = None,
    percentile: Annotated[float | None, typer.Option(help="Percentile for --gate min_distance. Default 1.")] = None,
    on_reject: OnRejectOption = None,
    gate_tries: GateTriesOption = None,
    detect_copies: DetectCopiesOption = None,
    score: Annotated[
        bool | None,
        typer.Option("--score/--no-score", help="Write the classifier's probability as a column. Default: yes."),
    ] = None,
    audit_members: AuditMembersOption = None,
    audit_non_members: AuditNonMembersOption = None,
    audit_members_metadata: AuditMembersMetadataOption = None,
    audit_non_members_metadata: AuditNonMembersMetadataOption = None,
    audit_class_column: AuditClassColumnOption = None,
    audit_extractor: AuditExtractorOption = None,
    c2pa: C2paOption = None,
    c2pa_certificate: CertificateOption = None,
    c2pa_key: KeyOption = None,
    only_shard: Annotated[
        list[int] | None,
        typer.Option(help="Make only this shard (the first is 0), without finishing; may be repeated."),
    ] = None,
    shards: ShardsOption = None,
    finalize_only: Annotated[
        bool, typer.Option("--finalize", help="Only assemble the dataset from shards that exist.")
    ] = False,
    print_job: PrintJobOption = False,
    queue: QueueOption = None,
    job_image: JobImageOption = None,
    job_gpus: JobGpusOption = None,
    node_selector: NodeSelectorOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Make a dataset from a bundle.

    After a stop at any point, run the same command again to continue. The files are the same as without the stop.
    With --audit-members and --audit-non-members the dataset is audited as by `dermis privacy audit --dataset` before it is
    finished: privacy_audit.json, AUDIT.md and the report have the result. The exit status does not depend on the verdict.
    Many processes make one dataset together with --shards, and one of them, or another, finishes it with --finalize. Their exit
    status is 2 if the same command would fail again: options that do not fit together, or missing shards.
    """
    from dermis.bundle import open_bundle
    from dermis.dataset.manifest import parse_manifest, synthesizer_identity
    from dermis.dataset.plan import plan_for
    from dermis.dataset.request import check_against
    from dermis.dataset.shards import missing_shards
    from dermis.dataset.store import PARTIAL, Store
    from dermis.synthesizer import Synthesizer

    options = {
        "seed": seed,
        "format": file_format,
        "image_format": image_format,
        "image_quality": image_quality,
        "truncation_psi": truncation_psi,
        "truncation_cutoff": truncation_cutoff,
        "noise_mode": noise_mode,
        "shard_size": shard_size,
    }
    classifier = {
        "score": score,
        "keep": keep,
        "threshold": threshold,
        "min_probability": min_probability,
        "max_probability": max_probability,
        "tries": tries,
    }
    fields: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    privacy = {
        "gate": gate,
        "percentile": percentile,
        "on_reject": on_reject,
        "tries": gate_tries,
        "detect_copies": detect_copies,
    }
    filtering = {name: value for name, value in classifier.items() if value is not None}
    gating = {name: value for name, value in privacy.items() if value is not None}
    if manifest is None:
        _check_gate_options(gating)
    if edit:
        fields["edits"] = [_parse_edit(text) for text in edit]
    if c2pa is not None:
        fields["provenance"] = {"c2pa": c2pa}
    part = None if shards is None or print_job else part_of(shards)
    if part is not None and (only_shard is not None or finalize_only):
        raise RequestError("--shards", f"omit {'--finalize' if finalize_only else '--only-shard'}")
    job_options = {"--queue": queue, "--job-image": job_image, "--job-gpus": job_gpus, "--node-selector": node_selector}
    for option, value in {} if print_job else job_options.items():
        if value not in (None, []):
            raise RequestError(option, "is an option of --print-job")
    sources = audit_sources(
        audit_members,
        audit_non_members,
        audit_members_metadata,
        audit_non_members_metadata,
        audit_class_column,
        audit_extractor,
    )
    opened = open_bundle(bundle)
    former: Manifest | None = None
    if manifest is not None:
        if classes is not None or fields or filtering or gating:
            words = {"edits": "edit", "tries": "gate-tries", "provenance": "c2pa"}
            extra = sorted({*(words.get(name, name) for name in (*fields, *gating)), *filtering})
            names = ", ".join(["classes"] * (classes is not None) + extra).replace("_", "-")
            raise RequestError("--manifest", f"already contains all options; omit --{names.replace(', ', ', --')}")
        former = parse_manifest(_read(manifest), str(manifest))
        if former.bundle_digest != opened.digest:
            raise RequestError(
                "--bundle",
                f"{manifest} was made with bundle {former.bundle_name} of digest {former.bundle_digest[:12]}, but "
                f"{bundle} has {opened.digest[:12]}; give the bundle that made it",
            )
        request = former.request
    elif classes is None:
        raise RequestError(
            "--classes", f"give the number of images of each class, for instance --classes {_example(opened)}"
        )
    else:
        if filtering:
            fields["classifier"] = filtering
        if gating:
            fields["privacy"] = gating
        request = _request({"model": opened.name, "classes": _parse_classes(classes), **fields})
    signer: ImageSigner | None = None
    if print_job:  # the pods have the certificate
        request = request_with_signing(request, c2pa_certificate, repeated=former is not None)
    else:
        request, signer = image_signer(request, c2pa_certificate, c2pa_key, repeated=former is not None)
    check_against(request, opened, max_samples=10**8)
    planned = plan_for(request, opened)
    if print_job:
        if sources is not None or only_shard is not None or finalize_only:
            raise RequestError("--print-job", "omit --finalize, --only-shard and the options of the audit")
        job = JobOptions(bundle, out, shards, queue, job_image, job_gpus, node_selector or ())
        typer.echo(job_yaml(planned, opened.generator.img_resolution, job), nl=False)
        return
    store = Store(out)
    chosen = list(range(planned.shards)) if only_shard is None else only_shard
    if part is not None:
        chosen = shards_of(part, planned.shards)
    for shard in chosen:
        if not 0 <= shard < planned.shards:
            raise RequestError("--only-shard", f"{shard} is not in 0 to {planned.shards - 1}")
    existing = existing_manifest(store, planned)
    planned = in_format_there(store, planned, former)
    finish = finalize_only or (only_shard is None and part is None)
    if sources is not None and not finish:
        option = "--only-shard" if part is None else "--shards"
        raise RequestError("--audit-members", f"is for the command that finishes the dataset; omit it with {option}")
    check_audited(existing, sources, store)
    if part is not None and (existing is not None or not chosen):
        state = "is finished" if existing is not None else f"has no shard for part {part[0]} of {part[1]}"
        typer.echo(f"{out}: {state}; nothing to do")
        return
    if finalize_only and existing is None and (absent := missing_shards(planned, store)):
        raise MissingShardsError(out, planned.shards, absent, "is missing")
    try:
        with (
            Synthesizer(opened, device=device, cache=Path(".dermis/cache/generators")) as synthesizer,
            _scoring(planned, opened, device) as scorer,
            _checking(planned, opened, device) as checker,
            _comparing(planned, opened, device, finish) as compare,
        ):
            models = DatasetModels(synthesizer, scorer, checker, compare, None if signer is None else signer.sign)
            identity = synthesizer_identity(models.identity)
            if former is not None and (differing := differences(former.synthesizer, identity)):
                typer.echo(f"warning: the bytes may differ from those of the manifest: {differing}", err=True)
            if existing is not None and is_complete(existing, store, identity):
                result: Manifest | None = existing
            elif existing is not None and finalize_only:
                raise StorageError(f"{out}: is finished, but damaged; omit --finalize to repair it")
            else:
                audit = None if sources is None else prepare_audit(sources, opened, planned, device)
                if audit is None and is_audited(existing):
                    raise StorageError(
                        f"{out}: was audited; run the whole command with the --audit options again to repair it"
                    )
                if not finalize_only:
                    begin(store, planned, reopen=existing is not None)
                result = _make(planned, store, opened, models, () if finalize_only else chosen, finish, audit)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; run the same command again to continue {out}", err=True)
        raise typer.Exit(130) from None
    if result is None:
        if existing_manifest(store, planned) is not None:  # another process has finished the dataset in the meantime
            store.remove(PARTIAL)
        made = f"shard {', '.join(map(str, chosen))} of {planned.shards}"
        if part is not None:
            made = f"part {part[0]} of {part[1]} ({len(chosen):,} of {planned.shards:,} shards)"
        typer.echo(f"{out}: {made} is ready; run with --finalize when all shards are ready")
        return
    typer.echo(f"{out}: {_summary(planned, result)} in {_containers(planned)}; check them with: dermis verify {out}")
    if former is not None:
        _compare(former, result)


@contextmanager
def _scoring(planned: DatasetPlan, bundle: Bundle, device: str) -> Iterator[Classifier | None]:
    """Open the bundle's classifier if the plan needs scores."""
    if not planned.scored:
        yield None
        return
    from dermis.classifier.onnx_session import Classifier

    with Classifier(bundle, device=device) as classifier:
        yield classifier


@contextmanager
def _checking(planned: DatasetPlan, bundle: Bundle, device: str) -> Iterator[Checker | None]:
    """Open the bundle's index if the plan has a gate."""
    if not planned.gated:
        yield None
        return
    from dermis.authenticity.checker import Checker

    with Checker(bundle, device=device) as checker:
        yield checker


@contextmanager
def _comparing(planned: DatasetPlan, bundle: Bundle, device: str, finish: bool) -> Iterator[Checker | None]:
    """Open the bundle's index for the report of a dataset without a gate, if it can be used; otherwise yield None."""
    if not finish or planned.gated or bundle.authenticity is None or bundle.reference is None:
        yield None
        return
    from dermis.authenticity.checker import Checker

    try:
        checker = Checker(bundle, device=device)
    except DermisError as error:
        typer.echo(f"warning: fidelity and variety will not be in the report: {error}", err=True)
        yield None
        return
    with checker:
        yield checker


@dataclass(frozen=True)
class DatasetModels:
    """The models that make a dataset: generator, classifier and index of training images.

    `compare` is the index for the report if the plan has no gate; the bytes of the images do not depend on it. `sign` puts
    signed manifests into the images.
    """

    synthesizer: Synthesizer
    scorer: Classifier | None
    checker: Checker | None
    compare: Checker | None = None
    sign: Sign | None = None

    @property
    def identity(self) -> dict[str, str]:
        """The versions and settings that the bytes of the dataset depend on, by name."""
        parts = [part.identity for part in (self.synthesizer, self.scorer, self.checker) if part is not None]
        return {key: value for part in parts for key, value in part.items()}


def _summary(planned: DatasetPlan, manifest: Manifest) -> str:
    """State the number of images, and the effects of filter and gate."""
    rejections: list[str] = []
    images = planned.samples
    if planned.filtered and manifest.classifier is not None:
        images = sum(tally.images for tally in manifest.classifier.values())
        rejections.append(f"{sum(tally.rejected for tally in manifest.classifier.values()):,} rejected by the filter")
    if manifest.privacy is not None:
        images = sum(tally.images for tally in manifest.privacy.classes.values())
        rejections.append(
            f"{sum(tally.rejected for tally in manifest.privacy.classes.values()):,} rejected by the gate"
        )
        after, before = manifest.privacy.authentic_share_of_images, manifest.privacy.authentic_share_of_candidates
        rejections.append(f"{after:.1%} authentic, before the gate {before:.1%}")
        if planned.detects_copies:
            copies = sum(tally.copies or 0 for tally in manifest.privacy.classes.values())
            rejections.append(f"{copies:,} taken for changed copies")
        if manifest.privacy.weakness is not None:
            rejections.append(f"warning: copies may pass the gate: {manifest.privacy.weakness}")
    if images < planned.samples:
        rejections.append(f"{planned.samples - images:,} missing")
    return f"{images:,} images" + (f" ({', '.join(rejections)})" if rejections else "")


def _containers(planned: DatasetPlan) -> str:
    """The files that hold the images."""
    from dermis.dataset.containers import container_name

    first = container_name(planned, 0)
    if first is None:
        return "images.zip"
    return first if planned.shards == 1 else f"{planned.shards:,} {Path(first).suffix} files"


def _make(
    planned: DatasetPlan,
    store: Store,
    bundle: Bundle,
    models: DatasetModels,
    shards: Sequence[int],
    finish: bool,
    audit: Audit | None = None,
) -> Manifest | None:
    from tqdm import tqdm

    from dermis.authenticity.attack import exposure
    from dermis.dataset.manifest import finalize
    from dermis.dataset.plan import BATCH
    from dermis.dataset.privacy import examiner
    from dermis.dataset.shards import check_space, write_shard
    from dermis.directions.edit import bundle_offset

    request = planned.request
    synthesizer, scorer, checker = models.synthesizer, models.scorer, models.checker
    if shards:
        check_space(planned, store, bundle.generator.img_resolution)
    offset = bundle_offset(bundle, request.moves) if request.moves else None

    def synthesize(indices: Sequence[int], labels: Sequence[int]) -> Any:
        return synthesizer.images(
            [request.seed] * len(indices),
            indices,
            labels,
            truncation_psi=request.truncation_psi,
            truncation_cutoff=request.truncation_cutoff,
            noise_mode=request.noise_mode,
            offset=offset,
        )

    def score(images: Any) -> Any:
        assert scorer is not None
        return scorer.classify(images, features=False).calibrated

    batch = max(BATCH, synthesizer.preferred_batch)
    total = sum(len(planned.shard(shard)) for shard in shards)
    with tqdm(total=total, unit="img", disable=total == 0) as bar:
        for shard in shards:
            before = bar.n

            def advance(done: int, before: int = before) -> None:
                bar.update(before + done - bar.n)

            write_shard(
                planned,
                shard,
                synthesize,
                store,
                score=score,
                examine=None if checker is None else examiner(planned, checker),
                identity=models.identity,
                sign=models.sign,
                on_batch=advance,
                batch_size=batch,
            )
    if not finish:
        return None
    expose = None if checker is None else partial(exposure, checker.index)
    return finalize(
        planned,
        store,
        bundle,
        models.identity,
        expose,
        examine=None if models.compare is None else partial(models.compare.nearest, detect_copies=False),
        audit=audit,
        sign=models.sign,
    )


def _compare(former: Manifest, repeated: Manifest) -> None:
    """Report whether a repeated dataset is the same as the former one; DermisError if it should be and is not."""
    if former.files == repeated.files:
        typer.echo("every file is the same as in the manifest, byte for byte")
    elif former.synthesizer != repeated.synthesizer:
        typer.echo("the bytes differ from those of the manifest, as another machine made it", err=True)
    elif former.canonical is not None and former.canonical == repeated.canonical:
        typer.echo("every file is the same as in the manifest, byte for byte, but for the signatures of images")
    elif former.request.signed and _unsigned_files(former) == _unsigned_files(repeated):
        typer.echo("every image is the same as in the manifest, byte for byte, but for its signature")
    elif _without_report(former) == _without_report(repeated):
        typer.echo(
            "every file except report and audit is the same as in the manifest, byte for byte; the former dataset was made "
            "without FAISS, by a version without reports, or with another audit, or this one was",
            err=True,
        )
    else:
        raise DermisError(
            "the files differ from those of the manifest, though made in the same way; please report this"
        )


def _unsigned_files(manifest: Manifest) -> list[FileEntry]:
    """Return the files that no signature is in. metadata.csv has the SHA-256 of every image without its signature."""
    from dermis.dataset.manifest import CARD, METADATA

    return [file for file in manifest.files if file.name in (CARD, METADATA)]


def _without_report(manifest: Manifest) -> list[FileEntry]:
    """Return the files whose bytes do not depend on what is installed beside the models."""
    from dermis.dataset.manifest import AUDIT_TEXT, PRIVACY_AUDIT, REPORT, REPORT_PAGE

    additions = (REPORT, REPORT_PAGE, PRIVACY_AUDIT, AUDIT_TEXT)
    return [file for file in manifest.files if file.name not in additions]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


def _parse_classes(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        if not (equals and name and number.isascii() and number.isdigit()) or name in counts:
            raise RequestError("--classes", f"{part.strip()!r} is not of the form NAME=COUNT, each name once")
        counts[name] = int(number)
    return counts


def _check_gate_options(gating: Mapping[str, Any]) -> None:
    """Refuse options of the gate without an effect, but for default values, which printed Jobs name."""
    if gating and "gate" not in gating:
        raise RequestError(
            option_of(f"privacy.{next(iter(gating))}"),
            "is an option of the gate; add --gate authentic or --gate min_distance",
        )
    if gating.get("percentile", 1) != 1 and gating["gate"] != "min_distance":
        raise RequestError("--percentile", "is an option of --gate min_distance")
    if gating.get("tries", 8) != 8 and gating.get("on_reject", "resample") != "resample":
        raise RequestError("--gate-tries", "is an option of --on-reject resample")


def _parse_edit(text: str) -> dict[str, Any]:
    match = re.fullmatch(r"(?P<name>[^=]+)=(?P<strength>[+-]?[0-9.]+)(@(?P<first>\d+)-(?P<last>\d+))?", text)
    try:
        if match is None:
            raise ValueError
        layers = None if match["first"] is None else [int(match["first"]), int(match["last"])]
        return {"direction": match["name"], "strength": float(match["strength"]), "layers": layers}
    except ValueError:
        message = f"{text!r} is not of the form DIRECTION=STRENGTH or DIRECTION=STRENGTH@FIRST-LAST"
        raise RequestError("--edit", message) from None


def _request(values: dict[str, Any]) -> DatasetRequest:
    from pydantic import ValidationError

    from dermis.dataset.request import DatasetRequest

    try:
        return DatasetRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise RequestError(".".join(str(part) for part in first["loc"]), first["msg"]) from None


def _example(bundle: Bundle) -> str:
    from dermis.dataset.request import classes_of

    return ",".join(f"{name}=100" for name in classes_of(bundle))
