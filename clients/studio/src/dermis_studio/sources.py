"""Where the image of a page comes from: a generated sample, or a file of the visitor, which stays in memory."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from dermis_client import AsyncDermisClient, DermisError, Model
from PIL import Image, ImageOps, UnidentifiedImageError

from dermis_studio import markup
from dermis_studio.samples import SampleRef, enlarged, generate_one, png
from dermis_studio.studio import AddressField, fill_from_address, html

MAX_FILE_BYTES = 32 << 20
MAX_PIXELS = 100_000_000
SAMPLE, FILE = "sample", "file"

_DROP_TEMPLATE = """<label class="ds-drop">${value ? `<img src="${value}" alt="The chosen image">` : ''}<strong>${value ?
'Choose another image' : 'Choose an image, or drop it here'}</strong>
<span>PNG, JPEG or WebP, up to 32 MB</span><input type="file"
accept="image/png,image/jpeg,image/webp"></label><p class="ds-drop-error" role="alert">${problem}</p>"""
_DROP_ON_LOAD = """
const read = (file) => {
  if (!file) return;
  if (!['image/png', 'image/jpeg', 'image/webp'].includes(file.type)) {
    props.problem = 'This is not a PNG, JPEG or WebP image. Choose another file.';
  } else if (file.size > 32 * 1024 * 1024) {
    props.problem = 'The file is larger than 32 MB. Choose a smaller image.';
  } else {
    const reader = new FileReader();
    reader.onload = () => { props.problem = ''; props.value = reader.result; trigger('upload'); };
    reader.onerror = () => { props.problem = 'The file cannot be read. Choose another one.'; };
    reader.readAsDataURL(file);
  }
};
element.addEventListener('change', (event) => { if (event.target.type === 'file') read(event.target.files[0]); });
element.addEventListener('dragover', (event) => {
  event.preventDefault(); element.querySelector('.ds-drop').classList.add('ds-over'); });
element.addEventListener('dragleave', () => element.querySelector('.ds-drop').classList.remove('ds-over'));
element.addEventListener('drop', (event) => {
  event.preventDefault(); element.querySelector('.ds-drop').classList.remove('ds-over');
  read(event.dataTransfer.files[0]); });
"""


@dataclass(frozen=True)
class Picture:
    """An image and where it comes from.

    Attributes:
        content: The file.
        media_type: Its media type.
        sample: The sample, if it was generated.
    """

    content: bytes
    media_type: str
    sample: SampleRef | None

    @property
    def words(self) -> str:
        """What it is."""
        return "Your image" if self.sample is None else f"Generated image: {self.sample.words}"

    def shown(self) -> str:
        """The image at a whole multiple of its size; a larger one is reduced."""
        if self.sample is not None:
            return enlarged(self.content, self.media_type, self.words, escape(self.sample.words) + ".")
        image = opened(self.content)
        size = f"{image.width} x {image.height} px"
        if max(image.size) <= 384:
            return enlarged(png(image), "image/png", self.words, "Your image.")
        image.thumbnail((384, 384), Image.Resampling.LANCZOS)
        return (
            f'<figure class="ds-figure"><div><img src="{markup.data_url(png(image), "image/png")}" width="{image.width}" '
            f'height="{image.height}" alt="{self.words}"></div><figcaption>Your image. {size}, reduced '
            f"(Lanczos).</figcaption></figure>"
        )


def drop(**options: Any) -> gr.HTML:
    """Return a field for an image, which the browser sends within a message. Its event is `upload`."""
    return html(
        "",
        html_template=_DROP_TEMPLATE,
        js_on_load=_DROP_ON_LOAD,
        problem="",
        elem_classes=["ds-drop-field"],
        **options,
    )


def content_of(value: str | None) -> tuple[bytes, str]:
    """Return the file and the media type of a field of `drop`.

    Raises:
        ValueError: There is none, or it is too large.
    """
    if not value:
        raise ValueError("no image is chosen; choose one first")
    head, comma, text = value.partition(",")
    media_type = head.removeprefix("data:").removesuffix(";base64")
    if (
        not comma
        or media_type not in {"image/png", "image/jpeg", "image/webp"}
        or len(text) > MAX_FILE_BYTES * 4 // 3 + 4
    ):
        raise ValueError("the file is not a PNG, JPEG or WebP image of at most 32 MB; choose another one")
    try:
        return base64.b64decode(text, validate=True), media_type
    except binascii.Error:
        raise ValueError("the file did not arrive completely; choose it again") from None


def opened(content: bytes) -> Image.Image:
    """Return an image of a visitor, upright, in RGB.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "WEBP"])
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("the image has too many pixels; choose a smaller one")
        return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("the image cannot be read; choose another one") from None


class SourceFields:
    """Fields with which a visitor chooses a sample or a file.

    Attributes:
        inputs: The fields, in the order of `picture`.
        outputs: The components that `updates` changes.
    """

    def __init__(self) -> None:
        self.kind = gr.Radio(label="Image", choices=[("Generated", SAMPLE), ("Your own", FILE)], value=SAMPLE)
        with gr.Column(elem_classes=["ds-fields"]) as self._sample:
            self.class_name = gr.Dropdown(label="Class", choices=[])
            with gr.Row():
                self.seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=80)
                self.index = gr.Number(label="Index", value=0, precision=0, minimum=0, min_width=80)
        with gr.Column(elem_classes=["ds-fields"], visible=False) as self._file:
            self.file = drop()
        self._note = html()
        self.inputs = [self.kind, self.class_name, self.seed, self.index, self.file]
        self.outputs = [self.kind, self._sample, self._file, self.class_name, self._note]
        self.kind.change(
            lambda kind: (gr.update(visible=kind == SAMPLE), gr.update(visible=kind == FILE)),
            self.kind,
            [self._sample, self._file],
            api_visibility="private",
            show_progress="hidden",
        )

    def updates(
        self, model: Model, query: dict[str, str], note: str = "", *, samples: bool = True, files: bool = True
    ) -> list[Any]:
        """Return updates of `outputs`. What the visitor has entered stays.

        Args:
            model: The model.
            query: The query of the address, which may name a class.
            note: A text below the fields; HTML.
            samples: Whether the visitor may choose samples.
            files: Whether the visitor may choose files.
        """
        choices = [("Generated", SAMPLE)] * samples + [("Your own", FILE)] * files
        kind = choices[0][1] if choices else SAMPLE
        classes = model.classes
        asked = query.get("class_name")
        if len(choices) > 1:
            source = [gr.update(choices=choices, visible=True), gr.skip(), gr.skip()]
        else:
            source = [
                gr.update(choices=choices, value=kind, visible=len(choices) > 1),
                gr.update(visible=samples and kind == SAMPLE),
                gr.update(visible=files and kind == FILE),
            ]
        return [
            *source,
            gr.update(choices=classes, value=asked if asked in classes else (classes[0] if classes else None)),
            note,
        ]

    def fill_from_address(self, blocks: gr.Blocks) -> None:
        """Fill seed and index from the address of the page, which may name a sample."""
        fill_from_address(blocks, AddressField("seed", self.seed), AddressField("index", self.index))


async def picture(client: AsyncDermisClient, model: Model, values: tuple[Any, ...], query: dict[str, str]) -> Picture:
    """Return the image that a visitor has chosen.

    Args:
        client: The client of the visitor.
        model: The model that generates samples.
        values: The values of `SourceFields.inputs`.
        query: The query of the address; its truncation and noise apply to the sample that it names.

    Raises:
        ValueError: No image is chosen.
        DermisError: The service does not generate it.
    """
    kind, class_name, seed, index, file = values
    if kind == FILE:
        content, media_type = content_of(file)
        return Picture(content, media_type, None)
    if not class_name:
        raise DermisError("no class is chosen; choose one")
    sample = SampleRef(model.name, class_name, int(seed or 0), int(index or 0))
    named = SampleRef.parse(query)
    if named is not None and (named.class_name, named.seed, named.index) == (class_name, sample.seed, sample.index):
        sample = SampleRef(model.name, class_name, sample.seed, sample.index, named.truncation, named.noise)
    image = await generate_one(client, sample)
    return Picture(image.content, image.media_type, sample)
