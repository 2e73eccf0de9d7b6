"""`dermis directions sweep`: samples that move along a direction and back, as GIF or MP4."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer


def sweep(
    bundle: Annotated[str, typer.Argument(help="Folder or fsspec URL of a bundle.", show_default=False)],
    out: Annotated[Path, typer.Option(help="GIF or MP4 file.", show_default=False)],
    direction: Annotated[str, typer.Option(help="Name of the direction.", show_default=False)],
    class_name: Annotated[
        str | None, typer.Option("--class", help="Default: the classes take turns.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the latents.")] = 0,
    index: Annotated[int, typer.Option(help="Of the first latent; the others are the next.")] = 0,
    samples: Annotated[int, typer.Option(help="Samples side by side.")] = 4,
    reach: Annotated[float, typer.Option(help="Strengths go from minus to plus this many standard deviations.")] = 3.0,
    steps: Annotated[int, typer.Option(help="Images from one end to the other.")] = 17,
    frame_ms: Annotated[int, typer.Option(help="How long each is shown, in milliseconds.")] = 100,
    truncation_psi: Annotated[float, typer.Option(help="Of the latents that are moved.")] = 0.8,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Samples that move along a direction, from one end to the other and back, so that the video loops."""
    from tqdm import tqdm

    from dermis.bundle import open_bundle
    from dermis.dataset.request import classes_of
    from dermis.directions.edit import MAX_STRENGTH, Edit, apply_edits
    from dermis.errors import RequestError
    from dermis.files import write_file
    from dermis.imaging import contact_sheet
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
    known = {found.name: found for found in opened.directions}
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
            drawn = synthesizer.images_from_ws(moved, "random", seeds=seeds, indices=indices)
            drawn = drawn.repeat(3, axis=3) if drawn.shape[3] == 1 else drawn
            frames.append(contact_sheet(drawn, columns=4, padding=0))
    there_and_back = np.stack([*frames, *frames[-2:0:-1]])
    write_file(out, encode_video(there_and_back, kind, frame_ms=frame_ms))
    typer.echo(f"{out}: {samples} samples along {direction}, from {-reach:g} to {reach:g} and back")
