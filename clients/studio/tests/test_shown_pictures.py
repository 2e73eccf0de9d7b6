"""Pictures that visitors see and save: strips, films, heat maps and their metadata."""

from __future__ import annotations

import base64
import io
import re
import zipfile
from typing import Any

from dermis_client import EditedImage, HeatMap
from dermis_studio import sources
from dermis_studio.pages import classify, map_points, strips
from dermis_studio.samples import SampleRef, enlarged
from PIL import Image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def generated(index: int) -> EditedImage:
    """An image of the service with the part of its XMP that sheets look at."""
    xmp = b'<a Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    content = encoded(Image.new("RGB", (8, 8), (index, 0, 0)), "WEBP", xmp=xmp, lossless=True)
    row = {"sample": 0, "strength": index, "media_type": "image/webp", "sha256": "0" * 64}
    return EditedImage.model_validate(row | {"b64": base64.b64encode(content).decode()})


def test_pictures_that_can_be_saved_say_that_they_are_synthetic() -> None:
    term = b"digitalsourcetype/trainedAlgorithmicMedia"
    images = [generated(index) for index in range(3)]
    links = re.findall(r'download="([^"]+)" href="data:[^,]+,([^"]+)"', strips.drawn(images, "age"))
    saved = {name: base64.b64decode(data) for name, data in links}
    with Image.open(io.BytesIO(saved["age.png"])) as strip:
        assert strip.size == (28, 8) and term in strip.info["xmp"] and strip.getpixel((20, 0)) == (2, 0, 0)
    assert term in saved["age.webp"]
    shown = enlarged(images[0].content, "image/webp", "an image", "")
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', shown)]
    assert pictures and all(term in data for data in pictures)
    own = map_points.thumbnail(Image.new("RGB", (64, 64), "red"))
    for others, expected in (([], term), ([own], b"digitalsourcetype/compositeSynthetic")):
        sheet = map_points._sheet([map_points.thumbnail(images[0].image), *others])
        assert sheet is not None and expected in base64.b64decode(sheet.partition(",")[2])
    plain = map_points._sheet([own])
    assert plain is not None and b"digitalsourcetype" not in base64.b64decode(plain.partition(",")[2])


def edited(colour: tuple[int, int, int], strength: float) -> EditedImage:
    """An edited image with a gradient of more colours than a GIF has."""
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    picture = Image.blend(picture, Image.effect_noise((64, 64), 90).convert("RGB"), 0.5)
    content = encoded(Image.blend(picture, Image.new("RGB", (64, 64), colour), 0.4), "PNG")
    sent = {"sample": 0, "strength": strength, "media_type": "image/png", "sha256": "0" * 64}
    return EditedImage.model_validate(sent | {"b64": base64.b64encode(content)})


def test_film_and_zip_have_the_colours_of_the_images() -> None:
    images = [edited((200, 150 + 20 * place, 120), place - 1.0) for place in range(3)]
    shown = strips.drawn(images, 'a "b"/<c>')
    assert "<c>" not in shown and shown.count('<figure><img class="ds-pixels"') == 3
    hrefs = re.findall(r'download="([^"]+)" href="data:([\w/]+);base64,([^"]+)"', shown)
    saved = {kind: base64.b64decode(content) for _, kind, content in hrefs}
    assert [name for name, *_ in hrefs] == ["a-b-c-.png", "a-b-c-.webp", "a-b-c-.zip"]
    film = Image.open(io.BytesIO(saved["image/webp"]))
    assert film.n_frames == 4  # there, and back to the first one
    for frame, image in enumerate([*images, images[1]]):
        film.seek(frame)
        assert film.convert("RGB").tobytes() == image.image.tobytes()
    with zipfile.ZipFile(io.BytesIO(saved["application/zip"])) as files:
        assert files.namelist() == ["00_0000_-1.00.png", "01_0000_+0.00.png", "02_0000_+1.00.png"]
        assert [files.read(name) for name in files.namelist()] == [image.content for image in images]
    assert "enlarged 6 times (nearest)" in shown and 'aria-pressed="false">Play film' in shown


def test_heat_map_is_shown_smooth_pixel_by_pixel_and_at_its_own_size() -> None:
    own = edited((200, 150, 120), 0.0).content
    colours = Image.effect_noise((32, 32), 90).convert("RGB")
    sent = {"method": "xrai", "scale": 0.5, "sha256": "0" * 64, "b64": base64.b64encode(encoded(colours, "PNG"))}
    picture = sources.Picture(own, "image/png", SampleRef("demo", "benign", 1, 2))
    shown = classify.overlay(picture, HeatMap.model_validate(sent), "malignant")
    views = re.findall(r'data-ds-view="(\w+)" style="width:(\d+)px;height:\d+px"( hidden)?>(.*?)</div>', shown)
    sizes = {name: (int(side), bool(hidden)) for name, side, hidden, _ in views}
    assert sizes == {"smooth": (384, False), "pixels": (384, True), "input": (32, True)}
    images = {name: re.findall(r"base64,([^\"]+)", inner) for name, *_, inner in views}
    opened = {name: [Image.open(io.BytesIO(base64.b64decode(each))) for each in pair] for name, pair in images.items()}
    assert opened["pixels"][0].tobytes() == Image.open(io.BytesIO(own)).tobytes()
    assert opened["pixels"][1].tobytes() == opened["input"][1].tobytes() == colours.tobytes()
    assert [each.size for each in opened["input"]] == [(32, 32)] * 2
    assert all('class="ds-pixels"' in inner for name, *_, inner in views if name != "smooth")
