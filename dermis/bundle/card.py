"""The section of a bundle's card on what its latent space comes with: index, encoder, directions."""

from __future__ import annotations

from collections.abc import Sequence

from dermis.authenticity.description import IndexDescription
from dermis.directions.direction import Direction
from dermis.projection.encoder_description import EncoderDescription

_BEGIN, _END = "<!-- latent space: written by dermis -->", "<!-- end of latent space -->"


def with_latent_section(
    card: str,
    index: IndexDescription | None,
    encoder: EncoderDescription | None,
    directions: Sequence[Direction],
) -> str:
    """A card with the section in place of the one that it may have; without, if there is nothing to tell."""
    before, begin, rest = card.partition(_BEGIN)
    after = rest.partition(_END)[2].lstrip("\n") if begin else ""
    told = [text for text in (_index(index), _encoder(encoder), _directions(directions)) if text]
    kept = before.rstrip("\n") + "\n"
    if told:
        kept += "\n" + "\n\n".join([f"{_BEGIN}\n## Latent space", *told]) + f"\n{_END}\n"
    return kept + ("\n" + after if after else "")


def _index(index: IndexDescription | None) -> str:
    if index is None:
        return ""
    held = f"and {index.held_out:,} held-out images" if index.held_out else "and of no held-out images"
    return f"""`authenticity/` holds embeddings of {index.vectors:,} training images {held}, in the feature space
`{index.extractor}` ({index.metric}, {index.dim} dimensions): images can be compared with them. Half of the training images are
nearer than {index.radii[50]:.3f} to another one, 1 % nearer than {index.radii[1]:.3f}{_near_duplicates(index)}.
**Whoever has these files can find out whether an image was a training image**; remove them where this must stay secret:
`dermis bundle detach`."""


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
    learnt = f"{images['count']:,} real images and generated ones" if images else "generated images"
    measured = encoder.metrics.get("held_out") or encoder.metrics.get("generated")
    result = ""
    if measured:
        kind = "real images that it did not learn from" if encoder.metrics.get("held_out") else "generated images"
        result = (
            f" Of {measured['images']:,} {kind}\nits latents are {measured['encoded']:.2f} away in the distance "
            f"`{encoder.metrics['distance']}`, the mean latent {measured['mean_start']:.2f}."
        )
    return f"`encoder/` gives latents for projections to start from, learnt from {learnt}.{result}"


def _directions(directions: Sequence[Direction]) -> str:
    if not directions:
        return ""
    names = ", ".join(f"`{direction.name}`" for direction in directions)
    return f"`directions.safetensors` holds {len(directions)} directions to edit along: {names}."
