"""Read an ISIC-layout folder (images + metadata.csv) into memory at one resolution.

The layout is that of the ISIC Archive's own download tool and of its challenges: a CSV with one row an image, and the
images beside it or in a sub-folder. Decoded images are cached, keyed by the content of every file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from dermis.errors import DataError

ID_COLUMNS = ("isic_id", "image_name", "image", "image_id")
CLASS_COLUMNS = ("target", "benign_malignant", "diagnosis_1", "class", "label")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


@dataclass(frozen=True)
class ImageDataset:
    """Decoded training images. images uint8 [N, R, R, 3]; labels int64 [N], indices into class_names."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    sha256: str  # of every (id, class, file content): the identity of the training set

    @property
    def resolution(self) -> int:
        return int(self.images.shape[1])


@dataclass(frozen=True)
class _Listing:
    ids: list[str]
    classes: list[str]
    paths: list[Path]


def load_isic(
    folder: Path,
    resolution: int,
    *,
    class_column: str | None = None,
    metadata: Path | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> ImageDataset:
    """Centre-crop every image to a square, resize it (Lanczos) and return all with their classes.

    `class_column` defaults to the first of CLASS_COLUMNS that the CSV has; 0/1 become benign/malignant. Raises
    DataError naming the file, column or rows at fault.
    """
    listing = _read_listing(folder, metadata or folder / "metadata.csv", class_column)
    class_names = tuple(sorted(set(listing.classes)))
    labels = np.array([class_names.index(name) for name in listing.classes], dtype=np.int64)
    digest = _content_digest(listing)
    images = _cached_images(listing.paths, resolution, cache, digest, progress)
    return ImageDataset(images, labels, class_names, tuple(listing.ids), digest)


def _read_listing(folder: Path, metadata: Path, class_column: str | None) -> _Listing:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --data takes a folder with images and metadata.csv")
    if not metadata.is_file():
        raise DataError(f"{metadata}: no such file; an ISIC folder has a CSV of its images, name it with --metadata")
    try:
        table = pd.read_csv(metadata, dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{metadata}: not a readable CSV ({error})") from error
    id_column = next((name for name in ID_COLUMNS if name in table.columns), None)
    if id_column is None:
        raise DataError(f"{metadata}: none of the columns {', '.join(ID_COLUMNS)} names the images")
    column = class_column or next((name for name in CLASS_COLUMNS if name in table.columns), None)
    if column is None or column not in table.columns:
        raise DataError(f"{metadata}: no class column; name one of {', '.join(table.columns)} with --class-column")
    ids = table[id_column].tolist()
    classes = table[column].tolist()
    unlabelled = [name for name, value in zip(ids, classes, strict=True) if value == ""]
    if unlabelled:
        raise DataError(f"{metadata}: {len(unlabelled)} rows have no {column}, the first is {unlabelled[0]}")
    if set(classes) <= {"0", "1", "0.0", "1.0"}:
        classes = ["malignant" if float(value) else "benign" for value in classes]
    if len(set(ids)) != len(ids):
        repeated = table[id_column][table[id_column].duplicated()].iloc[0]
        raise DataError(f"{metadata}: {repeated} stands in more than one row")
    files = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix in IMAGE_SUFFIXES}
    missing = [name for name in ids if name not in files]
    if missing:
        raise DataError(f"{folder}: {len(missing)} of {len(ids)} images are missing, the first is {missing[0]}")
    if not ids:
        raise DataError(f"{metadata}: no rows")
    order = np.argsort(ids, kind="stable")  # file order must not decide the training order
    return _Listing([ids[i] for i in order], [classes[i] for i in order], [files[ids[i]] for i in order])


def _content_digest(listing: _Listing) -> str:
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        contents = pool.map(lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), listing.paths)
        for name, cls, content in zip(listing.ids, listing.classes, contents, strict=True):
            digest.update(f"{name}\t{cls}\t{content}\n".encode())
    return digest.hexdigest()


def _cached_images(
    paths: Sequence[Path], resolution: int, cache: Path | None, digest: str, progress: bool
) -> NDArray[np.uint8]:
    if cache is None:
        return _decode_all(paths, resolution, progress)
    file = cache / f"{digest[:16]}-{resolution}.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, _decode_all(paths, resolution, progress))
        partial.replace(file)
    images: NDArray[np.uint8] = np.load(file, mmap_mode="r")
    return images


def _decode_all(paths: Sequence[Path], resolution: int, progress: bool) -> NDArray[np.uint8]:
    images = np.empty((len(paths), resolution, resolution, 3), dtype=np.uint8)
    broken: list[str] = []

    def decode(i: int) -> None:
        try:
            images[i] = _decode(paths[i], resolution)
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            broken.append(f"{paths[i].name} ({error})")

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(decode, range(len(paths))), "decoding", len(paths), disable=not progress, unit="img"):
            pass
    if broken:
        raise DataError(
            f"{len(broken)} images cannot be decoded, the first is {sorted(broken)[0]}; remove or mend them"
        )
    return images


def _decode(path: Path, resolution: int) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    square = rgb.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(square, dtype=np.uint8)
