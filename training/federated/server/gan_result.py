"""The bundle of a federated generator: an ordinary bundle whose card describes the federation and names no client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dermis import __version__
from dermis.bundle import write_bundle
from dermis.files import write_file
from dermis.image_metadata import ImageOrigin
from dermis.imaging import contact_sheet, encode
from dermis.networks import Generator
from training.federated.config import FederationConfig, gan_config
from training.federated.messages.serialization import Tensors
from training.federated.server.global_state import GlobalState, tensors_under
from training.federated.server.provenance import federation_provenance, federation_section
from training.gan.card import model_card
from training.gan.snapshot import GRID, sample_grid

FOLDER = "bundle"


def averaged_generator(federation: FederationConfig, tensors: Tensors) -> Generator:
    """Return G_ema of the global tensors."""
    generator = Generator(gan_config(federation, torch.device("cpu")).generator)
    generator.load_state_dict(tensors_under(tensors, "G_ema/"))
    return generator.eval().requires_grad_(False)


def write_result(federation: FederationConfig, state: GlobalState, out: Path) -> Path:
    """Write or replace the folder `bundle` and the grid of samples in `out`.

    The discriminator is left out, since more of the training images can be learnt from it than from the generator.

    Returns:
        The bundle's folder.
    """
    device = torch.device("cpu")
    generator = averaged_generator(federation, state.tensors)
    config = gan_config(federation, device)
    iterations = state.round * federation.iterations
    kimg = iterations * config.batch / 1000
    classes = {name: state.images_of(name) for name in federation.class_names}
    provenance: dict[str, Any] = {
        "dataset": {
            "name": f"federation of {len(state.contributors)}",
            "images": state.images,
            "classes": classes,
        },
        "kimg": kimg,  # on each client
        "training": {
            "configuration": replace(config, total_kimg=kimg).to_dict() | {"precision": federation.precision},
            "hardware": "the clients' own",
            "hours": round(state.seconds / 3600, 3),
            "augment_p": float(state.tensors["p"].item()),
            "changes": [],
            "started_from": {},
        },
        "federation": federation_provenance(federation, state),
        "licence": federation.licence,
        "attribution": federation.attribution,
        "code_version": __version__,
    }
    grid = contact_sheet(sample_grid(generator, device), columns=GRID)
    made_by = ImageOrigin(federation.name, licence=federation.licence, attribution=federation.attribution)
    write_file(_samples(out, state.round), encode(grid, origin=made_by))
    write_bundle(
        out / FOLDER,
        name=federation.name,
        generator=generator,
        class_names=federation.class_names if federation.conditional else (),
        provenance=provenance,
        metrics={},
        model_card=_card(federation, provenance),
        images={"samples.webp": encode(grid, "webp", 75, made_by)},
        weights_dtype="fp16",
        replace=True,
    )
    return out / FOLDER


def read_samples(out: Path, round_number: int) -> bytes:
    """Read the PNG file with the grid of samples of a round that `write_result` wrote."""
    return _samples(out, round_number).read_bytes()


def _samples(out: Path, round_number: int) -> Path:
    return out / f"samples-{round_number:06d}.png"


def _card(federation: FederationConfig, provenance: dict[str, Any]) -> str:
    card = model_card(federation.name, provenance, {})
    return card.replace("\n## Training\n", f"\n{federation_section(provenance['federation'])}\n## Training\n", 1)
