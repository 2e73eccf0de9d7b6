"""Continue and repair datasets of `dermis generate`: what a folder contains, and whether it is of the same options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from commands.console import option_of
from dermis.dataset.store import PARTIAL
from dermis.errors import OtherDatasetError, StorageError, escape

if TYPE_CHECKING:
    from dermis.dataset.manifest import Manifest
    from dermis.dataset.plan import DatasetPlan
    from dermis.dataset.request import DatasetRequest
    from dermis.dataset.store import Store

_PLAN_FILE = f"{PARTIAL}/plan.json"
# Entries of a process that was killed before it could write _PLAN_FILE, or of one that starts at the same time.
_STARTED = (f"{PARTIAL}/", f"{PARTIAL}/writing-")


def existing_manifest(store: Store, planned: DatasetPlan) -> Manifest | None:
    """Return the manifest if this dataset is finished here; None if it is unfinished or the folder is empty.

    Raises:
        OtherDatasetError: The folder has another dataset or other files.
    """
    from dermis.dataset.manifest import read_manifest
    from dermis.dataset.store import MANIFEST

    # Listed first: other processes that work on this dataset write the mark before they add anything else.
    entries = store.entries()
    started = store.size(_PLAN_FILE) is not None
    if started and (mark := _read_mark(store.read(_PLAN_FILE))).get("plan") != planned.digest:
        differing = _differing_options(planned, _started_request(mark, planned), mark.get("bundle"))
        known = f"; it was started {differing}: use these to continue it," if differing else ";"
        advice = f"{known} {'or ' if differing else ''}choose another --out or remove it"
        raise OtherDatasetError(f"{store.location}: contains an unfinished dataset with other options{advice}")
    if store.size(MANIFEST) is not None:
        manifest = read_manifest(store)
        if manifest.plan_digest == planned.digest:
            return manifest
        differing = _differing_options(planned, manifest.request, manifest.bundle_digest)
        known = f", made {differing}" if differing else ""
        raise OtherDatasetError(f"{store.location}: contains another dataset{known}; choose another --out or remove it")
    if not started and any(name != _STARTED[0] and not name.startswith(_STARTED[1]) for name in entries):
        raise OtherDatasetError(f"{store.location}: is not empty and has no dataset; choose another --out")
    return None


def in_format_there(store: Store, planned: DatasetPlan, former: Manifest | None) -> DatasetPlan:
    """Return the plan in the format that the dataset has in this folder, or else in that of a manifest to repeat.

    A dataset that a former version began or finished is continued or repaired in its format, so that no finished shard is lost.

    Args:
        store: The folder, for which `existing_manifest` has raised no error.
        planned: The plan, in the newest format.
        former: The manifest of the dataset to repeat, if there is one.

    Raises:
        OtherDatasetError: The folder has the dataset in another format than the manifest, or in that of a newer version.
    """
    from dermis.dataset.manifest import read_manifest
    from dermis.dataset.store import MANIFEST

    there: Any = None
    if store.size(_PLAN_FILE) is not None:
        there = _read_mark(store.read(_PLAN_FILE)).get("format_version", 1)
    elif store.size(MANIFEST) is not None:
        there = read_manifest(store).format_version
    if there not in (None, *range(1, planned.format_version + 1)):
        raise OtherDatasetError(
            f"{store.location}: was begun by a newer version of dermis; continue it with that one, or choose another --out"
        )
    if former is not None and there not in (None, former.format_version):
        raise OtherDatasetError(
            f"{store.location}: contains this dataset in format {there}, --manifest has format {former.format_version}; choose "
            "another --out"
        )
    format_version = there or (planned.format_version if former is None else former.format_version)
    if format_version < planned.format_version:
        typer.echo(
            f"note: format {format_version}, as it was begun: its images have no metadata that says that they are synthetic",
            err=True,
        )
    return replace(planned, format_version=format_version)


def is_complete(manifest: Manifest, store: Store, identity: Mapping[str, str]) -> bool:
    """Check a finished dataset against its manifest.

    Raises:
        StorageError: It was made by another synthesizer.
    """
    from dermis.dataset.verify import verify as verify_dataset

    if differing := differences(manifest.synthesizer, identity):
        raise StorageError(
            f"{store.location}: is finished, made by another synthesizer: {differing}; choose another --out or remove it"
        )
    report, listed = verify_dataset(store.location), {file.name for file in manifest.files}
    damaged = sorted(listed.intersection(report.changed + report.missing))
    if damaged:
        typer.echo(f"{store.location}: finished, but changed or missing: {', '.join(damaged)}", err=True)
        return False
    store.remove(PARTIAL)  # it remains if the run was killed right after it wrote the manifest
    return True


def begin(store: Store, planned: DatasetPlan, reopen: bool) -> None:
    """Mark the folder as an unfinished dataset; remove the manifest of a finished one, as its files will change."""
    from dermis.dataset.store import MANIFEST

    if store.size(_PLAN_FILE) is None:
        store.write(_PLAN_FILE, _mark(planned))
    if reopen:
        store.remove(MANIFEST)


def _mark(planned: DatasetPlan) -> bytes:
    content = {
        "plan": planned.digest,
        "bundle": planned.bundle_digest,
        "request": planned.request.model_dump(),
        "format_version": planned.format_version,
    }
    return json.dumps(content).encode()


def _read_mark(content: bytes) -> dict[str, Any]:
    """Parse a mark of `_mark`; empty if it is damaged."""
    try:
        mark = json.loads(content)
    except ValueError:
        return {}
    return mark if isinstance(mark, dict) else {}


def _started_request(mark: Mapping[str, Any], planned: DatasetPlan) -> DatasetRequest | None:
    """Return the request that a dataset was started with, None if it is not known.

    Marks of earlier versions have only the digest of the plan. Each noise mode is tried for them, as the default changed.
    """
    from typing import get_args

    from pydantic import ValidationError

    from dermis.dataset.request import DatasetRequest
    from dermis.network_config import NoiseMode

    if "request" in mark:
        try:
            return DatasetRequest.model_validate(mark["request"])
        except ValidationError:
            return None
    requests = [planned.request.model_copy(update={"noise_mode": mode}) for mode in get_args(NoiseMode)]
    return next((each for each in requests if replace(planned, request=each).digest == mark.get("plan")), None)


def _differing_options(planned: DatasetPlan, former: DatasetRequest | None, bundle_digest: str | None) -> str:
    """Describe the options of a former request that differ from the present ones; empty if they are not known.

    Args:
        bundle_digest: Digest of the former bundle; None if it is the same.
    """
    if former is None:
        return ""
    before, now = _option_texts(former), _option_texts(planned.request)
    added = [text for name, text in before.items() if now.get(name) != text]
    if bundle_digest not in (None, planned.bundle_digest):
        added.insert(0, f"--bundle of digest {escape(str(bundle_digest)[:12])}")
    left_out = [name for name in now if name not in before]
    parts = [f"{word} {', '.join(names)}" for word, names in (("with", added), ("without", left_out)) if names]
    return " and ".join(parts)


def _option_texts(request: DatasetRequest) -> dict[str, str]:
    """Return the command-line options of a request, by name. Unused options are left out."""
    parts = {"model", "classes", "edits", "classifier", "privacy", "provenance"}
    values = request.model_dump(exclude=parts, exclude_none=True)
    for name, part in (
        ("classifier", request.classifier and request.classifier.model_dump(exclude_defaults=True)),
        ("privacy", request.privacy and request.privacy.model_dump()),
    ):
        values |= {f"{name}.{field}": value for field, value in (part or {}).items()}
    texts = {option_of(field): f"{option_of(field)} {value}" for field, value in values.items()}
    for option in ("score", "detect-copies"):
        if texts.pop(f"--{option}", None):  # only where it differs from the default
            texts[f"--no-{option}"] = f"--no-{option}"
    if request.signed:
        texts["--c2pa"] = "--c2pa"
    texts["--classes"] = "--classes " + ",".join(f"{name}={count}" for name, count in request.classes.items())
    edits = [
        f"--edit {edit.direction}={edit.strength}" + ("" if edit.layers is None else "@{}-{}".format(*edit.layers))
        for edit in request.edits or ()
    ]
    return texts | ({"--edit": " ".join(edits)} if edits else {})


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Describe how the synthesizer of a manifest differs from the present one; empty if it does not."""
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    return "; ".join(f"{key} is {there.get(key, '-')} there, {here.get(key, '-')} here" for key in keys)
