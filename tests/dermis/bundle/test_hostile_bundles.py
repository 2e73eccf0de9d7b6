"""Tests that an untrusted bundle is opened within limits, or refused with a message that names the file or field."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from commands.main import app
from dermis.authenticity import index, index_check
from dermis.bundle import load_generator, open_bundle
from dermis.classifier.onnx_session import Classifier
from dermis.errors import BundleError, DermisError
from dermis.projection.encoder import load_encoder
from services.models import ServedModels
from tiny import make_bundle
from tiny_index import make_complete_bundle

pytest.importorskip("faiss", reason="FAISS is not installed")

PARTS = {"classifier": "classifier.json", "authenticity": "authenticity.json", "encoder": "encoder.json"}
NPY = "authenticity/radii.npy"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a classifier, an index and directions."""
    training = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    return Path(make_complete_bundle(tmp_path_factory.mktemp("original"), training).location)


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "b"))


def verify(bundle: Path) -> str:
    """What is wrong with a bundle, "" if nothing; fails at any error that is not one for users."""
    done = CliRunner().invoke(app, ["bundle", "verify", str(bundle)])
    if done.exception is None:
        return ""
    assert isinstance(done.exception, DermisError), repr(done.exception)
    message = str(done.exception)
    assert message.isprintable() and len(message) < 2000 and str(bundle) in message
    return message


def put(bundle: Path, name: str, data: bytes) -> None:
    """Write a file and the hashes of it, as an attacker would."""
    (bundle / name).write_bytes(data)
    part, _, rest = name.partition("/")
    if rest and rest != PARTS[part]:
        _record(bundle / part / PARTS[part], rest, data)
        name, data = f"{part}/{PARTS[part]}", (bundle / part / PARTS[part]).read_bytes()
        _record(bundle / "bundle.json", f"{part}/{rest}", (bundle / part / rest).read_bytes())
    if name != "bundle.json":
        _record(bundle / "bundle.json", name, data)


def _record(descriptor: Path, name: str, data: bytes) -> None:
    document = json.loads(descriptor.read_text())
    document["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    descriptor.write_text(json.dumps(document))


def npy(header: str) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def safetensors(header: Any, numbers: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


# -- files in the folder


def _replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / name).unlink()
        make(bundle / name)

    return change


def _link_out(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.write_bytes(b"# secret\n")
    put(path.parent, path.name, outside.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def _link_folder_out(bundle: Path) -> None:
    (bundle / "classifier").rename(bundle.parent / "elsewhere")
    (bundle / "classifier").symlink_to(bundle.parent / "elsewhere")


def _deep(bundle: Path) -> None:
    put(bundle, "metrics.json", b'{"a":' * 50_000 + b"1" + b"}" * 50_000)


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a named pipe": (_replace("MODEL_CARD.md", os.mkfifo), "MODEL_CARD.md.*named pipe"),
    "a descriptor that is a pipe": (_replace("bundle.json", os.mkfifo), "bundle.json.*named pipe"),
    "a part that is a pipe": (_replace("classifier/classifier.onnx", os.mkfifo), "classifier.onnx.*named pipe"),
    "an unlisted pipe": (lambda b: os.mkfifo(b / "pipe"), "does not list pipe"),
    "a device": (
        _replace("generator.safetensors", lambda p: p.symlink_to("/dev/zero")),
        "generator.safetensors.*link out",
    ),
    "a listed link out": (_replace("MODEL_CARD.md", _link_out), "MODEL_CARD.md.*link out"),
    "a linked folder": (_link_folder_out, "does not list classifier"),
    "an unlisted link": (lambda b: (b / "extra").symlink_to("/etc/passwd"), "does not list extra"),
    "a link to itself": (_replace("MODEL_CARD.md", lambda p: p.symlink_to(p.name)), "MODEL_CARD.md"),
    "a name that controls a terminal": (
        lambda b: (b / "\x1b[2Jfine\n").write_text(""),
        r"does not list \\x1b\[2Jfine\\n",
    ),
    "a name that is no text": (
        lambda b: Path(os.fsdecode(os.fsencode(b) + b"/\xff")).write_text(""),
        r"does not list \\udcff",
    ),
    "a sparse file": (lambda b: os.truncate(b / "generator.safetensors", 1 << 40), "generator.safetensors: differs"),
    "deep metrics": (_deep, "metrics.json: is not JSON.*nested"),
    "metrics with a repeated key": (lambda b: put(b, "metrics.json", b'{"a": 1, "a": 2}'), "a occurs more than once"),
    "metrics without bounds": (
        lambda b: put(b, "metrics.json", b'{"a": {"b": [1e999]}}'),
        "a.b.0: must be a finite number",
    ),
    "a card that is no text": (lambda b: put(b, "MODEL_CARD.md", b"\xff"), "MODEL_CARD.md: is not UTF-8"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bundle_with_irregular_files_or_outside_links_is_refused(bundle: Path, case: str) -> None:
    change, reason = FOLDERS[case]
    change(bundle)
    message = verify(bundle)
    assert re.search(reason, message), message


def test_links_within_and_to_bundle_folder_are_followed(bundle: Path, tmp_path: Path) -> None:
    (bundle / "COPY.md").symlink_to("MODEL_CARD.md")
    _record(bundle / "bundle.json", "COPY.md", (bundle / "MODEL_CARD.md").read_bytes())
    (tmp_path / "link").symlink_to(bundle)
    assert verify(bundle) == "" and open_bundle(tmp_path / "link").files["COPY.md"].bytes > 0


# -- changes after the bundle was opened


@pytest.mark.parametrize("part", ["authenticity", "encoder", "classifier"])
def test_bundle_part_changed_after_opening_is_refused(bundle: Path, part: str) -> None:
    opened = open_bundle(bundle)
    if part == "encoder":  # there is none in this bundle: one that appears is not read
        (bundle / part).mkdir()
        (bundle / part / PARTS[part]).write_text("{}")
        assert load_encoder(opened, device="cpu") is None
        return
    descriptor = bundle / part / PARTS[part]
    descriptor.write_bytes(descriptor.read_bytes() + b"\n")
    if part == "authenticity":
        with pytest.raises(BundleError, match="authenticity: was changed since the bundle was opened"):
            index.open_index(opened, device="cpu")
    else:
        model = bundle / part / "classifier.onnx"
        model.write_bytes(model.read_bytes()[:-1] + b"?")
        with pytest.raises(BundleError, match="classifier.onnx: differs"):
            Classifier(opened, device="cpu")


def test_index_is_checked_once_in_a_process_unless_another_one_is_expected(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, description = (bundle / "authenticity" / "index.faiss").read_bytes(), open_bundle(bundle).authenticity
    assert description is not None
    checked: list[bytes] = []
    monkeypatch.setattr(index_check, "_passed", set())
    monkeypatch.setattr(index_check, "run_limited", lambda _, data, *__, **___: checked.append(data) or "")
    for vectors in (30, 30, 31):
        index_check.check_index(data, replace(description, vectors=vectors), "index.faiss")
    index_check.check_index(data + b"0", description, "index.faiss")
    assert checked == [data, data, data + b"0"]


def test_index_replaced_after_check_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bundle / "authenticity" / "index.faiss"
    other = bundle.parent / "other"
    shutil.copy(file, other)
    monkeypatch.setattr(index, "_MAPPED_BYTES", 0)
    opened = open_bundle(bundle)
    assert index.open_index(opened, device="cpu").description.vectors == 30

    def exchange(*arguments: Any) -> None:
        index_check.check_index(*arguments)
        other.replace(file)

    monkeypatch.setattr(index, "check_index", exchange)
    with pytest.raises(BundleError, match="index.faiss: was changed while it was read"):
        index.open_index(opened, device="cpu")


# -- headers of arrays


ARRAYS: dict[str, tuple[str, bytes, str]] = {
    "a huge shape": (
        NPY,
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"),
        r"radii.npy: must hold .* of shape \(30,\)",
    ),
    "a negative shape": (
        NPY,
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
        "radii.npy: must hold",
    ),
    "a shape beyond the file": (
        NPY,
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (30,), }"),
        "radii.npy: holds 0 bytes of numbers",
    ),
    "objects": (NPY, npy("{'descr': '|O', 'fortran_order': False, 'shape': (30,), }"), "radii.npy: must hold"),
    "a deep header": (NPY, npy("(" * 90), "radii.npy: is not a .npy file"),
    "no array": (NPY, b"GIF89a", "radii.npy: is not a .npy file"),
    "a header beyond the file": (
        "generator.safetensors",
        b"\xff" * 7 + b"\x00" + b"{}",
        "generator.safetensors: is no",
    ),
    "tensors beyond the file": (
        "generator.safetensors",
        safetensors({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        "generator.safetensors: holds 0 bytes",
    ),
    "tensors of no type": (
        "generator.safetensors",
        safetensors({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1"),
        "a: dtype: must be",
    ),
    "tensors in one place": (
        "directions.safetensors",
        safetensors({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"1234"),
        "b: data_offsets",
    ),
    "deep directions": (
        "directions.safetensors",
        safetensors({"__metadata__": {"directions": "[" * 50_000}}),
        "directions.safetensors: holds no directions.*nested",
    ),
    "directions of another kind": (
        "directions.safetensors",
        safetensors(
            {"__metadata__": {"directions": '[{"name": "a", "layers": [0, 1], "scale": 1e300, "method": "x"}]'}}
        ),
        "directions.safetensors: 0.method",
    ),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_array_header_is_checked_before_allocation(bundle: Path, case: str) -> None:
    name, data, reason = ARRAYS[case]
    put(bundle, name, data)
    message = verify(bundle)
    assert re.search(reason, message), message


@pytest.mark.full
def test_an_index_with_huge_counts_is_refused(bundle: Path) -> None:
    name = "authenticity/index.faiss"
    data = (bundle / name).read_bytes()
    count = data.index(struct.pack("<q", 30))  # number of vectors, which follows the dimension
    for place, value in ((count, 1 << 40), (count, -1), (4, 1 << 30), (len(data) - 4 * 30 * 4 - 8, 1 << 60)):
        changed = bytearray(data)
        changed[place : place + 8] = struct.pack("<q", value)
        put(bundle, name, bytes(changed))
        assert "index.faiss: " in verify(bundle)


# -- bundle.json


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [path, *(leaf for key, item in items for leaf in _leaves(item, (*path, key)))]
    return [path]


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 2**31, 2**63 - 1, -(2**62), 1e308, "8", "", "\x1b[2J", "../x", "a" * 10_000, [], {}]),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.recursive(st.integers(0, 9), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_wrong_descriptor_value_gives_readable_error(original: Path, tmp_path: Path, data: st.DataObject) -> None:
    bundle = tmp_path / "b"
    if not bundle.exists():
        shutil.copytree(original, bundle)
    name = data.draw(st.sampled_from(["bundle.json", "classifier/classifier.json", "authenticity/authenticity.json"]))
    document = json.loads((original / name).read_bytes())
    path = data.draw(st.sampled_from(_leaves(document)[1:]))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = data.draw(ODD)
    put(bundle, name, json.dumps(document).encode())
    try:
        load_generator(open_bundle(bundle))
    except DermisError as error:
        assert str(error).isprintable() and len(str(error)) < 2000
    finally:
        shutil.copy(original / name, bundle / name)
        shutil.copy(original / "bundle.json", bundle / "bundle.json")


TEXTS = {
    "twice": (b'{"files": {}, "files": {}}', "files occurs more than once"),
    "NaN": (b'{"provenance": {"kimg": NaN}}', "provenance.kimg: must be a finite number"),
    "digits": (b'{"provenance": {"kimg": ' + b"9" * 100_000 + b"}}", "provenance.kimg: must be a finite number"),
    "surrogate": (b'{"name": "\\ud800"}', "name: is not valid Unicode"),
    "nested": (b'{"a":' * 1000 + b"1" + b"}" * 1000, "nested"),
    "bytes": (b"\xff\xfe{}", "not UTF-8"),
    "huge": (b" " * (5 << 20), "larger than"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_unusable_bundle_json_is_refused_by_name(bundle: Path, case: str) -> None:
    text, reason = TEXTS[case]
    (bundle / "bundle.json").write_bytes(text)
    message = verify(bundle)
    assert "bundle.json: is " in message and reason in message


# -- any file


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bundle_file_is_refused_or_harmless(original: Path, tmp_path: Path, data: st.DataObject) -> None:
    bundle = tmp_path / "b"
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(original, bundle)
    names = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from(names))
    content = bytearray((bundle / name).read_bytes())
    kind = data.draw(st.sampled_from(["cut", "overwrite", "replace"]))
    place = data.draw(st.integers(0, min(len(content) - 1, 400)))
    if kind == "cut":
        del content[place:]
    elif kind == "overwrite":
        content[place : place + 8] = data.draw(st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7]))
    else:
        content = bytearray(data.draw(st.binary(max_size=50)))
    if content == (bundle / name).read_bytes():
        return
    if name != "bundle.json":
        (bundle / name).write_bytes(content)
        assert "differs" in verify(bundle)  # the hashes are not those of bundle.json
    try:
        put(bundle, name, bytes(content))
    except (ValueError, TypeError, KeyError, AttributeError):
        return  # the descriptor is changed so much that no hash can be written into it
    verify(bundle)


# -- serving


def test_refused_bundle_does_not_affect_others(bundle: Path, tmp_path: Path) -> None:
    put(bundle, "metrics.json", b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
    os.mkfifo(tmp_path / "bundle.json")
    good = make_bundle(tmp_path / "good", name="good")
    models = ServedModels([str(bundle), str(tmp_path / "good"), str(tmp_path)], "good")
    assert [served.digest for served in models.bundles] == [good.digest]
    problems = models.check()
    assert set(problems) == {str(bundle), str(tmp_path)}
    assert all(problem.isprintable() for problem in problems.values())
    (tmp_path / "good" / "\x1b[2J").write_text("")
    models._checked -= 60
    assert r"\x1b" in models.check()["good"]
