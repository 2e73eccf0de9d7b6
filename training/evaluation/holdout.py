"""Check that held-out images were not used in training, and group images by patient."""

from __future__ import annotations

from dermis.errors import DataError
from dermis.privacy.audit import WithoutIds
from training.data.images import ImageDataset, content_digest
from training.data.splits import group_of


def check_holdout(
    dataset: ImageDataset,
    holdout: ImageDataset,
    trained_on: str | None,
    *,
    option: str = "--holdout",
    data_option: str = "--data",
) -> None:
    """Check that the generator was not trained on held-out images or patients, as far as ids, files and hashes show.

    Args:
        dataset: The images of --data.
        holdout: The images of --holdout.
        trained_on: SHA-256 of the training set that the bundle names. It also reveals held-out images that were split off
            after training, if both sets together are that training set.
        option: Name of the option that gave the held-out images, for messages.
        data_option: Name of the option that gave the other images.

    Raises:
        DataError: Images, patients or lesions are in both sets, or the bundle was trained on the held-out images.
    """
    if both := set(dataset.ids) & set(holdout.ids):
        raise DataError(f"{option}: {len(both)} of its images are also in {data_option}, the first is {min(both)}")
    ids_by_content = dict(zip(dataset.contents, dataset.ids, strict=False))
    copies = [
        (name, ids_by_content[file])
        for file, name in zip(holdout.contents, holdout.ids, strict=False)
        if file in ids_by_content
    ]
    if copies:
        raise DataError(
            f"{option}: {len(copies)} of its files are in {data_option} under other names, the first is {copies[0][0]}, "
            f"which is {copies[0][1]} in {data_option}; `dermis data leaks --remove` removes such copies"
        )
    if trained_on is not None and trained_on in (holdout.sha256, _together(dataset, holdout)):
        parts = option if trained_on == holdout.sha256 else f"{data_option} and {option} together"
        raise DataError(
            f"{option}: the bundle was trained on {parts}, so it has seen these images; split the images first, train on "
            f"one part and give the other part as {option}, or omit it"
        )
    groups = groups_of(dataset, holdout) or []
    if both := set(groups[: len(dataset.ids)]) & set(groups[len(dataset.ids) :]):
        raise DataError(
            f"{option}: {len(both)} patients or lesions also have images in {data_option}, the first is {min(both)}; "
            "split with `dermis data split`, which keeps them together"
        )


def groups_of(dataset: ImageDataset, holdout: ImageDataset | None = None) -> list[str] | None:
    """The patient (or lesion, or image) of every image of the first set, then of the second; None if not known.

    Both sets are grouped together, as two images can share a patient through a third one only.
    """
    sets = [dataset] if holdout is None else [dataset, holdout]
    records = [record for each in sets for record in each.records]
    if len(records) < sum(len(each.ids) for each in sets) or not any(r.patient_id or r.lesion_id for r in records):
        return None
    return group_of(records)


def without_ids(images: ImageDataset) -> WithoutIds:
    """Count the images that `groups_of` groups by their lesion only, or gives a group of their own."""
    without_patient = [record for record in images.records if not record.patient_id]
    return WithoutIds(len(without_patient), sum(not record.lesion_id for record in without_patient))


def _together(dataset: ImageDataset, holdout: ImageDataset) -> str:
    """`ImageDataset.sha256` of the union of both sets."""
    records = (*dataset.records, *holdout.records)
    pairs = sorted(zip(records, (*dataset.contents, *holdout.contents), strict=True), key=lambda pair: pair[0].id)
    return content_digest([record for record, _ in pairs], [content for _, content in pairs])
