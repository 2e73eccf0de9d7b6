"""Finish a dataset from its shards. manifest.json, which lists all files, is written last.

No file has a date: the same plan, bundle and synthesizer give the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from dermis import __version__
from dermis.authenticity.attack import Attack, Exposure
from dermis.dataset.canonical_hashes import CanonicalHashes, canonical_croissant, listing_sha256
from dermis.dataset.card import dataset_card
from dermis.dataset.columns import columns
from dermis.dataset.containers import (
    DatasetSample,
    add_to_zip,
    copy_to_zip,
    file_name,
    metadata_row,
    read_container,
    zip_of_many,
)
from dermis.dataset.croissant import croissant
from dermis.dataset.manifest_document import ManifestDocument, PrivacyDocument, TallyDocument
from dermis.dataset.packed import EmbeddingFile, PackedShard, pack, unpack
from dermis.dataset.plan import FORMAT_VERSION, DatasetPlan
from dermis.dataset.privacy import Checks, Examine, Expose, PrivacyReport, PrivacyTally, report
from dermis.dataset.request import ClassifierOptions, DatasetRequest
from dermis.dataset.scoring import ClassifierTally, tally
from dermis.dataset.shards import FileEntry, Sign, find_shard, missing_shards, signed_image
from dermis.dataset.store import MANIFEST, PARTIAL, Store, hash_file, storage_error, storage_errors
from dermis.errors import MissingShardsError, RequestError, StorageError, escape
from dermis.imaging import Images, contact_sheet, decode, encode, thumbnail
from dermis.provenance.canonical import canonical_sha256
from dermis.report.appearance import MeasureImages, appearances
from dermis.report.content import make_report
from dermis.report.page import report_page
from dermis.report.sample import measure
from dermis.strict_json import parse_json

if TYPE_CHECKING:
    from dermis.bundle import Bundle

ARCHIVE = "images.zip"
METADATA = "metadata.csv"
PREVIEW = "preview.png"
CARD = "README.md"
CROISSANT = "croissant.json"
REPORT, REPORT_PAGE = "report.json", "report.html"
PRIVACY_AUDIT, AUDIT_TEXT = "privacy_audit.json", "AUDIT.md"
SIGNATURE = "dataset.sig"  # of all files (`dermis.provenance.signing`); it covers the manifest, which cannot list it
SINGLE_FILES = (METADATA, PREVIEW, CARD, CROISSANT, REPORT, REPORT_PAGE, PRIVACY_AUDIT, AUDIT_TEXT)
"""Files of a dataset that hold no images."""
MAX_MANIFEST_BYTES = 256 << 20  # that of the largest dataset has 60 MiB
_IN_MEMORY = 4 << 20  # bytes of metadata.csv that are kept in memory instead of a file
PREVIEW_COLUMNS, PREVIEW_IMAGES, PREVIEW_SIDE = 8, 64, 128


@dataclass(frozen=True)
class DatasetAudit:
    """Result of a privacy audit of a dataset: as JSON values (`PrivacyAudit.to_json`), and as a text for people."""

    document: Mapping[str, Any]
    text: str


Audit = Callable[[Iterator[tuple[DatasetSample, Images]]], DatasetAudit]
"""Audits the samples of a dataset and their pixels, in order."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json, with which the dataset can be made again and verified."""

    request: DatasetRequest
    bundle_name: str
    bundle_digest: str
    class_names: tuple[str, ...]
    synthesizer: Mapping[str, str]
    plan_digest: str
    shards: int
    files: tuple[FileEntry, ...]
    classifier: Mapping[str, ClassifierTally] | None = None
    """Results of the classifier by class; None if images were not scored."""
    privacy: PrivacyReport | None = None
    """Results of the comparison with the training images; None if there was none."""
    format_version: int = FORMAT_VERSION
    """1: its images have no metadata of their origin."""
    canonical: CanonicalHashes | None = None
    """Hashes that do not depend on the signatures of images; None if images are not signed."""

    def to_json(self) -> bytes:
        """Encode the manifest. The same manifest gives the same bytes."""
        document: dict[str, Any] = {
            "format_version": self.format_version,
            "request": self.request.model_dump(),
            "bundle": {"name": self.bundle_name, "digest": self.bundle_digest, "class_names": self.class_names},
            "synthesizer": dict(self.synthesizer),
            "plan": {"digest": self.plan_digest, "samples": self.request.samples, "shards": self.shards},
            "files": [asdict(file) for file in self.files],
        }
        if self.classifier is not None:
            document["classifier"] = {name: asdict(class_tally) for name, class_tally in self.classifier.items()}
        if self.privacy is not None:
            document["privacy"] = asdict(self.privacy)
        if self.canonical is not None:
            document["canonical"] = {"files": dict(self.canonical.files), "digest": self.canonical.digest}
        return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

    def with_canonical(self, hashes: Mapping[str, str]) -> Manifest:
        """Add hashes of files without the signatures of images, and the digest of the manifest with them.

        The digest is the SHA-256 of this manifest without `canonical`, where each of these files has its hash from there and
        0 bytes. The same request gives it again, whoever signs the images.
        """
        files = tuple(
            FileEntry(each.name, 0, hashes[each.name]) if each.name in hashes else each for each in self.files
        )
        digest = hashlib.sha256(replace(self, files=files, canonical=None).to_json()).hexdigest()
        return replace(self, canonical=CanonicalHashes(dict(hashes), digest))


def synthesizer_identity(identity: Mapping[str, str]) -> dict[str, str]:
    """Return all that decides the bytes of a dataset besides request and bundle: identities of the machine, and version."""
    return {**identity, "dermis": __version__}


def finalize(
    plan: DatasetPlan,
    store: Store,
    bundle: Bundle,
    identity: Mapping[str, str],
    expose: Expose | None = None,
    *,
    examine: Examine | None = None,
    audit: Audit | None = None,
    sign: Sign | None = None,
    on_batch: Callable[[], None] | None = None,
    while_archiving: Callable[[], None] | None = None,
    measure_images: MeasureImages = appearances,
) -> Manifest:
    """Write all files of a dataset that are not written yet, and then manifest.json.

    It can be run again after a crash. A dataset that is complete is not changed.

    Args:
        plan: The plan of the dataset, all shards of which are finished.
        store: Where the dataset is stored.
        bundle: The bundle whose generator made the images.
        identity: Identity of synthesizer, classifier and index, with which all shards were made.
        expose: Measures what the images disclose of the training set; required if `plan.gated`.
        examine: Computes features for the report of a dataset without a gate; without it they are not measured.
        audit: Audits the images; the report then has this result in place of the bundle's audit.
        sign: Signs the preview; required if the images are signed.
        on_batch: Called between shards and between the images that are measured for the report. An exception ends the work.
        while_archiving: Called in place of `on_batch` while images.zip is written, which is as large as all images.
        measure_images: Measures artefacts and skin tone of images for the report.

    Returns:
        The manifest.

    Raises:
        MissingShardsError: A shard is missing or damaged. Nothing is written then.
        StorageError: A file cannot be written.
        RequestError: Filter or gate rejected all images.
    """
    if plan.gated and expose is None:
        raise ValueError("this plan has a gate, so it needs an index")
    done = _finished(plan, store, identity)
    if done is not None:
        _remove_unfinished(store)
        return done
    store.remove_abandoned()  # otherwise every killed attempt leaves a file as large as all images until the dataset ends
    with ExitStack() as stack:
        embeddings = stack.enter_context(closing(EmbeddingFile())) if plan.gated else None
        records = _records(plan, store, identity, embeddings, on_batch)
        _check_some(plan, records)
        tallies = _tally(plan, records) if plan.scored else None
        privacy = None
        if embeddings is not None and expose is not None:
            privacy = report(plan, _checks(plan, records), expose(embeddings.pieces()))
        card = dataset_card(plan, bundle, tallies, privacy).encode()
        metadata = stack.enter_context(_metadata(plan, records))
        files = [record.file for record in records]
        if plan.request.format == "imagefolder":
            members = {METADATA: metadata, CARD: io.BytesIO(card)}
            files = [_write_archive(plan, store, records, members, while_archiving)]
        files.append(_write_copy(store, METADATA, metadata))
        preview = encode(contact_sheet(_preview(plan, store, records), PREVIEW_COLUMNS), origin=plan.origin())
        preview = signed_image(plan, preview, "png", plan.origin(), sign)
        kept = _by_class(plan, records)
        measured = measure(
            plan,
            bundle,
            kept,
            lambda chosen: _chosen_images(plan, store, records, chosen),
            examine,
            None if embeddings is None else embeddings.of,
            on_batch,
            measure_images,
        )
        audited = None if audit is None else audit(_pixels(plan, store, records))
    measured = replace(measured, tallies=tallies, privacy=privacy, audit=None if audited is None else audited.document)
    counts = {name: len(samples) for name, samples in kept.items()}
    content = make_report(plan, bundle, counts, measured)
    texts = {
        PREVIEW: preview,
        CARD: card,
        CROISSANT: croissant(plan, bundle, files, sum(counts.values())),
        REPORT: content.to_json(),
        REPORT_PAGE: report_page(content).encode(),
    }
    if audited is not None:
        texts[PRIVACY_AUDIT] = (json.dumps(audited.document, indent=2) + "\n").encode()
        texts[AUDIT_TEXT] = audited.text.encode()
    # Signatures differ each time. If another process has taken over and finished, or written the preview, its files stay.
    done = _finished(plan, store, identity)
    if done is not None:
        return done
    if plan.request.signed:
        there = store.read_if_exists(PREVIEW)
        if there is not None and canonical_sha256(there) == canonical_sha256(preview):
            texts[PREVIEW] = there
    for name in {PRIVACY_AUDIT, AUDIT_TEXT} - texts.keys():
        if store.size(name) is not None:  # of a run with an audit that was killed before the manifest
            store.remove(name)
    for name, data in texts.items():
        store.write(name, data)
        files.append(FileEntry(name, len(data), hashlib.sha256(data).hexdigest()))
    manifest = Manifest(
        request=plan.request,
        bundle_name=bundle.name,
        bundle_digest=bundle.digest,
        class_names=plan.class_names,
        synthesizer=synthesizer_identity(identity),
        plan_digest=plan.digest,
        shards=plan.shards,
        files=tuple(sorted(files, key=lambda file: file.name)),
        classifier=tallies,
        privacy=privacy,
        format_version=plan.format_version,
    )
    if plan.request.signed:
        manifest = manifest.with_canonical(_canonical_hashes(plan, records, files, texts))
    store.write(MANIFEST, manifest.to_json())
    _remove_unfinished(store)
    return manifest


def _remove_unfinished(store: Store) -> None:
    store.remove(PARTIAL)
    store.abort_uploads()  # killed processes have left them also of files that are not in that folder


def read_manifest(store: Store) -> Manifest:
    """Read the manifest of a finished dataset.

    Raises:
        StorageError: There is none, or it is damaged.
    """
    return read_hashed_manifest(store)[0]


def read_hashed_manifest(store: Store) -> tuple[Manifest, str]:
    """Read the manifest of a finished dataset, and the SHA-256 (hex) of its file.

    Raises:
        StorageError: There is none, or it is damaged.
    """
    data = store.read_if_exists(MANIFEST, limit=MAX_MANIFEST_BYTES)
    if data is None:
        raise StorageError(f"{store.location}: has no {MANIFEST}; is this the folder of a finished dataset?")
    return parse_manifest(data, store.where(MANIFEST)), hashlib.sha256(data).hexdigest()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse manifest.json.

    Args:
        data: Content of the file.
        where: Name of the file for errors.

    Raises:
        StorageError: It is not a manifest. The message names the field.
    """
    try:
        document = ManifestDocument.model_validate(parse_json(data))
    except ValidationError as error:
        first = error.errors()[0]
        field = escape(".".join(str(part) for part in first["loc"])) or "the document"
        raise StorageError(f"{where}: {field}: {first['msg']}; is this a {MANIFEST} of dermis?") from None
    except ValueError as error:
        raise StorageError(f"{where}: is not JSON that can be used ({error})") from None
    _check_document(document, where)
    return Manifest(
        request=document.request,
        bundle_name=document.bundle.name,
        bundle_digest=document.bundle.digest,
        class_names=tuple(document.bundle.class_names),
        synthesizer=document.synthesizer,
        plan_digest=document.plan.digest,
        shards=document.plan.shards,
        files=tuple(FileEntry(file.name, file.bytes, file.sha256) for file in document.files),
        classifier=None if document.classifier is None else _tallies(document.classifier),
        privacy=None if document.privacy is None else _privacy(document.privacy),
        format_version=document.format_version,
        canonical=None if document.canonical is None else CanonicalHashes(**document.canonical.model_dump()),
    )


def _check_document(document: ManifestDocument, where: str) -> None:
    """Raise StorageError if fields contradict each other."""
    names = document.bundle.class_names
    if len({file.name.casefold() for file in document.files}) != len(document.files):
        raise StorageError(f"{where}: files: a name occurs more than once")
    if len(set(names)) != len(names):
        raise StorageError(f"{where}: bundle.class_names: a name occurs more than once")
    if unknown := sorted(document.request.classes.keys() - set(names)):
        raise StorageError(f"{where}: request.classes.{escape(unknown[0])}: is not a class of the bundle")
    samples = document.request.samples
    if (document.plan.samples, document.plan.shards) != (samples, -(-samples // document.request.shard_size)):
        raise StorageError(f"{where}: plan: has other samples or shards than the request")


def _canonical_hashes(
    plan: DatasetPlan, records: Sequence[PackedShard], files: Sequence[FileEntry], texts: Mapping[str, bytes]
) -> dict[str, str]:
    """Return the hash without the signatures of images of each file that has signatures or their hashes in it."""

    def images_of(record: PackedShard) -> Iterator[tuple[str, str]]:
        for sample in _kept(plan, record):
            yield file_name(plan, sample.index, sample.label), sample.sha256 or ""

    if plan.request.format == "imagefolder":
        hashes = {ARCHIVE: listing_sha256(chain.from_iterable(map(images_of, records)))}
    else:
        hashes = {record.file.name: listing_sha256(images_of(record)) for record in records}
    croissant_sha256 = hashlib.sha256(canonical_croissant(texts[CROISSANT], hashes)).hexdigest()
    return hashes | {PREVIEW: canonical_sha256(texts[PREVIEW]), CROISSANT: croissant_sha256}


def _tallies(documents: Mapping[str, TallyDocument]) -> dict[str, ClassifierTally]:
    return {
        name: ClassifierTally(document.images, document.drawn, document.agreeing)
        for name, document in documents.items()
    }


def _privacy(document: PrivacyDocument) -> PrivacyReport:
    attack = None if document.exposure.attack is None else Attack(**document.exposure.attack.model_dump())
    return PrivacyReport(
        index=document.index,
        classes={
            name: PrivacyTally(**class_document.model_dump()) for name, class_document in document.classes.items()
        },
        distances=tuple(document.distances),
        baseline=tuple(document.baseline),
        exposure=Exposure(document.exposure.identifiability, attack),
        limit=document.limit,
        stands_on=document.stands_on,
        weakness=document.weakness,
    )


def _finished(plan: DatasetPlan, store: Store, identity: Mapping[str, str]) -> Manifest | None:
    """Return the existing manifest if it is of this plan and identity. A damaged one is written again."""
    try:
        manifest = read_manifest(store)
    except StorageError as error:
        if error.kind != "storage":  # the storage cannot be reached, so it can exist
            raise
        return None
    same = (
        manifest.plan_digest == plan.digest
        and manifest.format_version == plan.format_version
        and dict(manifest.synthesizer) == synthesizer_identity(identity)
    )
    return manifest if same else None


def _records(
    plan: DatasetPlan,
    store: Store,
    identity: Mapping[str, str],
    embeddings: EmbeddingFile | None,
    on_batch: Callable[[], None] | None,
) -> list[PackedShard]:
    """Read the results of all shards, and add the embeddings of the gate to `embeddings`.

    Raises:
        MissingShardsError: A shard is missing or damaged, or was made by another synthesizer.
    """
    absent = missing_shards(plan, store)  # reads no file, so that it is known at once
    if absent:
        raise MissingShardsError(store.location, plan.shards, absent, "is missing")
    records: list[PackedShard] = []
    unusable: list[int] = []
    for shard in range(plan.shards):
        if on_batch is not None:
            on_batch()
        record = find_shard(plan, shard, store, identity=identity)
        try:
            if record is None:
                raise ValueError("no usable shard")
            packed = pack(plan, record)
            if embeddings is not None and not unusable:
                embeddings.add(plan, record)
        except (ValueError, OverflowError):
            unusable.append(shard)
        else:
            records.append(packed)
    if unusable:
        raise MissingShardsError(
            store.location,
            plan.shards,
            unusable,
            "is damaged, or was made by another synthesizer or for another request",
        )
    return records


def _kept(plan: DatasetPlan, record: PackedShard) -> Iterator[DatasetSample]:
    return (sample for sample in unpack(plan, record) if sample.sha256 is not None)


def _by_class(plan: DatasetPlan, records: Sequence[PackedShard]) -> dict[str, array[int]]:
    """Return the indices of the samples that have an image, by class and in order."""
    kept = {name: array("q") for name in plan.request.classes}
    for record in records:
        for sample in _kept(plan, record):
            kept[plan.class_names[sample.label]].append(sample.index)
    return kept


def _chosen_images(
    plan: DatasetPlan, store: Store, records: Sequence[PackedShard], chosen: Collection[str]
) -> Iterator[tuple[str, Images]]:
    """Yield name and pixels of the images with these file names, in the order of the dataset."""
    for record in records:
        names = {file_name(plan, sample.index, sample.label) for sample in _kept(plan, record)} & set(chosen)
        for name, data in _images(plan, store, record) if names else ():
            if name in names:
                yield name, decode(data)


def _pixels(plan: DatasetPlan, store: Store, records: Sequence[PackedShard]) -> Iterator[tuple[DatasetSample, Images]]:
    """Yield all samples that have an image, and its pixels."""
    for record in records:
        samples = {file_name(plan, sample.index, sample.label): sample for sample in _kept(plan, record)}
        for name, data in _images(plan, store, record):
            yield samples[name], decode(data)


def _tally(plan: DatasetPlan, records: Sequence[PackedShard]) -> dict[str, ClassifierTally]:
    outcomes = (
        (sample.label, sample.probability, sample.tries - (sample.checks.rejected if sample.checks else 0))
        for record in records
        for sample in unpack(plan, record)
    )
    return tally(plan, outcomes)


def _checks(plan: DatasetPlan, records: Sequence[PackedShard]) -> Iterator[tuple[int, Checks]]:
    """Yield label and checks of every sample."""
    for record in records:
        for sample in unpack(plan, record):
            assert sample.checks is not None
            yield sample.label, sample.checks


def _check_some(plan: DatasetPlan, records: Sequence[PackedShard]) -> None:
    """Raise RequestError if no image was kept."""
    if any(record.rows["kept"].any() for record in records):
        return
    candidates = sum(int(record.rows["tries"].sum()) for record in records)
    by_gate = sum(int(record.rows["rejected"].sum()) for record in records) if plan.gated else 0
    if by_gate == 0:
        options = plan.request.classifier
        defaults = ClassifierOptions.model_validate({})
        limiting = [
            name
            for name in ("keep", "min_probability", "max_probability")
            if options is not None and getattr(options, name) != getattr(defaults, name)
        ]
        message = f"none of {candidates:,} images was kept; change {' or '.join(limiting)}, or allow more tries"
        raise RequestError(f"classifier.{limiting[0]}" if len(limiting) == 1 else "classifier", message)
    raise RequestError(
        "privacy.on_reject",
        f"none of {candidates:,} images was kept, the gate rejected {by_gate:,}; this generator may copy its training images; "
        "generate with flag instead to inspect the images",
    )


@contextmanager
def _metadata(plan: DatasetPlan, records: Sequence[PackedShard]) -> Iterator[IO[bytes]]:
    """Give metadata.csv as an open file, in the temporary folder if it is large."""
    place = tempfile.gettempdir()
    with tempfile.SpooledTemporaryFile(_IN_MEMORY, prefix="dermis-metadata-") as file:
        with storage_errors(place):
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            writer = csv.DictWriter(text, columns(plan), lineterminator="\n")
            writer.writeheader()
            for record in records:
                writer.writerows(metadata_row(plan, sample) for sample in _kept(plan, record))
            text.detach()
        yield file


def _write_copy(store: Store, name: str, source: IO[bytes]) -> FileEntry:
    """Write the content of an open file as a file of the dataset."""
    with store.writing(name) as path, storage_errors(store.where(name)):
        source.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(source, file)
        source.seek(0)
        return FileEntry(name, path.stat().st_size, hash_file(source))


def _images(plan: DatasetPlan, store: Store, record: PackedShard) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each image of a shard. Errors of the format's library become StorageErrors."""
    with store.open(record.file.name, size=record.file.bytes) as file:
        images = read_container(plan, file)
        while True:
            try:
                item = next(images, None)
            except Exception as error:  # zipfile, tarfile and Arrow have different exceptions; Arrow's has no errno
                place = store.where(record.file.name)
                if not isinstance(error, OSError) or error.errno is not None:
                    failed = storage_error(error, place, remote=not store.local)
                    if failed is not None and failed.kind == "storage-unavailable":
                        raise failed from error
                raise StorageError(f"{place}: is damaged ({error}); make the shard again") from error
            if item is None:
                return
            yield item


def _write_archive(
    plan: DatasetPlan,
    store: Store,
    records: Sequence[PackedShard],
    texts: Mapping[str, IO[bytes]],
    while_archiving: Callable[[], None] | None,
) -> FileEntry:
    """Write images.zip from the parts, and the texts at its end."""
    with store.writing(ARCHIVE) as path:
        with storage_errors(store.where(ARCHIVE)), zip_of_many(path) as archive:
            for record in records:
                if while_archiving is not None:
                    while_archiving()
                for name, data in _images(plan, store, record):
                    add_to_zip(archive, name, data)
            for name, file in texts.items():
                copy_to_zip(archive, name, file)
        with storage_errors(store.where(ARCHIVE)), path.open("rb") as written:
            return FileEntry(ARCHIVE, path.stat().st_size, hash_file(written))


def _preview(plan: DatasetPlan, store: Store, records: Sequence[PackedShard]) -> Images:
    """Return thumbnails of the first samples of each class, at most 64, in complete rows if there are enough."""
    classes = list(plan.request.classes)[:PREVIEW_IMAGES]
    rows = max(PREVIEW_IMAGES // PREVIEW_COLUMNS // len(classes), 1)
    share = min(rows * PREVIEW_COLUMNS, max(PREVIEW_IMAGES // len(classes), 1))
    counts = {plan.class_names.index(name): min(share, plan.request.classes[name]) for name in classes}
    images: dict[int, list[Any]] = {label: [] for label in counts}
    for record in records:
        if all(len(images[label]) == count for label, count in counts.items()):
            break
        chosen: dict[str, int] = {}
        for sample in _kept(plan, record):
            label = sample.label
            number = sum(other == label for other in chosen.values())
            if label in counts and len(images[label]) + number < counts[label]:
                chosen[file_name(plan, sample.index, label)] = label
        for name, data in _images(plan, store, record) if chosen else ():
            if name in chosen:
                images[chosen[name]].append(thumbnail(decode(data), PREVIEW_SIDE))
    return np.stack([image for label in counts for image in images[label]])
