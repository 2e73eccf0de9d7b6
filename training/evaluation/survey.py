"""The expert survey of the paper (arXiv 2208.11702): can people distinguish generated from real dermoscopy?

    for-experts/index.html    a page that shows the images, asks the questions and keeps the answers, without a network
    for-experts/images/*.png  the same images as files, for other survey tools
    secret/key.json           which images are real: not for the experts

Half of the images are real and half generated, with the same classes in both halves. Except for their content, both halves
are alike: resolution, resizing, encoder, file sizes, names and order give no information.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from dermis.errors import DataError
from dermis.html_page import page_colours
from dermis.imaging import centre_square, encode
from dermis.network_config import NoiseMode
from dermis.reader_study import PlanError, Slot, Truth, equally_long, order_for_reader, plan_images

if TYPE_CHECKING:
    from dermis.synthesizer import Synthesizer
    from training.data.images import ImageDataset

FOR_EXPERTS = "for-experts"
KEY = "secret/key.json"


class KeyImage(BaseModel):
    """One image in the key."""

    model_config = ConfigDict(strict=True, extra="forbid")
    truth: Truth
    class_name: str
    sha256: str
    source: str | None = None  # id of a real image
    index: int | None = None  # sample of the seed of a generated image


class SurveyKey(BaseModel):
    """Content of secret/key.json."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format_version: Literal[1] = 1
    survey: str
    seed: int
    size: int
    resolution: int
    truncation_psi: float
    noise_mode: NoiseMode = "const"  # surveys whose keys do not state it have the constant noise
    pages: int
    class_names: list[str]
    with_diagnosis: bool
    bundle: dict[str, str]
    data: dict[str, str]
    synthesizer: dict[str, str]
    images: dict[str, KeyImage] = Field(min_length=1)


def plan_survey(
    labels: NDArray[np.int64], class_names: Sequence[str], count: int, seed: int, *, equal_classes: bool = False
) -> tuple[Slot, ...]:
    """Choose images, half of them real, and shuffle them; see `dermis.reader_study.plan_images` for the arguments.

    Raises:
        DataError: `count` is odd, or there are too few real images.
    """
    try:
        return plan_images(labels, class_names, count, seed, equal_classes=equal_classes)
    except PlanError as error:
        raise DataError(f"--count: {error}") from None


def create_survey(
    slots: Sequence[Slot],
    dataset: ImageDataset,
    synthesizer: Synthesizer,
    out: Path,
    *,
    seed: int,
    size: int,
    pages: int = 1,
    with_diagnosis: bool = False,
    truncation_psi: float = 1.0,
    data_name: str = "",
    progress: bool = True,
) -> SurveyKey:
    """Generate the planned images and write the folder of the survey completely or not at all.

    Args:
        slots: The planned images.
        dataset: The real images.
        synthesizer: Synthesizer of the bundle.
        out: The folder, which must not exist.
        seed: Seed of the plan and of the generated images.
        size: Side in pixels of the images that experts see.
        pages: Number of pages, one for each expert. Each has its own order, so that not all experts see the same images
            when they are tired.
        with_diagnosis: Whether experts are asked for the class.
        truncation_psi: Truncation of the generated images.
        data_name: Name of the real images for the key.
        progress: Whether to show a progress bar.

    Returns:
        The key.

    Raises:
        DataError: `out` exists, the generator has no colours, or there are no classes to ask for.
    """
    bundle = synthesizer.bundle
    check_new(out)
    if bundle.generator.img_channels != 3:
        raise DataError(
            f"{bundle.location}: generates images without colour, but real ones have colour; use another bundle"
        )
    if with_diagnosis and len(bundle.class_names) < 2:
        raise DataError(f"--with-diagnosis: {bundle.location} has no classes to choose from")
    if pages < 1 or size < 16:
        raise DataError(f"--experts must be at least 1 and --size at least 16; got {pages} and {size}")
    images = _draw(slots, dataset, synthesizer, seed, truncation_psi, size, progress)
    width = max(3, len(str(len(slots))))
    pngs = equally_long([encode(pixels) for pixels in images])
    encoded = {f"{i + 1:0{width}d}": data for i, data in enumerate(pngs)}
    key = SurveyKey(
        survey=_identity(encoded, with_diagnosis),
        seed=seed,
        size=size,
        resolution=dataset.resolution,
        truncation_psi=truncation_psi,
        noise_mode="random",
        pages=pages,
        class_names=list(bundle.class_names),
        with_diagnosis=with_diagnosis,
        bundle={"name": bundle.name, "digest": bundle.digest},
        data={"name": data_name, "sha256": dataset.sha256},
        synthesizer=dict(synthesizer.identity),
        images={
            name: _key_image(slot, dataset, bundle.class_names, data)
            for (name, data), slot in zip(encoded.items(), slots, strict=True)
        },
    )
    _write(out, key, encoded)
    return key


def check_new(out: Path) -> None:
    """Check that `out` does not exist, so that no keys and answers are overwritten.

    Raises:
        DataError: It exists.
    """
    if out.exists():
        raise DataError(f"{out}: exists already; choose another --out or remove it")


def read_key(path: Path) -> SurveyKey:
    """Read key.json.

    Raises:
        DataError: The file is missing or not a key; the message names it.
    """
    try:
        return SurveyKey.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give the key.json of the survey's secret folder") from None
    except ValidationError as error:
        raise DataError(f"{path}: is not the key of a survey: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """The first error of pydantic in one line: field and message."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else fault["msg"]


def _draw(
    slots: Sequence[Slot],
    dataset: ImageDataset,
    synthesizer: Synthesizer,
    seed: int,
    truncation_psi: float,
    size: int,
    progress: bool,
) -> NDArray[np.uint8]:
    """Make the images uint8 [count, size, size, 3] in the order of the slots."""
    images = np.empty((len(slots), size, size, 3), dtype=np.uint8)
    batch = synthesizer.preferred_batch
    generated = [(i, slot) for i, slot in enumerate(slots) if slot.truth == "generated"]
    with tqdm(total=len(slots), desc="drawing", unit="img", disable=not progress) as bar:
        for i, slot in enumerate(slots):
            if slot.truth == "real":
                images[i] = _resized(dataset.images[slot.index], size)
                bar.update()
        for start in range(0, len(generated), batch):
            part = generated[start : start + batch]
            batch_images = synthesizer.images(
                [seed] * len(part),
                [slot.index for _, slot in part],
                [slot.label for _, slot in part],
                truncation_psi=truncation_psi,
                noise_mode="random",
            )
            for (i, _), pixels in zip(part, batch_images, strict=True):
                images[i] = _resized(pixels, size)
            bar.update(len(part))
    return images


def _resized(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.asarray(centre_square(Image.fromarray(pixels), size))


def _key_image(slot: Slot, dataset: ImageDataset, class_names: Sequence[str], data: bytes) -> KeyImage:
    real = slot.truth == "real"
    return KeyImage(
        truth=slot.truth,
        class_name=class_names[slot.label] if class_names else "",
        sha256=hashlib.sha256(data).hexdigest(),
        source=dataset.ids[slot.index] if real else None,
        index=None if real else slot.index,
    )


def _identity(encoded: Mapping[str, bytes], with_diagnosis: bool) -> str:
    """Identity of the survey in pages, answers and key. It follows from what the experts have, so it reveals nothing."""
    digest = hashlib.sha256(json.dumps({"with_diagnosis": with_diagnosis}).encode())
    for name, data in encoded.items():
        digest.update(name.encode() + hashlib.sha256(data).digest())
    return digest.hexdigest()[:16]


def _write(out: Path, key: SurveyKey, encoded: Mapping[str, bytes]) -> None:
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        images = partial / FOR_EXPERTS / "images"
        images.mkdir(parents=True)
        for name, data in encoded.items():
            (images / f"{name}.png").write_bytes(data)
        for page in range(1, key.pages + 1):
            file = "index.html" if key.pages == 1 else f"page-{page}.html"
            (partial / FOR_EXPERTS / file).write_text(_page(key, encoded, page), encoding="utf-8")
        (partial / KEY).parent.mkdir(mode=0o700)
        descriptor = os.open(partial / KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(key.model_dump_json(indent=1, exclude_none=True) + "\n")
        partial.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _page(key: SurveyKey, encoded: Mapping[str, bytes], page: int) -> str:
    """Make a page for experts, from names and images. It contains only those parts of the key that every expert can know."""
    names = list(encoded)
    order = order_for_reader(len(names), key.seed, page)
    survey = {
        "survey": key.survey,
        "page": page,
        "size": key.size,
        "diagnoses": key.class_names if key.with_diagnosis else [],
        "images": [
            {"name": names[i], "src": "data:image/png;base64," + base64.b64encode(encoded[names[i]]).decode()}
            for i in order
        ],
    }
    template = files("training.evaluation").joinpath("survey_page.html").read_text(encoding="utf-8")
    template = template.replace("{{colours}}", page_colours(dark=False))
    # "<" would let a class name end the script element that holds the JSON.
    return template.replace("{{survey}}", json.dumps(survey).replace("<", "\\u003c"))
