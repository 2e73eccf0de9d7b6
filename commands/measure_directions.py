"""`dermis directions measure` and `sweep`: what directions do, in numbers and as a film."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from dermis.errors import RequestError, StorageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dermis.bundle import Bundle
    from dermis.directions.direction import Direction
    from dermis.imaging import Images
    from training.evaluation.disentanglement import Effect, Readings, Removal

_CHUNK = 64
_SEARCHED = 20_000  # latents that are looked through for images with a frame
_STRENGTHS = (1.0, 2.0, 3.0)

BundleArgument = Annotated[str, typer.Argument(help="Folder or fsspec URL of a bundle.", show_default=False)]
DirectionOption = Annotated[list[str] | None, typer.Option(help="Name of a direction; may be repeated. Default: all.")]


def measure(
    bundle: BundleArgument,
    direction: DirectionOption = None,
    images: Annotated[int, typer.Option(help="Latents that are moved, the classes taking turns.")] = 200,
    strength: Annotated[float, typer.Option(help="How far, to either side.")] = 2.0,
    framed: Annotated[
        int, typer.Option(help="Instead: find so many images with a frame, and how best to remove it.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the latents.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write this .json file.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """How far does each direction move the classifier, the detectors of artefacts, and the identity of images?

    In standard deviations of each over unmoved images, for a move of `--strength`; identity over the distance between two
    different images.
    """
    from tqdm import tqdm

    from dermis.bundle import open_bundle
    from dermis.directions.edit import MAX_STRENGTH, Edit, offset_of

    if images < 20 or not 0 < strength <= MAX_STRENGTH or framed < 0:
        raise RequestError("--images", f"must be at least 20, and --strength above 0 up to {MAX_STRENGTH:g}")
    opened = open_bundle(bundle)
    wanted = _chosen(opened, direction)
    known = {found.name: found for found in opened.directions}
    num_ws, w_dim = opened.generator.num_ws, opened.generator.w_dim

    def offset(name: str, by: float) -> NDArray[np.float32]:
        return offset_of([Edit(name, by)], known, num_ws=num_ws, w_dim=w_dim)

    with _reader(opened, device) as (read, latents):
        base = read(latents(seed, range(images)))
        if framed:
            removals = _remove_frames(read, latents, seed, framed, base, wanted, offset)
            document: dict[str, Any] = {"framed": framed, "removals": [asdict(found) for found in removals]}
            _print_removals(removals)
        else:
            ws = latents(seed, range(images))
            effects = [
                _effect(read, ws, base, each.name, strength, offset)
                for each in tqdm(wanted, "directions", unit="", disable=None)
            ]
            document = {"images": images, "strength": strength, "effects": [asdict(found) for found in effects]}
            _print_effects(effects)
    if out is not None:
        told = {"bundle": {"name": opened.name, "digest": opened.digest}, "seed": seed, **document}
        _write(out, (json.dumps(told, indent=2) + "\n").encode())


def sweep(
    bundle: BundleArgument,
    direction: Annotated[str, typer.Option(help="Name of a direction.", show_default=False)],
    out: Annotated[Path, typer.Option(help="A .gif file, or .mp4 (needs dermis[video]).", show_default=False)],
    count: Annotated[int, typer.Option(help="Images side by side, the classes taking turns.")] = 4,
    reach: Annotated[float, typer.Option(help="Strengths go from minus to plus this, and back.")] = 3.0,
    steps: Annotated[int, typer.Option(help="Frames in one way.")] = 25,
    frame_ms: Annotated[int, typer.Option(help="How long each frame is shown.")] = 60,
    truncation_psi: Annotated[float, typer.Option(help="Of the latents that are moved.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the latents.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """A film of images that move along a direction and back."""
    from dermis.bundle import open_bundle
    from dermis.dataset.request import classes_of
    from dermis.directions.edit import MAX_STRENGTH, Edit, offset_of
    from dermis.imaging import contact_sheet
    from dermis.synthesizer import Synthesizer
    from dermis.video import encode_video

    kind = out.suffix.lower().removeprefix(".")
    if kind not in ("gif", "mp4"):
        raise RequestError("--out", f"{out.name} must end in .gif or .mp4")
    if not (1 <= count <= 16 and 2 <= steps <= 500 and 0 < reach <= MAX_STRENGTH and 20 <= frame_ms <= 5000):
        raise RequestError(
            "--count", f"1 to 16 images, 2 to 500 steps, --reach up to {MAX_STRENGTH:g}, --frame-ms 20 to 5000"
        )
    opened = open_bundle(bundle)
    (chosen,) = _chosen(opened, [direction])
    num_ws, w_dim = opened.generator.num_ws, opened.generator.w_dim
    classes = len(classes_of(opened))
    frames = []
    with Synthesizer(opened, device=device) as synthesizer:
        for by in np.linspace(-reach, reach, steps):
            offset = offset_of([Edit(direction, float(by))], {direction: chosen}, num_ws=num_ws, w_dim=w_dim)
            drawn = synthesizer.images(
                [seed] * count,
                range(count),
                [i % classes for i in range(count)],
                truncation_psi=truncation_psi,
                offset=offset,
            )
            drawn = drawn.repeat(3, axis=3) if drawn.shape[3] == 1 else drawn
            frames.append(contact_sheet(drawn, columns=min(count, 4), padding=0))
    film = np.stack([*frames, *frames[-2:0:-1]])
    _write(out, encode_video(film, "mp4" if kind == "mp4" else "gif", frame_ms=frame_ms))
    typer.echo(f"{out}: {len(film)} frames")


def _chosen(bundle: Bundle, names: Sequence[str] | None) -> list[Direction]:
    known = {found.name: found for found in bundle.directions}
    if not known:
        raise RequestError("bundle", f"has no directions; find some: dermis directions fit {bundle.location}")
    for name in names or ():
        if name not in known:
            raise RequestError("--direction", f"{name!r} is unknown; this bundle has {', '.join(known)}")
    return [known[name] for name in names or known]


_Read = Callable[["NDArray[np.float32]"], "Readings"]
_Latents = Callable[[int, range], "NDArray[np.float32]"]
_Offset = Callable[[str, float], "NDArray[np.float32]"]


@contextmanager
def _reader(bundle: Bundle, device: str) -> Iterator[tuple[_Read, _Latents]]:
    """What reads attributes and features off the images of ws [N, num_ws, w_dim], and what gives ws of a seed's samples."""
    from dermis.authenticity.checker import Embedder
    from dermis.classifier.onnx_session import Classifier
    from dermis.cpus import available_cpus
    from dermis.dataset.request import classes_of
    from dermis.synthesizer import Synthesizer
    from training.data.artefacts import NAMES, detect_artefacts
    from training.evaluation.disentanglement import Readings

    classes = len(classes_of(bundle))
    with ExitStack() as stack:
        synthesizer = stack.enter_context(Synthesizer(bundle, device=device))
        pool = stack.enter_context(ThreadPoolExecutor(available_cpus()))
        classifier = stack.enter_context(Classifier(bundle, device="cpu")) if bundle.classifier else None
        embedder = None if classifier else Embedder("lite0", None, device=device)

        def read(ws: NDArray[np.float32]) -> Readings:
            rows, logits, features = [], [], []
            for start in range(0, len(ws), _CHUNK):
                drawn: Images = synthesizer.images_from_ws(ws[start : start + _CHUNK])
                drawn = drawn.repeat(3, axis=3) if drawn.shape[3] == 1 else drawn
                found = list(pool.map(detect_artefacts, drawn))
                rows += [[getattr(each, name) for name in NAMES] for each in found]
                if classifier is not None:
                    scores = classifier.classify(drawn)
                    logits.append(scores.logits.astype(np.float64))
                    assert scores.features is not None
                    features.append(scores.features)
                elif embedder is not None:
                    features.append(embedder.embed(drawn, drawn.shape[1]))
            table = np.array(rows, dtype=np.float64)
            attributes = {name: table[:, k] for k, name in enumerate(NAMES)}
            if classifier is not None:
                attributes[classifier.description.positive_class] = np.concatenate(logits)
            return Readings(attributes, np.concatenate(features).astype(np.float64))

        def latents(seed: int, indices: range) -> NDArray[np.float32]:
            return synthesizer.ws([seed] * len(indices), indices, [i % classes for i in indices])

        yield read, latents


def _effect(
    read: _Read, ws: NDArray[np.float32], base: Readings, name: str, strength: float, offset: _Offset
) -> Effect:
    from training.evaluation.disentanglement import effect

    return effect(name, strength, base, read(ws - offset(name, strength)), read(ws + offset(name, strength)))


def _remove_frames(
    read: _Read,
    latents: _Latents,
    seed: int,
    count: int,
    base: Readings,
    wanted: Sequence[Direction],
    offset: _Offset,
) -> list[Removal]:
    """Every direction at every strength on images with a frame, the best first."""
    from tqdm import tqdm

    from training.data.artefacts import THRESHOLDS
    from training.evaluation.disentanglement import removal, spreads, stranger_distance

    threshold = THRESHOLDS["frame"]
    parts: list[NDArray[np.float32]] = []
    with tqdm(total=count, desc="images with a frame", unit="", disable=None) as bar:
        for start in range(0, _SEARCHED, 4 * _CHUNK):
            ws = latents(seed, range(start, start + 4 * _CHUNK))
            having = ws[read(ws).attributes["frame"] >= threshold]
            parts.append(having)
            bar.update(len(having))
            if sum(map(len, parts)) >= count:
                break
    ws = np.concatenate(parts)[:count]
    if len(ws) < 5:
        raise RequestError(
            "--framed", f"{len(ws)} of {_SEARCHED:,} images have a frame; this generator hardly draws any"
        )
    before, spread, strangers = read(ws), spreads(base), stranger_distance(base.features)
    moves = [(each.name, sign * by) for each in wanted for sign in (1, -1) for by in _STRENGTHS]
    found = [
        removal(name, by, "frame", threshold, before, read(ws + offset(name, by)), spread, strangers)
        for name, by in tqdm(moves, "moves", unit="", disable=None)
    ]
    return sorted(found, key=lambda each: (-each.gone, each.identity))


def _print_effects(effects: Sequence[Effect]) -> None:
    names = list(effects[0].moves)
    _table(
        ("direction", *names, "identity"),
        [(each.direction, *(f"{each.moves[name]:+.2f}" for name in names), f"{each.identity:.2f}") for each in effects],
    )


def _print_removals(removals: Sequence[Removal]) -> None:
    names = [name for name in removals[0].moves if name != "frame"]
    _table(
        ("direction", "strength", "gone", *names, "identity"),
        [
            (
                each.direction,
                f"{each.strength:+g}",
                f"{each.gone:.0%}",
                *(f"{each.moves[name]:+.2f}" for name in names),
                f"{each.identity:.2f}",
            )
            for each in removals[:15]
        ],
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _write(path: Path, data: bytes) -> None:
    """The file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None
