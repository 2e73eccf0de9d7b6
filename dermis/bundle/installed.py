"""Bundles that are found by name: those of a checkout, and those that installed distributions bring.

A distribution announces its bundles as entry points of the group `dermis.bundles`: the name of the entry point is that of
the bundle, its value the package (a folder with `bundle.json`). Nothing of the package is imported.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

GROUP = "dermis.bundles"
DESCRIPTOR = "bundle.json"

_CHECKOUT = Path(__file__).resolve().parents[2] / "bundles"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def installed_bundles() -> dict[str, Path]:
    """Return the folders of the bundles that can be opened by name.

    A bundle in the checkout takes precedence over an installed one with the same name.
    """
    bundles: dict[str, Path] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        folder = _package_folder(entry)
        if folder is not None:
            bundles[entry.name] = folder
    bundles |= {file.parent.name: file.parent for file in sorted(_CHECKOUT.glob(f"*/{DESCRIPTOR}"))}
    return dict(sorted(bundles.items()))


def resolve_bundle(location: str | Path) -> str | Path:
    """Return the folder of the installed bundle with the name `location`. Every other location is returned unchanged.

    A folder or file of this name in the working directory takes precedence.
    """
    name = str(location)
    if not _NAME.fullmatch(name) or Path(name).exists():
        return location
    return installed_bundles().get(name, location)


def how_to_get_bundles() -> str:
    """Return a sentence for error messages that says how to get a bundle."""
    known = ", ".join(installed_bundles())
    if known:
        return f"name a folder that holds a bundle, or one of the installed bundles: {known}"
    return (
        "name a folder that holds a bundle. The demo bundle is the folder bundles/demo of the dermis repository; `make wheels` "
        "also builds it as the wheel dermis_demo_bundle"
    )


def _package_folder(entry: importlib.metadata.EntryPoint) -> Path | None:
    """Return the folder of the package that an entry point names; None if it holds no bundle."""
    if entry.dist is None:
        return None
    descriptor = Path(str(entry.dist.locate_file(Path(*entry.value.split(".")) / DESCRIPTOR)))
    return descriptor.parent if descriptor.is_file() else None
