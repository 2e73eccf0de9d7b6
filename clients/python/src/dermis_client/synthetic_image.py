"""Pillow images that keep on saving what says that they are synthetic.

Pillow reads the XMP of a file into `info["xmp"]`, but writes none unless each call of `save` passes it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dermis_client._version import __version__

# The packet that the service writes into each image, with what is known of a sheet. `term` is one of IPTC's vocabulary.
_SHEET_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmp:CreatorTool="dermis-client {version}"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/{term}"{attributes}>{elements}
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""
_TERM = re.compile(rb"newscodes/digitalsourcetype/([A-Za-z]+)")
# Written into the XMP of a sheet if all its images agree on them: the generator, and licence and attribution.
_SHARED_ATTRIBUTES = re.compile(rb"""\s(Iptc4xmpExt:(?:AISystemUsed|AISystemVersionUsed)=(?:"[^"<>]*"|'[^'<>]*'))""")
_SHARED_ELEMENTS = re.compile(
    rb'(<dc:rights><rdf:Alt><rdf:li xml:lang="x-default">[^<>]*</rdf:li></rdf:Alt></dc:rights>)'
)
_MAX_XMP = 60_000  # bytes; JPEG has space for 65,502
_GIF_END = b";"


class SyntheticImage(Image.Image):
    """An image whose `save` writes its `info["xmp"]` to PNG, JPEG, WebP, AVIF and GIF files.

    The images that its methods make of it, such as `resize`, are of this class too.
    """

    @classmethod
    def of(cls, image: Image.Image, xmp: bytes | None = None) -> SyntheticImage:
        """Return an image with the same pixels.

        Args:
            image: An image, which is not used any more.
            xmp: Its XMP; None to keep what `info` has.
        """
        image.load()
        new = cls()
        new.im = image.im
        new._mode, new._size = image.mode, image.size
        new.info = image.info if xmp is None else {**image.info, "xmp": xmp}
        return new

    def _new(self, im: Any) -> SyntheticImage:
        """Return the result of one of Pillow's methods, which all call this."""
        made = super()._new(im)
        result = SyntheticImage.of(made)
        if made.palette is not None:
            result.palette = made.palette
        return result

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002  # as Pillow names it
        """Write the image as Pillow does, with its XMP unless `params` has other metadata (`pnginfo`, `xmp`).

        Args:
            fp: The path of the file, or an open file.
            format: Pillow's name of the format; by default that of the path's suffix.
            **params: Options of Pillow.
        """
        xmp = xmp_of(self)
        if xmp is None:
            super().save(fp, format, **params)
        elif _is_gif(fp, format):
            buffer = io.BytesIO()
            super().save(buffer, "GIF", **params)
            _write(fp, gif_with_xmp(buffer.getvalue(), xmp))
        else:
            params.setdefault("xmp", xmp)  # Pillow ignores the options of other formats
            if "pnginfo" not in params:
                params["pnginfo"] = PngInfo()
                params["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8", "replace"))
            super().save(fp, format, **params)


def xmp_of(image: Image.Image) -> bytes | None:
    """Return the XMP of an image; None if it has none, or none that every format can hold."""
    xmp = image.info.get("xmp")
    return xmp if isinstance(xmp, bytes) and len(xmp) <= _MAX_XMP and b"\0" not in xmp else None


def xmp_of_sheet(images: Sequence[Image.Image], *, with_real: bool = False) -> bytes:
    """Return the XMP of a sheet: generated, or edited from photographs if one of its images is, and what all have in common.

    Args:
        images: The synthetic images on it.
        with_real: Whether it also shows real images.
    """
    packets = [xmp_of(image) or b"" for image in images]
    terms = {match[1].decode() for packet in packets for match in _TERM.finditer(packet)}
    edited = "compositeWithTrainedAlgorithmicMedia"
    term = edited if edited in terms else "trainedAlgorithmicMedia"
    attributes, elements = (_shared(pattern, packets) for pattern in (_SHARED_ATTRIBUTES, _SHARED_ELEMENTS))
    return _SHEET_XMP.format(
        version=__version__,
        term="compositeSynthetic" if with_real else term,
        attributes="".join(f"\n {attribute}" for attribute in attributes),
        elements="".join(f"\n {element}" for element in elements),
    ).encode()


def gif_with_xmp(data: bytes, xmp: bytes) -> bytes:
    """Add XMP to a GIF file, in the application extension of Adobe's XMP specification, part 3.

    The packet is not divided into sub-blocks. Programs that do not know it read its bytes as lengths of sub-blocks until one
    of them leads into the 258 bytes behind it, which lead to their end.
    """
    if not data.endswith(_GIF_END):
        raise ValueError("the GIF file has no end")
    trailer = b"\x01" + bytes(range(255, -1, -1)) + b"\x00"
    return data[:-1] + b"\x21\xff\x0bXMP DataXMP" + xmp + trailer + _GIF_END


def _shared(pattern: re.Pattern[bytes], packets: Sequence[bytes]) -> list[str]:
    """Return what each packet has, in the order of the first."""
    found = [pattern.findall(packet) for packet in packets]
    common = set(found[0]).intersection(*found[1:]) if found else set()
    return [text.decode("utf-8", "replace") for text in dict.fromkeys(found[0] if found else ()) if text in common]


def _is_gif(fp: Any, kind: str | None) -> bool:
    if kind is not None:
        return kind.upper() == "GIF"
    name = fp if isinstance(fp, str | bytes | os.PathLike) else getattr(fp, "name", "")
    return os.fsdecode(name).lower().endswith(".gif") if isinstance(name, str | bytes | os.PathLike) else False


def _write(fp: Any, data: bytes) -> None:
    if isinstance(fp, str | bytes | os.PathLike):
        Path(os.fsdecode(fp)).write_bytes(data)
    else:
        file: IO[bytes] = fp
        file.write(data)
