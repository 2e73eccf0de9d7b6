"""The part of a result's provenance about its federation: rounds, sizes, strategy; never the names of clients."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from training.federated.config import FederationConfig
from training.federated.server.global_state import GlobalState


def federation_provenance(federation: FederationConfig, state: GlobalState) -> dict[str, Any]:
    """Return the entry for the provenance of a bundle or classifier. Clients are ordered by size, without names."""
    clients = [{"images": m.images, "rounds": m.rounds, **m.classes} for m in state.contributors]
    provenance: dict[str, Any] = {
        "rounds": state.round,
        "iterations": federation.iterations,
        "strategy": federation.strategy,
        "strategy_options": federation.strategy_options,
        "members": clients,
        "wire_dtype": federation.wire_dtype,
        "secure_aggregation": federation.secure_aggregation,
        "gigabytes": round((state.bytes_down + state.bytes_up) / 1e9, 3),
    }
    if federation.start:
        provenance["began_with"] = PurePath(federation.start).name
    if federation.task == "gan":
        provenance |= {"share": federation.share, "optimizer": federation.optimizer}
    if state.privacy is not None:
        provenance["privacy"] = {key: state.privacy[key] for key in ("epsilon", "delta", "releases")}
    return provenance


def federation_section(provenance: dict[str, Any]) -> str:
    """Return the section about the federation for a card, in Markdown."""
    sizes = ", ".join(f"{client['images']:,}" for client in provenance["members"])
    participation = ", ".join(f"{client['rounds']:,}" for client in provenance["members"])
    rows = {
        "rounds": f"{provenance['rounds']:,} of {provenance['iterations']:,} training steps on each client",
        "clients": f"{len(provenance['members'])}, with {sizes} training images",
        "rounds per client": participation,
        "strategy": " ".join([provenance["strategy"], provenance["strategy_options"]]).strip(),
        "transfer format": f"{provenance['wire_dtype']}, {provenance['gigabytes']:g} GB in total",
        "secure aggregation": "yes" if provenance["secure_aggregation"] else "no: the server saw each client's update",
    }
    if "began_with" in provenance:
        rows["started from"] = provenance["began_with"]
    if "share" in provenance:
        shared = "generator and discriminator" if provenance["share"] == "both" else "the generator alone"
        rows |= {"exchanged": shared, "optimizers": provenance["optimizer"]}
    if privacy := provenance.get("privacy"):
        rows["differential privacy"] = (
            f"protects a whole client: epsilon {privacy['epsilon']:.2f} at delta {privacy['delta']:g} after "
            f"{privacy['releases']} releases of weights; it does not cover measurements"
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""## Federation

Trained by several institutions together. None of them shared its images.

| | |
| --- | --- |
{table}
"""
