"""Options and arguments that several commands have in common: one name, one type and one text for each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from dermis.errors import RequestError
from dermis.latents import MAX_SEED
from dermis.network_config import NoiseMode

DEMO_BUNDLE = "bundles/demo"
CACHE = Path(".dermis/cache")

# Machine

DeviceOption = Annotated[
    str, typer.Option(help="Where to compute: auto (CUDA if there is such a GPU), cpu, cuda, mps or xpu.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; default: one for each core.")]
CacheOption = Annotated[Path, typer.Option(help="Folder in which decoded images and features are kept.")]
CompileOption = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the main phases with torch.compile; default: on CUDA."),
]

# Bundles and classifiers

BundleArgument = Annotated[str, typer.Argument(help="Folder or fsspec URL of a bundle.", show_default=False)]
BundleFolderArgument = Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)]
BundleOption = Annotated[str, typer.Option(help="Folder or fsspec URL of a bundle.")]
ClassifierOption = Annotated[
    str, typer.Option(help="Folder or fsspec URL of a bundle with a classifier, or of a classifier.")
]
ThresholdOption = Annotated[
    str, typer.Option(help="Name of one of the classifier's thresholds, or a number from 0 to 1.")
]

# Real images

SourceArgument = Annotated[
    Path,
    typer.Argument(help="Folder or zip with images and a CSV, or with class folders; a StyleGAN zip; or a CSV alone."),
]
_DATA = "Real images: a folder, zip or CSV that `dermis data` can read."
DataOption = Annotated[Path, typer.Option(help=_DATA)]
OptionalDataOption = Annotated[Path | None, typer.Option(help=_DATA)]
MetadataOption = Annotated[
    Path | None, typer.Option(help="CSV of the images; default: metadata.csv, or the only CSV that has classes.")
]
ClassColumnOption = Annotated[
    str | None, typer.Option(help="CSV column of the classes; default: target, diagnosis or another usual name.")
]
ImageColumnOption = Annotated[
    str | None, typer.Option(help="CSV column that names the images; default: isic_id, image or another usual name.")
]
BinaryOption = Annotated[
    bool, typer.Option("--binary", help="Two classes: malignant (melanoma) and benign (every other diagnosis).")
]
MapOption = Annotated[
    list[str] | None,
    typer.Option("--map", help='Class of a value, such as "AIMP=benign"; "VALUE=" for no class. May be repeated.'),
]
LayoutOption = Annotated[
    Literal["isic", "imagefolder", "stylegan"] | None,
    typer.Option(help="Layout of the source, if it is not recognised."),
]
HoldoutOption = Annotated[
    Path | None, typer.Option(help="Held-out images: real ones that the generator was not trained on.")
]
HoldoutMetadataOption = Annotated[Path | None, typer.Option(help="CSV of the held-out images.")]

# Datasets

GateOption = Annotated[
    Literal["authentic", "min_distance"] | None,
    typer.Option(help="Condition on the distance of an image to the training images."),
]
OnRejectOption = Annotated[
    Literal["resample", "drop", "flag"] | None,
    typer.Option(help="What happens to images that the gate rejects. Default resample."),
]
GateTriesOption = Annotated[
    int | None,
    typer.Option(help="Images that the gate may reject before a sample is left out. Default 8."),
]
DetectCopiesOption = Annotated[
    bool | None,
    typer.Option(
        "--detect-copies/--no-detect-copies",
        help="Whether the gate also rejects changed copies that the bundle's copy detector finds. Default: yes.",
    ),
]

# Splits

SplitOption = Annotated[
    Path | None,
    typer.Option(help="Folder of `dermis data split` with train, validation and test; default: divide by patient."),
]
SplitSeedOption = Annotated[
    int, typer.Option(help="Without --split: seed of the division by patient into 65, 15 and 20 %.")
]
PartsOption = Annotated[
    Path | None, typer.Option(help="Folder of `dermis data split`, which names the part of each image.")
]
PredictionsOption = Annotated[
    Path | None,
    typer.Option(help="predictions.csv of the classifier's training, which names the part of each image."),
]

# Results

OutFolderOption = Annotated[Path, typer.Option(help="Folder of the results. Unfinished results are continued.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
LicenceOption = Annotated[str, typer.Option(help="Licence of the images; it is recorded with the result.")]
AttributionOption = Annotated[str, typer.Option(help="Who must be credited; it is recorded with the result.")]

# Training

TrainingSeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="OPTION=VALUE of the training, such as batch=16; may be repeated."),
]
LogOption = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="LOGGER",
        help="Also log curves and pictures to tensorboard, mlflow or wandb (Weights & Biases); can be repeated.",
    ),
]
TensorboardOption = Annotated[bool, typer.Option(help="The same as --log tensorboard.")]
ExtractorOption = Annotated[
    str,
    typer.Option(
        help="Feature space: inception, dinov2, clip, lite0, lite1, lite2 or timm:MODEL\\[@FILE.safetensors]."
    ),
]
PplPathsOption = Annotated[int, typer.Option(help="Paths of the perceptual path length; publications use 50000.")]
PerceptualOption = Annotated[
    Literal["auto", "vgg16", "lite0"],
    typer.Option(help="Perceptual distance: vgg16 (LPIPS), lite0, or auto: vgg16 if its weights are available."),
]

# Training of a classifier

ArchitectureOption = Annotated[str, typer.Option(help="A convolutional network of timm, or googlenet.")]
WeightsOption = Annotated[
    str, typer.Option(help="Initial weights: imagenet (downloaded), none, or a .safetensors file.")
]
ClassifierSizeOption = Annotated[int, typer.Option(help="Side in pixels of the classifier's input.")]
EpochsOption = Annotated[int, typer.Option(help="Maximum number of epochs.")]
PatienceOption = Annotated[int, typer.Option(help="Epochs without improvement on validation before a run ends.")]
ClassifierBatchOption = Annotated[int, typer.Option(help="Images in a step, over all processes.")]
ClassifierRateOption = Annotated[
    float, typer.Option(help="Learning rate of Adam; it is reduced to a fifth on a plateau.")
]
RotationOption = Annotated[float, typer.Option(help="Rotate training images by up to this many degrees.")]
FlipsOption = Annotated[bool, typer.Option(help="Flip training images at random.")]
FreezeStagesOption = Annotated[int, typer.Option(help="Keep the weights of the stem and of this many stages fixed.")]
HeadOnlyOption = Annotated[
    bool, typer.Option("--head-only", help="Train the last layer only; fastest with --rotation 0 --no-flips.")
]

# Generated images

_TRUNCATION = "Truncation of the latents: 1 for full variety, 0 for the mean image."


def _truncation(value: float) -> float:
    if not 0 <= value < math.inf:
        raise RequestError("--truncation-psi", f"{value} must be a finite number and not negative")
    return value


def _sample_seed(value: int) -> int:
    if not 0 <= value <= MAX_SEED:
        raise RequestError("--seed", f"{value} must be from 0 to 2^63 - 1")
    return value


TruncationOption = Annotated[float, typer.Option(help=_TRUNCATION, callback=_truncation)]
OptionalTruncationOption = Annotated[float | None, typer.Option(help=f"{_TRUNCATION} Default 1.")]
SampleSeedOption = Annotated[int, typer.Option(help="Seed of the generated images.", callback=_sample_seed)]
_GENERATOR = "Bundle that generates images; benign=BUNDLE or malignant=BUNDLE if it has no classes."
GeneratorOption = Annotated[str, typer.Option(help=_GENERATOR)]
OptionalGeneratorOption = Annotated[str | None, typer.Option(help=_GENERATOR)]
GenerateOption = Annotated[int, typer.Option(help="Images to generate with --generator.")]
DatasetOption = Annotated[Path | None, typer.Option(help="A dataset of `dermis generate`.")]
NoiseModeOption = Annotated[
    NoiseMode | None,
    typer.Option(help="random (default): each image has its own noise; const: all have the same; none: no noise."),
]

# Projection

ScheduleOption = Annotated[
    Literal["fast", "official"],
    typer.Option(help="Schedule of the optimisation: fast, or official (that of StyleGAN2: 1,000 steps in w)."),
]
StepsOption = Annotated[int | None, typer.Option(help="Number of steps; default: that of the schedule.")]

# Directions

DirectionsOption = Annotated[
    list[str] | None, typer.Option(help="Name of a direction; may be repeated. Default: all of the bundle.")
]
ReachOption = Annotated[float, typer.Option(help="Strengths run from minus to plus this many standard deviations.")]

# Edge cases

NeighboursOption = Annotated[int, typer.Option(help="Nearest neighbours, by cosine similarity, that are compared.")]
AgreementOption = Annotated[
    float,
    typer.Option(help="Between clusters: at most this share of the neighbours, weighted by class, has the same class."),
]
OddsOption = Annotated[float, typer.Option(help="Near the threshold: odds within this factor of the threshold's odds.")]
NeighbourDistanceOption = Annotated[
    float, typer.Option(help="Relative distance of the neighbours: |w' - w| / |w - w_avg|, or |z' - z| / |z| in z.")
]
NeighbourSpaceOption = Annotated[
    Literal["w", "z"],
    typer.Option(help="Latent space of the neighbours: w, or z (along the sphere; not for projections)."),
]
