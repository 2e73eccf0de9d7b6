"""`dermis train classifier`: from real and synthetic images to a measured classifier for serving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from commands.options import (
    CACHE,
    ArchitectureOption,
    AttributionOption,
    CacheOption,
    ClassColumnOption,
    ClassifierBatchOption,
    ClassifierRateOption,
    ClassifierSizeOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    FlipsOption,
    FreezeStagesOption,
    HeadOnlyOption,
    ImageColumnOption,
    LayoutOption,
    LicenceOption,
    LogOption,
    MapOption,
    MetadataOption,
    PatienceOption,
    ResumeOption,
    RotationOption,
    SplitOption,
    SplitSeedOption,
    TensorboardOption,
    TruncationOption,
    WeightsOption,
)
from commands.sources import read_options
from training.classifier.config import Balance, Monitor, WeightsDtype

if TYPE_CHECKING:
    from training.classifier.data import RealData
    from training.classifier.run import TrainedClassifier
    from training.classifier.synthetic import SyntheticImages


def train_classifier(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Run folder: checkpoint, log, predictions, and the folder `classifier`.")],
    architecture: ArchitectureOption = "efficientnet_b2",
    weights: WeightsOption = "imagenet",
    size: ClassifierSizeOption = 256,
    configuration: Annotated[
        Literal["real", "synthetic", "augmented"],
        typer.Option(
            help="Training images: real; synthetic, half of each class; or augmented: real and synthetic melanoma."
        ),
    ] = "real",
    synthetic: Annotated[
        list[str] | None,
        typer.Option(
            help="Synthetic images: a bundle, a generated dataset or its images.zip; benign=SOURCE and malignant=SOURCE for "
            "sources of one class. May be repeated; the number is divided among them."
        ),
    ] = None,
    synthetic_count: Annotated[
        int | None, typer.Option(help="Number of synthetic images; default 55000, or 22000 of melanoma if augmented.")
    ] = None,
    synthetic_seed: Annotated[int, typer.Option(help="Seed of images that are generated from a bundle.")] = 0,
    truncation_psi: TruncationOption = 1.0,
    split: SplitOption = None,
    split_seed: SplitSeedOption = 0,
    metadata: MetadataOption = None,
    image_column: ImageColumnOption = None,
    class_column: ClassColumnOption = None,
    maps: MapOption = None,
    layout: LayoutOption = None,
    epochs: EpochsOption = 20,
    patience: PatienceOption = 3,
    monitor: Annotated[Monitor, typer.Option(help="What must improve on validation.")] = "auc",
    batch: ClassifierBatchOption = 32,
    epoch_images: Annotated[int | None, typer.Option(help="Images in an epoch; default: all.")] = None,
    learning_rate: ClassifierRateOption = 5e-4,
    balance: Annotated[
        Balance, typer.Option(help="Balance of the classes: none, weights (in the loss) or sampling (half of each).")
    ] = "weights",
    rotation: RotationOption = 180.0,
    flips: FlipsOption = True,
    dropout: Annotated[float, typer.Option(help="Dropout before the last layer.")] = 0.2,
    freeze_stages: FreezeStagesOption = 0,
    head_only: HeadOnlyOption = False,
    default_threshold: Annotated[
        Literal["balanced_accuracy", "half", "specificity_90", "sensitivity_90"],
        typer.Option(help="Threshold that decides where none is named."),
    ] = "balanced_accuracy",
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="Arithmetic; auto is bf16 on CUDA, else fp32.")
    ] = "auto",
    weights_dtype: Annotated[
        WeightsDtype,
        typer.Option(help="Weights of the export: fp16, or int8 (half the size). Of a finished run: add --resume."),
    ] = "fp16",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Seed of everything random except the split.")] = 0,
    resume: ResumeOption = False,
    log: LogOption = None,
    tensorboard: TensorboardOption = False,
    name: Annotated[str | None, typer.Option(help="Title of the card; default: name of the run folder.")] = None,
    scenario: Annotated[str, typer.Option(help="Scenario named in the card; default: the configuration.")] = "",
    licence: LicenceOption = "unknown",
    attribution: AttributionOption = "",
    cache: CacheOption = CACHE,
) -> None:
    """Train a melanoma classifier, calibrate and measure it, and export it. Not a medical device.

    Diagnoses other than melanoma are benign. Ctrl-C saves; --resume continues. Under `torchrun` each process uses one GPU.
    """
    from dermis.devices import fast_dtype, resolve_device
    from dermis.errors import TrainingError
    from training.classifier.config import ClassifierConfig
    from training.classifier.data import load_real
    from training.classifier.export import require_onnx
    from training.classifier.run import ClassifierData, ClassifierOrigin
    from training.classifier.run import train_classifier as run
    from training.distributed import joined_ranks
    from training.loggers import check_loggers

    require_onnx()
    loggers = check_loggers([*(log or ()), *(["tensorboard"] if tensorboard else [])])
    if (configuration == "real") != (not synthetic):
        problem = "takes no --synthetic" if synthetic else "needs --synthetic, a bundle or a generated dataset"
        raise TrainingError(f"configuration: {configuration} {problem}")
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
        monitor=monitor,
        balance=balance,
        rotation=rotation,
        flips=flips,
        dropout=dropout,
        freeze_stages=freeze_stages,
        head_only=head_only,
        epoch_images=epoch_images,
        precision=precision,
        weights_dtype=weights_dtype,
    )
    with joined_ranks(target) as ranks:

        def report(text: str) -> None:
            if ranks.first:
                typer.echo(text, err=True)

        with ranks.first_rank_first():
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
            generated = None
            if synthetic:
                counts = _counts(configuration, synthetic_count)
                generated = _synthetic(
                    synthetic, counts, size, synthetic_seed, truncation_psi, cache, device, ranks.first
                )
        used = ClassifierData(configuration, real, generated)
        _report_data(report, real, generated)
        if generated is not None and not used.generator_saw_training_part_only:
            report(
                "warning: the generator of the synthetic images may have been trained on validation or test images, which "
                "makes the numbers too good; train it on the training part alone (see docs/classifier.md)"
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
            loggers=loggers,
            on_phase=report,
        )
        if result is None and ranks.first:
            report("stopped and saved; run the same command with --resume to continue")
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


def _report_data(report: Callable[[str], None], real: RealData, synthetic: SyntheticImages | None) -> None:
    for part, images in real.parts.items():
        counts = ", ".join(f"{count:,} {name}" for name, count in images.classes.items())
        report(f"{part}: {counts}")
    for each in synthetic.origin if synthetic is not None else ():
        report(f"synthetic: {each['images']:,} {each['class']} of {each['name']}")


def _print(result: TrainedClassifier) -> None:
    from training.classifier.card import with_interval

    test = result.description.metrics["test"]
    typer.echo(f"test: {test['images']:,} images, {test['positive']:,} malignant; in brackets 95 % intervals")
    for metric, estimate in test["metrics"].items():
        typer.echo(f"{metric.replace('_', ' '):30} {with_interval(estimate)}")
    hours, epochs = result.progress.seconds / 3600, result.progress.epoch
    typer.echo(f"{result.folder}: {epochs} epochs in {hours:.2f} h. Not a medical device.")
