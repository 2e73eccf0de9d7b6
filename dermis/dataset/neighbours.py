"""Write a folder of latent neighbours: images of latents near given ones (anchors), in a sub-folder for each class.

    benign/NBR_00000_000.png ...   neighbour 0 of anchor 0; `dermis train classifier --synthetic FOLDER` takes the folder
    metadata.csv                   the columns of every generated dataset, and `anchor` and `neighbour`
    neighbours.json                bundle, distance, space, anchors: all that is needed to make the images again
    anchors.npz                    the style vectors of anchors that are projections

Projections are named by their number, because their ids can be those of real images. Their style vectors are as sensitive as
the images.

The folder appears completely or not at all. Images of an interrupted call are kept beside it, and the same call continues.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dermis import __version__
from dermis.dataset.columns import COLUMNS
from dermis.dataset.containers import SOURCE, folder_name
from dermis.dataset.store import storage_errors
from dermis.errors import DataError, StorageError
from dermis.files import atomic_write
from dermis.image_metadata import ImageOrigin, origin_of
from dermis.imaging import encode
from dermis.latent_neighbours import Anchor, Space, check_options, neighbours_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dermis.bundle import Bundle
    from dermis.imaging import Images
    from dermis.network_config import NoiseMode
    from dermis.networks import Generator
    from dermis.synthesizer import Synthesizer

DESCRIPTION, METADATA, ANCHORS = "neighbours.json", "metadata.csv", "anchors.npz"
FORMAT_VERSION = 1
MAX_NEIGHBOURS = 10_000  # neighbours of one anchor
_PLAN = "plan.json"


def write_neighbours(
    out: Path,
    bundle: Bundle,
    generator: Generator,
    synthesizer: Synthesizer,
    anchors: Sequence[Anchor],
    *,
    count: int,
    distance: float,
    space: Space = "w",
    truncation_psi: float = 1.0,
    class_names: Sequence[str] | None = None,
    done: Callable[[int], object] = lambda images: None,
) -> int:
    """Generate neighbours of each anchor (see `dermis.latent_neighbours`) and write them to a folder.

    Neighbours of a sample have its noise, so that only the latent differs. Neighbours of style vectors have the constant
    noise, because style vectors have no noise.

    Args:
        out: The folder. It must not exist.
        bundle: The bundle of the generator.
        generator: Its generator.
        synthesizer: Its synthesizer.
        anchors: The latents whose neighbours are generated.
        count: Neighbours of each anchor.
        distance: Distance of the neighbours to their anchor, in `space`.
        space: The latent space.
        truncation_psi: Truncation of anchors that are samples.
        class_names: Names of the labels, if the bundle has none.
        done: Called with the number of images after each batch.

    Returns:
        The number of images.

    Raises:
        DataError: An option is out of range, there is no anchor, or `out` exists.
        StorageError: The folder cannot be written.
    """
    check_options(distance, space)
    if not 1 <= count <= MAX_NEIGHBOURS:
        raise DataError(f"count: {count} is not from 1 to {MAX_NEIGHBOURS:,}")
    if not anchors:
        raise DataError("there is no anchor to make neighbours of")
    if out.exists():
        raise DataError(f"{out}: exists already; choose another --out or remove it")
    names = tuple(class_names or bundle.class_names)
    description = _description(bundle, synthesizer, anchors, names, count, distance, space, truncation_psi)
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    partial = out.with_name(f".{out.name}.partial")
    with storage_errors(str(partial)):
        _begin(partial, text)
        for label in sorted({anchor.label for anchor in anchors}):
            (partial / folder_name(names[label])).mkdir(exist_ok=True)
    tasks = [(i, number) for i in range(len(anchors)) for number in range(count)]
    hashes = dict(_finished_images(partial, tasks, anchors, names))
    done(len(hashes))
    missing = [task for task in tasks if task not in hashes]
    step = synthesizer.preferred_batch * max(1, 32 // synthesizer.preferred_batch)
    for start in range(0, len(missing), step):
        chunk = missing[start : start + step]
        ws = [
            neighbours_of(
                generator,
                anchors[i],
                [number for _, number in group],
                distance=distance,
                space=space,
                truncation_psi=truncation_psi,
            )
            for i, group in groupby(chunk, key=lambda task: task[0])
        ]
        images = _images(synthesizer, np.concatenate(ws), [anchors[i] for i, _ in chunk])
        for task, image in zip(chunk, images, strict=True):
            picture = encode(image, origin=_origin(bundle, anchors[task[0]]))
            hashes[task] = _write(partial / _file_name(task, anchors, names), picture)
        done(len(chunk))
    with storage_errors(str(out)):
        (partial / METADATA).write_text(_table(tasks, anchors, names, hashes), encoding="utf-8")
        latents = {i: anchor.ws for i, anchor in enumerate(anchors) if anchor.ws is not None}
        if latents:
            np.savez_compressed(partial / ANCHORS, ws=np.stack(list(latents.values())), anchors=np.array(list(latents)))
        (partial / _PLAN).replace(partial / DESCRIPTION)
        partial.rename(out)
    return len(tasks)


def _images(synthesizer: Synthesizer, ws: NDArray[np.float32], anchors: Sequence[Anchor]) -> Images:
    """Generate images uint8 [N, H, W, channels] of style vectors [N, num_ws, w_dim], each with the noise of its anchor."""
    parts = []
    for noise_mode, group in groupby(zip(ws, anchors, strict=True), key=lambda pair: _noise_mode(pair[1])):
        rows, named = zip(*group, strict=True)
        seeds, indices = [anchor.seed for anchor in named], [anchor.index for anchor in named]
        parts.append(synthesizer.images_from_ws(np.stack(rows), noise_mode, seeds=seeds, indices=indices))
    return np.concatenate(parts)


def _origin(bundle: Bundle, anchor: Anchor) -> ImageOrigin:
    """Origin of the neighbours of an anchor, without seed and index, which do not name them alone."""
    return origin_of(bundle, "trainedAlgorithmicMedia" if anchor.ws is None else "compositeWithTrainedAlgorithmicMedia")


def _anchor_id(number: int, anchor: Anchor) -> str:
    """Name of an anchor in the files: the id of a projection would say whose image it is of."""
    return anchor.id if anchor.ws is None else f"projection-{number:05d}"


def _noise_mode(anchor: Anchor) -> NoiseMode:
    return "random" if anchor.ws is None else "const"


def read_description(folder: Path) -> dict[str, Any]:
    """Read neighbours.json.

    Raises:
        StorageError: It is missing or damaged.
    """
    try:
        description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder}: has no {DESCRIPTION} that can be read ({error})") from None
    return description


def _description(
    bundle: Bundle,
    synthesizer: Synthesizer,
    anchors: Sequence[Anchor],
    names: Sequence[str],
    count: int,
    distance: float,
    space: Space,
    truncation_psi: float,
) -> dict[str, Any]:
    classes = max(bundle.generator.c_dim, 1)
    for anchor in anchors:
        if not 0 <= anchor.label < min(classes, len(names)):
            raise DataError(f"{anchor.id}: class number {anchor.label} is none of the generator's {classes}")
    return {
        "format_version": FORMAT_VERSION,
        "bundle": {"name": bundle.name, "digest": bundle.digest, "class_names": list(names)},
        "synthesizer": {**synthesizer.identity, "dermis": __version__},
        "count": count,
        "distance": distance,
        "space": space,
        "truncation_psi": truncation_psi,
        "anchors": [
            {
                "id": _anchor_id(i, anchor),
                "label": anchor.label,
                "seed": anchor.seed,
                "index": anchor.index,
                "noise_mode": _noise_mode(anchor),  # missing in older files, whose images have the constant noise
                "ws_sha256": None if anchor.ws is None else hashlib.sha256(anchor.ws.tobytes()).hexdigest(),
            }
            for i, anchor in enumerate(anchors)
        ],
    }


def _begin(partial: Path, plan: str) -> None:
    """Prepare the folder of unfinished images. If it is of a call with other arguments, it is emptied."""
    if partial.exists() and (not (partial / _PLAN).is_file() or (partial / _PLAN).read_text(encoding="utf-8") != plan):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    _write(partial / _PLAN, plan.encode())


_Task = tuple[int, int]


def _finished_images(
    partial: Path, tasks: Sequence[_Task], anchors: Sequence[Anchor], names: Sequence[str]
) -> Iterator[tuple[_Task, str]]:
    """Yield the images that exist already, with their SHA-256."""
    for task in tasks:
        path = partial / _file_name(task, anchors, names)
        if path.is_file():
            yield task, hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, data: bytes) -> str:
    """Write a file completely or not at all and return its SHA-256 (hex)."""
    with storage_errors(str(path)), atomic_write(path) as partial:
        partial.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _id(task: _Task) -> str:
    return f"NBR_{task[0]:05d}_{task[1]:03d}"


def _file_name(task: _Task, anchors: Sequence[Anchor], names: Sequence[str]) -> str:
    return f"{folder_name(names[anchors[task[0]].label])}/{_id(task)}.png"


def _table(tasks: Sequence[_Task], anchors: Sequence[Anchor], names: Sequence[str], hashes: dict[_Task, str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, (*COLUMNS, "anchor", "neighbour"), restval="", lineterminator="\n")
    writer.writeheader()
    for task in tasks:
        anchor = anchors[task[0]]
        writer.writerow(
            {
                "isic_id": _id(task),
                "target": names[anchor.label],
                "source": SOURCE,
                "file_name": _file_name(task, anchors, names),
                "label": anchor.label,
                "seed": anchor.seed,
                "index": anchor.index,
                "sha256": hashes[task],
                "anchor": _anchor_id(task[0], anchor),
                "neighbour": task[1],
            }
        )
    return text.getvalue()
