"""Write an embedding for TensorBoard's projector: `tensorboard --logdir FOLDER`, or four files to load by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from dermis.dataset.store import storage_errors
from dermis.explain.embeddings import Embedded, origin_of_items
from dermis.explain.embeddings_page import sprite
from dermis.files import atomic_write
from dermis.imaging import encode

TENSORS, METADATA, SPRITE, CONFIG = "tensors.tsv", "metadata.tsv", "sprite.png", "projector_config.pbtxt"
_COLUMNS = ("id", "kind", "class", "source", "part", "predicted", "calibrated")


def write_projector(folder: Path, embedded: Embedded, predicted: list[str]) -> None:
    """Write features [N, D], metadata of the images, thumbnails and configuration.

    Raises:
        StorageError: The folder cannot be written.
        DataError: The picture of thumbnails would be too large.
    """
    picture = encode(sprite(embedded.thumbnails), origin=origin_of_items(embedded.items))
    side = embedded.thumbnails.shape[1]
    text = io.StringIO()
    np.savetxt(text, embedded.features, fmt="%.6g", delimiter="\t")
    rows = ["\t".join(_COLUMNS)]
    for item, prediction, p in zip(embedded.items, predicted, embedded.calibrated, strict=True):
        cells = (item.id, item.kind, item.class_name, item.source, item.part, prediction, f"{p:.6f}")
        rows.append("\t".join(" ".join(cell.split()) for cell in cells))  # a tab or line break would end the cell
    config = f"""embeddings {{
  tensor_name: "classifier features"
  tensor_path: "{TENSORS}"
  metadata_path: "{METADATA}"
  sprite {{
    image_path: "{SPRITE}"
    single_image_dim: {side}
    single_image_dim: {side}
  }}
}}
"""
    files = {
        TENSORS: text.getvalue().encode(),
        METADATA: ("\n".join(rows) + "\n").encode(),
        SPRITE: picture,
        CONFIG: config.encode(),  # last, because the projector reads no folder without it
    }
    with storage_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with atomic_write(folder / name) as partial:
                partial.write_bytes(data)
