"""`dermis train classifier`: from real and synthetic images to a measured classifier that services can load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.options import (
    ClassColumnOption,
    ImageColumnOption,
    LayoutOption,
    MapOption,
    MetadataOption,
    read_options,
)

if TYPE_CHECKING:
    from training.classifier.data import RealData
    from training.classifier.run import TrainedClassifier
    from training.classifier.synthetic import SyntheticImages


def train_classifier(
    data: Annotated[Path, typer.Option(help="Real images: anything that `dermis data` reads. Melanoma is malignant.")],
    out: Annotated[Path, typer.Option(help="Run folder: checkpoint, log, predictions, and the folder `classifier`.")],
    architecture: Annotated[
        str, typer.Option(help="A convolutional network of timm, or googlenet.")
    ] = "efficientnet_b2",
    weights: Annotated[
        str, typer.Option(help="To begin with: imagenet (downloaded), none, or a .safetensors file.")
    ] = "imagenet",
    size: Annotated[int, typer.Option(help="Image side in pixels that the network sees.")] = 256,
    configuration: Annotated[
        str, typer.Option(help="real; synthetic: only such images, balanced; augmented: real and synthetic melanoma.")
    ] = "real",
    synthetic: Annotated[
        list[str] | None,
        typer.Option(
            help="Bundle, generated dataset or images.zip; or benign=... and malignant=... Several share the work."
        ),
    ] = None,
    synthetic_count: Annotated[
        int | None, typer.Option(help="Synthetic images in all; default 55000 balanced, or 22000 of melanoma.")
    ] = None,
    synthetic_seed: Annotated[int, typer.Option(help="Of images that are drawn from a bundle.")] = 0,
    truncation_psi: Annotated[float, typer.Option(help="Of images that are drawn from a bundle.")] = 1.0,
    split: Annotated[
        Path | None, typer.Option(help="Folder of `dermis data split` with train, validation and test.")
    ] = None,
    split_seed: Annotated[int, typer.Option(help="Without --split: of the division by patient, 65, 15 and 20 %.")] = 0,
    metadata: MetadataOption = None,
    image_column: ImageColumnOption = None,
    class_column: ClassColumnOption = None,
    maps: MapOption = None,
    layout: LayoutOption = None,
    epochs: Annotated[int, typer.Option(help="At most.")] = 20,
    patience: Annotated[int, typer.Option(help="Epochs without a better monitor before the run ends.")] = 3,
    monitor: Annotated[str, typer.Option(help="What is watched on validation: auc or loss.")] = "auc",
    batch: Annotated[int, typer.Option(help="Images a step, of all processes.")] = 32,
    epoch_images: Annotated[int | None, typer.Option(help="Images an epoch; default: all.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Of Adam; reduced to a fifth on a plateau.")] = 5e-4,
    balance: Annotated[
        str, typer.Option(help="Of the classes: none, weights (in the loss) or sampling (half of each).")
    ] = "weights",
    rotation: Annotated[float, typer.Option(help="Turn training images by up to so many degrees; 0: not.")] = 180.0,
    flips: Annotated[bool, typer.Option(help="Flip training images at random.")] = True,
    dropout: Annotated[float, typer.Option(help="Before the last layer.")] = 0.2,
    freeze_stages: Annotated[int, typer.Option(help="Keep the stem and so many stages as they are.")] = 0,
    head_only: Annotated[
        bool, typer.Option("--head-only", help="Train the last layer only; fastest with --rotation 0 --no-flips.")
    ] = False,
    default_threshold: Annotated[
        str, typer.Option(help="balanced_accuracy, half, specificity_90 or sensitivity_90: which one decides.")
    ] = "balanced_accuracy",
    precision: Annotated[str, typer.Option(help="auto (bf16 on CUDA, else fp32), fp32 or bf16.")] = "auto",
    weights_dtype: Annotated[
        str, typer.Option(help="How the result is stored: fp16, or int8 (half the size). A finished run: --resume.")
    ] = "fp16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Decides everything random but the division.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Curves for TensorBoard, in the run folder.")] = False,
    name: Annotated[str | None, typer.Option(help="Title of the card; default: the run folder's name.")] = None,
    scenario: Annotated[str, typer.Option(help="What the card calls it; default: the configuration.")] = "",
    licence: Annotated[str, typer.Option(help="Licence of the training images, carried by the weights.")] = "unknown",
    attribution: Annotated[str, typer.Option(help="Whom users of the weights must credit.")] = "",
    cache: Annotated[Path, typer.Option(help="Where decoded images are kept.")] = Path(".dermis/cache"),
) -> None:
    """Train a melanoma classifier, calibrate and measure it, and export it. Not a medical device.

    Ctrl-C saves; --resume goes on. Under `torchrun` it uses one GPU a process.
    """
    from dermis.devices import fast_dtype, resolve_device
    from dermis.errors import TrainingError
    from training.classifier.config import ClassifierConfig
    from training.classifier.data import load_real
    from training.classifier.export import require_onnx
    from training.classifier.run import ClassifierData, ClassifierOrigin
    from training.classifier.run import train_classifier as run
    from training.distributed import joined_ranks
    from training.tensorboard import require_tensorboard

    require_onnx()
    if tensorboard:
        require_tensorboard()
    if (configuration == "real") != (not synthetic):
        wanted = "takes no --synthetic" if synthetic else "needs --synthetic, a bundle or a generated dataset"
        raise TrainingError(f"configuration: {configuration} {wanted}")
    target = resolve_device(device)
    if precision == "auto":
        precision = "bf16" if target.type == "cuda" and "bfloat16" in str(fast_dtype(target)) else "fp32"
    config = ClassifierConfig(
        architecture=architecture,
        size=size,
        seed=seed,
        batch=batch,
        epochs=epochs,
        learning_rate=learning_rate,
        patience=patience,
        monitor=monitor,  # type: ignore[arg-type]
        balance=balance,  # type: ignore[arg-type]
        rotation=rotation,
        flips=flips,
        dropout=dropout,
        freeze_stages=freeze_stages,
        head_only=head_only,
        epoch_images=epoch_images,
        precision=precision,  # type: ignore[arg-type]
        weights_dtype=weights_dtype,  # type: ignore[arg-type]
    )
    with joined_ranks(target) as ranks:

        def tell(text: str) -> None:
            if ranks.first:
                typer.echo(text, err=True)

        with ranks.one_after_another():
            real = load_real(
                data,
                size,
                split=split,
                split_seed=split_seed,
                cache=cache,
                progress=ranks.first,
                **read_options(
                    metadata=metadata, image_column=image_column, class_column=class_column, maps=maps, layout=layout
                ),
            )
            made = None
            if synthetic:
                counts = _counts(configuration, synthetic_count)
                made = _synthetic(synthetic, counts, size, synthetic_seed, truncation_psi, cache, device, ranks.first)
        used = ClassifierData(configuration, real, made)  # type: ignore[arg-type]
        _tell_data(tell, real, made)
        if made is not None and not used.generator_saw_training_part_only:
            tell(
                "warning: the synthetic images may be of a generator that saw validation or test images, and then the "
                "numbers are too good; train it on the training part alone (see docs/classifier.md)"
            )
        result = run(
            used,
            config,
            out,
            origin=ClassifierOrigin(name or out.name, scenario, licence, attribution),
            ranks=ranks,
            weights=weights,
            default_threshold=default_threshold,
            resume=resume,
            tensorboard=tensorboard,
            on_phase=tell,
        )
        if result is None and ranks.first:
            tell("stopped and saved; the same command with --resume goes on")
            raise typer.Exit(130)
    if result is not None:
        _print(result)


def _counts(configuration: str, count: int | None) -> dict[str, int]:
    from training.experiments.scenarios import SYNTHETIC_BALANCED, SYNTHETIC_MELANOMA

    if configuration == "augmented":
        return {"malignant": SYNTHETIC_MELANOMA if count is None else count}
    whole = SYNTHETIC_BALANCED if count is None else count
    return {"benign": whole - whole // 2, "malignant": whole // 2}


def _synthetic(
    sources: list[str],
    counts: dict[str, int],
    size: int,
    seed: int,
    truncation_psi: float,
    cache: Path,
    device: str,
    progress: bool,
) -> SyntheticImages:
    from training.classifier.synthetic import load_synthetic, parse_source

    return load_synthetic(
        [parse_source(text) for text in sources],
        counts,
        size,
        seed=seed,
        truncation_psi=truncation_psi,
        cache=cache,
        device=device,
        progress=progress,
    )


def _tell_data(tell: Callable[[str], None], real: RealData, made: SyntheticImages | None) -> None:
    for part, images in real.parts.items():
        counts = ", ".join(f"{count:,} {name}" for name, count in images.classes.items())
        tell(f"{part}: {counts}")
    for each in made.origin if made is not None else ():
        tell(f"synthetic: {each['images']:,} {each['class']} of {each['name']}")


def _print(result: TrainedClassifier) -> None:
    from training.classifier.card import with_interval

    test = result.description.metrics["test"]
    typer.echo(f"test: {test['images']:,} images, {test['positive']:,} malignant; in brackets 95 % intervals")
    for metric, estimate in test["metrics"].items():
        typer.echo(f"{metric.replace('_', ' '):30} {with_interval(estimate)}")
    hours, epochs = result.progress.seconds / 3600, result.progress.epoch
    typer.echo(f"{result.folder}: {epochs} epochs in {hours:.2f} h. Not a medical device.")
