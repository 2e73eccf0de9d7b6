"""Recognise files that are not official checkpoints by their first bytes, so that errors can say what to do."""

from __future__ import annotations

import json
import re
import zipfile
from typing import IO, cast

from dermis.errors import escape, quote
from dermis.official.pickled import Stream

HEAD_BYTES = 4096
_AGAIN = "download the checkpoint itself"
_SIGNATURES = (
    (b"\x1f\x8b", "is compressed with gzip; unpack it (gunzip) and import what it holds"),
    (b"BZh", "is compressed with bzip2; unpack it (bunzip2) and import what it holds"),
    (b"\xfd7zXZ\x00", "is compressed with xz; unpack it (unxz) and import what it holds"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard; unpack it (unzstd) and import what it holds"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it and import the .pkl file in it"),
    (b"Rar!\x1a\x07", "is a RAR archive; unpack it and import the .pkl file in it"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras?), not an official checkpoint (.pkl); choose another file"),
    (b"\x93NUMPY", "is a NumPy array (.npy), not an official checkpoint (.pkl); choose another file"),
    (b"GGUF", "is a GGUF file, not an official checkpoint (.pkl); choose another file"),
    (b"\x89PNG", "is a PNG image, not an official checkpoint (.pkl); choose another file"),
    (b"\xff\xd8\xff", "is a JPEG image, not an official checkpoint (.pkl); choose another file"),
    (b"%PDF", "is a PDF document, not an official checkpoint (.pkl); choose another file"),
)
_TORCH = (
    "is a PyTorch file (.pt or .pth, written by torch.save), not an official checkpoint, which is a .pkl of persisted "
    "networks; look for the .pkl (network-snapshot-*.pkl) that it was made from"
)
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6
_HTML = re.compile(rb"<(!doctype\s+html|html|head|body|meta|script|title|a|div|h1|center|p)\b", re.IGNORECASE)
_PROTOCOL_0 = re.compile(rb"[(\]})]|c\S+(\n|$)")  # beginnings of pickles of protocol 0 or 1 with more than a scalar


def describe_foreign(stream: Stream, size: int) -> str:
    """Return why a file is certainly not an official checkpoint; empty if it can be one.

    Args:
        stream: The file at its beginning. Its position is changed.
        size: Its size in bytes.

    Returns:
        A predicate such as "is an HTML page; ...", for a message that names the file.
    """
    head = stream.read(HEAD_BYTES)
    if not head:
        return f"is empty; the download failed: {_AGAIN} again"
    if not head.strip(b"\0"):
        return f"begins with {len(head):,} zero bytes; the download was not completed: {_AGAIN} again"
    if head.startswith((b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")):
        return (
            "is a Git LFS pointer, not the checkpoint: it names a file that Git did not fetch; run `git lfs pull` in its "
            "repository"
        )
    if b"/annex/objects/" in head[:200]:
        return "is a git-annex pointer, not the checkpoint; run `git annex get` in its repository"
    if head.startswith(_TORCH_LEGACY):
        return _TORCH
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _describe_zip(stream, head)
    for signature, text in _SIGNATURES:
        if head.startswith(signature):
            return text
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it (tar -xf) and import the .pkl file in it"
    return _describe_safetensors(head, size) or _describe_text(head)


def _describe_zip(stream: Stream, head: bytes) -> str:
    truncated = b"data.pkl" in head or b"/version" in head
    try:
        with zipfile.ZipFile(cast(IO[bytes], stream)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        kind = "a PyTorch file (.pt, a zip archive)" if truncated else "a zip archive"
        return f"is {kind} that is truncated or damaged, not an official checkpoint (.pkl); {_AGAIN}"
    if any(name.endswith(("data.pkl", "constants.pkl")) for name in names):
        return _TORCH
    if pickles := [name for name in names if name.endswith(".pkl")]:
        return f"is a zip archive; unpack it and import the file {quote(pickles[0])} in it"
    if names and all(name.endswith(".npy") for name in names):
        return "is a NumPy archive (.npz), not an official checkpoint (.pkl); choose another file"
    if "dataset.json" in names:
        return "is a zip of training images (dataset.json), not a checkpoint; it is for `dermis train gan --data`"
    some = f", among others {quote(names[0])}" if names else ""
    return f"is a zip archive of {len(names):,} files{some}, and none is an official checkpoint (.pkl)"


def _describe_safetensors(head: bytes, size: int) -> str:
    length = int.from_bytes(head[:8], "little")
    if len(head) < 10 or head[8:9] != b"{" or length > max(size, 100_000_000):
        return ""
    cut = " that is truncated" if length + 8 > size else ""
    return (
        f"is a safetensors file{cut}, not an official checkpoint (.pkl); if it belongs to a bundle of dermis, use the "
        "bundle's folder as it is"
    )


def _describe_text(head: bytes) -> str:
    text = head.removeprefix(b"\xef\xbb\xbf")
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = text.decode("utf-16", "replace").encode()
    text = text.lstrip()
    if _HTML.match(text) or (text.startswith((b"<!--", b"<?xml")) and _HTML.search(text)):
        title = re.search(rb"<title[^>]*>([^<]{1,200})", text, re.IGNORECASE)
        named = f' with the title "{escape(title[1].decode("utf-8", "replace").strip(), 100)}"' if title else ""
        return (
            f"is an HTML page{named}: the address gave a web page (of a login, a licence or a confirmation); open it in "
            f"a browser and {_AGAIN}"
        )
    if text.startswith((b"<?xml", b"<Error")):
        return f"is an XML document, perhaps an error message of the server: {quote(_start(text))}; {_AGAIN}"
    if text.startswith(b"{") and _is_json(text):
        return f"is JSON text, perhaps an error message of the server: {quote(_start(text))}; {_AGAIN}"
    if head[0] == 0x80 or _PROTOCOL_0.match(head):
        return ""
    start = quote(_start(head)) if _is_text(head) else quote(head[:16])
    return f"is not an official checkpoint (a Python pickle): it begins with {start}; {_AGAIN}"


def _start(text: bytes) -> str:
    return text[:80].decode("utf-8", "replace")


def _is_text(head: bytes) -> bool:
    return b"\0" not in head and all(byte >= 32 or byte in b"\t\n\r" for byte in head[:80])


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return len(text) > 1000 and text[1:].lstrip()[:1] == b'"'
    except RecursionError:
        return False
    return True
