"""The privacy audit as the last step of `dermis generate`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from commands.options import CACHE
from dermis.errors import DataError, RequestError, StorageError

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.dataset.containers import DatasetSample
    from dermis.dataset.manifest import Audit, DatasetAudit, Manifest
    from dermis.dataset.plan import DatasetPlan
    from dermis.dataset.store import Store
    from dermis.imaging import Images
    from training.data.images import ImageDataset

AuditMembersOption = Annotated[
    Path | None,
    typer.Option(
        help="Audit the dataset before it is finished: the training images of the bundle, as of dermis privacy audit.",
    ),
]
AuditNonMembersOption = Annotated[
    Path | None,
    typer.Option(help="For the audit: held-out real images of other patients."),
]
AuditMembersMetadataOption = Annotated[Path | None, typer.Option(help="CSV of --audit-members.")]
AuditNonMembersMetadataOption = Annotated[Path | None, typer.Option(help="CSV of --audit-non-members.")]
AuditClassColumnOption = Annotated[str | None, typer.Option(help="Column of the classes in both CSVs.")]
AuditExtractorOption = Annotated[
    list[str] | None,
    typer.Option(help="Feature space of the audit; may be repeated. Default: lite0 and lite1."),
]


@dataclass(frozen=True)
class AuditSources:
    """Real images with which a dataset is audited."""

    members: Path
    non_members: Path
    members_metadata: Path | None
    non_members_metadata: Path | None
    class_column: str | None
    extractors: tuple[str, ...]


def audit_sources(
    members: Path | None,
    non_members: Path | None,
    members_metadata: Path | None,
    non_members_metadata: Path | None,
    class_column: str | None,
    extractors: list[str] | None,
) -> AuditSources | None:
    """Return the sources of the options; None without an audit.

    Raises:
        RequestError: Only one of the two sets is given, or other options without them.
    """
    if members is not None and non_members is not None:
        return AuditSources(
            members, non_members, members_metadata, non_members_metadata, class_column, tuple(extractors or ())
        )
    if members is not None:
        raise RequestError("--audit-non-members", "an audit needs held-out real images of other patients as well")
    others = {
        "--audit-non-members": non_members,
        "--audit-members-metadata": members_metadata,
        "--audit-non-members-metadata": non_members_metadata,
        "--audit-class-column": class_column,
        "--audit-extractor": extractors,
    }
    if used := [name for name, value in others.items() if value]:
        raise RequestError(used[0], "is an option of an audit, which needs --audit-members as well")
    return None


def check_audited(existing: Manifest | None, sources: AuditSources | None, store: Store) -> None:
    """Raise StorageError if an audit is asked for of a dataset that is finished without one."""
    if existing is not None and sources is not None and not is_audited(existing):
        raise StorageError(
            f"{store.location}: is finished without an audit; audit it with dermis privacy audit --dataset, or choose another "
            "--out"
        )


def is_audited(manifest: Manifest | None) -> bool:
    """Return whether a finished dataset has an audit of its own."""
    from dermis.dataset.manifest import PRIVACY_AUDIT

    return manifest is not None and any(file.name == PRIVACY_AUDIT for file in manifest.files)


def prepare_audit(sources: AuditSources, bundle: Bundle, planned: DatasetPlan, device: str) -> Audit:
    """Read and check the real images, before any image is generated, and return the function that audits the dataset.

    Args:
        sources: The real images.
        bundle: The bundle that makes the dataset.
        planned: The plan of the dataset.
        device: Device of the networks.

    Raises:
        DermisError: The real images cannot be used for an audit.
    """
    from dermis.dataset.manifest import DatasetAudit
    from dermis.devices import resolve_device
    from dermis.privacy.audit import MIN_IMAGES
    from dermis.privacy.report import audit_report
    from training.data.isic import load_isic
    from training.evaluation.privacy import audit_privacy, check_sets
    from training.evaluation.sets import load_spaces

    def load(source: Path, table: Path | None) -> ImageDataset:
        return load_isic(
            source,
            bundle.generator.img_resolution,
            class_column=sources.class_column,
            metadata=table,
            cache=CACHE,
        )

    if planned.samples < MIN_IMAGES:
        raise RequestError(
            "--classes",
            f"{planned.samples} images are too few for an audit; give {MIN_IMAGES} or more, or omit the audit",
        )
    spaces, remark = load_spaces(sources.extractors, resolve_device(device), option="--audit-extractor")
    if remark:
        typer.echo(remark, err=True)
    members = load(sources.members, sources.members_metadata)
    others = load(sources.non_members, sources.non_members_metadata)
    check_sets(bundle, members, others, options=("--audit-members", "--audit-non-members"))

    def audit(samples: Iterator[tuple[DatasetSample, Images]]) -> DatasetAudit:
        images = _image_dataset(samples, planned)
        if len(images.labels) < MIN_IMAGES:
            raise DataError(
                f"{len(images.labels)} images were kept, too few for an audit ({MIN_IMAGES}); run the same command without the "
                "options of the audit to finish the dataset"
            )
        result = audit_privacy(bundle, members, others, spaces, dataset=images, cache=CACHE, device=device)
        for text in result.remarks:
            typer.echo(f"note: {text}", err=True)
        typer.echo(f"audit: {result.verdict.status}: {result.verdict.text}")
        return DatasetAudit(result.to_json(), audit_report(result))

    return audit


def _image_dataset(samples: Iterator[tuple[DatasetSample, Images]], planned: DatasetPlan) -> ImageDataset:
    from training.data.images import ImageDataset

    digest = hashlib.sha256()
    images, labels, ids = [], [], []
    for sample, pixels in samples:
        images.append(pixels)
        labels.append(sample.label)
        ids.append(f"{sample.index}")
        digest.update(f"{sample.index}\t{planned.class_names[sample.label]}\t{sample.sha256}\n".encode())
    return ImageDataset(
        np.stack(images), np.array(labels, np.int64), planned.class_names, tuple(ids), digest.hexdigest()
    )
