"""Description of a dataset in Croissant 1.0 with its RAI vocabulary: croissant.json.

https://docs.mlcommons.org/croissant/docs/croissant-spec.html and croissant-rai-spec.html. The file has no date and no
address, so that the same dataset has the same bytes; `dermis export croissant` writes a copy with both. Its size does not
depend on the number of images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dermis.dataset.columns import IMAGE, LABEL, columns, feature_kinds, table_kinds
from dermis.dataset.plan import DatasetPlan, request_in_words
from dermis.dataset.shards import FileEntry
from dermis.dataset.terms import dataset_citation, known_biases, terms_of, use_in_words
from dermis.imaging import SUFFIXES

if TYPE_CHECKING:
    from dermis.bundle import Bundle

MAX_LISTED_SHARDS = 64
"""Tar files up to this number are listed one by one, so that mlcroissant can open them; more are described by a pattern."""

_CONFORMS_TO = ("http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0")

# The context that the specification prescribes.
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}

_TYPES = {
    "string": "sc:Text",
    "int64": "sc:Integer",
    "float64": "sc:Float",
    LABEL: "sc:Integer",
    IMAGE: "sc:ImageObject",
}
_MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

_DESCRIPTIONS = {
    "image": "The synthetic image.",
    "label": "Number of the class that the generator was asked for.",
    "target": "Class that the generator was asked for.",
    "isic_id": "Name of the image: SYN_ and its number in the dataset.",
    "source": "What made the image.",
    "file_name": "Name of the image file.",
    "seed": "Seed of the latents.",
    "index": "Index of the latent from which the image was generated.",
    "sha256": "SHA-256 of the image file.",
    "probability": "Calibrated probability of the positive class by the classifier of the generator's bundle.",
    "nearest_distance": "Distance to the nearest training image, in the feature space of the bundle's index.",
    "distance_percentile": "Percentage of the training images whose radius is smaller than this distance.",
    "authentic": "Whether the distance is larger than the radius of the nearest training image (1) or not (0).",
    "gate": "Result of the gate: passed or flagged.",
}
_WITHOUT_VALUES = ("patient_id", "diagnosis", "age_approx", "sex", "anatom_site")  # of a synthetic image


def croissant(plan: DatasetPlan, bundle: Bundle, files: Sequence[FileEntry], images: int) -> bytes:
    """Write croissant.json.

    Args:
        plan: The plan of the dataset.
        bundle: The bundle whose generator made the images.
        files: metadata.csv and the files that hold the images.
        images: Number of images in the dataset.

    Returns:
        JSON. The same dataset gives the same bytes.
    """
    terms = terms_of(bundle)
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": list(_CONFORMS_TO),
        "name": f"synthetic-dermoscopy-{bundle.name}-{plan.digest[:12]}",
        "description": f"{images:,} synthetic dermoscopy images, made by the generator {bundle.name}. None is a photograph of "
        f"a person. Not for diagnosis. Requested were {request_in_words(plan)}",
        "license": terms.url or terms.licence,
        "creator": {"@type": "Organization", "name": f"dermis with the generator {bundle.name}"},
        "creditText": terms.attribution,
        "citeAs": dataset_citation(plan, bundle),
        "version": "1.0.0",
        "identifier": f"sha256:{plan.digest}",
        "keywords": ["synthetic", "dermoscopy", "medical", "image classification", "generative adversarial network"],
        "inLanguage": "en",
        "isLiveDataset": False,
        **_responsible_ai(plan, bundle),
        "distribution": _distribution(plan, files),
        "recordSet": [_classes(plan), _images(plan)],
    }
    if terms.use:
        document["usageInfo"] = [term.url for term in terms.use]
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def _responsible_ai(plan: DatasetPlan, bundle: Bundle) -> dict[str, Any]:
    terms = terms_of(bundle)
    properties: dict[str, Any] = {
        "rai:dataCollection": "No data was collected: a generative network (StyleGAN2-ADA) made every image from random "
        f"numbers. The network (SHA-256 of its bundle {bundle.digest}) was trained on real dermoscopy images: "
        f"{terms.attribution}.",
        "rai:dataCollectionType": ["Others", "Secondary Data analysis"],
        "rai:dataAnnotationProtocol": "No person labelled the images. The label is the class that the generator was asked "
        "for; what a dermatologist would see in the image can differ.",
        "rai:dataBiases": list(known_biases(plan, bundle)),
        "rai:dataLimitations": [
            "Not for diagnosis, and not a replacement of real images in the evaluation of a medical device.",
            "The images are less varied than real ones. report.json has the measured fidelity and variety.",
            "Several images of one dataset do not show one person or one lesion: there are no patients.",
        ],
        "rai:dataUseCases": [
            "Augmentation of training data, tests of software, teaching, and research on synthetic data. "
            f"Terms of use: {use_in_words(terms)}.",
        ],
        "rai:dataSocialImpact": "Classifiers that are trained on these images inherit the biases that are listed here, and "
        "can be less accurate for people whose skin is rare in them.",
        "rai:personalSensitiveInformation": [
            "None is stated: the images are synthetic, and the columns for patient, age, sex and body site are empty. "
            + _memorisation(plan)
        ],
        "rai:dataReleaseMaintenancePlan": "The dataset does not change. manifest.json has the SHA-256 of every file and is "
        "enough to make the dataset again.",
    }
    if plan.scored:
        properties["rai:machineAnnotationTools"] = [
            "The column probability is computed by the classifier of the bundle"
            + (f", SHA-256 {plan.classifier.digest}." if plan.classifier is not None else ".")
        ]
    return properties


def _memorisation(plan: DatasetPlan) -> str:
    known = "A generator can reproduce a training image, which is a photograph of a person. "
    if plan.gated:
        return known + "Every image was compared with the training images; README.md and report.json have the result."
    return known + "The images were not compared with the training images."


def _distribution(plan: DatasetPlan, files: Sequence[FileEntry]) -> list[dict[str, Any]]:
    entries = {file.name: file for file in files}
    media_type = _MEDIA_TYPES[plan.request.image_format]
    resources = [_file_object(entries["metadata.csv"], "text/csv", "A row for each image.")]
    if plan.request.format == "parquet":
        resources.append(
            _file_set("images.parquet", "data-*-of-*.parquet", "application/x-parquet", "Images with their rows.")
        )
        return resources
    archives = [file for file in files if file.name != "metadata.csv"]
    suffix = SUFFIXES[plan.request.image_format]
    if plan.request.format == "imagefolder":
        resources += [_file_object(file, "application/zip", "All images.") for file in archives]
        inside = f"images/*/*{suffix}"
    else:
        inside = f"*{suffix}"
        if len(archives) <= MAX_LISTED_SHARDS:
            resources += [_file_object(file, "application/x-tar", "A part of the images.") for file in archives]
        else:
            resources.append(_file_set("shards", "data-*-of-*.tar", "application/x-tar", "All images, in parts."))
    containers = [{"@id": each["@id"]} for each in resources[1:]]
    resources.append(
        {
            **_file_set("image-files", inside, media_type, "The image files inside the archives."),
            "containedIn": containers if len(containers) > 1 else containers[0],
        }
    )
    return resources


def _file_object(file: FileEntry, media_type: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": file.name,
        "name": file.name,
        "description": description,
        "contentUrl": file.name,
        "contentSize": f"{file.bytes} B",
        "encodingFormat": media_type,
        "sha256": file.sha256,
    }


def _file_set(identifier: str, pattern: str, media_type: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": identifier,
        "name": identifier,
        "description": description,
        "encodingFormat": media_type,
        "includes": pattern,
    }


def _classes(plan: DatasetPlan) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "name": "classes",
        "description": "The classes of the generator.",
        "dataType": "sc:Enumeration",
        "key": {"@id": "classes/label"},
        "field": [
            _field("classes/label", "sc:Integer", "Number of the class."),
            _field("classes/name", "sc:Text", "Name of the class."),
        ],
        "data": [{"classes/label": label, "classes/name": name} for label, name in enumerate(plan.class_names)],
    }


def _images(plan: DatasetPlan) -> dict[str, Any]:
    if plan.request.format == "parquet":
        fields = [
            _field(
                f"images/{name}",
                _TYPES[str(kind)],
                _DESCRIPTIONS.get(name, ""),
                {"fileSet": {"@id": "images.parquet"}, "extract": {"column": name}}
                | ({"transform": {"jsonPath": "bytes"}} if kind == IMAGE else {}),
            )
            for name, kind in feature_kinds(plan).items()
        ]
    else:
        kinds = table_kinds(plan)
        fields = [
            # The name of an image file without its suffix is its isic_id, which joins files and rows.
            _field(
                "images/isic_id",
                "sc:Text",
                _DESCRIPTIONS["isic_id"],
                {
                    "fileSet": {"@id": "image-files"},
                    "extract": {"fileProperty": "filename"},
                    "transform": {"regex": "^(SYN_[0-9]+)"},
                },
                references={"fileObject": {"@id": "metadata.csv"}, "extract": {"column": "isic_id"}},
            ),
            _field(
                "images/image",
                "sc:ImageObject",
                _DESCRIPTIONS["image"],
                {"fileSet": {"@id": "image-files"}, "extract": {"fileProperty": "content"}},
            ),
            *(
                _field(
                    f"images/{name}",
                    _TYPES[kinds[name]],
                    _DESCRIPTIONS.get(name, ""),
                    {"fileObject": {"@id": "metadata.csv"}, "extract": {"column": name}},
                )
                for name in columns(plan)
                if name != "isic_id" and name not in _WITHOUT_VALUES
            ),
        ]
    return {
        "@type": "cr:RecordSet",
        "@id": "images",
        "name": "images",
        "description": "The images with their labels and metadata.",
        "key": {"@id": "images/isic_id"},
        "field": fields,
    }


def _field(
    identifier: str,
    data_type: str,
    description: str,
    source: Mapping[str, Any] | None = None,
    references: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    field: dict[str, Any] = {"@type": "cr:Field", "@id": identifier, "name": identifier, "dataType": data_type}
    if description:
        field["description"] = description
    if source is not None:
        field["source"] = dict(source)
    if references is not None:
        field["references"] = dict(references)
    return field
