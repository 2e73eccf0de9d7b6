"""A downloaded dataset as a dataset of PyTorch or of Hugging Face. Both libraries are optional."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dermis_client._files import is_safe_name
from dermis_client._untrusted import MAX_LIST_BYTES, load_json, one_line
from dermis_client.errors import DermisError, IntegrityError, InvalidRequestError
from dermis_client.folders import ARCHIVE, MANIFEST

if TYPE_CHECKING:
    from dermis_client.torch import SyntheticDataset

FOR_TORCH = "imagefolder"


def require_torch() -> None:
    """Raise DermisError if PyTorch is not installed, before anything is downloaded."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise DermisError(f'to_torch needs PyTorch ({error}): pip install "dermis-client[torch]"') from error


def require_datasets() -> None:
    """Raise DermisError if the library datasets is not installed, before anything is downloaded."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise DermisError(f'to_hf needs the library datasets ({error}): pip install "dermis-client[hf]"') from error


def default_folder(dataset_id: str) -> Path:
    """Return the folder of a dataset for which none is given: its id, in the working directory.

    Raises:
        InvalidRequestError: The id cannot be the name of a folder.
    """
    if not is_safe_name(dataset_id):
        raise InvalidRequestError(f"folder: must be given, as {one_line(repr(dataset_id), 80)} is no name of a folder")
    return Path(dataset_id)


def check_format(data_format: str | None) -> None:
    """Raise InvalidRequestError if `to_torch` cannot read this format of datasets."""
    if data_format is not None and data_format != FOR_TORCH:
        raise InvalidRequestError(
            f"to_torch reads the format {FOR_TORCH}, and this dataset has the format {one_line(data_format, 40)}: use to_hf"
        )


def torch_dataset(folder: Path, options: dict[str, Any]) -> SyntheticDataset:
    """Open a downloaded dataset with the options of SyntheticDataset."""
    require_torch()
    from dermis_client.torch import SyntheticDataset

    if not (folder / ARCHIVE).exists() and (folder / MANIFEST).exists():
        check_format(_format_of(folder))
    return SyntheticDataset(folder, **options)


def hf_dataset(folder: Path, options: dict[str, Any]) -> Any:
    """Load a downloaded dataset with `datasets.load_dataset`. Nothing is fetched."""
    require_datasets()
    from datasets import load_dataset

    if not (folder / MANIFEST).is_file():
        raise IntegrityError(f"{folder} has no {MANIFEST}: is it the folder of a dataset?", name=MANIFEST)
    try:
        return load_dataset(str(folder.absolute()), **{"split": "train", **options})
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(
            f"{folder} cannot be loaded by the library datasets ({one_line(str(error), 200)})", name=MANIFEST
        ) from error


def _format_of(folder: Path) -> str | None:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            return None
        value = load_json(path.read_bytes())
    except (OSError, ValueError, json.JSONDecodeError):
        return None
    request = value.get("request") if isinstance(value, dict) else None
    found = request.get("format") if isinstance(request, dict) else None
    return found if isinstance(found, str) else None
