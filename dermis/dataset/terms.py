"""Under which terms a dataset can be used, its known biases, and how to cite it: texts of its card and of croissant.json.

They follow from the plan and the bundle alone, and have no date.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dermis.bundle.citation import bundle_key, entry, tex
from dermis.dataset.plan import DatasetPlan

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.bundle.reference import ClassReference

UNKNOWN_LICENCE = "unknown"

# Addresses of licences by their identifiers on the Hugging Face Hub, which are those of SPDX in lower case.
_LICENCES = {
    "cc-by-nc-4.0": "https://creativecommons.org/licenses/by-nc/4.0/",
    "cc-by-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "cc-by-sa-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "cc-by-nc-sa-4.0": "https://creativecommons.org/licenses/by-nc-sa/4.0/",
    "cc0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "mit": "https://opensource.org/license/mit",
}
# As the ISIC Archive writes them.
_ALIASES = {"cc-0": "cc0-1.0", "cc-by": "cc-by-4.0", "cc-by-nc": "cc-by-nc-4.0"}

_LIGHT, _DARK = ("very light", "light"), ("tan", "brown", "dark")
_ARTEFACTS = {"frame": "a black frame", "ruler": "a ruler", "hair": "hair", "ink": "ink"}
_UNEQUAL = 0.02  # difference between the shares of two classes from which on an artefact is named


@dataclass(frozen=True)
class UseTerm:
    """A term of the Data Use Ontology (DUO), such as DUO:0000042, general research use."""

    code: str
    name: str

    @property
    def url(self) -> str:
        """The term's address in the ontology."""
        return f"http://purl.obolibrary.org/obo/{self.code.replace(':', '_')}"


_NO_RESTRICTION = UseTerm("DUO:0000004", "no restriction")
_RESEARCH = UseTerm("DUO:0000042", "general research use")
_NON_COMMERCIAL = UseTerm("DUO:0000046", "non-commercial use only")


@dataclass(frozen=True)
class Terms:
    """Terms of use, which a generator's images carry from its training images.

    Attributes:
        licence: The licence as the bundle states it, or "unknown".
        identifier: Its identifier on the Hugging Face Hub; None if it has none.
        url: Address of its text; None if it is not known.
        attribution: Whom to name.
        use: Terms of the Data Use Ontology that express the licence; empty if the licence is not known.
    """

    licence: str
    identifier: str | None
    url: str | None
    attribution: str
    use: tuple[UseTerm, ...]


def terms_of(bundle: Bundle) -> Terms:
    """Return the terms of use of images that a bundle generates."""
    licence = str(bundle.provenance.get("licence") or UNKNOWN_LICENCE)
    known = _ALIASES.get(licence.lower(), licence.lower())
    identifier = known if known in _LICENCES else None
    use: tuple[UseTerm, ...] = ()
    if identifier is not None:
        use = (_RESEARCH, _NON_COMMERCIAL) if "-nc-" in identifier else (_NO_RESTRICTION,)
    attribution = str(bundle.provenance.get("attribution") or "not stated")
    return Terms(licence, identifier, _LICENCES.get(known), attribution, use)


def use_in_words(terms: Terms) -> str:
    """Return the terms of the Data Use Ontology as a text."""
    if not terms.use:
        return "not known, as the licence has no known terms: ask the owners of the training data"
    return ", ".join(f"{term.name} ({term.code})" for term in terms.use)


def known_biases(plan: DatasetPlan, bundle: Bundle) -> tuple[str, ...]:
    """Return the known biases of a dataset as sentences, with the numbers that the bundle has of real images."""
    return (
        *_training_classes(bundle),
        *_real_images(bundle),
        *_options(plan),
        "A generator learns frequent appearances better than rare ones. Rare diagnoses, body sites and skin types are "
        "missing or less varied than in its training images.",
    )


def _training_classes(bundle: Bundle) -> list[str]:
    dataset = bundle.provenance.get("dataset")  # in bundles of other programs it can be missing or of another type
    classes = dataset.get("classes") if isinstance(dataset, Mapping) else None
    counts = {str(name): value for name, value in classes.items()} if isinstance(classes, Mapping) else {}
    if not counts or not all(isinstance(count, int) for count in counts.values()):
        return ["How many images of each class the generator was trained on is not known."]
    listed = ", ".join(f"{count:,} of {name}" for name, count in counts.items())
    return [
        f"The generator was trained on {sum(counts.values()):,} images: {listed}. The images of a class with fewer "
        "training images are less varied and nearer to them."
    ]


def _real_images(bundle: Bundle) -> list[str]:
    reference = bundle.reference
    if reference is None or not reference.classes:
        return ["Skin tones and artefacts of the training images are not known: the bundle has no statistics of them."]
    whose = "training images" if _of_training_set(reference.provenance) else "real images that the bundle describes"
    sentences = []
    tones = [each.skin_tones for each in reference.classes.values()]
    visible = sum(sum(counts.values()) for counts in tones)  # an image without visible skin is in none of these counts
    if visible:
        light, dark = (sum(counts.get(name, 0) for counts in tones for name in names) for names in (_LIGHT, _DARK))
        sentences.append(
            f"Skin around the lesion is light or very light in {light / visible:.0%} of the {whose} that show it, and "
            f"tan, brown or dark in {dark / visible:.1%} (estimated from uncalibrated photographs). Synthetic images can "
            "be expected to be alike; report.json has what was measured in them."
        )
    unequal = [text for name in _ARTEFACTS if (text := _unequal(name, reference.classes))]
    if unequal:
        sentences.append(
            f"Artefacts go with classes: of the {whose}, {'; '.join(unequal)}. A classifier can learn the artefact "
            "instead of the lesion."
        )
    return sentences


def _of_training_set(provenance: Mapping[str, Any]) -> bool:
    dataset = provenance.get("dataset")
    return isinstance(dataset, Mapping) and dataset.get("is_training_set") is True


def _unequal(artefact: str, classes: Mapping[str, ClassReference]) -> str:
    """Return in which share of each class an artefact is; "" if the shares are about equal."""
    shares = {name: each.artefacts.get(artefact, 0) / each.images for name, each in classes.items()}
    if max(shares.values()) - min(shares.values()) < _UNEQUAL:
        return ""
    return f"{_ARTEFACTS[artefact]} is in " + " and ".join(
        f"{share:.0%} of {name}" for name, share in sorted(shares.items(), key=lambda item: -item[1])
    )


def _options(plan: DatasetPlan) -> list[str]:
    request = plan.request
    sentences = []
    if request.truncation_psi < 1:
        sentences.append(
            f"Truncation ({request.truncation_psi:g}) makes the images more typical and less varied than the training images."
        )
    if plan.filtered:
        sentences.append(
            "Images were selected by a classifier, so that images which it finds difficult are missing or fewer."
        )
    if plan.gated and request.privacy is not None and request.privacy.on_reject != "flag":
        sentences.append("Images that are too near to a training image were left out, which can remove typical images.")
    if request.edits:
        sentences.append(
            "All images were edited in the same way, so their distribution differs from that of real images."
        )
    return sentences


def dataset_citation(plan: DatasetPlan, bundle: Bundle) -> str:
    """Return a BibTeX entry of the dataset. The version of dermis, which made it, is in manifest.json."""
    return dataset_entry(plan.samples, bundle.name, bundle.digest, plan.digest, plan.request.seed)


def dataset_key(bundle_name: str, plan_digest: str) -> str:
    """Return the key of a dataset's BibTeX entry."""
    return bundle_key(f"{bundle_name}-{plan_digest[:12]}")


def dataset_entry(
    samples: int,
    bundle_name: str,
    bundle_digest: str,
    plan_digest: str,
    seed: int,
    extra: Mapping[str, str] | None = None,
) -> str:
    """Return a BibTeX entry of a dataset.

    Args:
        samples: Number of images that were requested.
        bundle_name: Name of the bundle that made it.
        bundle_digest: SHA-256 (hex) of that bundle.
        plan_digest: SHA-256 (hex) of its plan.
        seed: Its seed.
        extra: Further fields in TeX, which replace those of the same name.
    """
    fields = {
        "title": f"{samples:,} synthetic dermoscopy images of the generator {tex(bundle_name)}",
        "author": "{dermis}",
        "note": f"Seed {seed}. Plan SHA-256 {tex(plan_digest)}, generator SHA-256 {tex(bundle_digest)}",
    }
    return entry(dataset_key(bundle_name, plan_digest), fields | dict(extra or {}))
