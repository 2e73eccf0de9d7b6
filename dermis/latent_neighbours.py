"""Neighbours of latents at a given distance.

"At distance d" means a relative Euclidean distance, which has no unit and is the same for every generator:

    in w    |w' - w| = d |w - w_avg|     w' = w + d |w - w_avg| u, with u the unit vector from w to a partner's w
    in z    |z' - z| = d |z|             z' is z rotated towards a partner on the sphere through z

A neighbour lies in the direction of its partner: a second random latent of the same class, drawn for (seed, index, number of
the neighbour) by `dermis.latents.partner_z`. So a neighbour is in the region of the generator's images: along most directions
of a uniform distribution on w images hardly vary. In w the distance is measured over all style vectors together, also for a
projected image, whose style vectors differ.

arXiv 2208.11702 makes neighbours "at distance 0.1" of projected images without naming a measure; this one was chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dermis.errors import DataError, escape, quote
from dermis.latents import partner_z, z_for

if TYPE_CHECKING:
    from dermis.networks import Generator

Space = Literal["w", "z"]
Floats = NDArray[np.float32]
MAX_DISTANCE = {"w": 10.0, "z": 2.0}  # the largest distance on a sphere is its diameter


@dataclass(frozen=True)
class Anchor:
    """A latent whose neighbours are made: sample (seed, index) of class number `label`, or a given ws [num_ws, w_dim].

    A given ws is not truncated again. Its partners are those of (seed, index).
    """

    id: str
    label: int
    seed: int
    index: int
    ws: Floats | None = None


def w_neighbour(ws: Floats, w_avg: Floats, partner: Floats, distance: float) -> Floats:
    """Return ws' for ws and partner [num_ws, w_dim], w_avg [w_dim]: |ws' - ws| = distance |ws - w_avg| over all elements."""
    start, middle = ws.astype(np.float64), w_avg.astype(np.float64)
    towards = partner.astype(np.float64) - start
    length = float(np.linalg.norm(towards))
    if length == 0:
        raise ValueError("the partner is the latent itself; there is no direction to it")
    step = distance * float(np.linalg.norm(start - middle)) / length
    return (start + step * towards).astype(np.float32)


def z_neighbour(z: Floats, partner: Floats, distance: float) -> Floats:
    """Return z' for z and partner [z_dim] with |z'| = |z| and |z' - z| = distance |z|, a chord of the sphere: at most 2."""
    if not 0 <= distance <= MAX_DISTANCE["z"]:
        raise ValueError(f"distance must be from 0 to 2; got {distance}")
    start = z.astype(np.float64)
    radius = float(np.linalg.norm(start))
    axis = start / radius
    side = partner.astype(np.float64) - (partner @ axis) * axis
    side /= np.linalg.norm(side)
    cos = 1 - distance**2 / 2  # cosine of the angle whose chord is `distance`
    turned: Floats = (radius * (cos * axis + np.sqrt(1 - cos**2) * side)).astype(np.float32)
    return turned


def neighbours_of(
    generator: Generator,
    anchor: Anchor,
    numbers: Sequence[int],
    *,
    distance: float,
    space: Space = "w",
    truncation_psi: float = 1.0,
) -> Floats:
    """Compute the style vectors of neighbours of an anchor.

    Neighbours are truncated like the anchor: in w the anchor is truncated before the step, in z the neighbour after it.

    Args:
        generator: The generator.
        anchor: The anchor.
        numbers: Numbers of the neighbours.
        distance: Relative distance of the neighbours to the anchor.
        space: The latent space of that distance.
        truncation_psi: Truncation.

    Returns:
        float32 [len(numbers), num_ws, w_dim].

    Raises:
        DataError: The distance or space is not possible.
    """
    check_options(distance, space)
    config = generator.config
    partners = np.stack([partner_z(anchor.seed, anchor.index, number, config.z_dim) for number in numbers])
    if space == "z":
        if anchor.ws is not None:
            raise DataError(f"space: {anchor.id} is a projection, which has a w and no z; use w")
        z = z_for(anchor.seed, [anchor.index], config.z_dim)[0]
        turned = np.stack([z_neighbour(z, partner, distance) for partner in partners])
        return map_to_ws(generator, turned, anchor.label, truncation_psi)
    ws, w_avg = anchor_ws(generator, anchor, truncation_psi), generator.mapping.w_avg.numpy()
    partner_ws = map_to_ws(generator, partners, anchor.label, truncation_psi)
    return np.stack([w_neighbour(ws, w_avg, partner, distance) for partner in partner_ws])


def anchor_ws(generator: Generator, anchor: Anchor, truncation_psi: float = 1.0) -> Floats:
    """Return the style vectors [num_ws, w_dim] of the anchor."""
    if anchor.ws is not None:
        return anchor.ws
    z = z_for(anchor.seed, [anchor.index], generator.config.z_dim)
    ws: Floats = map_to_ws(generator, z, anchor.label, truncation_psi)[0]
    return ws


def map_to_ws(generator: Generator, z: Floats, label: int, truncation_psi: float = 1.0) -> Floats:
    """Compute style vectors [N, num_ws, w_dim] of latents [N, z_dim] of one class."""
    import torch

    config = generator.config
    c = torch.zeros(len(z), config.c_dim)
    if config.c_dim:
        c[:, label] = 1
    with torch.inference_mode():
        ws: Floats = generator.mapping(torch.from_numpy(z), c, truncation_psi=truncation_psi).numpy()
    return ws


def read_projections(path: Path, class_names: Sequence[str], num_ws: int, w_dim: int, *, seed: int = 0) -> list[Anchor]:
    """Read anchors from projected images.

    A file has `ws` float [N, num_ws, w_dim] (or [N, w_dim]) and `classes`, N names of the generator's classes. `ids` names
    the images; without it they are numbered. Anchor number i has its partners from (seed, i).

    Args:
        path: A .npz file, or a folder of such files, which are read in the order of their names.
        class_names: Names of the generator's classes.
        num_ws: Number of its style vectors.
        w_dim: Dimensions of its w.
        seed: Seed of the partners.

    Raises:
        DataError: A file cannot be read, or does not fit the generator.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: has no .npz files of projections")
    anchors: list[Anchor] = []
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as file_arrays:
                arrays = {name: file_arrays[name] for name in ("ws", "classes", "ids") if name in file_arrays}
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{file}: cannot be read as .npz ({escape(error)})") from None
        if absent := {"ws", "classes"} - arrays.keys():
            raise DataError(f"{file}: has no array {min(absent)}; projections need ws and classes")
        ws, classes = arrays["ws"], [str(name) for name in arrays["classes"]]
        if ws.ndim == 2:
            ws = np.repeat(ws[:, None], num_ws, axis=1)
        if ws.shape[1:] != (num_ws, w_dim) or len(classes) != len(ws) or not np.isfinite(ws).all():
            raise DataError(
                f"{file}: ws {ws.shape} with {len(classes)} classes; this generator takes [N, {num_ws}, {w_dim}], "
                "finite, with N classes"
            )
        if unknown := set(classes) - set(class_names):
            raise DataError(f"{file}: classes: {quote(min(unknown))} is none of {', '.join(class_names)}")
        ids = [str(name) for name in arrays["ids"]] if "ids" in arrays else [f"{file.stem}-{i}" for i in range(len(ws))]
        if len(ids) != len(ws):
            raise DataError(f"{file}: has {len(ids)} ids for {len(ws)} ws")
        for name, class_name, vectors in zip(ids, classes, ws, strict=True):
            anchors.append(Anchor(name, class_names.index(class_name), seed, len(anchors), vectors.astype(np.float32)))
    return anchors


def check_options(distance: float, space: str) -> None:
    """Raise DataError if the distance or the space is not possible."""
    if space not in get_args(Space):
        raise DataError(f"space: {space!r} is none of {', '.join(get_args(Space))}")
    if not 0 < distance <= MAX_DISTANCE[space]:
        raise DataError(f"distance: {distance:g} is not above 0 and at most {MAX_DISTANCE[space]:g} in {space}")
