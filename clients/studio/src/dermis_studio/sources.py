"""Where the image of a page comes from: a generated sample, or a file of the visitor, which stays in memory."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from dermis_client import AsyncDermisClient, DermisError, Model
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dermis_studio import markup
from dermis_studio.samples import SampleRef, enlarged, generate_one, png
from dermis_studio.studio import AddressField, fill_from_address, html

MAX_FILE_BYTES = 32 << 20
MAX_PIXELS = 40_000_000  # the service's own limit (DERMIS_MAX_UPLOAD_PIXELS)
# An image is kept in memory at about this length of its shorter side, twice that of the largest view, and with at most so
# many pixels. Larger images are decoded one at a time, while a few more wait for their turn in a thread each.
SIDE_PIXELS = 768
KEPT_PIXELS = 4_000_000
MAX_WAITING = 4
_TILE_PIXELS = 1024
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
        image, (width, height) = _decoded(self.content)
        size = f"{width} x {height} px"
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
    """Return an image of a visitor to be shown: upright, in RGB, reduced if it is much larger than a view of a page.

    Raises:
        ValueError: It cannot be read, or several large images are being read.
    """
    return _decoded(content)[0]


def _decoded(content: bytes) -> tuple[Image.Image, tuple[int, int]]:
    """Return what `opened` returns, and width and height of the whole image."""
    too_many = ValueError(f"the image has more than {MAX_PIXELS:,} pixels; choose a smaller one")
    try:
        if _webp_pixels(content) > MAX_PIXELS:  # Pillow allocates the whole canvas when it opens one
            raise too_many
        whole = Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "WEBP"])
        width, height = whole.size
        if width * height > MAX_PIXELS:
            raise too_many
        with _turn(width * height):
            image = _reduced(whole)
        turned = whole.getexif().get(ExifTags.Base.Orientation) in {5, 6, 7, 8}
        image.info = whole.info  # with the EXIF block
        ImageOps.exif_transpose(image, in_place=True)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("the image cannot be read; choose another one") from None
    return image, (height, width) if turned else (width, height)


_decoding = threading.Lock()
_places = threading.BoundedSemaphore(1 + MAX_WAITING)


@contextmanager
def _turn(pixels: int) -> Iterator[None]:
    """Wait until no other large image is being decoded."""
    if pixels <= KEPT_PIXELS:
        yield
        return
    if not _places.acquire(blocking=False):
        raise ValueError("others are looking at large images at the moment; try again in some seconds")
    try:
        with _decoding:
            yield
    finally:
        _places.release()


def _reduced(image: Image.Image) -> Image.Image:
    """Decode an image, and return it in RGB with whole squares of pixels averaged.

    Opening a PNG of 6300 x 6300 pixels needs 158 MiB, those of the decoder; with copies of the whole image it needed 454 MiB.
    """
    factor = _factor(image)
    if factor > 1:
        image.draft(
            "RGB", (max(1, image.width // factor), max(1, image.height // factor))
        )  # JPEG: decodes fewer pixels
        factor = _factor(image)
    image.load()
    if factor == 1:
        return _rgb(image)
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    side = factor * max(1, _TILE_PIXELS // factor)
    for top in range(0, image.height, side):
        for left in range(0, image.width, side):
            box = (left, top, min(left + side, image.width), min(top + side, image.height))
            small.paste(_rgb(image.crop(box)).reduce(factor), (left // factor, top // factor))
    return small


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip values of up to 65535 at 255
        image = image.point(lambda value: value / 256).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _factor(image: Image.Image) -> int:
    return max(1, min(image.size) // SIDE_PIXELS, math.ceil(math.sqrt(image.width * image.height / KEPT_PIXELS)))


def _webp_pixels(content: bytes) -> int:
    """Return the number of pixels in the header of a WebP; 0 for another image."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        return 0
    kind = content[12:16]
    if kind == b"VP8X":
        return (1 + int.from_bytes(content[24:27], "little")) * (1 + int.from_bytes(content[27:30], "little"))
    if kind == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return (1 + (bits & 0x3FFF)) * (1 + (bits >> 14 & 0x3FFF))
    return (int.from_bytes(content[26:28], "little") & 0x3FFF) * (int.from_bytes(content[28:30], "little") & 0x3FFF)


_MADE_HERE_TEMPLATE = """<label class="ds-made-here" hidden>Projected in this browser
<select><option value="">Choose one</option></select></label>"""
_MADE_HERE_ON_LOAD = """
const label = element.querySelector('label'), select = element.querySelector('select');
for (const each of window.dermisProjections.list()) select.add(new Option(each.words, each.id));
label.hidden = select.options.length < 2;
select.addEventListener('change', () => { if (select.value) trigger('select', { id: select.value }); });
"""
_PROJECTION_ID = re.compile(r"pr_[0-9a-f]{32}")


def made_here() -> gr.HTML:
    """Return a choice of the projections that were made in this browser, hidden if there are none. Its event is `select`."""
    return html("", html_template=_MADE_HERE_TEMPLATE, js_on_load=_MADE_HERE_ON_LOAD)


def chosen_projection(event: gr.EventData) -> str:
    """Return the id that was chosen in `made_here`; empty if it is none."""
    chosen = str(event._data.get("id", "")) if isinstance(event._data, dict) else ""
    return chosen if _PROJECTION_ID.fullmatch(chosen) else ""


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
        self, model: Model, query: Mapping[str, str], note: str = "", *, samples: bool = True, files: bool = True
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
