"""Bundles: what training hands to serving, one folder that is verified as a whole.

    bundle.json               format, name, network configs, class names, provenance, SHA-256 and size of every file
    generator.safetensors     weights under the official StyleGAN2-ADA key names, stored as float32 or float16
    discriminator.safetensors optional, for transfer learning
    classifier/               optional: a classifier, verified also by itself (`dermis.classifier.description`)
    encoder/                  optional: images to latents, for projections (`dermis.projection.encoder_description`)
    authenticity/             optional: an index of the training images' embeddings (`dermis.authenticity.description`)
    directions.safetensors    optional: named directions of w (`dermis.directions.direction`)
    metrics.json              what was measured, empty if nothing was
    MODEL_CARD.md             and the pictures that it shows

The SHA-256 of bundle.json is the identity of the whole: it covers every other file through the hashes it holds.
Nothing in a bundle is ever unpickled or executed, and files that it does not list are not read: a bundle may be
untrusted. `docs/bundles.md` documents the format.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dermis.authenticity import description as indices
from dermis.authenticity.description import IndexDescription
from dermis.bundle_card import with_latent_section
from dermis.classifier import description as classifiers
from dermis.classifier.description import Description
from dermis.directions import direction as direction_files
from dermis.directions.direction import Direction
from dermis.errors import BundleError, escape, quote
from dermis.folders import DescriptorModel, FileRecord, open_folder, parse_descriptor, to_json, write_folder
from dermis.network_config import DiscriminatorConfig, GeneratorConfig
from dermis.projection import encoder_description as encoders
from dermis.projection.encoder_description import EncoderDescription
from dermis.strict_json import parse_json
from dermis.tensor_files import MAX_HEADER_BYTES, read_tensors

if TYPE_CHECKING:
    from torch import nn

    from dermis.networks import Discriminator, Generator

BUNDLE_FORMAT = 1
DESCRIPTOR = "bundle.json"
GENERATOR = "generator.safetensors"
DISCRIMINATOR = "discriminator.safetensors"
METRICS = "metrics.json"
CARD = "MODEL_CARD.md"
DIRECTIONS = "directions.safetensors"

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
MAX_SMALL_BYTES = 16 << 20  # of what is parsed when a bundle is opened: descriptors, metrics, the card, directions
CLASS_PATTERN = r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}"  # class names become folder names of generated datasets
WeightsDtype = Literal["fp32", "fp16"]
_MAX_INTEGER = 1 << 53  # of a network's configuration; what is too large for its weights is refused when they load
Network = TypeVar("Network", bound="nn.Module")
DescribedT = TypeVar("DescribedT", bound="Described")
ConfigT = TypeVar("ConfigT", "GeneratorConfig", "DiscriminatorConfig")


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
    classifier: Description | None = None
    authenticity: IndexDescription | None = None
    encoder: EncoderDescription | None = None
    directions: tuple[Direction, ...] = ()


class Described(Protocol):
    """What every part of a bundle says of itself."""

    @property
    def files(self) -> Mapping[str, FileRecord]: ...
    @property
    def digest(self) -> str: ...


@dataclass(frozen=True)
class _Part:
    """A folder inside a bundle that could also stand alone, with a descriptor of its own."""

    descriptor: str
    parse: Callable[[bytes, str], Described]
    read: Callable[[str | Path], tuple[Described, dict[str, bytes]]]
    """Verifies a folder that stands alone: its description, and all its files by name."""


_PARTS: Mapping[str, _Part] = {
    "classifier": _Part(classifiers.DESCRIPTOR, classifiers.parse, classifiers.read_classifier_files),
    "authenticity": _Part(indices.DESCRIPTOR, indices.parse, indices.read_index_files),
    "encoder": _Part(encoders.DESCRIPTOR, encoders.parse, encoders.read_encoder_files),
}


class _Descriptor(DescriptorModel):
    """bundle.json."""

    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    generator: dict[str, Any]
    discriminator: dict[str, Any] | None = None
    class_names: list[str]
    provenance: dict[str, Any]


def open_bundle(location: str | Path) -> Bundle:
    """Read a bundle from a folder or an fsspec URL and verify every file of it.

    Raises `BundleError` if bundle.json is absent, malformed or newer than this code, if a file is missing, changed or
    not listed, or if the configuration contradicts itself.
    """
    folder = open_folder(location, "bundle", DESCRIPTOR)
    where, text = folder.where, folder.read_descriptor()
    descriptor = parse_descriptor(text, f"{where}/{DESCRIPTOR}", BUNDLE_FORMAT, _Descriptor)
    generator, discriminator = _configs(descriptor, where)
    _check_class_names(descriptor.class_names, generator.c_dim, f"{where}/{DESCRIPTOR}")
    for name in (GENERATOR, METRICS, CARD) + ((DISCRIMINATOR,) if discriminator else ()):
        if name not in descriptor.files:
            raise BundleError(f"{where}/{DESCRIPTOR}: files does not list {name}; get the bundle again")
    files = descriptor.records
    folder.check_listing(files)
    small: dict[str, bytes] = {}
    wanted = (METRICS, CARD, DIRECTIONS, *(f"{key}/{part.descriptor}" for key, part in _PARTS.items()))
    for name, record in files.items():
        if name in wanted:
            small[name] = folder.read(name, record, limit=MAX_SMALL_BYTES)
        else:
            folder.verify(name, record)
    try:
        metrics = parse_json(small[METRICS])
    except ValueError as error:
        raise BundleError(f"{where}/{METRICS}: is not JSON that can be used ({error}); get the bundle again") from None
    try:
        card = small[CARD].decode()
    except ValueError:
        raise BundleError(f"{where}/{CARD}: is not UTF-8; get the bundle again") from None
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
        classifier=_part("classifier", Description, files, small, where),
        authenticity=_part("authenticity", IndexDescription, files, small, where),
        encoder=_part("encoder", EncoderDescription, files, small, where),
        directions=_directions(small, where, generator),
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
        METRICS: to_json(dict(metrics or {}), METRICS),
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
    bundle: Bundle,
    *,
    metrics: Mapping[str, Any] | None = None,
    model_card: str | None = None,
    name: str | None = None,
    parts: Mapping[str, str | Path] | None = None,
    directions: Sequence[Direction] | None = None,
    remove: Sequence[str] = (),
) -> Bundle:
    """Write new metrics, a new card, a new name, parts (their folders, by name) or directions into a local bundle.

    Every other file stays as it is, to the byte. A part ("classifier", ...) or directions replace those that are there; those
    named in `remove` go. The card has a section on the classifier and one on the other parts, if there are any. Raises
    BundleError.
    """
    if "://" in bundle.location:
        raise BundleError(f"{bundle.location}: only a bundle in a local folder can be changed; copy it first")
    folder = open_folder(bundle.location, "bundle", DESCRIPTOR)
    files = {key: folder.read(key, record) for key, record in bundle.files.items()}
    described: dict[str, Described | None] = {key: getattr(bundle, key) for key in _PARTS}
    for name_of_part in remove:
        described[name_of_part] = None
        files = {key: data for key, data in files.items() if not key.startswith(f"{name_of_part}/")}
    for name_of_part, place in (parts or {}).items():
        described[name_of_part], data_of = _PARTS[name_of_part].read(place)
        files = {key: data for key, data in files.items() if not key.startswith(f"{name_of_part}/")}
        files |= {f"{name_of_part}/{key}": data for key, data in data_of.items()}
    if "directions" in remove:
        directions = ()
    if directions is not None:
        files.pop(DIRECTIONS, None)
        if directions:
            files[DIRECTIONS] = direction_files.to_bytes(directions)
    if metrics is not None:
        files[METRICS] = to_json(dict(metrics), METRICS)
    kept = bundle.directions if directions is None else directions
    changed = any(described[key] is not getattr(bundle, key) for key in _PARTS) or kept is not bundle.directions
    if model_card is not None or changed:
        files[CARD] = _card(bundle.model_card if model_card is None else model_card, described, kept).encode()
    fields = {
        "name": name or bundle.name,
        "generator": asdict(bundle.generator),
        "discriminator": asdict(bundle.discriminator) if bundle.discriminator else None,
        "class_names": list(bundle.class_names),
        "provenance": dict(bundle.provenance),
    }
    return _write(Path(bundle.location), fields, files, replace=True)


def _card(card: str, described: Mapping[str, Described | None], directions: Sequence[Direction]) -> str:
    """The card with a section on each part."""
    classifier, index, encoder = described["classifier"], described["authenticity"], described["encoder"]
    assert classifier is None or isinstance(classifier, Description)
    assert index is None or isinstance(index, IndexDescription)
    assert encoder is None or isinstance(encoder, EncoderDescription)
    card = classifiers.with_card_section(card, classifier)
    return with_latent_section(card, index, encoder, directions)


# -- reading


def _configs(descriptor: _Descriptor, where: str) -> tuple[GeneratorConfig, DiscriminatorConfig | None]:
    generator = _config(GeneratorConfig, descriptor.generator, f"{where}/{DESCRIPTOR}: generator")
    if descriptor.discriminator is None:
        return generator, None
    return generator, _config(DiscriminatorConfig, descriptor.discriminator, f"{where}/{DESCRIPTOR}: discriminator")


def _config(kind: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """A configuration of exactly its fields, each of its own type. BundleError, naming the field."""
    hints = get_type_hints(kind)
    required = {field.name for field in fields(kind) if field.default is MISSING}
    if unknown := sorted(values.keys() - hints.keys()):
        raise BundleError(f"{where}.{escape(unknown[0])}: is no option of a network; install a newer dermis")
    if missing := sorted(required - values.keys()):
        raise BundleError(f"{where}.{missing[0]}: is missing")
    for name, value in values.items():
        try:
            TypeAdapter(hints[name], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            raise BundleError(f"{where}.{name}: {error.errors()[0]['msg']}") from None
        if isinstance(value, int) and not 0 <= value <= _MAX_INTEGER:
            raise BundleError(f"{where}.{name}: must be from 0 to {_MAX_INTEGER}")
    try:
        return kind(**values)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise BundleError(f"{where}: {error}") from None


def check_names(name: str, class_names: Sequence[str], c_dim: int) -> None:
    """`BundleError` if a bundle of `c_dim` classes cannot be called so."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise BundleError(f"name: {quote(name)} must match {NAME_PATTERN}")
    _check_class_names(class_names, c_dim, "class_names")


def _check_class_names(names: Sequence[str], c_dim: int, where: str) -> None:
    if len(names) != c_dim:
        raise BundleError(f"{where}: {len(names)} class names for a generator of {c_dim} classes")
    for name in names:
        if not re.fullmatch(CLASS_PATTERN, name):
            raise BundleError(
                f"{where}: class name {quote(name)} must be letters, digits, space, dot, dash or underscore"
            )
    if len({name.casefold() for name in names}) != len(names):
        raise BundleError(f"{where}: class names must differ, also without regard to case: {escape(', '.join(names))}")


def _part(
    key: str, kind: type[DescribedT], files: Mapping[str, FileRecord], small: Mapping[str, bytes], where: str
) -> DescribedT | None:
    """The description of a part, if it is there. Its own listing must be that of the bundle."""
    part = _PARTS[key]
    there = {name.split("/", 1)[1]: record for name, record in files.items() if name.startswith(f"{key}/")}
    if not there:
        return None
    name = f"{key}/{part.descriptor}"
    if name not in small:
        raise BundleError(f"{where}/{DESCRIPTOR}: files does not list {name}; get the bundle again")
    described = part.parse(small[name], f"{where}/{name}")
    del there[part.descriptor]
    if dict(described.files) != there:
        raise BundleError(f"{where}/{name}: lists other files than {DESCRIPTOR} does; attach the {key} again")
    assert isinstance(described, kind)
    return described


def _directions(small: Mapping[str, bytes], where: str, config: GeneratorConfig) -> tuple[Direction, ...]:
    if DIRECTIONS not in small:
        return ()
    return direction_files.from_bytes(
        small[DIRECTIONS], f"{where}/{DIRECTIONS}", w_dim=config.w_dim, num_ws=config.num_ws
    )


def _load(bundle: Bundle, file: str, network: type[Network], config: Any) -> Network:
    import torch

    where = f"{bundle.location}/{file}"
    # On "meta" a network of any size costs nothing until its shapes are known to agree with the file.
    try:
        with torch.device("meta"):
            model = network(config)
        expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    except (RuntimeError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
        reason = escape(error)
        raise BundleError(f"{bundle.location}/{DESCRIPTOR}: describes an impossible network ({reason})") from None
    most = 4 * sum(math.prod(shape) for shape in expected.values()) + MAX_HEADER_BYTES
    data = open_folder(bundle.location, "bundle", DESCRIPTOR).read(file, bundle.files[file], limit=most)
    state = read_tensors(data, where)
    actual = {key: tuple(value.shape) for key, value in state.items()}
    if expected != actual:
        odd = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
        first = f"{odd[0]} is {actual.get(odd[0], 'absent')}, the configuration says {expected.get(odd[0], 'absent')}"
        raise BundleError(f"{where}: {len(odd)} tensors do not fit {DESCRIPTOR}: {escape(first)}")
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


def _write(out: Path, fields: Mapping[str, Any], files: Mapping[str, bytes], replace: bool) -> Bundle:
    check_names(fields["name"], fields["class_names"], fields["generator"]["c_dim"])
    write_folder(out, "bundle", DESCRIPTOR, {"format_version": BUNDLE_FORMAT, **fields}, files, replace=replace)
    return open_bundle(out)
