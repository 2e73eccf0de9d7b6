"""Download collections of the ISIC Archive with its own tool, isic-cli, and check that they are complete.

isic-cli skips images that exist already, so an interrupted run continues. It also skips images that fail: therefore every row
of its metadata.csv is checked afterwards.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from dermis.errors import DataError, install_command

API = "https://api.isic-archive.com/api/v2"
_RESERVED_SHARE = 0.02  # share of the free space that is left for metadata and the file system


@dataclass(frozen=True)
class Collection:
    """A part of the Archive."""

    name: str
    collection_id: int  # id that `isic collection list` shows
    search: str = ""  # query in the syntax of the Archive; "" for the whole collection


# "Challenge 2020: Training" and the melanomas of "Challenge 2019: Training": 33,126 + 4,522 images in the paper.
COLLECTIONS: Mapping[str, Collection] = {
    "isic-2020": Collection("isic-2020", 70),
    "isic-2019-melanoma": Collection(
        "isic-2019-melanoma", 65, 'diagnosis_2:"Malignant melanocytic proliferations (Melanoma)"'
    ),
    "isic-2019": Collection("isic-2019", 65),
    "ham10000": Collection("ham10000", 212),
}
PAPER = ("isic-2020", "isic-2019-melanoma")


@dataclass(frozen=True)
class CollectionSize:
    """Size of a collection in the Archive."""

    images: int
    bytes: int


def find_collection(name: str) -> Collection:
    """Get one of COLLECTIONS by its name, or any collection by its number.

    Raises:
        DataError: The name is not known.
    """
    if name in COLLECTIONS:
        return COLLECTIONS[name]
    if name.isascii() and name.isdigit():
        return Collection(f"collection-{int(name)}", int(name))
    raise DataError(f"--collection: {name!r} is neither a number nor one of {', '.join(COLLECTIONS)}")


def download(collections: Sequence[Collection], out: Path) -> dict[str, int]:
    """Download each collection into `out`/NAME: images, metadata.csv, attribution.txt, licenses/.

    The tool shows its own progress bar. Complete collections are not downloaded again.

    Returns:
        Number of images of each collection.

    Raises:
        DataError: The tool or the network is missing, the disk is too small, the tool fails, or images are missing afterwards.
    """
    # The folder of our own Python is searched too: its environment is not necessarily activated.
    program = shutil.which("isic") or shutil.which("isic", path=str(Path(sys.executable).parent))
    if program is None:
        raise DataError(f"the program `isic` is not installed; install it with: {install_command('data')}")
    sizes = {collection: fetch_collection_size(collection) for collection in collections}
    missing = {each: size for each, size in sizes.items() if count_complete(out / each.name) != size.images}
    _check_space(out, missing)
    for collection in missing:
        _run(program, collection, out / collection.name)
        present, size = count_complete(out / collection.name), sizes[collection]
        if present != size.images:
            raise DataError(
                f"{out / collection.name}: {size.images - (present or 0):,} of {size.images:,} images are missing; "
                "run the same command again"
            )
    return {collection.name: size.images for collection, size in sizes.items()}


def fetch_collection_size(collection: Collection) -> CollectionSize:
    """Get the number of images and the size of a collection from the public API of the Archive.

    Raises:
        DataError: The Archive cannot be reached or refuses.
    """
    query = {"query": collection.search, "collections": str(collection.collection_id)}
    try:
        with httpx.Client(base_url=API, timeout=30, follow_redirects=True) as client:
            count = client.get("/images/search/", params=query | {"limit": "1"}).raise_for_status().json()["count"]
            size = client.get("/images/search/size/", params=query).raise_for_status().json()["size"]
    except httpx.HTTPStatusError as error:
        raise DataError(f"{collection.name}: the ISIC Archive refuses ({error.response.status_code})") from error
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise DataError(f"the ISIC Archive cannot be reached ({error}); is there a network?") from error
    return CollectionSize(int(count), int(size))


def count_complete(folder: Path) -> int | None:
    """Number of rows of metadata.csv in a downloaded folder that have an image; None without the table."""
    try:
        with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
            ids = [row["isic_id"] for row in csv.DictReader(file)]
        present = {path.stem for path in folder.iterdir() if path.suffix != ".csv" and path.stat().st_size > 0}
    except (OSError, KeyError):
        return None
    return sum(name in present for name in ids)


def _check_space(out: Path, missing: Mapping[Collection, CollectionSize]) -> None:
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = 0
    for collection, size in missing.items():
        target = out / collection.name
        present_bytes = sum(path.stat().st_size for path in target.iterdir()) if target.is_dir() else 0
        needed += max(0, size.bytes - present_bytes)
    if needed > free * (1 - _RESERVED_SHARE):
        raise DataError(f"{out}: {needed / 1e9:.1f} GB are needed, but only {free / 1e9:.1f} GB are free")


def _run(program: str, collection: Collection, folder: Path) -> None:
    command = [program, "image", "download", "--collections", str(collection.collection_id)]
    if collection.search:
        command += ["--search", collection.search]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # No input, so that the tool neither waits for answers nor offers to send bug reports.
    status = subprocess.run([*command, str(folder)], stdin=subprocess.DEVNULL, check=False).returncode
    if status:
        raise DataError(
            f"{folder}: `isic image download` failed with status {status}, its message is above; "
            "run the same command again to continue"
        )
