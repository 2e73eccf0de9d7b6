"""`dermis bundle ...`: import official checkpoints, show and verify bundles, give them a classifier."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.official.convert import OfficialCheckpoint

bundle_app = typer.Typer(no_args_is_help=True, help="Import, show and verify bundles, give them a classifier.")


@bundle_app.command("import")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="Official .pkl file of StyleGAN2 (PyTorch).", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the new bundle.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Name of the bundle; default: the folder's name.")] = None,
    class_names: Annotated[str, typer.Option(help="Names of the labels 0, 1, ..., e.g. benign,malignant.")] = "",
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "unknown",
    attribution: Annotated[str, typer.Option(help="Whom users of the weights must credit.")] = "",
    network: Annotated[str, typer.Option(help="G_ema (the averaged generator) or G.")] = "G_ema",
    weights_dtype: Annotated[str, typer.Option(help="How weights are stored: fp32 or fp16 (half the size).")] = "fp32",
    require_discriminator: Annotated[
        bool, typer.Option("--require-discriminator", help="Fail where the discriminator cannot be imported.")
    ] = False,
    max_seconds: Annotated[
        int, typer.Option(min=1, help="Processor seconds for reading the file; elapsed time may be 5 times that.")
    ] = 120,
    max_memory_gib: Annotated[float, typer.Option(min=0.25, help="GiB of memory for reading the file.")] = 4,
) -> None:
    """Turn an official checkpoint into a bundle. Nothing in the checkpoint is executed."""
    from dermis.bundle import check_names, write_bundle
    from dermis.errors import BundleError
    from dermis.limited import ProcessLimits
    from dermis.official.convert import read_official

    if network not in ("G_ema", "G"):
        raise BundleError(f"--network: must be G_ema or G, not {network!r}")
    if weights_dtype not in ("fp32", "fp16"):
        raise BundleError(f"--weights-dtype: must be fp32 or fp16, not {weights_dtype!r}")
    if out.exists():
        raise BundleError(f"{out}: exists already; choose another folder or remove it")
    limits = ProcessLimits(max_seconds, 5 * max_seconds, int(max_memory_gib * (1 << 30)))
    read = read_official(checkpoint, cast(Literal["G_ema", "G"], network), limits)
    if read.discriminator is None:
        if require_discriminator:
            raise BundleError(f"{checkpoint}: no discriminator can be imported: {read.no_discriminator}")
        typer.echo(f"warning: {checkpoint}: imported without a discriminator: {read.no_discriminator}", err=True)
    config = read.generator.config
    names = [part.strip() for part in class_names.split(",")] if class_names else []
    names = names or [f"class{i}" for i in range(config.c_dim)]
    bundle_name = name or re.sub(r"[^a-z0-9._-]+", "-", out.absolute().name.lower()).strip("._-")
    check_names(bundle_name, names, config.c_dim)
    provenance = _provenance(checkpoint, network, read, licence, attribution)
    bundle = write_bundle(
        out,
        name=bundle_name,
        generator=read.generator,
        class_names=names,
        provenance=provenance,
        model_card=_card(bundle_name, names, config.img_resolution, provenance),
        discriminator=read.discriminator,
        weights_dtype=cast(Literal["fp32", "fp16"], weights_dtype),
    )
    typer.echo(f"{out}: {bundle.name}@{bundle.digest}")


@bundle_app.command("show")
def show(
    bundle: Annotated[str, typer.Argument(help="Folder or fsspec URL of a bundle.", show_default=False)],
) -> None:
    """Verify a bundle and print what it is, as JSON."""
    import json
    from dataclasses import asdict

    from dermis.bundle import open_bundle

    opened = open_bundle(bundle)
    facts = asdict(opened)
    facts["directions"] = [direction.name for direction in opened.directions]
    facts["model_card"] = opened.model_card.split("\n", 1)[0]
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    # Some characters beyond ASCII control a terminal, too; letters of all scripts stay as they are.
    typer.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


@bundle_app.command("verify")
def verify(
    bundle: Annotated[str, typer.Argument(help="Folder or fsspec URL of a bundle.", show_default=False)],
) -> None:
    """Check every file of a bundle against bundle.json, and that its networks and its index load."""
    from dermis.bundle import load_discriminator, load_generator, open_bundle
    from dermis.projection.encoder import load_encoder

    opened = open_bundle(bundle)
    load_generator(opened)
    if opened.discriminator is not None:
        load_discriminator(opened)
    if opened.classifier is not None:
        _try_classifier(opened)
    if opened.authenticity is not None:
        _try_index(opened)
    load_encoder(opened, device="cpu")
    typer.echo(f"{bundle}: {len(opened.files)} files are intact: {opened.name}@{opened.digest}")


@bundle_app.command("attach-classifier")
def attach_classifier(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)],
    classifier: Annotated[Path, typer.Argument(help="Folder of the classifier.", show_default=False)],
) -> None:
    """Put a classifier into a bundle, in place of the one that it may have. The bundle gets a new digest."""
    from dermis.bundle import amend_bundle, open_bundle

    opened = open_bundle(bundle)
    _try_classifier(classifier)
    amended = amend_bundle(opened, parts={"classifier": classifier})
    index = amended.authenticity
    if index is not None and index.extractor == "classifier" and opened.classifier != amended.classifier:
        typer.echo(
            "warning: its index was built with the classifier before; dermis index build makes it anew", err=True
        )
    assert amended.classifier is not None
    if not set(amended.class_names) <= set(amended.classifier.class_names):
        names = ", ".join(amended.class_names) or "no classes"
        typer.echo(
            f"warning: the generator has {names}, the classifier {', '.join(amended.classifier.class_names)}", err=True
        )
    size, resolution = amended.classifier.input.size, amended.generator.img_resolution
    if size > resolution:  # it learnt from detail that generated images lack, and calls few of them positive
        typer.echo(
            f"warning: the classifier sees {size} px, the generator draws {resolution}: its numbers for generated images will "
            f"be too low; train it with --size {resolution}",
            err=True,
        )
    typer.echo(f"{bundle}: {amended.name}@{amended.digest} with classifier {amended.classifier.digest}")


@bundle_app.command("detach")
def detach(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)],
    parts: Annotated[
        list[str], typer.Argument(help="classifier, authenticity, encoder or directions.", show_default=False)
    ],
) -> None:
    """Take parts out of a bundle, for instance the index of training images before it is shared. It gets a new digest."""
    from dermis.bundle import amend_bundle, open_bundle
    from dermis.errors import RequestError

    opened = open_bundle(bundle)
    there = {
        "classifier": opened.classifier,
        "authenticity": opened.authenticity,
        "encoder": opened.encoder,
        "directions": opened.directions,
    }
    for part in parts:
        if part not in there:
            raise RequestError("parts", f"{part!r} is none of {', '.join(there)}")
        if not there[part]:
            raise RequestError("parts", f"{bundle} has no {part}")
    amended = amend_bundle(opened, remove=parts)
    typer.echo(f"{bundle}: {amended.name}@{amended.digest} without {', '.join(parts)}")


def _try_classifier(source: Bundle | Path) -> None:
    """BundleError if ONNX Runtime cannot run it."""
    from dermis.classifier.onnx_session import Classifier

    Classifier(source, device="cpu", threads=1).close()


def _try_index(source: Bundle) -> None:
    """BundleError if FAISS cannot read and search it; a warning where FAISS is not installed."""
    import importlib.util

    from dermis.authenticity.index import open_index

    if importlib.util.find_spec("faiss") is None:
        typer.echo(f"warning: {source.location}: FAISS is not installed, so the index was not opened", err=True)
        return
    open_index(source, device="cpu", threads=1)


def _provenance(
    checkpoint: Path, network: str, read: OfficialCheckpoint, licence: str, attribution: str
) -> dict[str, Any]:
    from dermis import __version__
    from dermis.errors import escape

    kimg = re.fullmatch(r"network-snapshot-(\d{6})", checkpoint.stem)  # how official training names its files
    path = read.training_set.get("path")
    return {
        "source": {
            "format": "StyleGAN2-ADA (PyTorch) pickle",
            "file": escape(checkpoint.name),
            "sha256": read.sha256,
            "network": network,
        },
        # The folder a data set lay in is nobody's business but its owner's.
        "dataset": {"name": escape(re.split(r"[/\\]", path)[-1])} if isinstance(path, str) else None,
        "kimg": int(kimg[1]) if kimg else None,
        "licence": licence,
        "attribution": attribution,
        "code_version": __version__,
    }


def _cell(text: str) -> str:
    """Foreign text for a Markdown table: it adds no column, link or HTML element."""
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
