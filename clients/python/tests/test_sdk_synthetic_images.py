"""Tests of files that callers save from images of the SDK: they say that they are synthetic, as the service's files do."""

from __future__ import annotations

import base64
import hashlib
import io
import pickle
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from dermis_client.images import ImagesResult
from dermis_client.latent import EditsResult
from PIL import Image
from PIL.PngImagePlugin import PngInfo

IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def packet(term: str = "trainedAlgorithmicMedia", index: int = 0, rights: str = "Licence: CC-BY-4.0") -> bytes:
    return f"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:d="urn:dermis:image-origin:1/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="{TERMS}{term}"
 Iptc4xmpExt:AISystemUsed='demo "1" (StyleGAN2-ADA)' d:index="{index}">
 <dc:rights><rdf:Alt><rdf:li xml:lang="x-default">{rights}</rdf:li></rdf:Alt></dc:rights>
</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>""".encode()


def png(xmp: bytes) -> bytes:
    buffer, text = io.BytesIO(), PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    Image.fromarray(PIXELS).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def result(*packets: bytes, kind: type[Any] = ImagesResult) -> Any:
    rows = []
    for index, xmp in enumerate(packets):
        content = png(xmp)
        row = {"class": "benign", "seed": 1, "index": index, "sample": index, "media_type": "image/png"}
        b64 = base64.b64encode(content).decode()
        rows.append(row | {"sha256": hashlib.sha256(content).hexdigest(), "b64": b64})
    return kind.model_validate({"model": {"name": "demo", "digest": "d" * 64}, "data": rows})


def said(path: Path) -> tuple[dict[str, str], str]:
    """Attributes and rights of the XMP in a file."""
    if path.suffix == ".gif":
        xmp = path.read_bytes().partition(b"XMP DataXMP")[2].partition(b"\x01\xff\xfe")[0]
    else:
        with Image.open(path) as image:
            xmp = image.info["xmp"]
    (description,) = ElementTree.fromstring(xmp).iter(f"{RDF}Description")
    return dict(description.attrib), description.findtext(f".//{RDF}li") or ""


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_saved_images_and_sheets_say_that_they_are_synthetic(tmp_path: Path, suffix: str) -> None:
    images = result(packet(index=0), packet(index=1))
    images[0].image.save(tmp_path / f"one.{suffix}")
    attributes, rights = said(tmp_path / f"one.{suffix}")
    assert attributes["{urn:dermis:image-origin:1/}index"] == "0" and rights == "Licence: CC-BY-4.0"
    images.grid(gap=0).resize((8, 4)).convert("L").save(str(tmp_path / f"grid.{suffix}"))
    attributes, rights = said(tmp_path / f"grid.{suffix}")
    assert attributes[f"{IPTC}DigitalSourceType"] == f"{TERMS}trainedAlgorithmicMedia"
    assert attributes[f"{IPTC}AISystemUsed"] == 'demo "1" (StyleGAN2-ADA)' and rights == "Licence: CC-BY-4.0"
    assert "{urn:dermis:image-origin:1/}index" not in attributes
    with Image.open(tmp_path / f"grid.{suffix}") as image:
        assert image.size == (8, 4)


def test_pixels_stay_and_a_film_has_all_frames(tmp_path: Path) -> None:
    picture = result(packet())[0].image
    assert (np.asarray(picture) == PIXELS).all() and (np.asarray(pickle.loads(pickle.dumps(picture))) == PIXELS).all()
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    assert (np.asarray(Image.open(buffer)) == PIXELS).all()
    others = [picture.rotate(90), picture.rotate(180)]
    with (tmp_path / "film.gif").open("wb") as file:
        picture.save(file, save_all=True, append_images=others, loop=0)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3  # type: ignore[attr-defined]
        film.seek(2)
        film.load()
    assert said(tmp_path / "film.gif")[0][f"{IPTC}DigitalSourceType"].endswith("trainedAlgorithmicMedia")


def test_strip_of_edited_photographs_is_no_purely_generated_one(tmp_path: Path) -> None:
    edited = packet("compositeWithTrainedAlgorithmicMedia", rights="other")
    result(packet(), edited, kind=EditsResult).strip().save(tmp_path / "strip.png")
    attributes, rights = said(tmp_path / "strip.png")
    assert attributes[f"{IPTC}DigitalSourceType"] == f"{TERMS}compositeWithTrainedAlgorithmicMedia"
    assert rights == ""  # the images have different ones


@pytest.mark.parametrize("xmp", [b"<a>" + b"x" * 70_000, b"\xff\xfe not UTF-8", b"a\0b"])
def test_hostile_metadata_does_not_stop_saving(tmp_path: Path, xmp: bytes) -> None:
    picture = result(packet())[0].image
    picture.info["xmp"] = xmp
    for suffix in ("png", "jpg", "webp", "gif"):
        picture.save(tmp_path / f"one.{suffix}")
        with Image.open(tmp_path / f"one.{suffix}") as image:
            image.load()


def test_metadata_of_the_caller_is_kept(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_text("Title", "mine")
    result(packet())[0].image.save(tmp_path / "one.png", pnginfo=text)
    with Image.open(tmp_path / "one.png") as image:
        assert image.info["Title"] == "mine" and "xmp" not in image.info
