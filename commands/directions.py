"""`dermis directions ...`: find meaningful directions of a generator, keep them in its bundle, look at them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from commands.console import table_console

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dermis.bundle import Bundle
    from dermis.bundle.directions import Direction
    from dermis.imaging import Images
    from dermis.network_config import NoiseMode
    from dermis.networks import Generator

directions_app = typer.Typer(no_args_is_help=True, help="Find meaningful directions of a generator; look at them.")

_METHODS = ("sefa", "ganspace", "class-means", "attributes")


@directions_app.command("fit")
def fit(
    bundle: Annotated[
        Path, typer.Argument(help="Folder of the bundle, which gets the directions.", show_default=False)
    ],
    method: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(_METHODS)}; may be repeated. Default: all that can be done.")
    ] = None,
    count: Annotated[int, typer.Option(help="Directions of SeFa, for each range of layers, and of GANSpace.")] = 5,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Range of style vectors for SeFa, like 0-4; may be repeated. Default: all, 0-4 and the others."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Latents that are looked at.")] = 10_000,
    images: Annotated[int, typer.Option(help="Images that are drawn for attributes, the classes taking turns.")] = 4000,
    seed: Annotated[int, typer.Option(help="Of the latents.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep directions of other names that the bundle has.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Find directions and put them into the bundle, which gets a new digest.

    Attributes are frame, ruler, hair and ink by the detectors of `dermis data inspect`, and what the bundle's classifier
    calls malignant.
    """
    from dermis.bundle import amend_bundle, load_generator, open_bundle
    from dermis.directions.fit import class_means, ganspace, sample_w, sefa
    from dermis.errors import RequestError

    wanted = method or list(_METHODS)
    for name in wanted:
        if name not in _METHODS:
            raise RequestError("--method", f"{name!r} is none of {', '.join(_METHODS)}")
    if count < 1 or samples < 100 or images < 100:
        raise RequestError("--count", "must be at least 1, and --samples and --images at least 100")
    opened = open_bundle(bundle)
    generator = load_generator(opened)
    ranges = _ranges(layers, generator.num_ws)
    w = sample_w(generator, samples, seed=seed)
    found: list[Direction] = []
    if "sefa" in wanted:
        for first, last in ranges:
            prefix = "sefa" if (first, last) == (0, generator.num_ws) else f"sefa-l{first}-{last}"
            found += sefa(generator, w, layers=(first, last), count=count, prefix=prefix)
    if "ganspace" in wanted:
        found += ganspace(generator, samples=samples, seed=seed, count=count)
    if "class-means" in wanted and (method or generator.config.c_dim > 1):
        found += class_means(generator, opened.class_names, w, samples=min(samples, 2000), seed=seed)
    if "attributes" in wanted:
        found += _attributes(opened, generator, images, seed, device)
    if keep:
        names = {direction.name for direction in found}
        found = [direction for direction in opened.directions if direction.name not in names] + found
    amended = amend_bundle(opened, directions=found)
    _show(amended.directions)
    typer.echo(f"{bundle}: {len(found)} directions: {amended.name}@{amended.digest}")


@directions_app.command("list")
def list_directions(
    bundle: Annotated[str, typer.Argument(help="Folder or fsspec URL of a bundle.", show_default=False)],
) -> None:
    """Show the directions of a bundle."""
    from dermis.bundle import open_bundle

    opened = open_bundle(bundle)
    if not opened.directions:
        typer.echo(f"{bundle}: has no directions; find some: dermis directions fit {bundle}")
        return
    _show(opened.directions)


@directions_app.command("strips")
def strips(
    bundle: Annotated[str, typer.Argument(help="Folder or fsspec URL of a bundle.", show_default=False)],
    out: Annotated[Path, typer.Option(help="PNG, JPEG or WebP file.", show_default=False)],
    direction: Annotated[
        list[str] | None, typer.Option(help="Name of a direction: a row each. Default: all of them.")
    ] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="Default: the first class.")] = None,
    seed: Annotated[int, typer.Option(help="Of the latent.")] = 0,
    index: Annotated[int, typer.Option(help="Of the latent.")] = 0,
    projection: Annotated[
        Path | None, typer.Option(help="Instead of a latent: a .safetensors file of `dermis project`.")
    ] = None,
    reach: Annotated[float, typer.Option(help="Strengths go from minus to plus this many standard deviations.")] = 3.0,
    steps: Annotated[int, typer.Option(help="Images in a row.")] = 7,
    truncation_psi: Annotated[float, typer.Option(help="Of the latent that is moved.")] = 0.8,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """One image moved along directions, a row each: as the paper's figure 5."""
    from dermis.bundle import open_bundle
    from dermis.dataset.request import classes_of
    from dermis.directions.edit import MAX_STRENGTH, strip
    from dermis.errors import RequestError
    from dermis.files import write_file
    from dermis.imaging import contact_sheet, encode
    from dermis.synthesizer import Synthesizer

    suffix = out.suffix.lower().lstrip(".").replace("jpg", "jpeg")
    if suffix not in ("png", "jpeg", "webp"):
        raise RequestError("--out", f"{out.name} must end in .png, .jpg or .webp")
    if steps < 2 or not 0 < reach <= MAX_STRENGTH:
        raise RequestError("--steps", f"at least 2 images in a row, and --reach above 0 up to {MAX_STRENGTH:g}")
    opened = open_bundle(bundle)
    known = {found.name: found for found in opened.directions}
    names = direction or list(known)
    if not names:
        raise RequestError("bundle", f"has no directions; find some: dermis directions fit {bundle}")
    for name in names:
        if name not in known:
            raise RequestError("--direction", f"{name!r} is unknown; this bundle has {', '.join(known) or 'none'}")
    classes = classes_of(opened)
    if class_name is not None and class_name not in classes:
        raise RequestError("--class", f"{class_name!r} is unknown; this bundle has {', '.join(classes)}")
    label = classes.index(class_name) if class_name else 0
    given = None if projection is None else _projected(projection, opened)
    strengths = np.linspace(-reach, reach, steps).tolist()
    with Synthesizer(opened, device=device) as synthesizer:
        ws = given
        if ws is None:
            ws = synthesizer.ws([seed], [index], [label], truncation_psi=truncation_psi)[0]
        # A sample keeps its own noise in all its images. A projection was made with the constant noise.
        noise_mode: NoiseMode = "random" if given is None else "const"
        named = {"seeds": [seed] * steps, "indices": [index] * steps}
        rows = [synthesizer.images_from_ws(strip(ws, known[name], strengths), noise_mode, **named) for name in names]
    write_file(out, encode(contact_sheet(np.concatenate(rows), columns=steps), suffix))  # type: ignore[arg-type]
    typer.echo(f"{out}: {', '.join(names)}, from {-reach:g} to {reach:g}")


def _ranges(texts: Sequence[str] | None, num_ws: int) -> list[tuple[int, int]]:
    """Half-open ranges of style vectors."""
    from dermis.errors import RequestError

    if not texts:
        return [(0, num_ws), (0, 4), (4, num_ws)] if num_ws > 4 else [(0, num_ws)]
    ranges = []
    for text in texts:
        match = re.fullmatch(r"(\d+)-(\d+)", text)
        if not match or not 0 <= int(match[1]) < int(match[2]) <= num_ws:
            raise RequestError("--layers", f"{text!r} is no range like 0-4 within 0-{num_ws} (the end is not included)")
        ranges.append((int(match[1]), int(match[2])))
    return ranges


def _projected(file: Path, bundle: Bundle) -> NDArray[np.float32]:
    """ws [num_ws, w_dim] of a file that `dermis project` wrote for this generator."""
    from dermis.errors import DataError, RequestError
    from dermis.projection.result import from_bytes

    try:
        ws = from_bytes(file.read_bytes(), str(file))[0].ws
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    if ws.shape != (bundle.generator.num_ws, bundle.generator.w_dim):
        raise RequestError("--projection", f"{file} is of another generator than {bundle.name}")
    return ws


def _attributes(bundle: Bundle, generator: Generator, count: int, seed: int, device: str) -> list[Direction]:
    """A hyperplane for every attribute that enough of the generator's own images have."""
    from dermis.directions.fit import hyperplane, sample_w
    from dermis.errors import RequestError

    w = sample_w(generator, count, seed=seed)
    found = []
    for name, having in _labels(bundle, generator, w, seed, device).items():
        try:
            found.append(hyperplane(name, w, having, layers=(0, generator.num_ws), seed=0))
        except RequestError as error:
            typer.echo(f"left out: {error.message}", err=True)
    return found


def _labels(
    bundle: Bundle, generator: Generator, w: NDArray[np.float32], seed: int, device: str
) -> Mapping[str, NDArray[np.bool_]]:
    """What the detectors and the bundle's classifier find in the images of w [N, w_dim]: bool [N] by attribute.

    Image i has the noise of sample (seed, i).
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from dermis.classifier.onnx_session import Classifier
    from dermis.cpus import available_cpus
    from dermis.synthesizer import Synthesizer
    from training.data.artefacts import NAMES, detect_artefacts

    def artefacts(image: Images) -> tuple[str, ...]:
        return detect_artefacts(image).found

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
            drawn = synthesizer.images_from_ws(ws, "random", seeds=[seed] * len(ws), indices=indices)
            drawn = drawn.repeat(3, axis=3) if drawn.shape[3] == 1 else drawn
            rows += pool.map(artefacts, drawn)
            if classifier is not None:
                scores = classifier.classify(drawn, features=False)
                malignant.append(scores.calibrated >= classifier.description.threshold())
            bar.update(len(drawn))
    found = {name: np.array([name in row for row in rows]) for name in NAMES}
    if classifier is not None:
        found[f"{classifier.description.positive_class}-looking"] = np.concatenate(malignant)
        classifier.close()
    return found


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
