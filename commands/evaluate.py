"""`dermis evaluate`: measure a bundle against real images and write the numbers into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    bundle: Annotated[Path, typer.Option(help="Bundle folder; its metrics.json and card are renewed.")],
    data: Annotated[Path, typer.Option(help="ISIC-layout folder of the real images.")],
    extractor: Annotated[str, typer.Option(help="Feature space.")] = "lite0",
    count: Annotated[int | None, typer.Option(help="Generated images; default: as many as real ones.")] = None,
    truncation_psi: Annotated[float, typer.Option(help="As in generation.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the generated images.")] = 0,
    class_column: Annotated[str | None, typer.Option(help="CSV column of the classes.")] = None,
    cache: Annotated[Path, typer.Option(help="Where decoded images are kept.")] = Path(".dermis/cache"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Distances (FID, KID) between real and generated images, overall and per class, in a named feature space."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    from dermis.bundle import amend_bundle, open_bundle
    from dermis.devices import resolve_device
    from dermis.errors import DataError
    from dermis.features import feature_extractor
    from dermis.metrics import frechet_distance, kernel_distance
    from dermis.synthesizer import Synthesizer
    from training.data.isic import load_isic
    from training.gan.card import model_card

    opened = open_bundle(bundle)
    dataset = load_isic(data, opened.generator.img_resolution, class_column=class_column, cache=cache)
    conditional = bool(opened.class_names)
    if conditional and dataset.class_names != opened.class_names:
        raise DataError(f"{data}: has classes {dataset.class_names}, but the bundle {opened.class_names}")
    features = feature_extractor(extractor, resolve_device(device))
    synthesizer = Synthesizer(opened, device=device)
    # Classes in the proportions of the real images, so that neither set has a mix of its own.
    total = count or len(dataset.labels)
    labels = np.sort(dataset.labels[np.linspace(0, len(dataset.labels) - 1, total).astype(int)])

    def real_features() -> Any:
        starts = range(0, len(dataset.labels), 32)
        return features.over(dataset.images[i : i + 32] for i in tqdm(starts, "real images", unit="batch"))

    def generated_features() -> Any:
        for i in tqdm(range(0, total, 32), "generated images", unit="batch"):
            part = labels[i : i + 32] if conditional else np.zeros(len(labels[i : i + 32]), dtype=int)
            indices = list(range(i, i + len(part)))
            yield synthesizer.images([seed] * len(part), indices, part.tolist(), truncation_psi=truncation_psi)

    real, generated = real_features(), features.over(generated_features())

    def compare(a: Any, b: Any) -> dict[str, Any]:
        kid, kid_std = kernel_distance(a, b)
        return {"images": len(b), "fid": frechet_distance(a, b), "kid": kid, "kid_std": kid_std}

    metrics: dict[str, Any] = {
        "extractor": features.name,
        "extractor_identity": features.identity,
        "real_sha256": dataset.sha256,
        "real_images": len(real),
        "seed": seed,
        "truncation_psi": truncation_psi,
        "synthesizer": dict(synthesizer.identity),
        **compare(real, generated),
    }
    if conditional:
        metrics["classes"] = {
            name: compare(real[dataset.labels == k], generated[labels == k])
            for k, name in enumerate(dataset.class_names)
        }
    provenance = dict(opened.provenance)
    card = model_card(opened.name, provenance, metrics) if "training" in provenance else opened.model_card
    amend_bundle(opened, metrics=metrics, model_card=card)
    table = Table("class", "images", f"FID@{features.name}", f"KID@{features.name} x 1000")
    for name, part in {"all": metrics, **metrics.get("classes", {})}.items():
        table.add_row(name, str(part["images"]), f"{part['fid']:.1f}", f"{1000 * part['kid']:.2f}")
    Console().print(table)
