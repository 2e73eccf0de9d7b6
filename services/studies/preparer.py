"""Prepare the images of reader studies in the background, and remove studies that have expired.

A process claims a study for a limited time and stores its images in batches, so that another one continues where it stopped.
All images of a study are stored by the same encoder without metadata, whatever they are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from dermis.dataset.store import PARTIAL
from dermis.errors import BundleError, DermisError, RequestError, StorageError
from dermis.files import names_below
from dermis.image_reading import ImageError, read_training_image
from dermis.imaging import Images, as_rgb, encode
from services.errors import DatabaseUnavailableError, InferenceMemoryError, is_transient
from services.inference.client import InferenceClients
from services.inference.samples import Options, pack_rows
from services.models import ServedModels
from services.observed_store import ObservedStore, check_free_space
from services.problems import ProblemError
from services.settings import Settings
from services.studies.table import CLAIM_SECONDS, UPLOAD_PREFIX, StudyTable, upload_file
from services.studies.tables import Study, StudyImage
from services.tenants import folder_of

logger = logging.getLogger("dermis.studies")

_BATCH = 16
_POLL_SECONDS = 1.0
_CLEAN_SECONDS = 60.0
_MOST_FAILURES = 20
_LATE_SECONDS = 3600.0  # after the files of a study were removed, in which a process may still write some
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}


def study_store(storage: str, study: Study) -> ObservedStore:
    """The store of the files of a study."""
    return ObservedStore(f"{storage.rstrip('/')}/{folder_of(study.tenant, study.id)}")


def folder_images(folder: Path, class_names: Sequence[str]) -> list[tuple[int, str]]:
    """The real images of a folder that the operator has set.

    Args:
        folder: The folder, with one folder for each class.
        class_names: The classes of a model; without classes, all images of the folder are of class 0.

    Returns:
        Class number and path below the folder of each image, sorted.

    Raises:
        ProblemError: The folder cannot be read. The message does not name it: it is for callers of the API.
    """
    try:
        names = sorted(name for name in names_below(folder) if Path(name).suffix.lower() in _SUFFIXES)
    except OSError as error:
        logger.error("real images of studies", extra={"folder": str(folder), "error": str(error)})
        detail = "the folder of real images of this service cannot be read; ask its operator"
        raise ProblemError("internal", detail) from None
    if not class_names:
        return [(0, name) for name in names]
    label_of = {name: label for label, name in enumerate(class_names)}
    return [(label_of[first], name) for name in names if (first := name.split("/", 1)[0]) in label_of and "/" in name]


class StudyPreparer:
    """Prepares studies until it is stopped. Any number of processes may run one on the same database.

    Args:
        table: The studies.
        settings: The settings of the service.
        models: The served models.
        inference: The inference services.
    """

    def __init__(
        self, table: StudyTable, settings: Settings, models: ServedModels, inference: InferenceClients
    ) -> None:
        self._table = table
        self._settings = settings
        self._models = models
        self._inference = inference
        self._task: asyncio.Task[None] | None = None
        self._cleaned = float("-inf")

    def start(self) -> None:
        """Start in the background."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop between two images. The next start continues."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._table.close)

    async def _run(self) -> None:
        while True:
            try:
                await self._work()
            except Exception as error:  # such as a database that cannot be reached: the studies wait in it
                logger.warning("studies not prepared", extra={"error": str(error).partition("\n")[0]})
            await asyncio.sleep(_POLL_SECONDS if self._settings.max_studies else _CLEAN_SECONDS)

    async def _work(self) -> None:
        if time.monotonic() - self._cleaned >= _CLEAN_SECONDS:
            self._cleaned = time.monotonic()
            await asyncio.to_thread(self._remove_ended)
        while (study := await asyncio.to_thread(self._table.claim)) is not None:
            try:
                await self._prepare_claimed(study)
            except asyncio.CancelledError:
                # An error must not replace this one, which ends the task: the claim ends by itself.
                with suppress(Exception):
                    await asyncio.to_thread(self._table.release, study.id)
                raise
            except Exception as error:
                await self._fail(study, error)
            await asyncio.to_thread(self._remove_if_deleted, study)

    def _remove_ended(self) -> None:
        for study in self._table.to_delete():
            try:
                remove_study(self._table, self._settings.storage, study)
            except DermisError as error:  # it is tried again later, and does not keep the others
                logger.warning("study not removed", extra={"study": study.id, "error": str(error)})

    def _remove_if_deleted(self, study: Study) -> None:
        """Remove files that were written after the study was deleted by someone else."""
        if self._table.get(study.tenant, study.id) is None:
            ObservedStore(self._settings.storage).remove(folder_of(study.tenant, study.id))

    async def _fail(self, study: Study, error: Exception) -> None:
        logger.warning("study not prepared", extra={"study": study.id, "error": str(error).partition("\n")[0]})
        final = isinstance(error, BundleError | RequestError | ImageError)
        if not isinstance(error, DermisError | ImageError):
            logger.error("study failed", extra={"study": study.id}, exc_info=error)
        message = str(error) if isinstance(error, DermisError | ImageError) else "internal error; see the log"
        if isinstance(error, StorageError):
            # Its own message names folders.
            full = error.kind == "storage-full"
            message = "the storage is full" if full else "the storage could not be read or written"
        if isinstance(error, InferenceMemoryError):
            message = "the model had too little memory"
        most = 1 if final else _MOST_FAILURES
        if is_transient(error):
            await asyncio.to_thread(self._table.release, study.id, 5.0)
        else:
            await asyncio.to_thread(self._table.record_failure, study.id, message, most)

    async def _prepare_claimed(self, study: Study) -> None:
        """Prepare a study, and renew the claim on it meanwhile: another process would make the same images."""
        preparation = asyncio.create_task(self._prepare(study))
        try:
            while not (await asyncio.wait([preparation], timeout=CLAIM_SECONDS / 3))[0]:
                with suppress(DatabaseUnavailableError):  # the preparation itself waits for the database, or fails
                    await asyncio.to_thread(self._table.renew, study.id)
            await preparation
        finally:
            preparation.cancel()
            await asyncio.gather(preparation, return_exceptions=True)

    async def _prepare(self, study: Study) -> None:
        more = await asyncio.to_thread(self._table.record_prepared, study.id, {})
        while more:
            batch = await asyncio.to_thread(self._table.unprepared, study.id, _BATCH)
            generated = [image for image in batch if image.truth == "generated"]
            pixels = await self._generate(study, generated) if generated else []
            drawn = {image.number: data for image, data in zip(generated, pixels, strict=True)}
            sizes = await asyncio.to_thread(self._store, study, batch, drawn)
            more = await asyncio.to_thread(self._table.record_prepared, study.id, sizes)
        current = await asyncio.to_thread(self._table.get, study.tenant, study.id)
        if current is not None and current.state == "preparing":
            await asyncio.to_thread(self._open, current)

    async def _generate(self, study: Study, images: Sequence[StudyImage]) -> list[Images]:
        bundle = await asyncio.to_thread(self._models.serving, study.model_name, study.model_digest)
        options = Options(bundle.digest, study.truncation_psi)
        rows = pack_rows(
            options, study.seed, [int(image.source) for image in images], [image.label for image in images]
        )
        return list(as_rgb(np.stack(await self._inference.generator.images(rows))))

    def _store(self, study: Study, batch: Sequence[StudyImage], drawn: dict[int, Images]) -> dict[int, int]:
        check_free_space(self._settings.storage, self._settings.min_free_bytes)
        store = study_store(self._settings.storage, study)
        sizes: dict[int, int] = {}
        for image in batch:
            if image.truth == "generated":
                data = encode(drawn[image.number])
            elif study.real_source == "uploads":
                data = store.read(upload_file(image.source))
            else:
                data = encode(self._read(study, image.source))
            store.write(image.file, data)
            sizes[image.number] = len(data)
        return sizes

    def _read(self, study: Study, name: str) -> Images:
        folder = self._settings.study_folder_of(study.tenant)
        if folder is None:
            raise BundleError("the operator has withdrawn the folder of real images")
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:
            raise BundleError("a real image of the folder is missing; create the study again") from None
        except OSError as error:  # such as that of a network file system that is not there for a moment
            raise StorageError(f"{folder / name}: cannot be read: {error.strerror}") from None
        return read_training_image(data, study.size)

    def _open(self, study: Study) -> None:
        store = study_store(self._settings.storage, study)
        images = self._table.images(study.id)
        for name in store.entries():  # not from the rows: an interrupted upload may have left a file without one
            if name.startswith(UPLOAD_PREFIX):
                store.remove(name)
        store.remove(PARTIAL)
        size = sum(store.size(image.file) or 0 for image in images)
        self._table.record_opened(study.id, size)
        logger.info("study open", extra={"study": study.id, "images": len(images)})


def remove_study(table: StudyTable, storage: str, study: Study) -> None:
    """Remove a study with its files. If that is interrupted, a later call completes it.

    A call an hour later does it once more. Until then `StudyTable.to_delete` has the study no more, and its row only shows that
    it existed: a process that was killed while it wrote images, of a preparation or an upload, can have written them late.
    """
    table.mark_deleting(study.id)
    ObservedStore(storage).remove(folder_of(study.tenant, study.id))
    table.delete(study.id, _LATE_SECONDS)
