"""`dermis privacy ...`: attack a generator or a dataset to measure what it discloses about the training images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.options import (
    CACHE,
    BundleArgument,
    CacheOption,
    ClassColumnOption,
    DatasetOption,
    DeviceOption,
    SampleSeedOption,
    TruncationOption,
)
from dermis.errors import RequestError
from dermis.files import write_file

if TYPE_CHECKING:
    from training.data.images import ImageDataset

privacy_app = typer.Typer(
    no_args_is_help=True, help="Measure what generated images disclose about the training images."
)


@privacy_app.command("audit")
def audit(
    bundle: Annotated[str, typer.Option(help="Folder or fsspec URL of the bundle.")],
    members: Annotated[
        Path, typer.Option(help="Its training images: a folder, zip or CSV that `dermis data` can read.")
    ],
    non_members: Annotated[
        Path, typer.Option(help="Held-out real images of other patients, separated at random before the training.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for audit.json and AUDIT.md, which name no image and no patient.")],
    members_metadata: Annotated[Path | None, typer.Option(help="CSV of the members.")] = None,
    non_members_metadata: Annotated[Path | None, typer.Option(help="CSV of the held-out images.")] = None,
    dataset: DatasetOption = None,
    attach: Annotated[
        bool, typer.Option("--attach", help="Also store the result in the bundle and its card; it gets a new digest.")
    ] = False,
    extractor: Annotated[
        list[str] | None,
        typer.Option(
            help="Feature space; may be repeated. Default: lite0 and lite1. The pixels at 16 x 16 and the space of the "
            "bundle's classifier are added."
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(help="Number of samples; default: as many as members.")] = None,
    projection_steps: Annotated[
        int,
        typer.Option(min=0, help="Also project every real image by this many optimisation steps; 0 for none."),
    ] = 0,
    training_state: Annotated[
        Path | None, typer.Option(help="checkpoint.safetensors of the training, to attack its discriminator.")
    ] = None,
    truncation_psi: TruncationOption = 1.0,
    seed: SampleSeedOption = 0,
    class_column: ClassColumnOption = None,
    cache: CacheOption = CACHE,
    device: DeviceOption = "auto",
) -> None:
    """Audit a bundle, or with --dataset the images of a dataset: attacks, their controls, and a verdict by written rules.

    --dataset is a dataset of `dermis generate`, or any folder or zip of generated images. The exit status does not depend on
    the verdict.
    """
    from dermis.bundle import amend_bundle, open_bundle
    from dermis.dataset.reading import open_dataset
    from dermis.devices import resolve_device
    from dermis.privacy.audit import MIN_IMAGES
    from dermis.privacy.report import audit_report
    from training.data.isic import load_isic
    from training.data.sources import MANIFEST
    from training.evaluation.privacy import Options, audit_privacy
    from training.evaluation.sets import load_spaces

    if attach and dataset is not None:
        raise RequestError("--attach", "stores audits of bundles; the audit of a dataset is kept beside the dataset")
    if attach and "://" in bundle:
        raise RequestError("--attach", "only a bundle in a local folder can be changed; copy it first")
    if count is not None and count < MIN_IMAGES:
        raise RequestError("--count", f"{count} images are too few for an audit; give {MIN_IMAGES} or more")
    if dataset is not None and (count is not None or projection_steps or training_state is not None):
        raise RequestError("--dataset", "audits existing images; omit --count, --projection-steps and --training-state")
    if out.exists() and not out.is_dir():
        raise RequestError("--out", f"{out} is not a folder")
    opened = open_bundle(bundle)
    if dataset is not None and (dataset / MANIFEST).is_file():
        open_dataset(dataset)  # refuses a dataset with changed files
    spaces, remark = load_spaces(extractor or [], resolve_device(device))
    if remark:
        typer.echo(remark, err=True)

    def load(source: Path, csv: Path | None) -> ImageDataset:
        return load_isic(source, opened.generator.img_resolution, class_column=class_column, metadata=csv, cache=cache)

    result = audit_privacy(
        opened,
        load(members, members_metadata),
        load(non_members, non_members_metadata),
        spaces,
        dataset=None if dataset is None else load(dataset, None),
        dataset_location=dataset,
        options=Options(count, seed, truncation_psi, projection_steps, training_state),
        cache=cache,
        device=device,
    )
    for text in result.remarks:
        typer.echo(f"note: {text}", err=True)
    write_file(out / "audit.json", (json.dumps(result.to_json(), indent=2) + "\n").encode())
    write_file(out / "AUDIT.md", audit_report(result).encode())
    typer.echo(f"{result.verdict.status}: {result.verdict.text}")
    typer.echo(f"{out / 'AUDIT.md'}")
    if attach:
        amended = amend_bundle(opened, privacy_audit=result.to_json())
        typer.echo(f"{bundle}: {amended.name}@{amended.digest}")


@privacy_app.command("show")
def show(bundle: BundleArgument) -> None:
    """Print the privacy audit that is stored in a bundle."""
    from dermis.bundle import open_bundle
    from dermis.bundle.bundle import PRIVACY_AUDIT
    from dermis.errors import DataError
    from dermis.privacy.audit import PrivacyAudit
    from dermis.privacy.report import audit_report

    opened = open_bundle(bundle)
    if opened.privacy_audit is None:
        raise DataError(f"{bundle}: has no privacy audit; make one with dermis privacy audit --attach")
    stored = PrivacyAudit.from_json(opened.privacy_audit, f"{bundle}/{PRIVACY_AUDIT}")
    text = audit_report(stored)
    typer.echo("".join(c if c.isprintable() or c == "\n" else " " for c in text), nl=False)
