"""Bundles: what training hands to serving, one folder that is verified as a whole.

    bundle.json               format, name, network configs, class names, provenance, SHA-256 and size of every file
    generator.safetensors     weights under the official StyleGAN2-ADA key names, stored as float32 or float16
    discriminator.safetensors optional, for transfer learning
    metrics.json              what was measured, empty if nothing was
    MODEL_CARD.md             and the pictures that it shows

The SHA-256 of bundle.json is the identity of the whole: it covers every other file through the hashes it holds.
Nothing in a bundle is ever unpickled or executed. `docs/bundles.md` documents the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermis.errors import BundleError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dermis.networks import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig

BUNDLE_FORMAT = 1
DESCRIPTOR = "bundle.json"
GENERATOR = "generator.safetensors"
DISCRIMINATOR = "discriminator.safetensors"
METRICS = "metrics.json"
CARD = "MODEL_CARD.md"

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
CLASS_PATTERN = r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}"  # class names become folder names of generated datasets
_PATH_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_MAX_DESCRIPTOR_BYTES = 4 << 20
WeightsDtype = Literal["fp32", "fp16"]
Network = TypeVar("Network", bound="nn.Module")


@dataclass(frozen=True)
class FileRecord:
    """SHA-256 (hex) and size of one file of a bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: what bundle.json and the card say. `load_generator` reads the weights."""

    location: str
    name: str
    digest: str
    """SHA-256 (hex) of bundle.json: the identity of the whole bundle."""
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig | None
    class_names: tuple[str, ...]
    """Names of the labels 0 ... c_dim - 1; empty for an unconditional generator."""
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Any]
    model_card: str
    files: Mapping[str, FileRecord]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class _Descriptor(BaseModel):
    """bundle.json."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format_version: int
    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    generator: dict[str, Any]
    discriminator: dict[str, Any] | None = None
    class_names: list[str]
    provenance: dict[str, Any]
    files: dict[str, _File]


def open_bundle(location: str | Path) -> Bundle:
    """Read a bundle from a folder or an fsspec URL and verify every file of it.

    Raises `BundleError` if bundle.json is absent, malformed or newer than this code, if a file is missing, changed or
    not listed, or if the configuration contradicts itself.
    """
    where = str(location).rstrip("/")
    fs, root = _filesystem(where)
    text = _read(fs, root, where, DESCRIPTOR, limit=_MAX_DESCRIPTOR_BYTES)
    descriptor = _parse(text, where)
    generator, discriminator = _configs(descriptor, where)
    _check_class_names(descriptor.class_names, generator.c_dim, f"{where}/{DESCRIPTOR}")
    for name in (GENERATOR, METRICS, CARD) + ((DISCRIMINATOR,) if discriminator else ()):
        if name not in descriptor.files:
            raise BundleError(f"{where}/{DESCRIPTOR}: files does not list {name}; get the bundle again")
    _check_listing(fs, root, where, descriptor)
    files = {name: FileRecord(record.sha256, record.bytes) for name, record in sorted(descriptor.files.items())}
    small: dict[str, bytes] = {}
    for name, record in files.items():
        data = _read_verified(fs, root, where, name, record)
        if name in (METRICS, CARD):
            small[name] = data
    try:
        metrics, card = json.loads(small[METRICS]), small[CARD].decode()
    except ValueError as error:
        raise BundleError(f"{where}: {METRICS} is not JSON or {CARD} not UTF-8 ({error})") from None
    if not isinstance(metrics, dict):
        raise BundleError(f"{where}/{METRICS}: must hold a JSON object")
    return Bundle(
        location=where,
        name=descriptor.name,
        digest=hashlib.sha256(text).hexdigest(),
        generator=generator,
        discriminator=discriminator,
        class_names=tuple(descriptor.class_names),
        provenance=descriptor.provenance,
        metrics=metrics,
        model_card=card,
        files=files,
    )


def load_generator(bundle: Bundle) -> Generator:
    """The generator in float32, in eval mode, without gradients. The very bytes that are loaded are hashed first."""
    from dermis.networks import Generator

    return _load(bundle, GENERATOR, Generator, bundle.generator)


def load_discriminator(bundle: Bundle) -> Discriminator:
    """The discriminator in float32, in eval mode, without gradients; `BundleError` if the bundle has none."""
    from dermis.networks import Discriminator

    if bundle.discriminator is None:
        raise BundleError(f"{bundle.location}: this bundle has no discriminator")
    return _load(bundle, DISCRIMINATOR, Discriminator, bundle.discriminator)


def write_bundle(
    out: str | Path,
    *,
    name: str,
    generator: Generator,
    class_names: Sequence[str],
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    model_card: str,
    discriminator: Discriminator | None = None,
    images: Mapping[str, bytes] | None = None,
    weights_dtype: WeightsDtype = "fp32",
    replace: bool = False,
) -> Bundle:
    """Write a bundle folder and open it again. The folder appears whole or not at all.

    `images` are the files that the card shows, by name. Refuses an existing `out` unless `replace`. A conditional
    generator without `class_names` gets class0, class1, ...; `weights_dtype` fp16 halves the size (weights are loaded
    back as float32). Raises `BundleError` for bad names, weights that are not finite, or provenance that is not JSON.
    """
    names = list(class_names) or [f"class{i}" for i in range(generator.config.c_dim)]
    files = {
        GENERATOR: _weights(generator, weights_dtype),
        METRICS: _json(dict(metrics or {}), METRICS),
        CARD: model_card.encode(),
        **(images or {}),
    }
    if discriminator is not None:
        files[DISCRIMINATOR] = _weights(discriminator, weights_dtype)
    fields = {
        "name": name,
        "generator": asdict(generator.config),
        "discriminator": asdict(discriminator.config) if discriminator is not None else None,
        "class_names": names,
        "provenance": dict(provenance),
    }
    return _write(Path(out), fields, files, replace)


def amend_bundle(
    bundle: Bundle, *, metrics: Mapping[str, Any] | None = None, model_card: str | None = None, name: str | None = None
) -> Bundle:
    """Write new metrics, a new card or a new name into a local bundle; every other file stays as it is, to the byte."""
    if "://" in bundle.location:
        raise BundleError(f"{bundle.location}: only a bundle in a local folder can be changed; copy it first")
    fs, root = _filesystem(bundle.location)
    files = {key: _read_verified(fs, root, bundle.location, key, record) for key, record in bundle.files.items()}
    if metrics is not None:
        files[METRICS] = _json(dict(metrics), METRICS)
    if model_card is not None:
        files[CARD] = model_card.encode()
    fields = {
        "name": name or bundle.name,
        "generator": asdict(bundle.generator),
        "discriminator": asdict(bundle.discriminator) if bundle.discriminator else None,
        "class_names": list(bundle.class_names),
        "provenance": dict(bundle.provenance),
    }
    return _write(Path(bundle.location), fields, files, replace=True)


# -- reading


def _filesystem(where: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(where)
    except (ValueError, ImportError, OSError) as error:
        raise BundleError(f"{where}: {error}") from None
    return fs, root.rstrip("/")


def _read(fs: Any, root: str, where: str, name: str, limit: int) -> bytes:
    try:
        with fs.open(f"{root}/{name}", "rb") as file:
            data: bytes = file.read(limit + 1)
    except FileNotFoundError:
        hint = "is this the folder of a bundle?" if name == DESCRIPTOR else "get the bundle again"
        raise BundleError(f"{where}: {name} is missing; {hint}") from None
    except Exception as error:  # every remote file system raises exceptions of its own library
        raise BundleError(f"{where}/{name}: cannot be read: {_reason(error)}") from error
    if len(data) > limit:
        raise BundleError(f"{where}/{name}: is larger than it may be ({limit:,} bytes); get the bundle again")
    return data


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def _read_verified(fs: Any, root: str, where: str, name: str, record: FileRecord) -> bytes:
    data = _read(fs, root, where, name, limit=record.bytes)
    if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
        raise BundleError(f"{where}/{name}: differs from what {DESCRIPTOR} says (SHA-256); get the bundle again")
    return data


def _parse(text: bytes, where: str) -> _Descriptor:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}/{DESCRIPTOR}: is not JSON ({error}); get the bundle again") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > BUNDLE_FORMAT:
        message = f"has format {version}, this dermis reads up to {BUNDLE_FORMAT}; install a newer dermis"
        raise BundleError(f"{where}/{DESCRIPTOR}: {message}")
    try:
        descriptor = _Descriptor.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BundleError(f"{where}/{DESCRIPTOR}: {field}: {first['msg']}") from None
    if descriptor.format_version != BUNDLE_FORMAT:
        raise BundleError(f"{where}/{DESCRIPTOR}: format_version must be {BUNDLE_FORMAT}")
    for name in descriptor.files:
        if not _PATH_PATTERN.fullmatch(name) or ".." in name or name == DESCRIPTOR:
            raise BundleError(f"{where}/{DESCRIPTOR}: files: {name!r} is not a file name inside the bundle")
    return descriptor


def _configs(descriptor: _Descriptor, where: str) -> tuple[GeneratorConfig, DiscriminatorConfig | None]:
    from dermis.networks import DiscriminatorConfig, GeneratorConfig

    field = "generator"
    try:
        generator = GeneratorConfig(**descriptor.generator)
        field = "discriminator"
        return generator, DiscriminatorConfig(**descriptor.discriminator) if descriptor.discriminator else None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise BundleError(f"{where}/{DESCRIPTOR}: {field}: {error}") from None


def check_names(name: str, class_names: Sequence[str], c_dim: int) -> None:
    """`BundleError` if a bundle of `c_dim` classes cannot be called so."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise BundleError(f"name: {name!r} must match {NAME_PATTERN}")
    _check_class_names(class_names, c_dim, "class_names")


def _check_class_names(names: Sequence[str], c_dim: int, where: str) -> None:
    if len(names) != c_dim:
        raise BundleError(f"{where}: {len(names)} class names for a generator of {c_dim} classes")
    for name in names:
        if not re.fullmatch(CLASS_PATTERN, name):
            raise BundleError(f"{where}: class name {name!r} must be letters, digits, space, dot, dash or underscore")
    if len({name.casefold() for name in names}) != len(names):
        raise BundleError(f"{where}: class names must differ, also without regard to case: {', '.join(names)}")


def _check_listing(fs: Any, root: str, where: str, descriptor: _Descriptor) -> None:
    try:
        found = {path.removeprefix(root).lstrip("/") for path in fs.find(root)} - {DESCRIPTOR}
    except Exception as error:  # as in _read
        raise BundleError(f"{where}: cannot be listed: {_reason(error)}") from error
    if extra := sorted(found - descriptor.files.keys()):
        raise BundleError(f"{where}: {DESCRIPTOR} does not list {', '.join(extra[:5])}; remove what is no part of it")
    if missing := sorted(descriptor.files.keys() - found):
        raise BundleError(f"{where}: {', '.join(missing[:5])} is missing; get the bundle again")


def _load(bundle: Bundle, file: str, network: type[Network], config: Any) -> Network:
    import safetensors
    import safetensors.torch
    import torch

    fs, root = _filesystem(bundle.location)
    data = _read_verified(fs, root, bundle.location, file, bundle.files[file])
    try:
        state: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise BundleError(f"{bundle.location}/{file}: is no safetensors file ({error})") from None
    # On "meta" a network of any size costs nothing until its shapes are known to agree with the file.
    try:
        with torch.device("meta"):
            model = network(config)
    except RuntimeError as error:
        raise BundleError(f"{bundle.location}/{DESCRIPTOR}: describes an impossible network ({error})") from None
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    actual = {key: tuple(value.shape) for key, value in state.items()}
    if expected != actual:
        odd = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
        first = f"{odd[0]} is {actual.get(odd[0], 'absent')}, the configuration says {expected.get(odd[0], 'absent')}"
        raise BundleError(f"{bundle.location}/{file}: {len(odd)} tensors do not fit {DESCRIPTOR}: {first}")
    model.load_state_dict({key: value.to(torch.float32) for key, value in state.items()}, assign=True)
    return model.requires_grad_(False).eval()


# -- writing


def _weights(model: nn.Module, weights_dtype: WeightsDtype) -> bytes:
    import safetensors.torch
    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16}[weights_dtype]
    state = {}
    for key, value in model.state_dict().items():
        stored = value.detach().to("cpu", dtype).contiguous()
        if not torch.isfinite(stored).all():
            raise BundleError(f"{key}: holds values that are not finite in {weights_dtype}; the bundle is not written")
        state[key] = stored
    return safetensors.torch.save(state)


def _json(value: Mapping[str, Any], what: str) -> bytes:
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise BundleError(f"{what}: cannot be written as JSON: {error}") from None


def _write(out: Path, fields: Mapping[str, Any], files: Mapping[str, bytes], replace: bool) -> Bundle:
    check_names(fields["name"], fields["class_names"], fields["generator"]["c_dim"])
    for name in files:
        if not _PATH_PATTERN.fullmatch(name) or ".." in name or name == DESCRIPTOR:
            raise BundleError(f"{name!r} cannot be the name of a file in a bundle")
    if out.exists() and not replace:
        raise BundleError(f"{out}: exists already; choose another folder or remove it")
    records = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in sorted(files.items())
    }
    descriptor = _json({"format_version": BUNDLE_FORMAT, **fields, "files": records}, DESCRIPTOR)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.new-"))
    except OSError as error:
        raise BundleError(f"{out.parent}: cannot be written: {error.strerror}") from None
    try:
        fresh.chmod(0o755)
        for name, data in {**files, DESCRIPTOR: descriptor}.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _put(fresh, out)
    except OSError as error:
        raise BundleError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return open_bundle(out)


def _put(fresh: Path, out: Path) -> None:
    """Rename `fresh` to `out`; what stood there is moved aside first and comes back if the rename fails."""
    if not out.exists():
        fresh.rename(out)
        return
    if not (out / DESCRIPTOR).is_file():
        raise BundleError(f"{out}: is no bundle, so it is not replaced; choose another folder")
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
    try:
        out.rename(old / out.name)
        fresh.rename(out)
    finally:
        if not out.exists():
            (old / out.name).rename(out)
        shutil.rmtree(old, ignore_errors=True)  # not reached if the old bundle could not come back
