"""The bundle that a federated generator becomes: an ordinary one, whose card tells of the federation but of no member."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dermis import __version__
from dermis.bundle import write_bundle
from dermis.imaging import contact_sheet, encode
from dermis.networks import Generator
from training.federated.config import FederationConfig, gan_config
from training.federated.messages.serialization import Tensors
from training.federated.server.global_state import GlobalState
from training.federated.server.provenance import federation_facts, federation_section
from training.gan.card import model_card
from training.gan.snapshot import GRID, sample_grid

FOLDER = "bundle"


def averaged_generator(federation: FederationConfig, tensors: Tensors) -> Generator:
    """G_ema of the global state."""
    generator = Generator(gan_config(federation, torch.device("cpu")).generator)
    generator.load_state_dict(_under(tensors, "G_ema/"))
    return generator.eval().requires_grad_(False)


def finish(federation: FederationConfig, state: GlobalState, out: Path, counted: Tensors | None) -> Path:
    """Write (or replace) out/bundle and the grid of samples; returns the bundle's folder.

    Without the discriminator, which knows more of the training images than the generator does.
    """
    device = torch.device("cpu")
    generator = averaged_generator(federation, state.tensors)
    config = gan_config(federation, device)
    iterations = state.round * federation.iterations
    kimg = iterations * config.batch / 1000
    classes = {name: state.images_of(name) for name in federation.class_names}
    provenance: dict[str, Any] = {
        "dataset": {
            "name": f"federation of {len(state.participants)}",
            "images": state.images,
            "classes": classes,
        },
        "kimg": kimg,  # at each member
        "training": {
            "configuration": replace(config, total_kimg=kimg).to_dict() | {"precision": federation.precision},
            "hardware": "the members' own",
            "hours": round(state.seconds / 3600, 3),
            "augment_p": float(state.tensors["p"].item()),
            "changes": [],
            "started_from": {},
        },
        "federation": federation_facts(federation, state),
        "licence": federation.licence,
        "attribution": federation.attribution,
        "code_version": __version__,
    }
    grid = contact_sheet(sample_grid(generator, device), columns=GRID)
    (out / f"samples-{state.round:06d}.png").write_bytes(encode(grid))
    write_bundle(
        out / FOLDER,
        name=federation.name,
        generator=generator,
        class_names=federation.class_names if federation.conditional else (),
        provenance=provenance,
        metrics={},
        model_card=_card(federation, provenance),
        images={"samples.webp": encode(grid, "webp", 75)},
        weights_dtype="fp16",
        replace=True,
    )
    return out / FOLDER


def _card(federation: FederationConfig, provenance: dict[str, Any]) -> str:
    card = model_card(federation.name, provenance, {})
    return card.replace("\n## Training\n", f"\n{federation_section(provenance['federation'])}\n## Training\n", 1)


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
