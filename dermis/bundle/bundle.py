"""Bundles: opening, loading, writing and changing them. The package's docstring describes the folder."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dermis.bundle.card import (
    with_citation_section,
    with_classifier_section,
    with_latent_section,
    with_privacy_section,
    with_reference_section,
)
from dermis.bundle.classifier import CLASSIFIER_PART, ClassifierDescription
from dermis.bundle.copies import COPIES_PART, CopiesDescription
from dermis.bundle.directions import Direction, decode_directions, encode_directions
from dermis.bundle.encoder import ENCODER_PART, EncoderDescription
from dermis.bundle.folder import (
    DescriptionT_co,
    DescriptorModel,
    FileRecord,
    Folder,
    PartDescription,
    PartFormat,
    exists,
    open_folder,
    parse_descriptor,
    to_json,
    write_folder,
)
from dermis.bundle.index import INDEX_PART, IndexDescription
from dermis.bundle.installed import DESCRIPTOR, resolve_bundle
from dermis.bundle.reference import REFERENCE_PART, ReferenceDescription
from dermis.errors import BundleError, escape, quote
from dermis.network_config import DiscriminatorConfig, GeneratorConfig
from dermis.strict_json import parse_json
from dermis.tensor_files import MAX_HEADER_BYTES, read_tensors

if TYPE_CHECKING:
    from torch import nn

    from dermis.networks import Discriminator, Generator

BUNDLE_FORMAT = 1
GENERATOR = "generator.safetensors"
DISCRIMINATOR = "discriminator.safetensors"
METRICS = "metrics.json"
CARD = "MODEL_CARD.md"
DIRECTIONS = "directions.safetensors"
PRIVACY_AUDIT = "privacy_audit.json"
SIGNATURE = "model.sig"
"""A signature of all files (`dermis.provenance.signing`). bundle.json cannot list it, as it covers bundle.json."""

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
CLASS_PATTERN = r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}"  # class names become folder names of generated datasets
WeightsDtype = Literal["fp32", "fp16"]
_MAX_SMALL_BYTES = 16 << 20  # limit of each file that opening parses: descriptors, metrics, card, directions
_MAX_INTEGER = 1 << 53  # limit in a network's configuration; weights of another size are refused when they are loaded
Network = TypeVar("Network", bound="nn.Module")
ConfigT = TypeVar("ConfigT", "GeneratorConfig", "DiscriminatorConfig")


@dataclass(frozen=True)
class Bundle:
    """A verified bundle without its weights, which `load_generator` reads."""

    location: str
    name: str
    digest: str
    """SHA-256 (hex) of bundle.json. It identifies the whole bundle."""
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig | None
    class_names: tuple[str, ...]
    """Names of the labels 0 ... c_dim - 1; empty for an unconditional generator."""
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Any]
    model_card: str
    files: Mapping[str, FileRecord]
    classifier: ClassifierDescription | None = None
    authenticity: IndexDescription | None = None
    encoder: EncoderDescription | None = None
    directions: tuple[Direction, ...] = ()
    reference: ReferenceDescription | None = None
    copies: CopiesDescription | None = None
    privacy_audit: Mapping[str, Any] | None = None
    """Content of privacy_audit.json, which `dermis.privacy.audit` reads; None if the bundle was not audited."""


_PARTS: Mapping[str, PartFormat[PartDescription]] = {
    part.name: part for part in (CLASSIFIER_PART, INDEX_PART, ENCODER_PART, REFERENCE_PART, COPIES_PART)
}


class _BundleDescriptor(DescriptorModel):
    """The fields of bundle.json."""

    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    generator: dict[str, Any]
    discriminator: dict[str, Any] | None = None
    class_names: list[str]
    provenance: dict[str, Any]


def trained_on(provenance: Mapping[str, Any]) -> str | None:
    """SHA-256 of the training set that a bundle's provenance states, or None."""
    dataset = provenance.get("dataset")  # in bundles of other programs it can be missing or of another type
    return dataset.get("sha256") if isinstance(dataset, Mapping) else None


def open_bundle(location: str | Path) -> Bundle:
    """Open a bundle and verify every file of it.

    Args:
        location: A folder, an fsspec URL, or the name of an installed bundle such as `demo`.

    Raises:
        BundleError: bundle.json is missing, malformed or of a newer format; a file is missing, changed or not listed; or
            the configuration contradicts itself.
    """
    folder = open_folder(resolve_bundle(location), "bundle", DESCRIPTOR)
    where, text = folder.where, folder.read_descriptor()
    descriptor = parse_descriptor(text, f"{where}/{DESCRIPTOR}", BUNDLE_FORMAT, _BundleDescriptor)
    generator, discriminator = _configs(descriptor, where)
    _check_class_names(descriptor.class_names, generator.c_dim, f"{where}/{DESCRIPTOR}")
    for name in (GENERATOR, METRICS, CARD) + ((DISCRIMINATOR,) if discriminator else ()):
        if name not in descriptor.files:
            raise BundleError(f"{where}/{DESCRIPTOR}: files does not list {name}; get the bundle again")
    files = descriptor.records
    folder.check_listing(files, allowed=(SIGNATURE,))
    small: dict[str, bytes] = {}
    parsed = (METRICS, CARD, DIRECTIONS, PRIVACY_AUDIT, *(f"{key}/{part.descriptor}" for key, part in _PARTS.items()))
    for name, record in files.items():
        if name in parsed:
            small[name] = folder.read(name, record, limit=_MAX_SMALL_BYTES)
        else:
            folder.verify(name, record)
    try:
        card = small[CARD].decode()
    except ValueError:
        raise BundleError(f"{where}/{CARD}: is not UTF-8; get the bundle again") from None
    index, reference = _part(INDEX_PART, files, small, where), _part(REFERENCE_PART, files, small, where)
    _check_dimensions(reference, index, where)
    return Bundle(
        location=where,
        name=descriptor.name,
        digest=hashlib.sha256(text).hexdigest(),
        generator=generator,
        discriminator=discriminator,
        class_names=tuple(descriptor.class_names),
        provenance=descriptor.provenance,
        metrics=_json_object(small[METRICS], f"{where}/{METRICS}"),
        model_card=card,
        files=files,
        classifier=_part(CLASSIFIER_PART, files, small, where),
        authenticity=index,
        encoder=_part(ENCODER_PART, files, small, where),
        directions=_directions(small, where, generator),
        reference=reference,
        privacy_audit=_json_object(small[PRIVACY_AUDIT], f"{where}/{PRIVACY_AUDIT}")
        if PRIVACY_AUDIT in small
        else None,
        copies=_part(COPIES_PART, files, small, where),
    )


def read_signature(source: Bundle | str | Path) -> tuple[bytes | None, dict[str, str]]:
    """Read the signature of a bundle, and what it has to cover. No other file than bundle.json is read.

    Args:
        source: The bundle. For an opened one, bundle.json is not read again: the files are those of this very object, also if
            somebody replaces them meanwhile.

    Returns:
        The signature, None if the bundle is not signed; and the SHA-256 of every file by name, that of bundle.json included.

    Raises:
        BundleError: A file cannot be read, or bundle.json is malformed.
    """
    if isinstance(source, Bundle):
        folder = open_folder(source.location, "bundle", DESCRIPTOR)
        files, digest = source.files, source.digest
    else:
        folder, text, files = _read_listing(source)
        digest = hashlib.sha256(text).hexdigest()
    records = {name: record.sha256 for name, record in files.items()} | {DESCRIPTOR: digest}
    return folder.read_unlisted(SIGNATURE, limit=_MAX_SMALL_BYTES), records


def _read_listing(location: str | Path) -> tuple[Folder, bytes, dict[str, FileRecord]]:
    """Return the folder of a bundle, the content of its bundle.json, and the files that it lists. They are not read."""
    folder = open_folder(resolve_bundle(location), "bundle", DESCRIPTOR)
    text = folder.read_descriptor()
    descriptor = parse_descriptor(text, f"{folder.where}/{DESCRIPTOR}", BUNDLE_FORMAT, _BundleDescriptor)
    return folder, text, descriptor.records


def has_part(location: str | Path, part: PartFormat[PartDescription]) -> bool:
    """Whether a place is a bundle that has a part.

    Raises:
        BundleError: bundle.json cannot be read, or is malformed.
    """
    return exists(location, DESCRIPTOR) and f"{part.name}/{part.descriptor}" in _read_listing(location)[2]


def find_part(source: Bundle | str | Path, part: PartFormat[PartDescription], missing: str) -> str:
    """Return the folder of a part of a bundle, or of a part outside of a bundle.

    Args:
        source: A bundle, or the folder or fsspec URL of a bundle or of the part.
        part: Kind of the part.
        missing: Message after the location if the bundle has no such part.

    Raises:
        BundleError: The bundle has no such part.
    """
    if not isinstance(source, str | Path):
        if getattr(source, part.name) is None:
            raise BundleError(f"{source.location}: {missing}")
        return f"{source.location}/{part.name}"
    where = str(resolve_bundle(source)).rstrip("/")
    if not exists(where, DESCRIPTOR):
        return where
    folder, _, records = _read_listing(where)
    descriptor = f"{part.name}/{part.descriptor}"
    if descriptor not in records:
        raise BundleError(f"{where}: {missing}")
    folder.verify(descriptor, records[descriptor])  # it lists the other files of the part with their hashes
    return f"{where}/{part.name}"


def load_generator(bundle: Bundle) -> Generator:
    """Load the generator in float32, in eval mode, without gradients.

    Raises:
        BundleError: The weights were changed after the bundle was opened, or do not fit the configuration.
    """
    from dermis.networks import Generator

    return _load(bundle, GENERATOR, Generator, bundle.generator)


def load_discriminator(bundle: Bundle) -> Discriminator:
    """Load the discriminator in float32, in eval mode, without gradients.

    Raises:
        BundleError: The bundle has no discriminator, or its weights were changed or do not fit the configuration.
    """
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
    """Write a bundle's folder and open it. The folder appears completely or not at all.

    Args:
        out: Path of the folder.
        name: Name of the bundle.
        generator: The generator.
        class_names: Name of each label. If empty, a conditional generator gets class0, class1, ...
        provenance: How the generator was trained, as JSON values.
        metrics: Measurements, as JSON values.
        model_card: The model card in Markdown.
        discriminator: The discriminator, for transfer learning.
        images: Files that the card shows, by name.
        weights_dtype: "fp16" halves the size. Weights are always loaded as float32.
        replace: Whether an existing bundle at `out` is replaced.

    Raises:
        BundleError: `out` exists and may not be replaced, a name is not allowed, weights are not finite, or `provenance`
            or `metrics` are not JSON.
    """
    names = list(class_names) or [f"class{i}" for i in range(generator.config.c_dim)]
    weights = _weights(generator, weights_dtype)
    digest = hashlib.sha256(weights).hexdigest()
    files = {
        GENERATOR: weights,
        METRICS: to_json(dict(metrics or {}), METRICS),
        CARD: with_citation_section(model_card, name, generator.config.img_resolution, digest).encode(),
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
    privacy_audit: Mapping[str, Any] | None = None,
    remove: Sequence[str] = (),
) -> Bundle:
    """Change a local bundle. Files that no argument names keep their bytes.

    The sections of the card on the parts and on citing it are written again if a part, the name or the card changes.

    Args:
        bundle: The bundle to change.
        metrics: New content of metrics.json.
        model_card: New model card.
        name: New name of the bundle.
        parts: Folders to attach, by the part's name: "classifier", "authenticity", "encoder", "reference" or "copies". A part
            that is already in the bundle is replaced. A new encoder or classifier removes the privacy audit.
        directions: New directions. They replace all that the bundle has.
        privacy_audit: New content of privacy_audit.json. The card gets a section about it.
        remove: Names of parts to remove, or "directions" or "privacy_audit".

    Raises:
        BundleError: The bundle is not local, a folder in `parts` is not such a part, or the bundle cannot be written.
    """
    if "://" in bundle.location:
        raise BundleError(f"{bundle.location}: only a bundle in a local folder can be changed; copy it first")
    folder = open_folder(bundle.location, "bundle", DESCRIPTOR)
    files = {key: folder.read(key, record) for key, record in bundle.files.items()}
    descriptions: dict[str, PartDescription | None] = {key: getattr(bundle, key) for key in _PARTS}
    for name_of_part in remove:
        if name_of_part in _PARTS:
            descriptions[name_of_part] = None
        files = {key: data for key, data in files.items() if not key.startswith(f"{name_of_part}/")}
    for name_of_part, place in (parts or {}).items():
        descriptions[name_of_part], data_of = _PARTS[name_of_part].read(place)
        files = {key: data for key, data in files.items() if not key.startswith(f"{name_of_part}/")}
        files |= {f"{name_of_part}/{key}": data for key, data in data_of.items()}
    if "directions" in remove:
        directions = ()
    if directions is not None:
        files.pop(DIRECTIONS, None)
        if directions:
            files[DIRECTIONS] = encode_directions(directions)
    if metrics is not None:
        files[METRICS] = to_json(dict(metrics), METRICS)
    audit = bundle.privacy_audit
    # An audit attacks encoder and classifier as parts of the bundle: it says nothing of others.
    if "privacy_audit" in remove or {"encoder", "classifier"} & (parts or {}).keys():
        files.pop(PRIVACY_AUDIT, None)
        audit = None
    if privacy_audit is not None:
        audit = dict(privacy_audit)
        files[PRIVACY_AUDIT] = to_json(audit, PRIVACY_AUDIT)
    new_directions = bundle.directions if directions is None else directions
    changed = (
        any(descriptions[key] is not getattr(bundle, key) for key in _PARTS)
        or new_directions is not bundle.directions
        or audit is not bundle.privacy_audit
        or name not in (None, bundle.name)
    )
    if model_card is not None or changed:
        card = bundle.model_card if model_card is None else model_card
        card = _card(card, descriptions, new_directions)
        weights = bundle.files[GENERATOR].sha256
        card = with_citation_section(card, name or bundle.name, bundle.generator.img_resolution, weights)
        # An audit that stays keeps its section: a foreign bundle's file was not checked and may lack what the section names.
        files[CARD] = (card if audit is bundle.privacy_audit else with_privacy_section(card, audit)).encode()
    fields = {
        "name": name or bundle.name,
        "generator": asdict(bundle.generator),
        "discriminator": asdict(bundle.discriminator) if bundle.discriminator else None,
        "class_names": list(bundle.class_names),
        "provenance": dict(bundle.provenance),
    }
    return _write(Path(bundle.location), fields, files, replace=True)


def _card(card: str, descriptions: Mapping[str, PartDescription | None], directions: Sequence[Direction]) -> str:
    """Write the sections on the parts into the card."""
    classifier, index, encoder = descriptions["classifier"], descriptions["authenticity"], descriptions["encoder"]
    copies = descriptions["copies"]
    assert classifier is None or isinstance(classifier, ClassifierDescription)
    assert index is None or isinstance(index, IndexDescription)
    assert encoder is None or isinstance(encoder, EncoderDescription)
    assert copies is None or isinstance(copies, CopiesDescription)
    reference = descriptions["reference"]
    assert reference is None or isinstance(reference, ReferenceDescription)
    card = with_reference_section(with_classifier_section(card, classifier), reference)
    return with_latent_section(card, index, encoder, directions, copies)


# -- reading


def _configs(descriptor: _BundleDescriptor, where: str) -> tuple[GeneratorConfig, DiscriminatorConfig | None]:
    generator = _config(GeneratorConfig, descriptor.generator, f"{where}/{DESCRIPTOR}: generator")
    if descriptor.discriminator is None:
        return generator, None
    return generator, _config(DiscriminatorConfig, descriptor.discriminator, f"{where}/{DESCRIPTOR}: discriminator")


def _config(kind: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """Make a configuration from the values of its fields.

    Raises:
        BundleError: A field is missing, unknown or of another type. The message names the field.
    """
    hints = get_type_hints(kind)
    required = {field.name for field in fields(kind) if field.default is MISSING}
    if unknown := sorted(values.keys() - hints.keys()):
        raise BundleError(f"{where}.{escape(unknown[0])}: is not a known option of a network; install a newer dermis")
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
    """Check the names of a bundle and its classes.

    Raises:
        BundleError: `name` or a class name is not allowed, or the number of class names is not `c_dim`.
    """
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


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise BundleError(f"{where}: is not JSON that can be used ({error}); get the bundle again") from None
    if not isinstance(value, dict):
        raise BundleError(f"{where}: must hold a JSON object")
    return value


def _part(
    part: PartFormat[DescriptionT_co], files: Mapping[str, FileRecord], small: Mapping[str, bytes], where: str
) -> DescriptionT_co | None:
    """Parse the description of a part.

    Args:
        part: The part.
        files: Records of the bundle's files.
        small: Content of the files that are parsed, by name.
        where: Path or URL of the bundle.

    Returns:
        The description, None if the bundle does not have this part.

    Raises:
        BundleError: The descriptor is missing or malformed, or lists other files than bundle.json.
    """
    records = {name.split("/", 1)[1]: record for name, record in files.items() if name.startswith(f"{part.name}/")}
    if not records:
        return None
    name = f"{part.name}/{part.descriptor}"
    if name not in small:
        raise BundleError(f"{where}/{DESCRIPTOR}: files does not list {name}; get the bundle again")
    description = part.parse(small[name], f"{where}/{name}")
    del records[part.descriptor]
    if dict(description.files) != records:
        raise BundleError(f"{where}/{name}: lists other files than {DESCRIPTOR} does; attach the {part.name} again")
    return description


def _check_dimensions(reference: ReferenceDescription | None, index: IndexDescription | None, where: str) -> None:
    """Raise BundleError if a reference has statistics of more dimensions than the index it was made with."""
    space = None if reference is None else reference.space
    if space is None or index is None or space.index != index.digest or space.dim <= index.dim:
        return
    raise BundleError(
        f"{where}/{REFERENCE_PART.name}/{REFERENCE_PART.descriptor}: space.dim: is {space.dim}, but the index has "
        f"{index.dim} dimensions; make the reference again"
    )


def _directions(small: Mapping[str, bytes], where: str, config: GeneratorConfig) -> tuple[Direction, ...]:
    if DIRECTIONS not in small:
        return ()
    return decode_directions(small[DIRECTIONS], f"{where}/{DIRECTIONS}", w_dim=config.w_dim, num_ws=config.num_ws)


def _load(bundle: Bundle, file: str, network: type[Network], config: Any) -> Network:
    import torch

    where = f"{bundle.location}/{file}"
    # On the device "meta" a network takes no memory: its shapes are compared with those of the file first.
    try:
        with torch.device("meta"):
            model = network(config)
        expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    except (RuntimeError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
        reason = escape(error)
        raise BundleError(f"{bundle.location}/{DESCRIPTOR}: describes an impossible network ({reason})") from None
    limit = 4 * sum(math.prod(shape) for shape in expected.values()) + MAX_HEADER_BYTES
    data = open_folder(bundle.location, "bundle", DESCRIPTOR).read(file, bundle.files[file], limit=limit)
    state = read_tensors(data, where)
    actual = {key: tuple(value.shape) for key, value in state.items()}
    if expected != actual:
        keys = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
        first = (
            f"{keys[0]} is {actual.get(keys[0], 'absent')}, the configuration says {expected.get(keys[0], 'absent')}"
        )
        raise BundleError(f"{where}: {len(keys)} tensors do not fit {DESCRIPTOR}: {escape(first)}")
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
