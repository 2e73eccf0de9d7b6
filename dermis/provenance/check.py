"""Verify the provenance of many images: a file, a folder, or a dataset in any of its formats."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from dermis.dataset.containers import read_container
from dermis.dataset.manifest import PREVIEW, SINGLE_FILES, read_manifest
from dermis.dataset.plan import plan
from dermis.dataset.store import MANIFEST, Store
from dermis.dataset.verify import ZIP_ERRORS, content_of, members_of
from dermis.errors import DataError, StorageError, escape
from dermis.files import NotRegularError, names_below, open_regular

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MAX_BYTES = 256 << 20


def images_at(location: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every image at a place: one file, the files of a folder, or those of a dataset or images.zip.

    Raises:
        StorageError: The place or a file cannot be read.
        DataError: It has no image.
    """
    found = False
    for name, data in _images(location):
        found = True
        yield name, data
    if not found:
        raise DataError(f"{location}: has no PNG, JPEG or WebP file")


def _images(location: str) -> Iterator[tuple[str, bytes]]:
    path = Path(location)
    if "://" not in location and path.is_file():
        if zipfile.is_zipfile(path):
            yield from _of_zip(path)
        else:
            yield path.name, _read(path.parent, path.name)
        return
    store = Store(location)
    if store.size(MANIFEST) is not None:
        yield from _of_dataset(store)
        return
    if "://" in location or not path.is_dir():
        raise StorageError(f"{location}: is no file, folder or dataset")
    for name in sorted(names_below(path)):
        if name.lower().endswith(_SUFFIXES):
            yield name, _read(path, name)


def _read(root: Path, name: str) -> bytes:
    try:
        with open_regular(root, name) as file:
            data = file.read(_MAX_BYTES + 1)
    except NotRegularError:
        raise StorageError(f"{root}/{escape(name)}: is not a regular file") from None
    except OSError as error:
        raise StorageError(f"{root}/{escape(name)}: cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise StorageError(f"{root}/{escape(name)}: is larger than {_MAX_BYTES >> 20} MiB")
    return data


def _of_zip(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for name, member in members_of(archive).items():
                if name.lower().endswith(_SUFFIXES):
                    if member.file_size > min(_MAX_BYTES, 10 * path.stat().st_size):
                        raise ValueError(f"{name} would unpack to {member.file_size:,} bytes")
                    yield name, content_of(archive, member)
    except (*ZIP_ERRORS, OSError) as error:
        raise StorageError(f"{path}: cannot be read as a zip file ({escape(error)})") from None


def _of_dataset(store: Store) -> Iterator[tuple[str, bytes]]:
    manifest = read_manifest(store)
    layout = plan(manifest.request, manifest.bundle_digest, manifest.class_names)
    containers = {file.name for file in manifest.files} - set(SINGLE_FILES)
    if store.size(PREVIEW) is not None:
        yield PREVIEW, store.read(PREVIEW, limit=_MAX_BYTES)
    if store.folder is not None:  # unpacked images, and any other image that the manifest does not list
        for name in sorted(names_below(store.folder)):
            if name not in containers and name != PREVIEW and name.lower().endswith(_SUFFIXES):
                yield name, _read(store.folder, name)
    for file in manifest.files:
        if file.name not in containers:
            continue
        with store.open(file.name) as container:
            images = read_container(layout, container)
            while True:
                try:
                    image = next(images, None)
                except Exception as error:  # zipfile, tarfile and Arrow have different exceptions
                    raise StorageError(f"{store.where(file.name)}: cannot be read ({escape(error)})") from None
                if image is None:
                    break
                yield image
