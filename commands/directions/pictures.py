"""`dermis directions strips` and `sweep`: images along directions, as a contact sheet or a video."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from commands.options import BundleArgument, DeviceOption, DirectionsOption, ReachOption, TruncationOption

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dermis.bundle import Bundle
    from dermis.network_config import NoiseMode


def strips(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option(help="PNG, JPEG or WebP file.", show_default=False)],
    direction: DirectionsOption = None,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Class of the image; default: the first.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the latent.")] = 0,
    index: Annotated[int, typer.Option(help="Index of the latent.")] = 0,
    projection: Annotated[
        Path | None, typer.Option(help="Projected image in place of a latent: a .safetensors file of `dermis project`.")
    ] = None,
    reach: ReachOption = 3.0,
    steps: Annotated[int, typer.Option(help="Images in a row.")] = 7,
    truncation_psi: TruncationOption = 0.8,
    device: DeviceOption = "auto",
) -> None:
    """Move one image along directions, one row for each, as in figure 5 of the paper."""
    from dermis.bundle import open_bundle
    from dermis.dataset.request import classes_of
    from dermis.directions.edit import MAX_STRENGTH, strip
    from dermis.errors import RequestError
    from dermis.files import write_file
    from dermis.image_metadata import origin_of
    from dermis.imaging import ImageFormat, contact_sheet, encode
    from dermis.synthesizer import Synthesizer

    formats: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    image_format = formats.get(out.suffix.lower())
    if image_format is None:
        raise RequestError("--out", f"{out.name} must end in .png, .jpg or .webp")
    if steps < 2 or not 0 < reach <= MAX_STRENGTH:
        raise RequestError("--steps", f"at least 2 images in a row, and --reach above 0 up to {MAX_STRENGTH:g}")
    opened = open_bundle(bundle)
    known = {each.name: each for each in opened.directions}
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
    projected = None if projection is None else _projected(projection, opened)
    strengths = np.linspace(-reach, reach, steps).tolist()
    with Synthesizer(opened, device=device) as synthesizer:
        ws = projected
        if ws is None:
            ws = synthesizer.ws([seed], [index], [label], truncation_psi=truncation_psi)[0]
        # A sample keeps its own noise in all its images. A projection was made with the constant noise.
        noise_mode: NoiseMode = "random" if projected is None else "const"
        noise = {"seeds": [seed] * steps, "indices": [index] * steps}
        rows = [synthesizer.images_from_ws(strip(ws, known[name], strengths), noise_mode, **noise) for name in names]
    origin = origin_of(opened).of_sample(seed, index)
    if projected is not None:
        origin = origin_of(opened, "compositeWithTrainedAlgorithmicMedia")
    write_file(out, encode(contact_sheet(np.concatenate(rows), columns=steps), image_format, origin=origin))
    typer.echo(f"{out}: {', '.join(names)}, from {-reach:g} to {reach:g}")


def sweep(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option(help="GIF or MP4 file.", show_default=False)],
    direction: Annotated[str, typer.Option(help="Name of the direction.", show_default=False)],
    class_name: Annotated[
        str | None, typer.Option("--class", help="Class of the images; default: all in turn.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the latents.")] = 0,
    index: Annotated[int, typer.Option(help="Index of the first latent; the others have the next ones.")] = 0,
    samples: Annotated[int, typer.Option(help="Samples side by side.")] = 4,
    reach: ReachOption = 3.0,
    steps: Annotated[int, typer.Option(help="Video frames from one end to the other.")] = 17,
    frame_ms: Annotated[int, typer.Option(help="Duration of a video frame in milliseconds.")] = 100,
    truncation_psi: TruncationOption = 0.8,
    device: DeviceOption = "auto",
) -> None:
    """Move samples along a direction, from one end to the other and back, so that the video loops."""
    from tqdm import tqdm

    from dermis.bundle import open_bundle
    from dermis.dataset.request import classes_of
    from dermis.directions.edit import MAX_STRENGTH, Edit, apply_edits
    from dermis.errors import RequestError
    from dermis.files import write_file
    from dermis.image_metadata import origin_of
    from dermis.imaging import as_rgb, contact_sheet
    from dermis.synthesizer import Synthesizer
    from dermis.video import VideoFormat, encode_video

    kinds: dict[str, VideoFormat] = {".gif": "gif", ".mp4": "mp4"}
    kind = kinds.get(out.suffix.lower())
    if kind is None:
        raise RequestError("--out", f"{out.name} must end in .gif or .mp4")
    if steps < 2 or samples < 1 or not 20 <= frame_ms <= 5000 or not 0 < reach <= MAX_STRENGTH:
        raise RequestError(
            "--steps",
            f"must be at least 2, --samples at least 1, --reach above 0 up to {MAX_STRENGTH:g}, --frame-ms from 20 to 5000",
        )
    opened = open_bundle(bundle)
    known = {each.name: each for each in opened.directions}
    if direction not in known:
        has = ", ".join(known) or f"none; find some: dermis directions fit {bundle}"
        raise RequestError("--direction", f"{direction!r} is unknown; this bundle has {has}")
    classes = classes_of(opened)
    if class_name is not None and class_name not in classes:
        raise RequestError("--class", f"{class_name!r} is unknown; this bundle has {', '.join(classes)}")
    labels = [i % len(classes) if class_name is None else classes.index(class_name) for i in range(samples)]
    seeds, indices = [seed] * samples, range(index, index + samples)
    frames = []
    with Synthesizer(opened, device=device) as synthesizer:
        ws = synthesizer.ws(seeds, indices, labels, truncation_psi=truncation_psi)
        for strength in tqdm(np.linspace(-reach, reach, steps).tolist(), desc="frames", disable=None):
            moved = apply_edits(ws, [Edit(direction, strength)], known)
            # Every frame has the noise of its sample, so that the frames differ by the edit alone.
            images = synthesizer.images_from_ws(moved, "random", seeds=seeds, indices=indices)
            frames.append(contact_sheet(as_rgb(images), columns=4, padding=0))
    there_and_back = np.stack([*frames, *frames[-2:0:-1]])
    origin = origin_of(opened).of_sample(seed)
    write_file(out, encode_video(there_and_back, kind, frame_ms=frame_ms, origin=origin))
    typer.echo(f"{out}: {samples} samples along {direction}, from {-reach:g} to {reach:g} and back")


def _projected(file: Path, bundle: Bundle) -> NDArray[np.float32]:
    """Read ws [num_ws, w_dim] from a file that `dermis project` wrote for this generator."""
    from dermis.errors import DataError, RequestError
    from dermis.projection.result import from_bytes

    try:
        ws = from_bytes(file.read_bytes(), str(file))[0].ws
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    if ws.shape != (bundle.generator.num_ws, bundle.generator.w_dim):
        raise RequestError("--projection", f"{file} was made with another generator than that of {bundle.name}")
    return ws
