"""`dermis directions fit` and `list`: find directions of a generator and keep them in its bundle."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from commands.console import table_console
from commands.options import BundleArgument, BundleFolderArgument, DeviceOption

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dermis.bundle import Bundle
    from dermis.bundle.directions import Direction
    from dermis.imaging import Images
    from dermis.networks import Generator


class FitMethod(StrEnum):
    """Ways of finding directions."""

    SEFA = "sefa"
    GANSPACE = "ganspace"
    CLASS_MEANS = "class-means"
    ATTRIBUTES = "attributes"


def fit(
    bundle: BundleFolderArgument,
    method: Annotated[
        list[FitMethod] | None, typer.Option(help="May be repeated. Default: all that suit the bundle.")
    ] = None,
    count: Annotated[
        int, typer.Option(help="Number of directions by GANSpace, and by SeFa for each range of layers.")
    ] = 5,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Range of style vectors for SeFa, such as 0-4; may be repeated. Default: all, 0-4, and those from 4 on."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of latents to analyse.")] = 10_000,
    images: Annotated[int, typer.Option(help="Images to generate for attributes, of all classes in turn.")] = 4000,
    seed: Annotated[int, typer.Option(help="Seed of the latents.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the bundle's directions that have other names.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Find directions and put them into the bundle, which gets a new digest.

    Attributes are frame, ruler, hair and ink as `dermis data inspect` detects them, and the positive class of the bundle's
    classifier.
    """
    from dermis.bundle import amend_bundle, load_generator, open_bundle
    from dermis.directions.fit import class_means, ganspace, sample_w, sefa
    from dermis.errors import RequestError

    methods = method or list(FitMethod)
    if count < 1 or samples < 100 or images < 100:
        raise RequestError("--count", "must be at least 1, and --samples and --images at least 100")
    opened = open_bundle(bundle)
    generator = load_generator(opened)
    ranges = _ranges(layers, generator.num_ws)
    w = sample_w(generator, samples, seed=seed)
    directions: list[Direction] = []
    if FitMethod.SEFA in methods:
        for first, last in ranges:
            prefix = "sefa" if (first, last) == (0, generator.num_ws) else f"sefa-l{first}-{last}"
            directions += sefa(generator, w, layers=(first, last), count=count, prefix=prefix)
    if FitMethod.GANSPACE in methods:
        directions += ganspace(generator, samples=samples, seed=seed, count=count)
    if FitMethod.CLASS_MEANS in methods and (method or generator.config.c_dim > 1):
        directions += class_means(generator, opened.class_names, w, samples=min(samples, 2000), seed=seed)
    if FitMethod.ATTRIBUTES in methods:
        directions += _attributes(opened, generator, images, seed, device)
    if keep:
        names = {direction.name for direction in directions}
        directions = [direction for direction in opened.directions if direction.name not in names] + directions
    amended = amend_bundle(opened, directions=directions)
    _show(amended.directions)
    typer.echo(f"{bundle}: {len(directions)} directions: {amended.name}@{amended.digest}")


def list_directions(
    bundle: BundleArgument,
) -> None:
    """Show the directions of a bundle."""
    from dermis.bundle import open_bundle

    opened = open_bundle(bundle)
    if not opened.directions:
        typer.echo(f"{bundle}: has no directions; find some: dermis directions fit {bundle}")
        return
    _show(opened.directions)


def _ranges(texts: Sequence[str] | None, num_ws: int) -> list[tuple[int, int]]:
    """Parse half-open ranges of style vectors."""
    from dermis.errors import RequestError

    if not texts:
        return [(0, num_ws), (0, 4), (4, num_ws)] if num_ws > 4 else [(0, num_ws)]
    ranges = []
    for text in texts:
        match = re.fullmatch(r"(\d+)-(\d+)", text)
        if not match or not 0 <= int(match[1]) < int(match[2]) <= num_ws:
            raise RequestError(
                "--layers", f"{text!r} is not a range such as 0-4 within 0-{num_ws} (the end is not included)"
            )
        ranges.append((int(match[1]), int(match[2])))
    return ranges


def _attributes(bundle: Bundle, generator: Generator, count: int, seed: int, device: str) -> list[Direction]:
    """Fit a hyperplane for each attribute that enough generated images have."""
    from dermis.directions.fit import hyperplane, sample_w
    from dermis.errors import RequestError

    w = sample_w(generator, count, seed=seed)
    directions = []
    for name, present in _labels(bundle, generator, w, seed, device).items():
        try:
            directions.append(hyperplane(name, w, present, layers=(0, generator.num_ws), seed=0))
        except RequestError as error:
            typer.echo(f"left out: {error.message}", err=True)
    return directions


def _labels(
    bundle: Bundle, generator: Generator, w: NDArray[np.float32], seed: int, device: str
) -> Mapping[str, NDArray[np.bool_]]:
    """Detect attributes in the images of latents, by the detectors and by the bundle's classifier.

    Args:
        w: [N, w_dim]. Image i has the noise of sample (seed, i).

    Returns:
        bool [N] for each attribute.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from dermis.artefacts import NAMES, detect_artefacts
    from dermis.classifier.onnx_session import Classifier
    from dermis.cpus import available_cpus
    from dermis.imaging import as_rgb
    from dermis.synthesizer import Synthesizer

    def artefacts(image: Images) -> tuple[str, ...]:
        return detect_artefacts(image).present

    rows: list[tuple[str, ...]] = []
    malignant: list[NDArray[np.bool_]] = []
    classifier = Classifier(bundle, device="cpu") if bundle.classifier else None
    with (
        Synthesizer(bundle, device=device, generator=generator) as synthesizer,
        ThreadPoolExecutor(available_cpus()) as pool,
        tqdm(total=len(w), desc="attributes", unit="img", disable=None) as bar,
    ):
        for start in range(0, len(w), 64):
            ws = np.repeat(w[start : start + 64, None], generator.num_ws, axis=1)
            indices = range(start, start + len(ws))
            images = as_rgb(synthesizer.images_from_ws(ws, "random", seeds=[seed] * len(ws), indices=indices))
            rows += pool.map(artefacts, images)
            if classifier is not None:
                scores = classifier.classify(images, features=False)
                malignant.append(scores.calibrated >= classifier.description.threshold())
            bar.update(len(images))
    labels = {name: np.array([name in row for row in rows]) for name in NAMES}
    if classifier is not None:
        labels[f"{classifier.description.positive_class}-looking"] = np.concatenate(malignant)
        classifier.close()
    return labels


def _show(directions: Sequence[Direction]) -> None:
    from rich.table import Table

    table = Table()
    for column in ("direction", "layers", "scale", "found by", "facts"):
        table.add_column(column)
    for each in directions:
        facts = ", ".join(_fact(key, value) for key, value in each.facts.items())
        table.add_row(each.name, f"{each.layers[0]}-{each.layers[1]}", f"{each.scale:.3g}", each.method, facts)
    table_console().print(table)


def _fact(key: str, value: float | str) -> str:
    return f"{key} {value}" if isinstance(value, str) else f"{key} {value:.3g}"
