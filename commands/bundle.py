"""`dermis bundle ...`: import official checkpoints, show and verify bundles, attach and detach parts."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from commands.console import warn_of_removed_audit
from commands.options import (
    CACHE,
    AttributionOption,
    BundleArgument,
    BundleFolderArgument,
    CacheOption,
    ClassColumnOption,
    DataOption,
    DeviceOption,
    MetadataOption,
)
from commands.signing import TrustedOption, check_bundle_signature, sign_bundle

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.official.convert import OfficialCheckpoint

bundle_app = typer.Typer(no_args_is_help=True, help="Import, show and verify bundles, attach and detach parts.")


class RemovablePart(StrEnum):
    """Parts of a bundle that can be removed."""

    CLASSIFIER = "classifier"
    AUTHENTICITY = "authenticity"
    ENCODER = "encoder"
    REFERENCE = "reference"
    COPIES = "copies"
    DIRECTIONS = "directions"
    PRIVACY_AUDIT = "privacy_audit"


@bundle_app.command("import")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="Official .pkl file of StyleGAN2 (PyTorch).", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the new bundle.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Name of the bundle; default: the folder's name.")] = None,
    class_names: Annotated[str, typer.Option(help="Names of the labels 0, 1, ..., such as benign,malignant.")] = "",
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "unknown",
    attribution: AttributionOption = "",
    network: Annotated[
        Literal["G_ema", "G"], typer.Option(help="Generator to import: G_ema (averaged weights) or G.")
    ] = "G_ema",
    weights_dtype: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="How weights are stored: fp32 or fp16 (half the size).")
    ] = "fp32",
    require_discriminator: Annotated[
        bool, typer.Option("--require-discriminator", help="Fail if the discriminator cannot be imported.")
    ] = False,
    max_seconds: Annotated[
        int,
        typer.Option(
            min=1, help="Limit of processor seconds for reading the file; the limit of elapsed time is 5 times as high."
        ),
    ] = 120,
    max_memory_gib: Annotated[float, typer.Option(min=0.25, help="Limit of memory for reading the file, in GiB.")] = 4,
) -> None:
    """Turn an official checkpoint into a bundle. Nothing in the checkpoint is executed."""
    from dermis.bundle import check_names, write_bundle
    from dermis.errors import BundleError
    from dermis.limited import ProcessLimits
    from dermis.official.convert import read_official

    if out.exists():
        raise BundleError(f"{out}: exists already; choose another folder or remove it")
    limits = ProcessLimits(max_seconds, 5 * max_seconds, int(max_memory_gib * (1 << 30)))
    official = read_official(checkpoint, network, limits)
    if official.discriminator is None:
        if require_discriminator:
            raise BundleError(f"{checkpoint}: no discriminator can be imported: {official.no_discriminator}")
        typer.echo(f"warning: {checkpoint}: imported without a discriminator: {official.no_discriminator}", err=True)
    config = official.generator.config
    names = [part.strip() for part in class_names.split(",")] if class_names else []
    names = names or [f"class{i}" for i in range(config.c_dim)]
    bundle_name = name or re.sub(r"[^a-z0-9._-]+", "-", out.absolute().name.lower()).strip("._-")
    check_names(bundle_name, names, config.c_dim)
    provenance = _provenance(checkpoint, network, official, licence, attribution)
    bundle = write_bundle(
        out,
        name=bundle_name,
        generator=official.generator,
        class_names=names,
        provenance=provenance,
        model_card=_card(bundle_name, names, config.img_resolution, provenance),
        discriminator=official.discriminator,
        weights_dtype=weights_dtype,
    )
    typer.echo(f"{out}: {bundle.name}@{bundle.digest}")


@bundle_app.command("show")
def show(
    bundle: BundleArgument,
) -> None:
    """Verify a bundle and print its description as JSON."""
    import json
    from dataclasses import asdict

    from dermis.bundle import open_bundle

    opened = open_bundle(bundle)
    description = asdict(opened)
    description["directions"] = [direction.name for direction in opened.directions]
    description["model_card"] = opened.model_card.split("\n", 1)[0]
    text = json.dumps(description, indent=2, ensure_ascii=False)
    # Some characters beyond ASCII control a terminal as well; letters of all scripts are printed unchanged.
    typer.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


bundle_app.command("sign")(sign_bundle)


@bundle_app.command("verify")
def verify(
    bundle: BundleArgument,
    trusted: TrustedOption = None,
) -> None:
    """Check every file of a bundle against bundle.json, that its networks and its index can be loaded, and its signature."""
    from dermis.bundle import load_discriminator, load_generator, open_bundle
    from dermis.bundle.bundle import PRIVACY_AUDIT
    from dermis.bundle.reference import read_features
    from dermis.privacy.audit import PrivacyAudit
    from dermis.projection.encoder import load_encoder

    opened = open_bundle(bundle)
    signed = check_bundle_signature(opened, trusted)
    load_generator(opened)
    if opened.discriminator is not None:
        load_discriminator(opened)
    if opened.classifier is not None:
        _try_classifier(opened)
    if opened.authenticity is not None:
        _try_index(opened)
    load_encoder(opened, device="cpu")
    if opened.reference is not None:
        read_features(f"{opened.location}/reference", opened.reference)
    if opened.copies is not None:
        _try_copy_detector(opened)
    if opened.privacy_audit is not None:
        PrivacyAudit.from_json(opened.privacy_audit, f"{opened.location}/{PRIVACY_AUDIT}")
    typer.echo(f"{bundle}: {len(opened.files)} files are intact: {opened.name}@{opened.digest}{signed}")


@bundle_app.command("attach-classifier")
def attach_classifier(
    bundle: BundleFolderArgument,
    classifier: Annotated[
        Path,
        typer.Argument(help="Folder of the classifier, as `dermis train classifier` writes it.", show_default=False),
    ],
) -> None:
    """Put a classifier into a bundle, in place of an earlier one. The bundle gets a new digest."""
    from dermis.bundle import amend_bundle, open_bundle

    opened = open_bundle(bundle)
    _try_classifier(classifier)
    amended = amend_bundle(opened, parts={"classifier": classifier})
    warn_of_removed_audit(opened, "classifier")
    index = amended.authenticity
    if index is not None and index.extractor == "classifier" and opened.classifier != amended.classifier:
        typer.echo(
            "warning: its index was built with the former classifier; build it again with dermis index build", err=True
        )
    assert amended.classifier is not None
    if not set(amended.class_names) <= set(amended.classifier.class_names):
        names = ", ".join(amended.class_names) or "no classes"
        typer.echo(
            f"warning: the generator has {names}, the classifier {', '.join(amended.classifier.class_names)}", err=True
        )
    size, resolution = amended.classifier.input.size, amended.generator.img_resolution
    if size > resolution:  # it was trained on detail that generated images lack, and predicts too few positives
        typer.echo(
            f"warning: the classifier's input has {size} px, generated images have {resolution}: their probabilities will "
            f"be too low; train it with --size {resolution}",
            err=True,
        )
    typer.echo(f"{bundle}: {amended.name}@{amended.digest} with classifier {amended.classifier.digest}")


@bundle_app.command("reference")
def reference(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle; it gets a new digest.")],
    data: DataOption,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Held-out images: real ones that the generator was not trained on, as a baseline."),
    ] = None,
    held_out_metadata: Annotated[Path | None, typer.Option(help="CSV of the held-out images.")] = None,
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    device: DeviceOption = "auto",
    cache: CacheOption = CACHE,
) -> None:
    """Put statistics of real images into a bundle, with which the reports of its datasets are compared.

    --data are the images that the generator was trained on. No image is stored: every number is of at least 50 images.
    Fidelity and variety need the index of the bundle (`dermis index build`), so build it first.
    """
    from tempfile import TemporaryDirectory

    from dermis.bundle import amend_bundle, open_bundle, trained_on
    from dermis.bundle.reference import write_reference_folder
    from dermis.errors import RequestError
    from dermis.report.build import build_reference
    from training.data.isic import load_isic
    from training.evaluation.holdout import check_holdout
    from training.evaluation.reference import measure_real

    if held_out is None and held_out_metadata is not None:
        raise RequestError("--held-out-metadata", "needs --held-out, the images that it describes")
    opened = open_bundle(bundle)
    size = opened.generator.img_resolution
    dataset = load_isic(data, size, class_column=class_column, metadata=metadata, cache=cache)
    training_set = trained_on(opened.provenance)
    held = None
    if held_out is not None:
        held = load_isic(held_out, size, class_column=class_column, metadata=held_out_metadata, cache=cache)
        check_holdout(dataset, held, training_set, option="--held-out")
    if training_set is not None and training_set != dataset.sha256:
        typer.echo("warning: --data is not the set that the bundle names as its training set", err=True)
    if missing := sorted(set(opened.class_names) - set(dataset.class_names)):
        typer.echo(f"warning: --data has no images of {', '.join(missing)}, so nothing is compared for them", err=True)
    real, others = measure_real(opened, dataset, held, device)
    index = opened.authenticity
    description, features = build_reference(
        real,
        resolution=size,
        index=None if index is None else index.digest,
        held_out=others,
        provenance={
            "dataset": {"name": data.name, "sha256": dataset.sha256, "is_training_set": training_set == dataset.sha256},
            "held_out": None if held is None or held_out is None else {"name": held_out.name, "sha256": held.sha256},
        },
    )
    with TemporaryDirectory() as folder:
        write_reference_folder(Path(folder) / "reference", description, features)
        amended = amend_bundle(opened, parts={"reference": Path(folder) / "reference"})
    if index is None:
        typer.echo("warning: the bundle has no index, so fidelity and variety will not be measured", err=True)
    for name in description.suppressed:
        typer.echo(f"warning: {name} has images of too few patients, so there are no statistics of it", err=True)
    counts = ", ".join(f"{name} {of_class.images:,}" for name, of_class in description.classes.items())
    typer.echo(f"{bundle}: {amended.name}@{amended.digest} with statistics of {counts}")


@bundle_app.command("detach")
def detach(
    bundle: BundleFolderArgument,
    parts: Annotated[
        list[RemovablePart], typer.Argument(metavar="PART...", help="Parts to remove.", show_default=False)
    ],
) -> None:
    """Remove parts from a bundle: classifier, authenticity, encoder, copies, reference, directions or privacy_audit.

    authenticity is the index of training images, and copies is the copy detector. Both reveal whether an image is a training
    image; they can be removed before a bundle is shared.
    """
    from dermis.bundle import amend_bundle, open_bundle
    from dermis.errors import RequestError

    opened = open_bundle(bundle)
    for part in parts:
        if not getattr(opened, part):
            raise RequestError("parts", f"{bundle} has no {part}")
    amended = amend_bundle(opened, remove=parts)
    typer.echo(f"{bundle}: {amended.name}@{amended.digest} without {', '.join(parts)}")


@bundle_app.command("export-onnx")
def export_onnx(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option("--out", help="File to write, such as generator.onnx.", show_default=False)],
    part: Annotated[
        Literal["all", "mapping", "synthesis"],
        typer.Option(help="all, or mapping (latents to style vectors) or synthesis (style vectors to images) alone."),
    ] = "all",
    truncation_cutoff: Annotated[
        int | None,
        typer.Option(min=0, help="Style vectors that the input truncation_psi moves, from the coarsest; default: all."),
    ] = None,
) -> None:
    """Write the generator as an ONNX file, which ONNX Runtime and OpenVINO run without dermis and torch.

    The results of the file are compared with those of torch before it is written.
    """
    from dermis.bundle import open_bundle
    from dermis.exports.generator_onnx import OPSET, check_generator_onnx, generator_onnx
    from dermis.files import write_file

    opened = open_bundle(bundle)
    model = generator_onnx(opened, part, truncation_cutoff)
    difference = check_generator_onnx(model, opened, truncation_cutoff=truncation_cutoff)
    write_file(out, model)
    typer.echo(
        f"{out}: {opened.name}@{opened.digest}, {len(model):,} bytes, opset {OPSET}, differs from torch by {difference:g}"
    )


def _try_classifier(source: Bundle | Path) -> None:
    """Raise BundleError if ONNX Runtime cannot run the classifier."""
    from dermis.classifier.onnx_session import Classifier

    Classifier(source, device="cpu", threads=1).close()


def _try_copy_detector(source: Bundle) -> None:
    """Raise BundleError if the copy detector cannot be loaded; warn if FAISS is not installed."""
    import importlib.util

    from dermis.authenticity.copy_detector import CopyDetector

    if importlib.util.find_spec("faiss") is None:
        typer.echo(f"warning: {source.location}: FAISS is not installed, so the copy detector was not opened", err=True)
        return
    CopyDetector(source, device="cpu", threads=1)


def _try_index(source: Bundle) -> None:
    """Raise BundleError if FAISS cannot read and search the index; warn if FAISS is not installed."""
    import importlib.util

    from dermis.authenticity.index import open_index

    if importlib.util.find_spec("faiss") is None:
        typer.echo(f"warning: {source.location}: FAISS is not installed, so the index was not opened", err=True)
        return
    open_index(source, device="cpu", threads=1)


def _provenance(
    checkpoint: Path, network: str, official: OfficialCheckpoint, licence: str, attribution: str
) -> dict[str, Any]:
    from dermis import __version__
    from dermis.errors import escape

    kimg = re.fullmatch(r"network-snapshot-(\d{6})", checkpoint.stem)  # how official training names its files
    path = official.training_set.get("path")
    return {
        "source": {
            "format": "StyleGAN2-ADA (PyTorch) pickle",
            "file": escape(checkpoint.name),
            "sha256": official.sha256,
            "network": network,
        },
        # The name only: the folder of a data set is private to its owner.
        "dataset": {"name": escape(re.split(r"[/\\]", path)[-1])} if isinstance(path, str) else None,
        "kimg": int(kimg[1]) if kimg else None,
        "licence": licence,
        "attribution": attribution,
        "code_version": __version__,
    }


def _cell(text: str) -> str:
    """Escape foreign text for a Markdown table, so that it adds no column, link or HTML element."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", text)


def _card(name: str, class_names: list[str], resolution: int, provenance: dict[str, Any]) -> str:
    source = provenance["source"]
    dataset = _cell(provenance["dataset"]["name"]) if provenance["dataset"] else "not stated in the checkpoint"
    return f"""# {name}

A StyleGAN2-ADA generator of {resolution} x {resolution} px images, imported from an official PyTorch checkpoint.
Its images are synthetic: not for diagnosis. Nothing was measured when it was imported; see metrics.json.

| | |
| --- | --- |
| classes | {", ".join(class_names) or "none (unconditional)"} |
| imported from | {_cell(source["file"])}, network {source["network"]} |
| SHA-256 of that file | {source["sha256"]} |
| training data | {dataset} |
| licence | {provenance["licence"]} |
| attribution | {provenance["attribution"] or "not stated"} |
| dermis | {provenance["code_version"]} |
"""
