"""The expert survey of the paper (arXiv 2208.11702): can people tell generated from real dermoscopy?

    for-experts/index.html    one page that shows the images, asks and keeps the answers; needs no network
    for-experts/images/*.png  the same images as files, for other survey tools
    secret/key.json           which image is which: not for the experts

Half of the images are real and half generated, with the same classes in both halves. Whatever could tell the halves
apart besides their content is the same for both: resolution, resizing, encoder, file sizes, names and order.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from dermis.errors import DataError
from dermis.imaging import encode
from dermis.network_config import NoiseMode

if TYPE_CHECKING:
    from dermis.synthesizer import Synthesizer
    from training.data.isic import ImageDataset

FOR_EXPERTS = "for-experts"
KEY = "secret/key.json"
Truth = Literal["real", "generated"]

# Streams of random numbers: what one of them is used for does not shift the others.
_REAL, _MIX, _ORDER = 0, 1, 2


@dataclass(frozen=True)
class Slot:
    """One image of a survey before it is drawn: row `index` of the real images or sample `index` of the seed."""

    truth: Truth
    label: int
    index: int


class KeyImage(BaseModel):
    """What the key says of one image. `source` is the real image's id; `index` the sample of the survey's seed."""

    model_config = ConfigDict(strict=True, extra="forbid")
    truth: Truth
    class_name: str
    sha256: str
    source: str | None = None
    index: int | None = None


class SurveyKey(BaseModel):
    """secret/key.json."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format_version: Literal[1] = 1
    survey: str
    seed: int
    size: int
    resolution: int
    truncation_psi: float
    noise_mode: NoiseMode = "const"  # keys that do not state it are of surveys drawn with the constant noise
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
    """Choose `count` images, half of them real, and mix them: a function of the arguments alone.

    labels int64 [N] are the classes of the real images, indices into `class_names`; all 0 without classes. Both halves
    have the classes in the proportions of `labels` (largest remainders decide the last images), or as many of each
    with `equal_classes`; the real ones are drawn without replacement. DataError if `count` is odd or asks for more than
    there are.
    """
    if count < 2 or count % 2:
        raise DataError(f"--count: must be even and at least 2, as half are real; got {count}")
    half = count // 2
    available = np.bincount(labels, minlength=len(class_names))
    shares = (available > 0) / (available > 0).sum() if equal_classes else available / available.sum()
    wanted = _apportion(shares, half)
    if (short := np.flatnonzero(wanted > available)).size:
        k = int(short[0])
        kind = f"real {class_names[k]} images" if class_names else "real images"
        raise DataError(f"--count: {count} takes {wanted[k]} {kind}, but there are {available[k]}")
    rng = np.random.default_rng([seed, _REAL])
    slots: list[Slot] = []
    for label, number in enumerate(wanted.tolist()):
        rows = rng.choice(np.flatnonzero(labels == label), number, replace=False)
        slots += [Slot("real", label, row) for row in rows.tolist()]
    slots += [Slot("generated", label, i) for i, label in enumerate(np.repeat(np.arange(len(wanted)), wanted).tolist())]
    order = np.random.default_rng([seed, _MIX]).permutation(count)
    return tuple(slots[i] for i in order)


def _apportion(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers with the sum `total`, as near to shares * total as they can be (Hamilton's method)."""
    exact = shares * total
    numbers = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - numbers), kind="stable")
    numbers[order[: total - int(numbers.sum())]] += 1
    return numbers


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
    """Draw the planned images, write the folder `out` and return its key. The folder appears whole or not at all.

    `size` is the side in pixels of the images that experts see. With `pages` > 1 there is a page for each expert,
    page-1.html and so on, each in an order of its own, so that the same images do not meet everyone tired. DataError
    if `out` exists, if the generator draws no colour, or if there are no classes to ask for.
    """
    bundle = synthesizer.bundle
    check_new(out)
    if bundle.generator.img_channels != 3:
        raise DataError(f"{bundle.location}: draws images without colour, which real ones have; a survey needs colour")
    if with_diagnosis and len(bundle.class_names) < 2:
        raise DataError(f"--with-diagnosis: {bundle.location} has no classes to choose from")
    if pages < 1 or size < 16:
        raise DataError(f"--experts must be at least 1 and --size at least 16; got {pages} and {size}")
    images = _draw(slots, dataset, synthesizer, seed, truncation_psi, size, progress)
    width = max(3, len(str(len(slots))))
    pngs = _equally_long([encode(pixels) for pixels in images])
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
    """DataError if there is something at `out` already: keys and answers are not to be written over."""
    if out.exists():
        raise DataError(f"{out}: exists already; choose another --out or remove it")


def read_key(path: Path) -> SurveyKey:
    """DataError naming the file if it is absent or no key."""
    try:
        return SurveyKey.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give the key.json of the survey's secret folder") from None
    except ValidationError as error:
        raise DataError(f"{path}: is no key of a survey: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, in one line: where, and what."""
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
    """The images uint8 [count, size, size, 3] in the order of the slots."""
    images = np.empty((len(slots), size, size, 3), dtype=np.uint8)
    batch = synthesizer.preferred_batch
    generated = [(place, slot) for place, slot in enumerate(slots) if slot.truth == "generated"]
    with tqdm(total=len(slots), desc="drawing", unit="img", disable=not progress) as bar:
        for place, slot in enumerate(slots):
            if slot.truth == "real":
                images[place] = _resized(dataset.images[slot.index], size)
                bar.update()
        for start in range(0, len(generated), batch):
            part = generated[start : start + batch]
            drawn = synthesizer.images(
                [seed] * len(part),
                [slot.index for _, slot in part],
                [slot.label for _, slot in part],
                truncation_psi=truncation_psi,
                noise_mode="random",
            )
            for (place, _), pixels in zip(part, drawn, strict=True):
                images[place] = _resized(pixels, size)
            bar.update(len(part))
    return images


def _resized(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if pixels.shape[0] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))


def _equally_long(pngs: Sequence[bytes]) -> list[bytes]:
    """Files of one length: each gets a private chunk of zeros before its last one, IEND, which viewers skip.

    Otherwise their sizes would tell how noisy the images are, and generators differ from cameras in that.
    """
    end, kind, longest = 12, b"paDd", max(map(len, pngs))
    padded = []
    for png in pngs:
        zeros = bytes(longest - len(png))
        chunk = struct.pack(">I", len(zeros)) + kind + zeros + struct.pack(">I", zlib.crc32(kind + zeros))
        padded.append(png[:-end] + chunk + png[-end:])
    return padded


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
    """Names the survey in pages, answers and key. Made of what the experts have anyway, so it tells them nothing."""
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
    """The page as it is handed out. It is made of names and images: of the key, only what every expert may know."""
    names = list(encoded)
    order = np.random.default_rng([key.seed, _ORDER, page]).permutation(len(names))
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
    # "<" would let a class name end the script element that holds the JSON.
    return template.replace("{{survey}}", json.dumps(survey).replace("<", "\\u003c"))
