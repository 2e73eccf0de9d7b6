"""Collect what a privacy audit of a bundle or a dataset is computed from: images, features, scores, attributes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.authenticity.checker import CLASSIFIER, Embedder
from dermis.bundle import Bundle, load_discriminator, trained_on
from dermis.classifier.preprocess import to_input
from dermis.dataset.manifest import read_manifest
from dermis.dataset.store import Store
from dermis.devices import resolve_device
from dermis.errors import DataError
from dermis.features import FeatureExtractor
from dermis.metrics.neighbours import Features
from dermis.privacy.attacks import Scores, Space
from dermis.privacy.audit import MIN_IMAGES, Evidence, PrivacyAudit, Subject, run_audit
from dermis.privacy.generator_attacks import Logits, discriminator_scores, optimised_scores, projection_scores
from dermis.privacy.power import PLANTED_SHARE
from dermis.privacy.questions import Attribute
from dermis.synthesizer import Synthesizer
from training.data.attributes import value_of
from training.data.embedding import embed_array, progress_bar
from training.data.images import ImageDataset
from training.data.sources import MANIFEST, Record
from training.evaluation.copies import recompressed
from training.evaluation.features import labels_in_proportion, real_features
from training.evaluation.holdout import check_holdout, groups_of, without_ids
from training.evaluation.sets import Generation, generated_batches
from training.gan.state import load_stored_discriminator

ATTRIBUTES = {
    "sex": "sex",
    "age_approx": "age",
    "anatom_site": "site",
    "diagnosis": "diagnosis",
    "skin_type": "skin type",
}
PLANTED_QUALITY = 75  # JPEG quality of the copies that are planted to try the audit
PROJECTION_DISTANCE = "lite0"
PIXELS = "pixels"
PIXEL_SIDE = 16


@dataclass(frozen=True)
class Options:
    """Options of an audit of a bundle.

    Attributes:
        count: Number of generated images; None for as many as members.
        seed: Seed of everything random.
        truncation_psi: Truncation of the generated images.
        projection_steps: Steps by which every real image is also projected by optimisation; 0 for none.
        training_state: Checkpoint of the generator's training, for its discriminator.
    """

    count: int | None = None
    seed: int = 0
    truncation_psi: float = 1.0
    projection_steps: int = 0
    training_state: Path | None = None


def audit_privacy(
    bundle: Bundle,
    members: ImageDataset,
    non_members: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    *,
    dataset: ImageDataset | None = None,
    dataset_location: Path | None = None,
    options: Options = Options(),
    cache: Path | None = None,
    device: str = "auto",
) -> PrivacyAudit:
    """Audit a bundle or, with `dataset`, the images of a dataset.

    The space of pixels is added to those of the extractors, and that of the bundle's classifier if the bundle has one.

    Args:
        bundle: The bundle.
        members: Its training images.
        non_members: Held-out real images of other patients.
        extractors: The feature spaces.
        dataset: Generated images that are audited in place of new samples; attacks on the generator are left out.
        dataset_location: Folder of the dataset, for its manifest; None if this bundle has just made the images.
        options: The options.
        cache: Folder for features of images.
        device: Device of the networks.

    Raises:
        DataError: Images or patients are in both sets, or there are too few.
    """
    check_sets(bundle, members, non_members, dataset)
    groups = groups_of(members, non_members)
    discriminator, more = (None, []) if dataset is not None else _discriminator(bundle, members, options, device)
    digest = trained_on(bundle.provenance)
    remarks = _remarks(bundle, members, groups, digest)
    made_by = bundle.digest if dataset_location is None else _made_by(dataset_location)
    if made_by is None:
        remarks.append("The dataset has no manifest, so it is not known which generator made it.")
    elif made_by != bundle.digest:
        remarks.append(f"The dataset was made by a bundle with another digest ({made_by[:12]}).")
    embedder = None if bundle.classifier is None else Embedder(CLASSIFIER, bundle, device=device)
    spaces = [*extractors, pixel_space()]
    if embedder is not None:
        spaces.append(_classifier_space(embedder, bundle.generator.img_resolution))
    count = len(members.labels) if options.count is None else options.count
    if dataset is not None:
        count = len(dataset.labels)
    real = len(members.labels) + len(non_members.labels)
    planted = max(1, round(PLANTED_SHARE * len(members.labels)))
    attacked = real * _attacks_on_generator(bundle, options) if dataset is None else 0
    total = len(spaces) * (real + count + planted) + (count if dataset is None else 0) + attacked
    with progress_bar(total, "auditing") as bar:
        generated, labels = _generated(bundle, members, spaces, dataset, count, options, cache, device, bar)
        features = [
            Space(
                space.name,
                real_features(members, space, cache, bar=bar),
                real_features(non_members, space, cache, bar=bar),
                of_generated,
                knows_members=space.name == CLASSIFIER,
            )
            for space, of_generated in zip(spaces, generated, strict=True)
        ]
        copies = _copies(members, planted, options.seed)
        planted_features = {space.name: embed_array(copies, space.extract, bar) for space in spaces}
        scores: list[Scores] = []
        if dataset is None:
            scores = _generator_scores(bundle, members, non_members, discriminator, options, device, bar)
            if bundle.encoder is None:
                more = ["The bundle has no encoder, so the error of encoded images was not measured.", *more]
            remarks += more
    if embedder is not None:
        embedder.close()
    subject = Subject(
        scope="bundle" if dataset is None else "dataset",
        bundle_name=bundle.name,
        bundle_digest=bundle.digest,
        dataset_digest=None if dataset is None else _digest(dataset, dataset_location),
        generated=count,
        members=len(members.labels),
        member_patients=None if groups is None else len(set(groups[: len(members.labels)])),
        members_sha256=members.sha256,
        members_are_training_set=None if digest is None else digest == members.sha256,
        non_members=len(non_members.labels),
        non_member_patients=None if groups is None else len(set(groups[len(members.labels) :])),
        non_members_sha256=non_members.sha256,
        spaces={space.name: space.identity for space in spaces},
        seed=options.seed,
        truncation_psi=options.truncation_psi if dataset is None else None,
        members_without_ids=without_ids(members),
        non_members_without_ids=without_ids(non_members),
        dataset_of_bundle=None if dataset is None or made_by is None else made_by == bundle.digest,
    )
    evidence = Evidence(
        features,
        groups if groups is not None else [f"{i}" for i in range(real)],
        scores,
        _attributes(bundle, members, non_members, labels),
        planted_features,
        remarks,
    )
    return run_audit(subject, evidence)


def check_sets(
    bundle: Bundle,
    members: ImageDataset,
    non_members: ImageDataset,
    dataset: ImageDataset | None = None,
    *,
    options: tuple[str, str] = ("--members", "--non-members"),
) -> None:
    """Check that the sets are large enough, fit the bundle's classes, and share no image and no patient.

    Args:
        bundle: The bundle.
        members: Its training images.
        non_members: Held-out images.
        dataset: Images of an audited dataset.
        options: Names of the options of members and non-members, for messages.

    Raises:
        DataError: A check fails.
    """
    sets = dict(zip(options, (members, non_members), strict=True))
    if dataset is not None:
        sets["--dataset"] = dataset
    for option, images in sets.items():
        if len(images.labels) < MIN_IMAGES:
            raise DataError(
                f"{option}: {len(images.labels)} images are too few for an audit; give {MIN_IMAGES} or more"
            )
        unknown = set(images.class_names) - set(bundle.class_names)
        if bundle.class_names and unknown:
            raise DataError(
                f"{option}: has the class {min(unknown)}, but the bundle has {', '.join(bundle.class_names)}; name "
                f"their column with {options[0].removesuffix('members')}class-column"
            )
    check_holdout(members, non_members, trained_on(bundle.provenance), option=options[1], data_option=options[0])


def _remarks(bundle: Bundle, members: ImageDataset, groups: Sequence[str] | None, digest: str | None) -> list[str]:
    remarks = []
    if digest is None:
        remarks.append(
            "The bundle does not name its training set, so it is not known whether the members are that set."
        )
    elif digest != members.sha256:
        remarks.append("The members are not the set that the bundle names as its training set.")
    if groups is None:
        remarks.append("The tables name no patients or lesions, so every image counts as one patient.")
    if bundle.classifier is not None:
        remarks.append(
            "The feature space classifier is that of the bundle's classifier, which may have been trained on the members, so "
            "it is a control of the attacks in this space only."
        )
    return remarks


def pixel_space() -> FeatureExtractor:
    """The pixels of images reduced to 16 x 16, with mean 0 and length 1.

    Networks can place a copy that was compressed or changed a little as far from its original as another image is. Here it is
    nearest to its original, and no network has learnt from the members.
    """
    side = PIXEL_SIDE

    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        rows = np.stack([to_input(image, side) for image in images]).reshape(len(images), -1).astype(np.float32)
        rows -= rows.mean(axis=1, keepdims=True)
        scaled: NDArray[np.float32] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
        return scaled

    return FeatureExtractor(PIXELS, f"pixels/{side}-lanczos/mean-0-length-1", side * side * 3, extract)


def _classifier_space(embedder: Embedder, size: int) -> FeatureExtractor:
    """The feature space of the bundle's classifier as an extractor of images of `size` px."""

    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return embedder.embed(images, size)

    return FeatureExtractor(CLASSIFIER, embedder.identity, embedder.dim, extract)


def _generated(
    bundle: Bundle,
    members: ImageDataset,
    spaces: Sequence[FeatureExtractor],
    dataset: ImageDataset | None,
    count: int,
    options: Options,
    cache: Path | None,
    device: str,
    bar: tqdm,
) -> tuple[list[Features], list[str]]:
    """Features of the generated images in each space, and their classes ("" without classes)."""
    if dataset is not None:
        classes = [dataset.class_names[label] if bundle.class_names else "" for label in dataset.labels]
        return [real_features(dataset, space, cache, bar=bar) for space in spaces], classes
    labels = labels_in_proportion(bundle_labels(bundle, members), count)
    generation = Generation(labels, options.seed, options.truncation_psi, ("random",))
    parts: list[list[NDArray[np.float32]]] = [[] for _ in spaces]
    with Synthesizer(bundle, device=device) as synthesizer:
        for images in generated_batches(synthesizer, generation, "random"):
            bar.update(len(images))
            for collected, space in zip(parts, spaces, strict=True):
                collected.append(space.extract(images))
                bar.update(len(images))
    names = [bundle.class_names[label] if bundle.class_names else "" for label in labels]
    return [np.concatenate(collected) for collected in parts], names


def bundle_labels(bundle: Bundle, images: ImageDataset) -> NDArray[np.int64]:
    """Class numbers of the bundle for images; zeros for a bundle without classes."""
    if not bundle.class_names:
        return np.zeros_like(images.labels)
    numbers = np.array([bundle.class_names.index(name) for name in images.class_names], np.int64)
    result: NDArray[np.int64] = numbers[images.labels]
    return result


def _copies(members: ImageDataset, count: int, seed: int) -> NDArray[np.uint8]:
    """Some members, compressed again: copies [count, R, R, 3] that the audit has to detect."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(members.labels))[:count])
    return np.stack([recompressed(members.images[i], PLANTED_QUALITY) for i in chosen])


def _attacks_on_generator(bundle: Bundle, options: Options) -> int:
    has_discriminator = bundle.discriminator is not None or options.training_state is not None
    return (bundle.encoder is not None) + bool(options.projection_steps) + has_discriminator


def _discriminator(
    bundle: Bundle, members: ImageDataset, options: Options, device: str
) -> tuple[Logits | None, list[str]]:
    """The discriminator that is attacked, of the training state or the bundle, and remarks on it."""
    place = resolve_device(device)
    if options.training_state is None:
        if bundle.discriminator is None:
            return None, ["There is no discriminator in the bundle, so it was not attacked."]
        return load_discriminator(bundle).to(place), []
    stored = load_stored_discriminator(options.training_state, place)
    c_dim = len(bundle.class_names)
    if (stored.config.resolution, stored.config.c_dim) != (bundle.generator.img_resolution, c_dim):
        raise DataError(
            f"{options.training_state}: its discriminator is for {stored.config.resolution} px and {stored.config.c_dim} "
            f"classes, the bundle has {bundle.generator.img_resolution} px and {c_dim} classes"
        )
    if stored.dataset_sha256 != members.sha256:
        return stored.network, ["The training state is of a training on other images than the members."]
    return stored.network, []


def _generator_scores(
    bundle: Bundle,
    members: ImageDataset,
    non_members: ImageDataset,
    discriminator: Logits | None,
    options: Options,
    device: str,
    bar: tqdm,
) -> list[Scores]:
    """Scores of all attacks on the generator that are possible."""
    sets = (members, non_members)
    scores: list[Scores] = []
    if bundle.encoder is not None:
        scores.append(
            _joined([projection_scores(bundle, each.images, device=device, on_batch=bar.update) for each in sets])
        )
    if options.projection_steps:
        scores.append(
            _joined(
                [
                    optimised_scores(
                        bundle,
                        each.images,
                        steps=options.projection_steps,
                        distance=PROJECTION_DISTANCE,
                        device=device,
                        on_image=bar.update,
                    )
                    for each in sets
                ]
            )
        )
    if discriminator is not None:
        scores.append(
            _joined(
                [
                    discriminator_scores(
                        discriminator,
                        each.images,
                        bundle_labels(bundle, each).tolist(),
                        len(bundle.class_names),
                        device=resolve_device(device),
                        on_batch=bar.update,
                    )
                    for each in sets
                ]
            )
        )
    return scores


def _joined(parts: Sequence[Scores]) -> Scores:
    """Scores of members and of non-members as one array."""
    return replace(parts[0], values=np.concatenate([part.values for part in parts]))


def _attributes(
    bundle: Bundle, members: ImageDataset, non_members: ImageDataset, generated: Sequence[str]
) -> list[Attribute]:
    """Attributes of the images: the class, and those of the table that at least one image has."""
    attributes = []
    if len(bundle.class_names) > 1:
        real = [each.class_names[label] for each in (members, non_members) for label in each.labels]
        attributes.append(Attribute("class", real, generated))
    records = (*members.records, *non_members.records)
    if len(records) < len(members.labels) + len(non_members.labels):
        return attributes
    for column, name in ATTRIBUTES.items():
        values = [_value(record, column) for record in records]
        if len(set(values) - {""}) > 1:
            attributes.append(Attribute(name, values))
    return attributes


def _value(record: Record, column: str) -> str:
    value = value_of(record.row, column).lower()
    if column != "age_approx":
        return value
    try:
        return f"{int(float(value)) // 10 * 10}"  # decades
    except (ValueError, OverflowError):
        return ""


def _made_by(location: Path) -> str | None:
    """The digest of the bundle that made a dataset, by its manifest; None without one. A manifest names no weights."""
    return read_manifest(Store(location)).bundle_digest if (location / MANIFEST).is_file() else None


def _digest(dataset: ImageDataset, location: Path | None) -> str:
    if location is not None and (location / MANIFEST).is_file():
        return hashlib.sha256((location / MANIFEST).read_bytes()).hexdigest()
    return dataset.sha256
