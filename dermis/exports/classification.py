"""A dataset in the layouts of COCO, FiftyOne and YOLO classification. All are folders of image files with JSON beside them."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from dermis.errors import RequestError
from dermis.exports.output import Write
from dermis.exports.source import ExportSource

NOTICE = "README.md"
LABELS = "labels.json"


def write_coco(source: ExportSource, write: Write) -> int:
    """Write the images to data/ and labels.json in the format of COCO's object detection.

    COCO has no labels of whole images. Each image has one annotation, whose box is the whole image.

    Returns:
        Number of images.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for sample in source.samples():
        name = f"{sample.name}{sample.suffix}"
        write(f"data/{name}", sample.data)
        width, height = sample.size
        image = {"id": sample.number + 1, "file_name": name, "width": width, "height": height, "license": 1}
        images.append(image | {"seed": int(sample.row["seed"]), "index": int(sample.row["index"])})
        annotations.append(
            {
                "id": sample.number + 1,
                "image_id": sample.number + 1,
                "category_id": sample.label + 1,
                "bbox": [0, 0, width, height],
                "area": width * height,
                "segmentation": [],
                "iscrowd": 0,
            }
        )
    document = {
        "info": {"description": f"{_SYNTHETIC} {_origin(source)}", "version": "1.0", "contributor": source.attribution},
        "licenses": [{"id": 1, "name": source.licence, "url": _url(source.licence)}],
        "categories": [
            {"id": label + 1, "name": name, "supercategory": "skin lesion"}
            for label, name in enumerate(source.manifest.class_names)
        ],
        "images": images,
        "annotations": annotations,
    }
    write(LABELS, _json(document))
    write(NOTICE, _notice(source))
    return len(images)


def write_fiftyone(source: ExportSource, write: Write) -> int:
    """Write the images to data/ and labels.json as FiftyOne's FiftyOneImageClassificationDataset.

    Returns:
        Number of images.
    """
    labels: dict[str, int] = {}
    for sample in source.samples():
        write(f"data/{sample.name}{sample.suffix}", sample.data)
        labels[sample.name] = sample.label
    write(LABELS, _json({"classes": list(source.manifest.class_names), "labels": labels}))
    write(NOTICE, _notice(source))
    return len(labels)


def write_yolo(source: ExportSource, write: Write, validation: float) -> int:
    """Write the images to train/CLASS/ and val/CLASS/, as YOLO's classification reads them.

    Args:
        source: The dataset.
        write: Writes a file.
        validation: Share of each class in val/, evenly distributed over its samples. 0 writes no val/.

    Returns:
        Number of images.

    Raises:
        RequestError: The share is not at least 0 and below 1, or a class has too few images to be divided.
    """
    if not 0 <= validation < 1:
        raise RequestError("validation", f"must be at least 0 and below 1, not {validation:g}")
    written: Counter[int] = Counter()
    for sample in source.samples():
        part = "val" if _in_validation(written[sample.label], validation) else "train"
        written[sample.label] += 1
        write(f"{part}/{source.folder(sample.label)}/{sample.name}{sample.suffix}", sample.data)
    alone = [source.manifest.class_names[label] for label, count in written.items() if count == 1]
    if alone and validation:  # YOLO numbers the classes of each part by itself, so both need the same ones
        raise RequestError("validation", f"there is only one image of {alone[0]}; give 0 to put all into train/")
    write(NOTICE, _notice(source))
    return written.total()


def _in_validation(position: int, share: float) -> bool:
    """Whether the sample at this position of its class, from 0, belongs to the validation part.

    Of n samples of a class ceil((n - 1) share) do, so that two samples are enough for both parts.
    """
    return position > 0 and math.ceil(position * share - 1e-9) > math.ceil((position - 1) * share - 1e-9)


_SYNTHETIC = "Synthetic dermoscopy images. None is a photograph of a person. Not for diagnosis."


def _origin(source: ExportSource) -> str:
    manifest = source.manifest
    return (
        f"Made by dermis with the generator {manifest.bundle_name} (bundle SHA-256 {manifest.bundle_digest}); "
        f"dataset: manifest.json SHA-256 {source.digest}."
    )


def _notice(source: ExportSource) -> bytes:
    return f"""{_SYNTHETIC}

{_origin(source)}

Licence: {source.licence}

Attribution: {source.attribution}
""".encode()


def _url(licence: str) -> str:
    return licence if licence.startswith("https://") else ""


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
