"""How to cite a dataset or a bundle: BibTeX, and a paragraph for the methods section of a paper.

Every number is one that the dataset or the bundle has; what was not measured is not mentioned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from dermis import __version__
from dermis.bundle.citation import (
    METHOD_CITATION,
    METHOD_KEY,
    SOFTWARE_KEY,
    bundle_entry,
    bundle_key,
    entry,
    tex,
)
from dermis.dataset.manifest import CROISSANT, REPORT, Manifest, read_manifest
from dermis.dataset.request import DatasetRequest
from dermis.dataset.store import MANIFEST, Store
from dermis.dataset.terms import dataset_entry, dataset_key, terms_of
from dermis.errors import DataError, RequestError, quote
from dermis.privacy.verdict import read_verdict
from dermis.strict_json import parse_json

if TYPE_CHECKING:
    from dermis.bundle import Bundle

Style = Literal["markdown", "latex"]
_MAX_BYTES = 16 << 20  # of report.json and croissant.json
_DOI = re.compile(r"10\.\d{4,9}/[^\s\"<>{}\\]{1,200}")
_URL = re.compile(r"https?://[^\s\"<>{}\\]{1,1000}")
_MARK = re.compile(r"\[@([A-Za-z0-9._-]+)\]")
_ZENODO_ADVICE = "Deposit it, for example at Zenodo, and cite its DOI: `--doi`."


@dataclass(frozen=True)
class Publication:
    """What only its authors know of a published dataset or bundle.

    Attributes:
        authors: As BibTeX has them, "Family, Given and Family, Given"; empty if not known.
        year: Year of publication.
        doi: Its DOI, without an address before it.
        url: Where it is published.

    Raises:
        RequestError: A field is not of its form. The message names the option of `dermis cite`.
    """

    authors: str = ""
    year: int | None = None
    doi: str = ""
    url: str = ""

    def __post_init__(self) -> None:
        if self.year is not None and not 1900 <= self.year <= 9999:
            raise RequestError("--year", f"must be a year, not {self.year}")
        if self.doi and not _DOI.fullmatch(self.doi):
            raise RequestError(
                "--doi", f"must be a DOI such as 10.5281/zenodo.1234567, without an address, not {quote(self.doi)}"
            )
        if self.url and not _URL.fullmatch(self.url):
            raise RequestError("--url", f"must begin with https:// or http://, not {quote(self.url)}")

    def fields(self) -> dict[str, str]:
        """Return the fields of a BibTeX entry. Those that are not known are missing."""
        names = [f"{{{tex(name)}}}" if "," not in name else tex(name) for name in self._names()]
        fields = {
            "author": " and ".join(names),
            "year": "" if self.year is None else str(self.year),
            "doi": tex(self.doi),
            "url": self.url.replace("%", r"\%").replace("#", r"\#"),
        }
        return {name: value for name, value in fields.items() if value}

    def _names(self) -> list[str]:
        return [name.strip() for name in self.authors.split(" and ") if name.strip()]


@dataclass(frozen=True)
class Citation:
    """How to cite something.

    Attributes:
        entries: Its BibTeX entry and those of what the paragraph refers to.
        paragraph: A paragraph for a methods section, in plain text with references of the form [@key].
        advice: What is missing for a complete citation; empty if nothing is.
    """

    entries: tuple[str, ...]
    paragraph: str
    advice: str = ""

    @property
    def bibtex(self) -> str:
        """All entries, as the content of a .bib file."""
        return "\n\n".join(self.entries) + "\n"

    def methods(self, style: Style = "markdown") -> str:
        """Return the paragraph, in Markdown (as pandoc reads it) or LaTeX."""
        if style == "markdown":
            return self.paragraph + "\n"
        parts = _MARK.split(self.paragraph)  # text and keys in turns
        texts = [f"\\cite{{{part}}}" if number % 2 else _latex(part) for number, part in enumerate(parts)]
        return "".join(texts) + "\n"


def cite(location: str | Path, publication: Publication | None = None) -> Citation:
    """Cite a finished dataset, or a bundle.

    Args:
        location: Folder or fsspec URL of a dataset or of a bundle, or the name of an installed bundle.
        publication: What its authors know of its publication.

    Raises:
        DataError: There is neither a dataset nor a bundle.
        DermisError: A file of it is damaged.
    """
    from dermis.bundle import open_bundle
    from dermis.bundle.folder import exists
    from dermis.bundle.installed import DESCRIPTOR, resolve_bundle

    published = publication or Publication()
    if Path(location).is_file():
        raise DataError(f"{location}: is a file; give the folder of a dataset or bundle")
    store = Store(location)
    if store.size(MANIFEST) is not None:
        return _cite_dataset(store, published)
    if exists(resolve_bundle(location), DESCRIPTOR):
        return _cite_bundle(open_bundle(location), published)
    raise DataError(
        f"{location}: has neither the {MANIFEST} of a finished dataset nor the {DESCRIPTOR} of a bundle; give the folder of one"
    )


def software_entry(version: str) -> str:
    """Return a BibTeX entry of dermis in a version."""
    fields = {
        "title": "{dermis}: generators and services for synthetic dermoscopy",
        "author": "{The dermis developers}",
    }
    return entry(SOFTWARE_KEY, {**fields, "note": f"Software, version {tex(version)}, Apache-2.0"})


# -- a dataset


class _Number(BaseModel):
    name: str
    value: float | None
    class_name: str | None = None
    low: float | None = None
    high: float | None = None
    reference: float | None = None


class _Section(BaseModel):
    numbers: list[_Number] = []


class _Origin(BaseModel):
    licence: str
    attribution: str
    training_images: int | None = None
    resolution: int


class _Report(BaseModel):
    """What is read of report.json."""

    images: int
    origin: _Origin
    fidelity: _Section
    variety: _Section


def _cite_dataset(store: Store, published: Publication) -> Citation:
    manifest = read_manifest(store)
    report = _report(store, manifest)
    request = manifest.request
    version = _clean(manifest.synthesizer.get("dermis", "of an unknown version"))
    counts = _images_by_class(manifest)
    images = sum(counts.values())
    classes = _enumeration(f"{count:,} of the class {_clean(name)}" for name, count in counts.items())
    size = "" if report is None else f" of {report.origin.resolution} x {report.origin.resolution} px"
    key = dataset_key(manifest.bundle_name, manifest.plan_digest)
    sentences = [
        f"We used {images:,} synthetic dermoscopy images{size} ({classes}) [@{key}], which were generated with the "
        f"StyleGAN2-ADA generator {_clean(manifest.bundle_name)} (bundle SHA-256 {_clean(manifest.bundle_digest)[:16]}) by "
        f"dermis {version} [@{SOFTWARE_KEY}], after the method of [@{METHOD_KEY}].",
        *_training_set(report),
        f"Latents and noise follow from the seed {request.seed} and the index of each image ({_options(request)}).",
        *_edits(request),
        *_filter(manifest),
        *_gate(manifest, images),
        *_measured_of(report),
        *_licence(store, manifest, report),
        f"The dataset can be generated again from its manifest (SHA-256 of the plan {_clean(manifest.plan_digest)[:16]}). "
        "Class names say what the generator was asked for; they are not diagnoses.",
    ]
    extra = published.fields()
    entries = (
        dataset_entry(
            request.samples, manifest.bundle_name, manifest.bundle_digest, manifest.plan_digest, request.seed, extra
        ),
        software_entry(version),
        METHOD_CITATION,
    )
    return Citation(entries, " ".join(sentences), _advice(published))


def _report(store: Store, manifest: Manifest) -> _Report | None:
    """Read the parts of report.json; None if the dataset is older than this file."""
    value = _listed_json(store, manifest, REPORT)
    if value is None:
        return None
    try:
        return _Report.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{store.where(REPORT)}: {field}: {first['msg']}; make the dataset again") from None


def _listed_json(store: Store, manifest: Manifest, name: str) -> Any:
    """Read a JSON file that the manifest lists, and check its SHA-256; None if it is not listed."""
    import hashlib

    record = next((file for file in manifest.files if file.name == name), None)
    if record is None:
        return None
    data = store.read(name, limit=_MAX_BYTES)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise DataError(
            f"{store.where(name)}: differs from {MANIFEST}; run the same `dermis generate` command again to repair it"
        )
    try:
        return parse_json(data)
    except ValueError as error:
        raise DataError(f"{store.where(name)}: is not JSON that can be used ({error})") from None


def _images_by_class(manifest: Manifest) -> dict[str, int]:
    tallies = manifest.privacy.classes if manifest.privacy is not None else manifest.classifier
    if tallies is None:
        return dict(manifest.request.classes)
    return {name: class_tally.images for name, class_tally in tallies.items()}


def _training_set(report: _Report | None) -> list[str]:
    if report is None or report.origin.training_images is None:
        return []
    return [
        f"It was trained on {report.origin.training_images:,} real images (source: {_clean(report.origin.attribution)})."
    ]


def _options(request: DatasetRequest) -> str:
    noise = {"random": "random noise", "const": "the same noise for all images", "none": "no noise"}[request.noise_mode]
    truncation = f"truncation psi {request.truncation_psi:g}"
    if request.truncation_cutoff is not None:
        truncation += f" of the first {request.truncation_cutoff} style vectors"
    quality = "" if request.image_format == "png" else f" of quality {request.image_quality}"
    return f"{truncation}, {noise}, {request.image_format.upper()}{quality}"


def _edits(request: DatasetRequest) -> list[str]:
    if not request.moves:
        return []
    moves = _enumeration(f"{edit.strength:g} standard deviations along {edit.direction}" for edit in request.moves)
    return [f"Every latent was moved by {moves}."]


def _filter(manifest: Manifest) -> list[str]:
    options = manifest.request.classifier
    if options is None or not options.filters or manifest.classifier is None:
        return []
    rules = []
    if options.keep == "agreeing":
        rules.append(f"whose requested class the classifier of the bundle confirmed (threshold {options.threshold})")
    if options.min_probability > 0 or options.max_probability < 1:
        rules.append(f"with a calibrated probability from {options.min_probability:g} to {options.max_probability:g}")
    tries = f", from at most {options.tries} latents for each image" if options.tries > 1 else ""
    return [f"Only images {' and '.join(rules)} were kept{tries}."]


def _gate(manifest: Manifest, images: int) -> list[str]:
    options, privacy = manifest.request.privacy, manifest.privacy
    if options is None or privacy is None:
        return ["The images were not compared with the training images."]
    tallies = privacy.classes.values()
    seen, rejected = sum(tally.seen for tally in tallies), sum(tally.rejected for tally in tallies)
    condition = (
        "is larger than the distance of that training image to its nearest other training image (authentic)"
        if options.gate == "authentic"
        else f"is at least the percentile {options.percentile:g} of the distances between nearest training images"
    )
    detector = (
        ", and that a copy detector finds no changed copy"
        if options.detect_copies and any(tally.copies is not None for tally in tallies)
        else ""
    )
    outcome = {
        "resample": f"{rejected:,} of {seen:,} candidates did not meet it and were replaced",
        "drop": f"{rejected:,} of {seen:,} candidates did not meet it and were left out",
        "flag": f"{sum(tally.flagged for tally in tallies):,} of {images:,} images did not meet it and were kept with a flag",
    }[options.on_reject]
    sentences = [
        "A gate compared each image with the training images in the feature space of the bundle's index. It required that the "
        f"distance to the nearest training image {condition}{detector}; {outcome}."
    ]
    attack = privacy.exposure.attack
    if attack is not None:
        sentences.append(
            f"A membership attack by nearest distances had an AUC of {attack.auc:.3f} (95 % interval {attack.low:.3f} to "
            f"{attack.high:.3f} with images counted as independent; chance 0.5; {attack.members:,} training and "
            f"{attack.held_out:,} held-out images)."
        )
    return sentences


def _measured_of(report: _Report | None) -> list[str]:
    if report is None:
        return []
    sentences = []
    for name, section in (("Fréchet distance", report.fidelity), ("coverage", report.variety)):
        texts = [_in_words(number) for number in section.numbers if number.name == name and number.value is not None]
        if texts:
            title = name[0].upper() + name[1:]
            sentences.append(
                f"{title} of the images to real images in the feature space of the bundle's index: {'; '.join(texts)}."
            )
    return sentences


def _in_words(number: _Number) -> str:
    assert number.value is not None
    extras = []
    if number.low is not None and number.high is not None:
        extras.append(f"95 % interval {number.low:.4g} to {number.high:.4g}")
    if number.reference is not None:
        extras.append(f"real images {number.reference:.4g}")
    brackets = f" ({', '.join(extras)})" if extras else ""
    of = "" if number.class_name is None else f"{number.class_name} "
    return f"{of}{number.value:.4g}{brackets}"


def _licence(store: Store, manifest: Manifest, report: _Report | None) -> list[str]:
    if report is not None:
        licence = report.origin.licence
    else:
        document = _listed_json(store, manifest, CROISSANT)
        licence = str(document.get("license", "unknown")) if isinstance(document, Mapping) else "unknown"
    if licence == "unknown":
        return ["The licence of the training data, which the images carry, is not known."]
    return [f"The images carry the licence of the training data, {_clean(licence)}."]


# -- a bundle


def _cite_bundle(bundle: Bundle, published: Publication) -> Citation:
    provenance, metrics = bundle.provenance, bundle.metrics
    version = _clean(provenance.get("code_version") or __version__)
    size = bundle.generator.img_resolution
    kind = f"conditional on {_enumeration(bundle.class_names)}" if bundle.class_names else "unconditional"
    terms = terms_of(bundle)
    licence = (
        "The licence of the training data is not known."
        if terms.licence == "unknown"
        else f"Weights and images carry the licence of the training data, {_clean(terms.licence)}."
    )
    sentences = [
        f"Synthetic images were generated with {bundle.name} [@{bundle_key(bundle.name)}] (bundle SHA-256 "
        f"{bundle.digest[:16]}), a StyleGAN2-ADA generator of {size} x {size} px dermoscopy images, {kind}, of dermis "
        f"{version} [@{SOFTWARE_KEY}], after the method of [@{METHOD_KEY}].",
        *_training(provenance, terms.attribution),
        *_private_training(provenance),
        *_measured(metrics),
        *_privacy_audit(bundle.privacy_audit),
        licence,
    ]
    entries = (
        bundle_entry(bundle.name, size, bundle.files["generator.safetensors"].sha256, published.fields()),
        software_entry(version),
        METHOD_CITATION,
    )
    return Citation(entries, " ".join(sentences), _advice(published))


def _training(provenance: Mapping[str, Any], attribution: str) -> list[str]:
    dataset, run = _mapping(provenance, "dataset"), _mapping(provenance, "training")
    images, shown = dataset.get("images"), provenance.get("kimg")
    if type(images) is not int:
        return [f"Its training data are not described (source: {_clean(attribution)})."]
    classes = dataset.get("classes")
    counts = ""
    if isinstance(classes, Mapping) and classes and all(type(count) is int for count in classes.values()):
        counts = f" ({_enumeration(f'{count:,} {_clean(name)}' for name, count in classes.items())})"
    text = f"It was trained on {images:,} real images{counts} of {_clean(attribution)}"
    if isinstance(shown, int | float):
        text += f"; {shown:,.1f} thousand images were shown to the discriminator"
    seed = _mapping(run, "configuration").get("seed")
    if type(seed) is int:
        text += f", with the seed {seed}"
    return [f"{text}."]


def _private_training(provenance: Mapping[str, Any]) -> list[str]:
    privacy = _mapping(provenance, "privacy")
    epsilon, delta = privacy.get("epsilon"), privacy.get("delta")
    if not isinstance(epsilon, int | float) or not isinstance(delta, int | float):
        return []
    unit = privacy.get("unit")
    of = f" for each {_clean(unit)}" if isinstance(unit, str) else ""
    return [f"The training was differentially private{of}, with epsilon {epsilon:.3g} at delta {delta:.3g}."]


def _measured(metrics: Mapping[str, Any]) -> list[str]:
    spaces = _mapping(metrics, "spaces")
    held_out = "generated_holdout"
    names = [name for name, space in spaces.items() if isinstance(space, Mapping)]
    # A space that the discriminator was trained in flatters the generator.
    fair = [name for name in names if spaces[name].get("trained_discriminator") is not True] or names
    sentences = []
    for name in fair:
        comparisons = _mapping(spaces[name], "comparisons")
        which = held_out if held_out in comparisons else "generated_training"
        numbers, reference = _mapping(comparisons, which), _mapping(comparisons, "training_holdout")
        texts = [
            *_distance("Fréchet distance", "fd", 1, numbers, reference),
            *_distance("kernel inception distance times 1000", "kid", 1000, numbers, reference),
            *(
                _number(numbers, measure, reference)
                for measure in ("precision", "recall")
                if isinstance(numbers.get(measure), int | float)
            ),
        ]
        if not texts:
            continue
        against = "held-out real images" if which == held_out else "training images"
        count = numbers.get("images")
        amount = f"{count:,} images of each kind" if type(count) is int else "as many images of each kind"
        sentences.append(
            f"In the feature space {_clean(name)}, generated images compared with {against} ({amount}) had a "
            f"{_enumeration(texts)}."
        )
        sentences += _membership(_mapping(spaces[name], "copies"))
    if sentences and fair == names and any(spaces[name].get("trained_discriminator") is True for name in names):
        sentences.append("The discriminator was trained in this feature space, so the numbers are too good.")
    return sentences


def _distance(
    title: str, key: str, factor: float, numbers: Mapping[str, Any], reference: Mapping[str, Any]
) -> list[str]:
    value = numbers.get(key)
    if not isinstance(value, int | float):
        return []
    extras = []
    interval = numbers.get(f"{key}_interval")
    if isinstance(interval, list) and len(interval) == 2 and all(isinstance(end, int | float) for end in interval):
        extras.append(f"95 % interval {interval[0] * factor:.4g} to {interval[1] * factor:.4g}")
    real = reference.get(key)
    if isinstance(real, int | float):
        extras.append(f"real training images in their place {real * factor:.4g}")
    return [f"{title} of {value * factor:.4g}" + (f" ({', '.join(extras)})" if extras else "")]


def _number(numbers: Mapping[str, Any], key: str, reference: Mapping[str, Any]) -> str:
    real = reference.get(key)
    note = f" (real training images {real:.3f})" if isinstance(real, int | float) else ""
    return f"{key} of {float(numbers[key]):.3f}{note}"


def _membership(copies: Mapping[str, Any]) -> list[str]:
    auc = _mapping(_mapping(copies, "membership"), "auc")
    if not all(isinstance(auc.get(key), int | float) for key in ("value", "low", "high")):
        return []
    return [
        f"A membership attack by nearest distances had an AUC of {auc['value']:.3f} (95 % interval {auc['low']:.3f} to "
        f"{auc['high']:.3f}; chance 0.5)."
    ]


def _privacy_audit(audit: Mapping[str, Any] | None) -> list[str]:
    stored = None if audit is None else read_verdict(audit)
    return [] if stored is None else [f"The verdict of the privacy audit in the bundle is: {stored.verdict.status}."]


# -- texts


def _advice(published: Publication) -> str:
    missing = [
        name
        for name, value in (("--author", published.authors), ("--year", published.year), ("--doi", published.doi))
        if not value
    ]
    return f"not in the citation: {', '.join(missing)}. {_ZENODO_ADVICE}" if missing else ""


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a section of a file of another program, which can be missing or of another type."""
    section = values.get(key)
    return section if isinstance(section, Mapping) else {}


def _clean(text: object) -> str:
    """Return foreign text as one line that has no references."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return _MARK.sub(r"@\1", line)[:1000].rstrip(".")


def _enumeration(texts: Iterable[str]) -> str:
    parts = list(texts)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def _latex(text: str) -> str:
    return tex(text).replace(" x ", r" $\times$ ")
