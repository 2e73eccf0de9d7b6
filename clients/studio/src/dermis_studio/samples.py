"""A generated sample: its coordinates in addresses and messages, and what the service says about it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any
from urllib.parse import urlencode

from dermis_client import (
    AsyncDermisClient,
    AuthenticityResult,
    ClassificationsResult,
    DermisError,
    GeneratedImage,
    Model,
)
from dermis_client.models import NoiseMode
from dermis_client.synthetic_image import SyntheticImage
from PIL import Image

from dermis_studio import markup, scales
from dermis_studio.access import Visitor

TILE_PIXELS = 160  # larger images are shown in a grid at a smaller size
DETAIL_PIXELS = 384
NOISE = {"random": "its own for each image", "const": "the same for all", "none": "none"}


_NOISE_MODES: Mapping[str, NoiseMode] = {"random": "random", "const": "const", "none": "none"}


@dataclass(frozen=True)
class SampleRef:
    """What determines a generated image.

    Attributes:
        model: Name of the model.
        class_name: The class.
        seed: With `index`, determines latent and noise.
        index: Index of the image.
        truncation: Truncation psi.
        noise: Noise mode.
    """

    model: str
    class_name: str
    seed: int
    index: int
    truncation: float = 1.0
    noise: NoiseMode = "random"

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> SampleRef | None:
        """Return the sample that a message or an address names; None if it names none.

        Raises:
            ValueError: A number cannot be read.
        """
        if not values.get("class_name"):
            return None
        try:
            return cls(
                model=str(values.get("model") or ""),
                class_name=str(values["class_name"]),
                seed=int(_or_default(values.get("seed"), 0)),
                index=int(_or_default(values.get("index"), 0)),
                truncation=float(_or_default(values.get("truncation"), 1.0)),
                noise=_NOISE_MODES[str(_or_default(values.get("noise"), "random"))],
            )
        except (TypeError, ValueError, KeyError):
            raise ValueError(
                "the address names no sample; give it a whole seed and index, a number as truncation, and a known noise mode"
            ) from None

    @property
    def query(self) -> str:
        """The sample as the query of an address."""
        return urlencode(asdict(self))

    @property
    def body(self) -> dict[str, Any]:
        """The body of /v1/images for this image alone, with the options that differ from the defaults."""
        body: dict[str, Any] = {"classes": {self.class_name: 1}, "seed": self.seed, "start_index": self.index}
        return body | options(self.model, self.truncation, self.noise)

    @property
    def words(self) -> str:
        """The sample in words."""
        return f"{self.class_name}, seed {self.seed}, index {self.index}"


def _or_default(value: Any, default: Any) -> Any:
    """Return a value, or the default if there is none. 0 is a value."""
    return default if value is None or value == "" else value


def options(model: str | None, truncation: float, noise: NoiseMode) -> dict[str, Any]:
    """Return the options of a generation that differ from the defaults."""
    result: dict[str, Any] = {}
    if model:
        result["model"] = model
    if truncation != 1.0:
        result["truncation_psi"] = truncation
    if noise != "random":
        result["noise_mode"] = noise
    return result


async def generate_one(client: AsyncDermisClient, sample: SampleRef) -> GeneratedImage:
    """Generate the image of a sample."""
    result = await client.images.generate(
        {sample.class_name: 1},
        seed=sample.seed,
        start_index=sample.index,
        model=sample.model or None,
        truncation_psi=sample.truncation,
        noise_mode=sample.noise,
        image_format="png",
    )
    return result[0]


async def find_model(client: AsyncDermisClient, name: str | None) -> Model:
    """Return the model with this name, or the default one.

    Raises:
        DermisError: There is none.
    """
    models = await client.models.list()
    for model in models:
        if model.name == name or (not name and model.default):
            return model
    raise DermisError(
        f"the service has no model {name!r}; load the page again"
        if name
        else "the service has no model; ask its operator"
    )


def tile_image(image: GeneratedImage) -> tuple[str, int]:
    """Return an image for a grid as a URL, and the length of its sides in CSS pixels."""
    picture = image.image
    if max(picture.size) <= TILE_PIXELS:
        return markup.data_url(image.content, image.media_type), picture.width
    small = picture.resize((128, 128), Image.Resampling.LANCZOS)
    return markup.data_url(png(small), "image/png"), 128


def reduced(image: Image.Image, pixels: int) -> Image.Image:
    """Return an image whose sides have at most this number of pixels (Lanczos)."""
    if max(image.size) <= pixels:
        return image
    small = image.copy()
    small.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return small


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG, fast rather than small. That of a generated image has its XMP."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def enlarged(content: bytes, media_type: str, alt: str, caption: str, *, pixels: int = DETAIL_PIXELS) -> str:
    """Return an image at a whole multiple of its size, with a choice between smooth and pixel by pixel.

    Args:
        content: The image file.
        media_type: Its media type.
        alt: What it shows.
        caption: Text below it; HTML.
        pixels: Length of the sides that it may have.
    """
    image = SyntheticImage.of(Image.open(io.BytesIO(content)).convert("RGB"))
    factor = max(1, pixels // max(image.size))
    width, height = factor * image.width, factor * image.height
    original = markup.data_url(content, media_type)
    if factor == 1:
        shown = f'<img src="{original}" width="{width}" height="{height}" alt="{escape(alt)}" class="ds-pixels">'
        return (
            f'<figure class="ds-figure" style="max-width:{width}px"><div>{shown}</div><figcaption>{caption} '
            f"{image.width} x {image.height} px, shown 1:1."
            "</figcaption></figure>"
        )
    smooth = markup.data_url(png(image.resize((width, height), Image.Resampling.LANCZOS)), "image/png")
    return (
        f'<figure class="ds-figure" style="max-width:{width}px" data-ds-views><div>'
        f'<img data-ds-view="smooth" src="{smooth}" width="{width}" height="{height}" alt="{escape(alt)}">'
        f'<img data-ds-view="pixels" class="ds-pixels" src="{original}" width="{width}" height="{height}" alt="{escape(alt)}" '
        "hidden></div><figcaption>"
        f"{caption} {image.width} x {image.height} px, enlarged {factor} times"
        '<span class="ds-choice" role="group" aria-label="Enlarging">'
        '<button type="button" data-ds-show="smooth" aria-pressed="true">smooth (Lanczos)</button>'
        '<button type="button" data-ds-show="pixels" aria-pressed="false">pixels (nearest)</button></span>'
        "</figcaption></figure>"
    )


async def measured(
    client: AsyncDermisClient, visitor: Visitor, model: Model, sample: SampleRef, image: GeneratedImage
) -> str:
    """Return what classifier and index of the model say about a sample, as far as the visitor may ask for it."""
    parts = []
    calls: list[Any] = []
    if model.classifier is not None and visitor.may("classify"):
        calls.append(client.classifications.create(image.content, model=model.name))
    if model.authenticity is not None and visitor.may("authenticity:generated"):
        calls.append(check(client, sample))
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, ClassificationsResult):
            parts.append(probability(model, result))
        elif isinstance(result, AuthenticityResult):
            parts.append(distance(model, result))
        elif isinstance(result, Exception):
            parts.append(markup.problem(result))
    return "".join(parts)


async def check(client: AsyncDermisClient, sample: SampleRef) -> AuthenticityResult:
    """Compare a sample with the training images."""
    return await client.authenticity.check_generated(
        {sample.class_name: 1},
        seed=sample.seed,
        start_index=sample.index,
        model=sample.model or None,
        truncation_psi=sample.truncation,
        extra_body={"noise_mode": sample.noise},
    )


def probability(model: Model, result: ClassificationsResult) -> str:
    """Return the calibrated probability of one image with its scale."""
    thresholds = {} if model.classifier is None else model.classifier.thresholds
    scale = scales.probability_scale(result[0].calibrated, result.positive_class, thresholds, result.threshold.name)
    return f"<h3>Probability of {escape(result.positive_class)} (calibrated)</h3>{scale}"


def distance(model: Model, result: AuthenticityResult) -> str:
    """Return the distance of one image to the training images, in words and on a scale."""
    verdict = result[0]
    baseline = (model.authenticity or {}).get("baseline") or {}
    title, text, kind = words_of(verdict.authentic, verdict.percentile, verdict.copy_detected)
    return (
        "<h3>Distance to the training images</h3>"
        f'<div class="ds-verdict {kind}"><b>{escape(title)}</b><p>{escape(text)}</p></div>'
        f"{scales.distance_scale(verdict.distance, baseline)}"
    )


def words_of(authentic: bool, percentile: int, copy_detected: bool | None) -> tuple[str, str, str]:
    """Return a verdict in words: title, explanation, and the class of its look."""
    compared = (
        f"It is farther from its nearest training image than {percentile} % of the training images are from theirs."
        if percentile
        else "It is nearer to its nearest training image than 99 % of the training images are to theirs."
    )
    if copy_detected:
        return (
            "Looks like a changed copy of a training image",
            f"The copy detector recognises a training image, for instance mirrored, cropped or recoloured. {compared}",
            "ds-copy",
        )
    if percentile == 0:
        return "Very near to a training image", compared, "ds-copy"
    if not authentic:
        return (
            "Near to a training image",
            f"That training image has no nearer neighbour among the training images. {compared}",
            "ds-near",
        )
    return "Not near to a training image", compared, "ds-far"
