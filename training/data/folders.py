"""Decide whether folders are classes, or look like parts of a data set, patients, containers or masks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from dermis.errors import DataError, escape
from training.data.files import Listing, without_suffix
from training.data.tables import read_grid

_MASK = re.compile(r"(.+?)[ _-](?:segmentation|seg|masks?|superpixels|lesion|roi\d*|attribute_\w+)", re.IGNORECASE)
_PARTS = frozenset(
    {"train", "training", "val", "valid", "validation", "test", "testing", "holdout", "held-out", "held_out", "heldout"}
)
# Names of folders with images of all classes in published data sets.
CONTAINERS = re.compile(
    r"(.*[_ -])?(images?|imgs?|input|jpe?gs?|pngs?|photos?|data)([_ -]?(part|resized)?[_ -]?\d*)?", re.IGNORECASE
)


def wrapper(listing: Listing) -> str:
    """The folder that contains the class folders: "data/" if all images are in data/benign and data/malignant."""
    prefix = ""
    while True:
        inside = [name.removeprefix(prefix) for name in listing.images]
        tops = {name.partition("/")[0] for name in inside}
        if len(tops) != 1 or any(name.count("/") < 2 for name in inside):
            return prefix
        prefix += f"{tops.pop()}/"


def check_class_folders(path: Path, listing: Listing, below: Mapping[str, set[str]], prefix: str) -> None:
    """Check that folders are not likely to be something else than classes.

    Args:
        path: The source, for messages.
        listing: Its files.
        below: Folders that can be classes, each with the names of the folders inside that have images ("" for none).
        prefix: Folder that contains them.

    Raises:
        DataError: The folders may be something else.
    """
    tables = unused_tables(listing)
    unused = f" ({'; '.join(tables)})" if tables else ""
    choice = "--layout imagefolder uses the folders as classes"
    nested = next((name for name in sorted(listing.ignored) if name.endswith("/dataset.json")), None)
    if nested is not None:
        raise DataError(
            f"{path}: contains a StyleGAN data set in a folder, {escape(nested)}; give that folder, or a zip of its content "
            f"({choice})"
        )
    if all(re.fullmatch(r"\d{5}", name) for name in below):
        raise DataError(
            f"{path}: the folders {escape(', '.join(sorted(below)[:3]))}, ... are numbered like those of a StyleGAN data set, "
            f"but there is no dataset.json; --layout stylegan reads it without classes ({choice})"
        )
    if masks := _masks(listing):
        mask, image = masks[0]
        raise DataError(
            f"{path}: {len(masks):,} images look like masks of others, the first, {escape(mask)}, of {escape(image)}; "
            f"move the masks elsewhere ({choice})"
        )
    names = escape(", ".join(sorted(below)), 1000)
    if len(below) < 2:
        raise DataError(
            f"{path}: only one folder has images, {prefix}{names}, and no table names them{unused}; add metadata.csv, name "
            f"a table with --metadata, or make a sub-folder for each class ({choice})"
        )
    inner = [folders - {""} for folders in below.values()]
    shared = set.intersection(*inner)
    parts = sorted(name for name in below if is_part(name))
    if parts and (len(parts) > 1 or shared):
        content = f", each with {', '.join(sorted(shared))}," if shared else ""
        raise DataError(
            f"{path}: {prefix}{names} look like parts of a data set{content} and not like classes; give one of them, as in "
            f"{path / prefix / parts[0]} ({choice})"
        )
    if len(shared) > 1 and all("" not in folders for folders in below.values()):
        raise DataError(
            f"{path}: the classes may be {names}, or the folders {', '.join(sorted(shared))} in each of them; give one of "
            f"the folders, or rearrange them ({choice})"
        )
    if all(CONTAINERS.fullmatch(name) for name in below):
        raise DataError(
            f"{path}: {names} are not names of classes, and no table names their images{unused}; name a table with "
            f"--metadata ({choice})"
        )
    if _one_form(below) or all(folder and folder.startswith(top) for top, all_in in below.items() for folder in all_in):
        raise DataError(
            f"{path}: {names} look like a folder for each patient, image or part, and not like classes{unused}; "
            f"name a table with --metadata ({choice})"
        )


def is_part(folder: str) -> bool:
    """Whether a folder has the name of a part of a data set: train, test_resized, Validation 2."""
    return folder.casefold() in _PARTS or not _PARTS.isdisjoint(re.split(r"[\W\d_]+", folder.casefold()))


def _one_form(folders: Iterable[str]) -> bool:
    """Whether folders differ in a number only, as patient_1 and patient_2, unless the name says that it is a class."""
    forms = {re.sub(r"\d+", "0", name) for name in folders}
    form = next(iter(forms)).casefold()
    named = re.search(r"class|label|categor|type|grade|stage|level|group|cluster", form)
    return len(forms) == 1 and "0" in form and re.search(r"[^\W\d_]", form) is not None and not named


def _masks(listing: Listing) -> list[tuple[str, str]]:
    """Images with names of masks, each with the image that it is a mask of."""
    by_name = {without_suffix(name): name for name in sorted(listing.images)}
    matches = ((name, _MASK.fullmatch(without_suffix(name))) for name in sorted(listing.images))
    return [(name, by_name[match[1]]) for name, match in matches if match and match[1] in by_name]


def why_no_class_folders(path: Path, listing: Listing, outside: Sequence[str]) -> str:
    """Message for a source without class folders. `outside` are images that are not in a sub-folder."""
    if not listing.images:
        unreadable = next(iter(listing.unreadable.items()), None)
        reason = (
            f"; {len(listing.unreadable):,} files cannot be read, the first, {unreadable[0]}, is {unreadable[1]}"
            if unreadable
            else ""
        )
        return f"{path}: there are no images in it{reason}"
    folders = {name for name in listing.images if "/" in name}
    tables = "; ".join(unused_tables(listing))
    if folders:
        return (
            f"{path}: read as one sub-folder for each class, but {len(outside)} images are outside of them, the first is "
            f"{outside[0]}" + (f" ({tables})" if tables else "")
        )
    return (
        f"{path / 'metadata.csv'}: no such file, and no other table names the {len(outside):,} images and their classes"
        + (f" ({tables})" if tables else "")
        + "; name a table with --metadata, or give a folder with one sub-folder for each class, or a StyleGAN zip"
    )


def unused_tables(listing: Listing) -> list[str]:
    """Notes on tables that were not read, with their columns."""
    others = (".xlsx", ".xls", ".ods", ".jsonl")
    notes = [f"{escape(name)} is not read; save it as CSV" for name in listing.other_files if name.endswith(others)]
    for name, file in listing.tables.items():
        try:
            header = read_grid(file, max_rows=1).header
        except DataError:
            continue
        if len(header) > 1 and PurePosixPath(name).suffix:
            notes.append(
                f"{escape(name)} is not used; its columns are {escape(', '.join(header[:8]))}"
                + (", ..." if len(header) > 8 else "")
            )
    return notes


def folders_of(names: Iterable[str], prefix: str) -> set[str]:
    """Names of the folders directly below `prefix` that contain these files."""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return {name.partition("/")[0] for name in inside if "/" in name}
