"""What a result tells of the federation that made it: rounds, sizes, how updates were averaged; never who took part."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from training.federated.config import FederationConfig
from training.federated.server.global_state import GlobalState


def federation_facts(federation: FederationConfig, state: GlobalState) -> dict[str, Any]:
    """For the provenance of a bundle or classifier. Members by size, without even the numbers that logs call them by."""
    members = [{"images": m.images, "rounds": m.rounds, **m.classes} for m in state.participants]
    facts: dict[str, Any] = {
        "rounds": state.round,
        "iterations": federation.iterations,
        "strategy": federation.strategy,
        "strategy_options": federation.strategy_options,
        "members": members,
        "wire_dtype": federation.wire_dtype,
        "secure_aggregation": federation.secure_aggregation,
        "gigabytes": round((state.bytes_down + state.bytes_up) / 1e9, 3),
    }
    if federation.start:
        facts["began_with"] = PurePath(federation.start).name
    if federation.task == "gan":
        facts |= {"share": federation.share, "optimizer": federation.optimizer}
    if state.privacy is not None:
        facts["privacy"] = {key: state.privacy[key] for key in ("epsilon", "delta", "releases")}
    return facts


def federation_section(facts: dict[str, Any]) -> str:
    """Markdown for a card."""
    sizes = ", ".join(f"{member['images']:,}" for member in facts["members"])
    parts = ", ".join(f"{member['rounds']:,}" for member in facts["members"])
    rows = {
        "rounds": f"{facts['rounds']:,} of {facts['iterations']:,} training steps at each member",
        "members": f"{len(facts['members'])}, with {sizes} training images",
        "took part in": f"{parts} rounds",
        "averaged by": " ".join([facts["strategy"], facts["strategy_options"]]).strip(),
        "weights on the wire": f"{facts['wire_dtype']}, {facts['gigabytes']:g} GB in all",
        "secure aggregation": "yes" if facts["secure_aggregation"] else "no: the server saw each member's update",
    }
    if "began_with" in facts:
        rows["began with"] = facts["began_with"]
    if "share" in facts:
        shared = "generator and discriminator" if facts["share"] == "both" else "the generator alone"
        rows |= {"exchanged": shared, "optimizers": facts["optimizer"]}
    if privacy := facts.get("privacy"):
        rows["differential privacy"] = (
            f"of a whole member: epsilon {privacy['epsilon']:.2f} at delta {privacy['delta']:g} after "
            f"{privacy['releases']} releases of weights; measurements are outside of it"
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""## Federation

Trained by several institutions together, none of which showed its images.

| | |
| --- | --- |
{table}
"""
