"""Tests of the metadata of images: every file says that it is synthetic, in standard XMP; pixels and other bytes stay."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dermis.bundle import Bundle
from dermis.dataset.containers import read_container
from dermis.dataset.manifest import finalize, parse_manifest
from dermis.dataset.plan import latent_index
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.dataset.verify import verify
from dermis.directions.edit import Edit
from dermis.image_metadata import NAMESPACE, ImageOrigin, metadata_bytes, origin_of, xmp_packet
from dermis.imaging import ImageFormat, decode, encode
from dermis.video import encode_video
from painted_dataset import IDENTITY, make, paint, planned

XMP, DC = "http://ns.adobe.com/xap/1.0/", "http://purl.org/dc/elements/1.1/"
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def properties(data: bytes) -> dict[str, str]:
    """The properties of the XMP packet of an image, by an XML parser of its own."""
    with Image.open(io.BytesIO(data)) as image:
        packet = image.info["xmp"]
    (description,) = ElementTree.fromstring(packet).iter(f"{{{RDF}}}Description")
    texts = {child.tag: child.findtext(f".//{{{RDF}}}li") or "" for child in description}
    return {**description.attrib, **texts}


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_metadata_is_standard_xmp_and_leaves_the_pixels(image_format: ImageFormat) -> None:
    origin = ImageOrigin("demo", "ab" * 32, "CC-BY-NC-4.0", "HAM10000").of_sample(7, 3, [Edit("age", 1.5, (0, 4))])
    plain, marked = encode(PIXELS, image_format), encode(PIXELS, image_format, 95, origin)
    assert (decode(marked) == decode(plain)).all() and marked == encode(PIXELS, image_format, 95, origin)
    assert len(marked) - len(plain) <= metadata_bytes(origin) < 4000
    said = properties(marked)
    assert said[f"{{{IPTC}}}DigitalSourceType"] == (
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    )
    assert said[f"{{{XMP}}}CreatorTool"].startswith("dermis ")
    assert said[f"{{{DC}}}rights"] == "Licence: CC-BY-NC-4.0. Attribution: HAM10000"
    own = {name: said[f"{{{NAMESPACE}}}{name}"] for name in ("bundle", "seed", "index", "edits")}
    assert own == {"bundle": "ab" * 32, "seed": "7", "index": "3", "edits": "age=1.5@0-4"}
    if image_format == "png":
        with Image.open(io.BytesIO(marked)) as image:
            assert image.info["Software"].startswith("dermis ") and "demo" in image.info["Source"]


FRAMES = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("loops", [1, 40])
def test_films_have_the_metadata_of_images_and_all_their_frames(loops: int) -> None:
    origin = ImageOrigin("demo" * loops, "ab" * 32, "CC-BY-NC-4.0", "HAM10000").of_sample(7)
    marked = encode_video(FRAMES, "gif", origin=origin)
    assert marked.partition(b"XMP DataXMP")[2].startswith(xmp_packet(origin) + b"\x01\xff\xfe")
    assert marked.startswith(encode_video(FRAMES, "gif")[:-1])
    with Image.open(io.BytesIO(marked)) as film:
        assert film.n_frames == 3 and film.info["loop"] == 0  # type: ignore[attr-defined]
        film.seek(2)
        assert np.asarray(film.convert("RGB")).shape == (16, 16, 3)
    # A program that does not know XMP follows the lengths of sub-blocks and comes to the end of the file.
    place = marked.index(b"XMP DataXMP") + len(b"XMP DataXMP")
    while marked[place]:
        place += 1 + marked[place]
    assert marked[place:] == b"\0;"


def test_mp4_has_the_metadata_in_a_box_of_its_own() -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed")
    origin = ImageOrigin("demo", "ab" * 32).of_sample(7)
    marked = encode_video(FRAMES, "mp4", origin=origin)
    place, boxes = 0, {}
    while place < len(marked):
        size, kind = int.from_bytes(marked[place : place + 4], "big"), marked[place + 4 : place + 8]
        boxes[kind] = marked[place + 8 : place + size]
        place += size
    assert place == len(marked) and {b"ftyp", b"moov", b"mdat"} < boxes.keys()
    assert boxes[b"uuid"] == bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + xmp_packet(origin)
    assert marked.startswith(encode_video(FRAMES, "mp4"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "film.mp4").write_bytes(marked)
        assert imageio_ffmpeg.count_frames_and_secs(f"{folder}/film.mp4")[0] == 3


@pytest.mark.parametrize("text", ["\0\x1b[2J\u202e\ud800", '"/><script>&amp;]]>', "\u76ae\U0001f600" * 9000])
def test_hostile_texts_of_a_bundle_give_readable_metadata_of_limited_size(tiny_bundle: Bundle, text: str) -> None:
    origin = origin_of(replace(tiny_bundle, provenance={"licence": text, "attribution": text}))
    assert len(xmp_packet(origin)) < 10_000
    for image_format in ("png", "jpeg", "webp"):
        marked = encode(PIXELS, image_format, 95, origin)
        assert len(marked) - len(encode(PIXELS, image_format)) <= metadata_bytes(origin)
        rights = properties(marked)[f"{{{DC}}}rights"]
        assert text[:5] in rights if text.isprintable() else rights.isprintable()


def refuse(indices: Sequence[int], labels: Sequence[int]) -> Any:
    raise LookupError("an image was generated")


def images_of(folder: Path, plan: Any) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("data-*")) or [folder / "images.zip"]:
        with path.open("rb") as file:
            found |= dict(read_container(plan, file))
    return found


@pytest.mark.parametrize(
    ("file_format", "image_format"), [("imagefolder", "png"), ("webdataset", "jpeg"), ("parquet", "webp")]
)
def test_every_image_of_a_dataset_names_its_own_sample(
    tiny_bundle: Bundle, tmp_path: Path, file_format: str, image_format: str
) -> None:
    options = {"format": file_format, "image_format": image_format, "seed": 7}
    make(tmp_path, tiny_bundle, **options)
    images = images_of(tmp_path, planned(tiny_bundle, **options))
    assert len(images) == 20
    for name, data in images.items():
        said = properties(data)
        assert said[f"{{{NAMESPACE}}}index"] == str(int(name.rpartition("SYN_")[2][:8]))
        assert said[f"{{{NAMESPACE}}}bundle"] == tiny_bundle.digest and said[f"{{{NAMESPACE}}}seed"] == "7"
    preview = properties((tmp_path / "preview.png").read_bytes())
    assert f"{{{NAMESPACE}}}index" not in preview and preview[f"{{{NAMESPACE}}}seed"] == "7"


def test_index_is_that_of_the_latent_that_was_kept(tiny_bundle: Bundle) -> None:
    origin = planned(tiny_bundle).origin(latent_index(4, 2))
    assert origin is not None and origin.index == 4 + 2 * 2**34


def test_former_format_has_no_metadata_and_stays_verifiable(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Format 1 is read, made again with its own bytes, and its shards are no shards of format 2."""
    former, now = replace(planned(tiny_bundle), format_version=1), planned(tiny_bundle)
    assert former.digest == now.digest
    for shard in range(former.shards):
        write_shard(former, shard, paint, Store(tmp_path), identity=IDENTITY)
    sidecar = (tmp_path / ".partial" / "shard-00000.json").read_bytes()
    assert b"dermis" not in sidecar and b"format_version" not in sidecar  # as former versions wrote and accept it
    assert write_shard(former, 0, refuse, Store(tmp_path), identity=IDENTITY).shard == 0
    with pytest.raises(LookupError):
        write_shard(now, 0, refuse, Store(tmp_path), identity=IDENTITY)
    manifest = finalize(former, Store(tmp_path), tiny_bundle, IDENTITY)
    assert manifest.format_version == 1 == parse_manifest((tmp_path / "manifest.json").read_bytes(), "m").format_version
    assert verify(tmp_path).ok
    for data in images_of(tmp_path, former).values():
        assert data == encode(decode(data))
        with Image.open(io.BytesIO(data)) as image:
            assert not image.info
