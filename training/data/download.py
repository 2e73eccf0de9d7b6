"""Download collections of the ISIC Archive with the Archive's own tool, isic-cli, and check that they arrived whole.

isic-cli skips the images that are there already, so a run that was stopped goes on; but it passes over images that
fail, which is why every row of its metadata.csv is looked for afterwards.
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
_SPARE = 0.02  # of free space, for metadata and the file system's own


@dataclass(frozen=True)
class Collection:
    """What to ask the Archive for. collection_id as `isic collection list` shows it; search in the Archive's syntax."""

    name: str
    collection_id: int
    search: str = ""


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
class Offer:
    """How much the Archive has of a collection."""

    images: int
    bytes: int


def find_collection(name: str) -> Collection:
    """One of COLLECTIONS by its name, or any by its number. DataError otherwise."""
    if name in COLLECTIONS:
        return COLLECTIONS[name]
    if name.isascii() and name.isdigit():
        return Collection(f"collection-{int(name)}", int(name))
    raise DataError(f"--collection: {name!r} is neither a number nor one of {', '.join(COLLECTIONS)}")


def download(collections: Sequence[Collection], out: Path) -> dict[str, int]:
    """Download each collection into OUT/<name>: images, metadata.csv, attribution.txt, licenses/. Images of each.

    The Archive's tool shows its own progress bar. A collection that is there whole is left alone. Raises DataError if
    the tool or the network is missing, the disk is too small, the tool fails or images did not arrive.
    """
    # Beside our own Python, where it was installed, even if that environment is not activated.
    program = shutil.which("isic") or shutil.which("isic", path=str(Path(sys.executable).parent))
    if program is None:
        raise DataError(f"the program `isic` is not installed; install it with: {install_command('data')}")
    offers = {collection: ask_archive(collection) for collection in collections}
    missing = {each: offer for each, offer in offers.items() if count_whole(out / each.name) != offer.images}
    _check_space(out, missing)
    for collection in missing:
        _run(program, collection, out / collection.name)
        there, offer = count_whole(out / collection.name), offers[collection]
        if there != offer.images:
            raise DataError(
                f"{out / collection.name}: {offer.images - (there or 0):,} of {offer.images:,} images did not arrive; "
                "run the same command again"
            )
    return {collection.name: offer.images for collection, offer in offers.items()}


def ask_archive(collection: Collection) -> Offer:
    """Count and size of a collection, from the Archive's public API. DataError if it cannot be reached."""
    query = {"query": collection.search, "collections": str(collection.collection_id)}
    try:
        with httpx.Client(base_url=API, timeout=30, follow_redirects=True) as client:
            count = client.get("/images/search/", params=query | {"limit": "1"}).raise_for_status().json()["count"]
            size = client.get("/images/search/size/", params=query).raise_for_status().json()["size"]
    except httpx.HTTPStatusError as error:
        raise DataError(f"{collection.name}: the ISIC Archive refuses ({error.response.status_code})") from error
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise DataError(f"the ISIC Archive cannot be reached ({error}); is there a network?") from error
    return Offer(int(count), int(size))


def count_whole(folder: Path) -> int | None:
    """Images of a downloaded folder, if every row of its metadata.csv has one; fewer if not; None without the table."""
    try:
        with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
            ids = [row["isic_id"] for row in csv.DictReader(file)]
        there = {path.stem for path in folder.iterdir() if path.suffix != ".csv" and path.stat().st_size > 0}
    except (OSError, KeyError):
        return None
    return sum(name in there for name in ids)


def _check_space(out: Path, missing: Mapping[Collection, Offer]) -> None:
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = 0
    for collection, offer in missing.items():
        there = out / collection.name
        arrived = sum(path.stat().st_size for path in there.iterdir()) if there.is_dir() else 0
        needed += max(0, offer.bytes - arrived)
    if needed > free * (1 - _SPARE):
        raise DataError(f"{out}: {needed / 1e9:.1f} GB are to come, but only {free / 1e9:.1f} GB are free")


def _run(program: str, collection: Collection, folder: Path) -> None:
    command = [program, "image", "download", "--collections", str(collection.collection_id)]
    if collection.search:
        command += ["--search", collection.search]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # No input: the tool must not wait for answers, nor send its bug reports.
    status = subprocess.run([*command, str(folder)], stdin=subprocess.DEVNULL, check=False).returncode
    if status:
        raise DataError(
            f"{folder}: `isic image download` failed with status {status}, its message is above; "
            "run the same command again to go on"
        )
