"""The operations of the gateway on reader studies. Every method blocks: call it in a thread."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from dermis.bundle import Bundle
from dermis.errors import DermisError, RequestError, StorageError
from dermis.imaging import Images, decode, encode
from dermis.reader_study import PlanError, order_for_reader, plan_images, uncompressed_png
from services.observed_store import ObservedStore, check_free_space
from services.quotas import DAY
from services.settings import Settings
from services.studies.preparer import folder_images, remove_study, study_store
from services.studies.table import StudyStateError, StudyTable, upload_file
from services.studies.tables import Invitation, RealSource, Study, StudyImage
from services.tenants import folder_of

if TYPE_CHECKING:
    from services.studies.results import Row, StudyResults

logger = logging.getLogger("dermis.studies")

_RESULT_THREADS = 2
_KEPT_RESULTS = 8  # studies; the results of a large one have a few megabytes
AHEAD = 1  # images after the first unanswered one that a page can load before they are shown


class StudyService:
    """Reader studies of tenants.

    Attributes:
        table: The studies.
        pool: The threads that compute results, so that they take no thread from other calls.
    """

    def __init__(self, settings: Settings, table: StudyTable) -> None:
        self._settings = settings
        self.table = table
        self.pool = ThreadPoolExecutor(_RESULT_THREADS, "study-results")
        self._lock = threading.Lock()
        self._results: dict[str, tuple[tuple[int, int], StudyResults]] = {}  # by study, with the version of the answers

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
            ProblemError: The folder of real images cannot be read.
            TooManyStudiesError: The tenant has as many studies as the settings allow.
            QuotaExceededError: A quota of the tenant would be exceeded.
            StorageError: There is not enough space.
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
        pixels = {hashlib.sha256(image.tobytes()).hexdigest(): image for image in images}
        store = study_store(self._settings.storage, study)
        known = self.table.kept_uploads(study.id)
        # A process that ended between the two steps below leaves a row without a file, which is written now.
        files = {
            digest: encode(image)
            for digest, image in pixels.items()
            if digest not in known or store.size(upload_file(digest)) is None
        }
        sizes = {digest: len(data) for digest, data in files.items()}
        self._check_space(sum(sizes.values()))
        # The rows come first: what is stored counts for the quota and the limit before it takes space.
        added = self.table.add_uploads(
            study, label, sizes, self._settings.max_study_images, self._settings.quota_of(study.tenant)
        )
        try:
            for digest, data in files.items():
                store.write(upload_file(digest), data)
            late = files.keys() - self.table.kept_uploads(study.id)
        except BaseException:
            self._discard(study, {digest: sizes[digest] for digest in added})
            raise
        if late:
            self._discard(study, {digest: sizes[digest] for digest in late})
            raise StudyStateError("the study was opened or deleted meanwhile: it takes no more images")
        return len(added)

    def _discard(self, study: Study, sizes: Mapping[str, int]) -> None:
        """Remove rows and files of uploads, as far as they can be removed.

        A row without a file is completed by the next upload of the same image, or removed when the study is opened; a file
        without a row is removed then as well, or with the study.
        """
        try:
            store = study_store(self._settings.storage, study)
            for digest in self.table.remove_uploads(study, sizes):
                store.remove(upload_file(digest))
            if self.table.get(study.tenant, study.id) is None:
                ObservedStore(self._settings.storage).remove(folder_of(study.tenant, study.id))
        except DermisError as error:
            logger.warning("uploads of a study not removed", extra={"study": study.id, "error": str(error)})

    def _check_space(self, needed: int) -> None:
        check_free_space(self._settings.storage, self._settings.min_free_bytes, needed)

    def open(self, study: Study) -> Study:
        """Choose the images of a study with uploaded real images, and prepare it. So is one whose creation was interrupted.

        Raises:
            RequestError: There are too few real images.
            StudyStateError: It was opened before.
            QuotaExceededError: A quota of the tenant would be exceeded.
            StorageError: There is not enough space, or the uploaded images cannot be listed.
        """
        if study.state != "collecting":
            raise StudyStateError(f"the study is {study.state}: it was opened already")
        folder = self._settings.study_folder_of(study.tenant)
        if study.real_source == "folder" and folder is not None:  # the process ended while the study was created
            return self._prepare(study, folder_images(folder, study.class_names))
        uploads = self.table.uploads(study.id)
        files = set(study_store(self._settings.storage, study).entries())
        complete = [upload for upload in uploads if upload.file in files]
        real = [(upload.label, upload.sha256) for upload in complete]
        return self._prepare(study, real, [upload.sha256 for upload in complete], len(uploads) - len(complete))

    def _prepare(
        self, study: Study, real: Sequence[tuple[int, str]], uploads: Sequence[str] = (), incomplete: int = 0
    ) -> Study:
        labels = np.array([label for label, _ in real], dtype=np.int64)
        half = study.images // 2
        if len(real) < half:
            message = f"{study.images} images take {half} real ones, but there are {len(real)}"
            if incomplete:
                message += f"; {incomplete} more were not received completely: upload them again"
            raise RequestError("real_images", message, "invalid-request")
        try:
            slots = plan_images(labels, study.class_names, study.images, study.seed, equal_classes=study.equal_classes)
        except PlanError as error:
            raise RequestError("images", str(error)) from None
        sources = [(slot, real[slot.index][1] if slot.truth == "real" else str(slot.index)) for slot in slots]
        estimate = study.images * (study.size * study.size * 3 + 4096)
        self._check_space(estimate)
        return self.table.prepare(study, sources, uploads, estimate, self._settings.quota_of(study.tenant))

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
        data = study_store(self._settings.storage, study).read(name, limit=study.longest)
        try:
            image = decode(data)
        except (OSError, SyntaxError, ValueError):
            raise StorageError(f"{name}: was changed") from None
        if image.shape != (study.size, study.size, 3):
            raise StorageError(f"{name}: was changed")
        return uncompressed_png(image)

    def results(self, study: Study) -> StudyResults:
        """The results of the answers so far. They are kept until an answer is given or changed.

        Raises:
            RequestError: The images of the study are not chosen yet.
        """
        from services.studies.results import results_of  # loads scipy, which nothing else here needs

        version = self.table.answers_version(study.id)
        with self._lock:
            kept = self._results.get(study.id)
        if kept is not None and kept[0] == version:
            return kept[1]
        images = self.table.images(study.id)
        if not images:
            raise RequestError("study", "its images are not chosen yet, so there are no results", "study-state")
        invitations = self.table.invitations(study.id)
        rows = {invitation.id: row for row, invitation in enumerate(invitations)}
        results = results_of(study, images, invitations, self.table.answer_arrays(study.id, rows, len(images)))
        with self._lock:
            self._results.pop(study.id, None)
            self._results[study.id] = (version, results)
            while len(self._results) > _KEPT_RESULTS:
                del self._results[next(iter(self._results))]
        return results

    def answer_rows(self, study: Study) -> Iterator[list[Row]]:
        """The answers with the truth, as rows of one reader after another in the order of the invitations."""
        from services.studies.results import answer_rows

        images, invitations = self.table.images(study.id), self.table.invitations(study.id)
        return (answer_rows(study, images, each, self.table.answers_of(each.id)) for each in invitations)

    def close(self) -> None:
        """Stop the threads that compute results."""
        self.pool.shutdown(wait=False, cancel_futures=True)
