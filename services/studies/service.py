"""The operations of the gateway on reader studies. Every method blocks: call it in a thread."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence

import numpy as np

from dermis.bundle import Bundle
from dermis.errors import RequestError, StorageError
from dermis.imaging import Images, encode
from dermis.reader_study import PlanError, order_for_reader, padded, plan_images
from services.quotas import DAY
from services.settings import Settings
from services.studies.preparer import folder_images, remove_study, study_store
from services.studies.table import StudyStateError, StudyTable, upload_file
from services.studies.tables import Invitation, RealSource, Study, StudyImage

AHEAD = 1  # images after the first unanswered one that a page can load before they are shown


class StudyService:
    """Reader studies of tenants.

    Attributes:
        table: The studies.
    """

    def __init__(self, settings: Settings, table: StudyTable) -> None:
        self._settings = settings
        self.table = table

    def create(
        self,
        tenant: str,
        subject: str,
        bundle: Bundle,
        *,
        name: str,
        images: int,
        real_source: RealSource,
        equal_classes: bool,
        truncation_psi: float,
        seed: int | None,
        keep_days: float | None,
    ) -> Study:
        """Create a study of a tenant, and with images of the operator's folder prepare it.

        Args:
            tenant: The tenant.
            subject: Who creates it.
            bundle: The model of the generated images.
            name: Its name, which readers see.
            images: Number of images, half of them real.
            real_source: Where the real images come from.
            equal_classes: Whether both halves have as many images of each class.
            truncation_psi: Truncation of the generated images.
            seed: Seed of everything random; None for a random one.
            keep_days: Days after which it is deleted; None for as long as the settings allow.

        Raises:
            RequestError: There are too many images, or no folder of real images.
            TooManyStudiesError: The tenant has as many studies as the settings allow.
            QuotaExceededError: A quota of the tenant would be exceeded.
        """
        if images > self._settings.max_study_images:
            raise RequestError("images", f"at most {self._settings.max_study_images}", "request-too-large")
        if bundle.generator.img_channels != 3:
            raise RequestError(
                "model", "it generates images without colour, but real ones have colour; use another model"
            )
        folder = self._settings.study_folder_of(tenant)
        if real_source == "folder" and folder is None:
            raise RequestError("real_images", "this service has no folder of real images for you; upload some instead")
        limits = [self._settings.study_keep_days, self._settings.quota_of(tenant).retention_days, keep_days]
        values = {
            "tenant": tenant,
            "created_by": subject,
            "name": name,
            "images": images,
            "real_source": real_source,
            "equal_classes": equal_classes,
            "model_name": bundle.name,
            "model_digest": bundle.digest,
            "class_names": list(bundle.class_names),
            "size": bundle.generator.img_resolution,
            "truncation_psi": truncation_psi,
            "seed": secrets.randbits(62) if seed is None else seed,
            "expires_at": time.time() + min(days for days in limits if days is not None) * DAY,
        }
        if real_source == "uploads":
            return self.table.create(values, self._settings.max_studies)
        assert folder is not None
        real = folder_images(folder, bundle.class_names)
        study = self.table.create(values, self._settings.max_studies)
        try:
            return self._prepare(study, real)
        except BaseException:
            self.table.delete(study.id)
            raise

    def add_uploads(self, study: Study, class_name: str | None, images: Sequence[Images]) -> int:
        """Add uploaded real images, squares of the size of the study, all of one class.

        Returns:
            The number of images that were not added before.

        Raises:
            RequestError: The model has no such class, or there would be more images than the settings allow.
            StudyStateError: The study takes no more images.
            QuotaExceededError: The tenant may not store so much.
            StorageError: They cannot be stored.
        """
        if study.state != "collecting" or study.real_source != "uploads":
            raise StudyStateError(f"the study is {study.state}: it takes no more images")
        if study.class_names and class_name not in study.class_names:
            raise RequestError(
                "class", f"name one of the classes of the model: {', '.join(study.class_names)}", "unknown-class"
            )
        label = study.class_names.index(class_name) if study.class_names and class_name else 0
        known = {upload.sha256 for upload in self.table.uploads(study.id)}
        pixels = {hashlib.sha256(image.tobytes()).hexdigest(): image for image in images}
        new = {digest: image for digest, image in pixels.items() if digest not in known}
        most = self._settings.max_study_images
        if len(known) + len(new) > most:
            raise RequestError("files", f"a study can have at most {most} uploaded images", "request-too-large")
        files = {digest: encode(image) for digest, image in new.items()}
        store = study_store(self._settings.storage, study)
        # The files come first: every row then has a file, and files without a row are removed with the study.
        for digest, data in files.items():
            store.write(upload_file(digest), data)
        size = sum(map(len, files.values()))
        return self.table.add_uploads(study, dict.fromkeys(files, label), size, self._settings.quota_of(study.tenant))

    def open(self, study: Study) -> Study:
        """Choose the images of a study with uploaded real images, and prepare it.

        Raises:
            RequestError: There are too few real images.
            StudyStateError: It was opened before.
            QuotaExceededError: A quota of the tenant would be exceeded.
        """
        if study.state != "collecting":
            raise StudyStateError(f"the study is {study.state}: it was opened already")
        return self._prepare(study, [(upload.label, upload.sha256) for upload in self.table.uploads(study.id)])

    def _prepare(self, study: Study, real: Sequence[tuple[int, str]]) -> Study:
        labels = np.array([label for label, _ in real], dtype=np.int64)
        half = study.images // 2
        if len(real) < half:
            raise RequestError(
                "real_images",
                f"{study.images} images take {half} real ones, but there are {len(real)}",
                "invalid-request",
            )
        try:
            slots = plan_images(labels, study.class_names, study.images, study.seed, equal_classes=study.equal_classes)
        except PlanError as error:
            raise RequestError("images", str(error)) from None
        sources = [(slot, real[slot.index][1] if slot.truth == "real" else str(slot.index)) for slot in slots]
        estimate = study.images * (study.size * study.size * 3 + 4096)
        return self.table.prepare(study, sources, estimate, self._settings.quota_of(study.tenant))

    def counts(self, study: Study) -> dict[str, dict[str, int]]:
        """The number of real images by class: `uploaded` while they are collected, `real` and `generated` afterwards."""
        if study.state == "collecting":
            classes = [study.class_of(upload.label) for upload in self.table.uploads(study.id)]
            return {name: {"uploaded": classes.count(name)} for name in study.class_names or [""]}
        images = self.table.images(study.id)
        kinds = [(study.class_of(image.label), image.truth) for image in images]
        return {
            name: {"real": kinds.count((name, "real")), "generated": kinds.count((name, "generated"))}
            for name in study.class_names or [""]
        }

    def delete(self, study: Study) -> None:
        """Delete a study with its images, invitations and answers."""
        remove_study(self.table, self._settings.storage, study)

    def image_of(self, study: Study, invitation: Invitation, position: int) -> int:
        """The number of the image that a reader sees at a position, from 0."""
        return order_for_reader(study.images, study.seed, invitation.number)[position]

    def picture(self, study: Study, number: int) -> bytes:
        """The PNG file of an image, of the same length as all others of the study.

        Raises:
            StorageError: It cannot be read.
        """
        name = StudyImage(study.id, number, "real", 0, "", True).file
        data = study_store(self._settings.storage, study).read(name)
        if len(data) > study.longest:
            raise StorageError(f"{name}: was changed")
        return padded(data, study.longest)
