"""Sections of a bundle's card: on the classifier, on index, encoder and directions, and on the privacy audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dermis.bundle.citation import METHOD_CITATION, bundle_entry
from dermis.bundle.classifier import CLASSIFIER_CARD, NOTICE, ClassifierDescription
from dermis.bundle.copies import CopiesDescription
from dermis.bundle.directions import Direction
from dermis.bundle.encoder import EncoderDescription
from dermis.bundle.index import IndexDescription
from dermis.bundle.reference import MINIMUM_GROUP, ReferenceDescription

_CLASSIFIER_BEGIN, _CLASSIFIER_END = "<!-- classifier: written by dermis -->", "<!-- end of classifier -->"
_LATENT_BEGIN, _LATENT_END = "<!-- latent space: written by dermis -->", "<!-- end of latent space -->"
_PRIVACY_BEGIN, _PRIVACY_END = "<!-- privacy audit: written by dermis -->", "<!-- end of privacy audit -->"

_CITATION_BEGIN, _CITATION_END = "<!-- citation: written by dermis -->", "<!-- end of citation -->"
_REFERENCE_BEGIN, _REFERENCE_END = "<!-- reference: written by dermis -->", "<!-- end of reference -->"


def _with_section(card: str, begin: str, end: str, text: str) -> str:
    """Replace the section between two marks in a card, or add it at the end. An empty text removes the section."""
    before, mark, rest = card.partition(begin)
    after = rest.partition(end)[2].lstrip("\n") if mark else ""
    after = "\n" + after if after else ""
    if text:
        return before.rstrip("\n") + f"\n\n{begin}\n{text}\n{end}\n" + after
    return before.rstrip("\n") + "\n" + after if mark else card


def with_citation_section(card: str, name: str, resolution: int, weights: str) -> str:
    """Replace the section on how to cite a bundle in its card, or add it.

    Args:
        card: The card, with or without such a section.
        name: Name of the bundle.
        resolution: Side of its images, px.
        weights: SHA-256 (hex) of generator.safetensors.
    """
    text = f"""## Citation

`dermis cite BUNDLE` also prints a paragraph for a methods section.

```bibtex
{bundle_entry(name, resolution, weights)}

{METHOD_CITATION}
```"""
    return _with_section(card, _CITATION_BEGIN, _CITATION_END, text)


def with_reference_section(card: str, reference: ReferenceDescription | None) -> str:
    """Replace the section on the statistics of real images in a bundle's card.

    Args:
        card: The card, with or without such a section.
        reference: The reference of the bundle; None removes the section.
    """
    if reference is None:
        return _with_section(card, _REFERENCE_BEGIN, _REFERENCE_END, "")
    counts = ", ".join(f"{name} {of_class.images:,}" for name, of_class in reference.classes.items())
    text = f"""## Statistics of real images

`reference/` holds statistics of real images with which the report of every dataset is compared: {counts}. It holds no image:
every number is of at least {MINIMUM_GROUP} images. Means and covariances of a small class still tell a little about who was in
it: remove the folder if nobody may find out whose images were used (`dermis bundle detach BUNDLE reference`)."""
    return _with_section(card, _REFERENCE_BEGIN, _REFERENCE_END, text)


def with_classifier_section(card: str, classifier: ClassifierDescription | None) -> str:
    """Replace the section on the classifier in a bundle's card.

    Args:
        card: The card, with or without such a section.
        classifier: The classifier of the bundle; None removes the section.
    """
    if classifier is None:
        return _with_section(card, _CLASSIFIER_BEGIN, _CLASSIFIER_END, "")
    thresholds = ", ".join(f"{name} {value:.4g}" for name, value in sorted(classifier.thresholds.items()))
    text = f"""## Classifier

**{NOTICE}**

`classifier/` distinguishes {classifier.positive_class} from {classifier.class_names[0]}: {classifier.architecture} on
{classifier.input.size} px, temperature {classifier.temperature:.4g}, thresholds on the calibrated probability: {thresholds}.
[Its card](classifier/{CLASSIFIER_CARD}) describes its training and its measurements."""
    return _with_section(card, _CLASSIFIER_BEGIN, _CLASSIFIER_END, text)


def with_latent_section(
    card: str,
    index: IndexDescription | None,
    encoder: EncoderDescription | None,
    directions: Sequence[Direction],
    copies: CopiesDescription | None = None,
) -> str:
    """Replace the section on the latent space in a bundle's card.

    Args:
        card: The card, with or without such a section.
        index: The index of the bundle, or None.
        encoder: The encoder of the bundle, or None.
        directions: The directions of the bundle.
        copies: The copy detector of the bundle, or None. Without any of these parts the section is removed.
    """
    before, begin, rest = card.partition(_LATENT_BEGIN)
    after = rest.partition(_LATENT_END)[2].lstrip("\n") if begin else ""
    paragraphs = [text for text in (_index(index), _copies(copies), _encoder(encoder), _directions(directions)) if text]
    kept = before.rstrip("\n") + "\n"
    if paragraphs:
        kept += "\n" + "\n\n".join([f"{_LATENT_BEGIN}\n## Latent space", *paragraphs]) + f"\n{_LATENT_END}\n"
    return kept + ("\n" + after if after else "")


def _index(index: IndexDescription | None) -> str:
    if index is None:
        return ""
    held_out = f"and {index.held_out:,} held-out images" if index.held_out else "and no held-out images"
    return f"""`authenticity/` holds embeddings of {index.vectors:,} training images {held_out}, in the feature space
`{index.extractor}` ({index.metric}, {index.dim} dimensions): images can be compared with them. Half of the training images are
nearer than {index.radii[50]:.3f} to another one, 1 % nearer than {index.radii[1]:.3f}{_near_duplicates(index)}.
**With these files anyone can find out whether an image was a training image**; remove them if this must stay secret:
`dermis bundle detach`."""


def _copies(copies: CopiesDescription | None) -> str:
    if copies is None:
        return ""
    return f"""`copies/` holds descriptors of {copies.references:,} training images, and a network that recognises changed
copies of them: mirrored, cropped, recoloured, painted over or joined. Anyone can find training images with it, as with the
index."""


def _near_duplicates(index: IndexDescription) -> str:
    if index.duplicates is None:
        return ""
    return (
        f"\n({index.duplicates.images:,} near-duplicates among them, which count as {index.duplicates.groups:,} images)"
    )


def _encoder(encoder: EncoderDescription | None) -> str:
    if encoder is None:
        return ""
    images = encoder.provenance.get("images")
    count = images.get("count") if isinstance(images, Mapping) else None
    learnt = f"{count:,} real images and generated ones" if isinstance(count, int) else "generated images"
    measured = encoder.metrics.get("held_out") or encoder.metrics.get("generated")
    result = ""
    if measured:
        kind = "real images that it was not trained on" if encoder.metrics.get("held_out") else "generated images"
        result = (
            f"\nFor {measured['images']:,} {kind}, the distance (`{encoder.metrics['distance']}`) between an image and the\n"
            f"image of its encoded latent is {measured['encoded']:.2f} on average; with the mean latent it is "
            f"{measured['mean_start']:.2f}."
        )
    return f"The encoder in `encoder/` computes initial latents for projections. It was trained on {learnt}.{result}"


def _directions(directions: Sequence[Direction]) -> str:
    if not directions:
        return ""
    names = ", ".join(f"`{direction.name}`" for direction in directions)
    return f"`directions.safetensors` holds {len(directions)} directions to edit along: {names}."


def with_privacy_section(card: str, audit: Mapping[str, Any] | None) -> str:
    """Replace the section on the privacy audit in a bundle's card.

    Args:
        card: The card, with or without such a section.
        audit: The audit as JSON values; None removes the section.
    """
    if audit is None:
        return _with_section(card, _PRIVACY_BEGIN, _PRIVACY_END, "")
    subject, verdict = audit["subject"], audit["verdict"]
    rows = "\n".join(f"| {outcome['rule']} | {outcome['status']} |" for outcome in audit["outcomes"])
    psi = subject.get("truncation_psi")  # of audits of bundles only
    truncated = "" if psi is None else f" (truncation psi {psi:g})"
    text = f"""## Privacy audit

**Verdict: {verdict["status"]}.** {verdict["text"][:1].upper()}{verdict["text"][1:]}. Measured with {subject["members"]:,}
training images, {subject["non_members"]:,} held-out images and {subject["generated"]:,} generated ones{truncated}, before the
audit was stored here (digest {subject["bundle_digest"][:12]}). `privacy_audit.json` has all numbers: `dermis privacy show`.

| rule | status |
| --- | --- |
{rows}

A pass is no proof that nothing is disclosed."""
    return _with_section(card, _PRIVACY_BEGIN, _PRIVACY_END, text)
