"""A dataset as DICOM objects: Dermoscopic Photography Image Storage (DICOM supplement 221), or VL Photographic Image Storage.

Every object says that it is synthetic: Synthetic Data (0008,001C) is YES, and there is no patient. One study holds the
dataset, with a series for each class. Identifiers follow from the digest of the dataset and the number of the sample, and no
object has a date, so that the same dataset gives the same bytes.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from dermis import __version__
from dermis.errors import DermisError, install_command
from dermis.exports.source import ExportSample, ExportSource

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

CODING_SCHEME = "99DERMIS"
PATIENT_NAME = "Synthetic^No patient"
_NAMESPACE = uuid.UUID("6f0d2c1e-3f55-5d4a-9d0b-8a7b4f5f3c52")  # of the names below; never changed
_EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
DicomClass = Literal["dermoscopic", "photographic"]
"""Dermoscopic photography, or any photography, which readers from before 2021 know, too."""
_CLASSES: Mapping[DicomClass, tuple[str, str]] = {  # UID of the storage class, and the modality
    "dermoscopic": ("1.2.840.10008.5.1.4.1.1.77.1.7", "DMS"),
    "photographic": ("1.2.840.10008.5.1.4.1.1.77.1.4", "XC"),
}
_MAX_SHORT, _MAX_LONG = 16, 64  # characters of the value representations SH and LO


def unique_identifier(*parts: str | int) -> str:
    """Return a DICOM UID (root 2.25) that is the same for the same parts."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join(str(part) for part in parts)).int}"


def dicom_files(source: ExportSource, kind: DicomClass = "dermoscopic") -> Iterator[tuple[str, bytes]]:
    """Yield name and content of a DICOM file for each sample of a dataset, in order.

    Args:
        source: The dataset.
        kind: Storage class of the objects.

    Raises:
        DermisError: pydicom is not installed.
        DataError: A file of the dataset was changed.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise DermisError(f"DICOM needs pydicom ({error}); {install_command('dicom')}") from error
    for sample in source.samples():
        yield f"{source.folder(sample.label)}/{sample.name}.dcm", dicom_object(source, sample, kind)


def dicom_object(source: ExportSource, sample: ExportSample, kind: DicomClass = "dermoscopic") -> bytes:
    """Encode one sample as a DICOM file with its pixels as they are, 8-bit RGB without compression."""
    from pydicom import dcmwrite
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID

    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    _add_identity(dataset, source, sample, kind)
    _add_equipment(dataset, source)
    _add_image(dataset, source, sample)
    if kind == "dermoscopic":
        _add_dermoscope(dataset)
    dataset.AcquisitionContextSequence = [
        _item("class", "Class that the generator was asked for", code=_class_code(source, sample.label)),
        *(
            _item(name, meaning, text=text)
            for name, meaning, text in (
                ("seed", "Seed", sample.row["seed"]),
                ("index", "Index of the latent", sample.row["index"]),
                ("probability", "Probability by the classifier", sample.row.get("probability", "")),
                ("nearest", "Distance to nearest training image", sample.row.get("nearest_distance", "")),
                ("gate", "Gate against copies", sample.row.get("gate", "")),
                ("image-sha256", "SHA-256 of the image file", sample.row["sha256"]),
                ("dataset-sha256", "SHA-256 of manifest.json", source.digest),
                ("bundle-sha256", "SHA-256 of the generator's bundle", source.manifest.bundle_digest),
                ("licence", "Licence", source.licence),
                ("attribution", "Attribution", source.attribution),
            )
            if text
        ),
    ]
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = UID(_EXPLICIT_LITTLE_ENDIAN)
    meta.ImplementationClassUID = UID(unique_identifier("implementation"))
    meta.ImplementationVersionName = f"DERMIS_{__version__}"[:_MAX_SHORT]
    dataset.file_meta = meta
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def _add_identity(dataset: Dataset, source: ExportSource, sample: ExportSample, kind: DicomClass) -> None:
    """Add the modules patient, study, series and SOP common."""
    short = source.digest[:12]
    dataset.SOPClassUID, dataset.Modality = _CLASSES[kind]
    # The same image in both classes is two objects, which must not have one identifier.
    of_kind = (source.digest,) if kind == "dermoscopic" else (source.digest, kind)
    dataset.SOPInstanceUID = unique_identifier(*of_kind, "image", sample.number)
    dataset.SyntheticData = "YES"
    dataset.PatientName = PATIENT_NAME
    dataset.PatientID = f"SYNTHETIC-{short}"
    dataset.PatientBirthDate = dataset.PatientSex = ""
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "Synthetic image: there is no patient"
    dataset.PatientComments = (
        "Synthetic images. There is no patient, and several images are not of one person or one lesion."
    )
    dataset.StudyInstanceUID = unique_identifier(source.digest, "study")
    dataset.StudyID = short
    dataset.StudyDate = dataset.StudyTime = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = "Synthetic dermoscopy, not for diagnosis"
    dataset.SeriesInstanceUID = unique_identifier(*of_kind, "series", sample.label)
    dataset.SeriesNumber = sample.label + 1
    dataset.Laterality = ""
    dataset.SeriesDescription = f"Synthetic: {source.manifest.class_names[sample.label]}"[:_MAX_LONG]
    if kind == "dermoscopic":
        # No two images show the same place, so each has a frame of reference of its own.
        dataset.FrameOfReferenceUID = unique_identifier(*of_kind, "frame", sample.number)
        dataset.PositionReferenceIndicator = ""
    scheme = _dataset(CodingSchemeDesignator=CODING_SCHEME, CodingSchemeName="Names of dermis")
    dataset.CodingSchemeIdentificationSequence = [scheme]


def _add_equipment(dataset: Dataset, source: ExportSource) -> None:
    dataset.Manufacturer = "dermis"
    dataset.ManufacturerModelName = f"Generator {source.manifest.bundle_name}"[:_MAX_LONG]
    dataset.DeviceSerialNumber = source.manifest.bundle_digest[:_MAX_LONG]
    dataset.SoftwareVersions = f"dermis {source.manifest.synthesizer.get('dermis', 'of unknown version')}"[:_MAX_LONG]
    converter = _dataset(
        Manufacturer="dermis",
        ManufacturerModelName="Export of datasets",
        SoftwareVersions=f"dermis {__version__}",
        ContributionDescription="Written from the image file of a synthetic dataset",
        PurposeOfReferenceCodeSequence=[_code("109103", "DCM", "Modifying Equipment")],
    )
    dataset.ContributingEquipmentSequence = [converter]


def _add_image(dataset: Dataset, source: ExportSource, sample: ExportSample) -> None:
    pixels = sample.pixels()
    dataset.InstanceNumber = sample.number + 1
    dataset.PatientOrientation = ""
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    class_name = source.manifest.class_names[sample.label]
    dataset.DerivationDescription = (
        "Made by a generative neural network from random numbers. It is not a photograph of a person. "
        "Not for diagnosis, not for treatment."
    )
    dataset.ImageComments = f"Synthetic image, class {class_name}. Not for diagnosis."
    dataset.BurnedInAnnotation = "NO"
    dataset.AnatomicRegionSequence = [_code("39937001", "SCT", "Skin")]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    lossy = source.manifest.request.image_format != "png"
    dataset.LossyImageCompression = "01" if lossy else "00"
    if lossy:
        dataset.LossyImageCompressionRatio = round(pixels.size / len(sample.data), 2)
        if source.manifest.request.image_format == "jpeg":
            dataset.LossyImageCompressionMethod = "ISO_10918_1"
    data = pixels.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)


def _add_dermoscope(dataset: Dataset) -> None:
    """Add the module of dermoscopic images. What it says of the dermoscope, which does not exist, is empty."""
    dataset.LightSourcePolarization = dataset.ContactMethod = ""
    dataset.EmitterColorTemperature = dataset.OpticalMagnificationFactor = None
    dataset.RecognizableVisualFeatures = "NO"


def _class_code(source: ExportSource, label: int) -> Dataset:
    return _code(f"class-{label}", CODING_SCHEME, source.manifest.class_names[label][:_MAX_LONG])


def _item(name: str, meaning: str, *, text: str = "", code: Dataset | None = None) -> Dataset:
    """Return a name with its value for the acquisition context."""
    item = _dataset(ValueType="TEXT" if code is None else "CODE", ConceptNameCodeSequence=[_name(name, meaning)])
    if code is None:
        item.TextValue = text
    else:
        item.ConceptCodeSequence = [code]
    return item


def _name(name: str, meaning: str) -> Dataset:
    return _code(name, CODING_SCHEME, meaning)


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    return _dataset(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def _dataset(**attributes: Any) -> Dataset:
    from pydicom.dataset import Dataset

    dataset = Dataset()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset
