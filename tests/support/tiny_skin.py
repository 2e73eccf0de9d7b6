"""A tiny ISIC-layout folder whose classes a classifier can distinguish."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from dermis.imaging import encode

COUNT = 96
COLUMNS = ("isic_id", "patient_id", "target", "age_approx", "sex", "anatom_site", "source")


def make_skin(folder: Path, count: int = COUNT, size: int = 40) -> Path:
    """Every third image malignant (darker in the middle, with noise); two images a patient."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    y, x = np.mgrid[:size, :size] / size - 0.5
    spot = (np.hypot(y, x) < 0.3)[..., None]
    rows = []
    for i in range(count):
        malignant = i % 3 == 0
        skin = rng.normal(180, 25, 3) + rng.normal(0, 12, (size, size, 3))
        image = skin - spot * (rng.normal(90, 25) if malignant else rng.normal(40, 25))
        name = f"ISIC_{i:07d}"
        (folder / "images" / f"{name}.png").write_bytes(encode(image.clip(0, 255).astype(np.uint8)))
        target = "malignant" if malignant else "benign"
        source = "clinic-a" if i % 4 else "clinic-b"
        rows.append((name, f"IP_{i // 2:04d}", target, 20 + i % 70, "female" if i % 2 else "male", "back", source))
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return folder
