"""Tests of bundles: an incomplete bundle is refused, and writing one never leaves a part of it."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dermis.bundle
from commands.main import app
from dermis.bundle import (
    BUNDLE_FORMAT,
    Bundle,
    amend_bundle,
    load_discriminator,
    load_generator,
    open_bundle,
    write_bundle,
)
from dermis.errors import BundleError, RequestError
from dermis.networks import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig
from tiny import make_bundle
from tiny_index import make_complete_bundle


def network(c_dim: int = 2) -> Generator:
    torch.manual_seed(0)
    return Generator(GeneratorConfig(8, c_dim, z_dim=4, w_dim=4, mapping_layers=1, channel_base=32, channel_max=8))


def make(out: Path, c_dim: int = 2, **options: Any) -> Bundle:
    arguments: dict[str, Any] = {
        "name": "tiny",
        "generator": network(c_dim),
        "class_names": ("benign", "malignant")[:c_dim],
        "provenance": {"kimg": 1, "licence": "CC0-1.0"},
        "metrics": {"kid": 0.5},
        "model_card": "# tiny\n",
        "images": {"samples.png": b"png"},
    }
    return write_bundle(out, **arguments | options)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "bundle.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_written_bundle_opens_unchanged(tmp_path: Path) -> None:
    D = Discriminator(DiscriminatorConfig(8, 2, channel_base=32, channel_max=8, mapping_layers=1))
    made = make(tmp_path / "b", discriminator=D)
    bundle = open_bundle(str(tmp_path / "b") + "/")
    assert bundle == made
    assert (bundle.name, bundle.class_names, bundle.metrics) == ("tiny", ("benign", "malignant"), {"kid": 0.5})
    loaded = load_generator(bundle)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in network().state_dict().items())
    assert load_discriminator(bundle).state_dict().keys() == D.state_dict().keys()


def test_half_storage_is_loaded_as_float32(tmp_path: Path) -> None:
    full, half = make(tmp_path / "full"), make(tmp_path / "half", weights_dtype="fp16")
    name = "generator.safetensors"
    assert half.files[name].bytes < 0.75 * full.files[name].bytes and half.digest != full.digest
    value, stored = load_generator(half).state_dict(), network().state_dict()
    assert all(torch.equal(value[key], stored[key].half().float()) for key in stored)


def test_bundles_of_same_content_have_same_digest(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert first.digest == second.digest
    assert make(tmp_path / "c", provenance={"kimg": 2}).digest != first.digest


def test_classes_without_names_are_numbered(tmp_path: Path) -> None:
    assert make(tmp_path / "a", class_names=()).class_names == ("class0", "class1")
    assert make(tmp_path / "b", c_dim=0).class_names == ()


# -- damage


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _files(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda b: rewrite(b, lambda document: change(document["files"]))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed weights": (lambda b: _flip(b / "generator.safetensors"), "generator.safetensors.*SHA-256"),
    "changed card": (lambda b: _flip(b / "MODEL_CARD.md"), "MODEL_CARD.md.*SHA-256"),
    "longer file": (lambda b: (b / "samples.png").write_bytes(b"png more"), "samples.png"),
    "missing file": (lambda b: (b / "metrics.json").unlink(), "metrics.json is missing"),
    "extra file": (lambda b: (b / "extra.py").write_text("print()"), "does not list extra.py"),
    "no descriptor": (lambda b: (b / "bundle.json").unlink(), "bundle.json is missing"),
    "descriptor of text": (lambda b: (b / "bundle.json").write_text("hello"), "is not JSON"),
    "deep descriptor": (lambda b: (b / "bundle.json").write_text("[" * 100_000), "is not JSON"),
    "descriptor of a list": (lambda b: (b / "bundle.json").write_text("[]"), "bundle.json"),
    "newer format": (
        lambda b: rewrite(b, lambda d: d.update(format_version=BUNDLE_FORMAT + 1)),
        "install a newer dermis",
    ),
    "unknown field": (lambda b: rewrite(b, lambda d: d.update(code="x")), "code"),
    "other classes": (lambda b: rewrite(b, lambda d: d["class_names"].append("nevus")), "3 class names"),
    "class name as a path": (
        lambda b: rewrite(b, lambda d: d.update(class_names=["benign", "../etc"])),
        "class name '../etc'",
    ),
    "bundle name as a path": (lambda b: rewrite(b, lambda d: d.update(name="../tiny")), "name"),
    "impossible network": (lambda b: rewrite(b, lambda d: d["generator"].update(img_resolution=9)), "power of two"),
    "endless mapping": (lambda b: rewrite(b, lambda d: d["generator"].update(mapping_layers=10**9)), "mapping_layers"),
    "no channels": (lambda b: rewrite(b, lambda d: d["generator"].update(channel_base=4)), "channel_base"),
    "unknown option": (lambda b: rewrite(b, lambda d: d["generator"].update(magic=1)), "generator"),
    "path out of the bundle": (
        _files(lambda files: files.update({"../secret": {"sha256": "0" * 64, "bytes": 1}})),
        "'../secret' is not a file name",
    ),
    "absolute path": (
        _files(lambda files: files.update({"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}})),
        "'/etc/passwd' is not a file name",
    ),
    "weights not listed": (_files(lambda files: files.pop("generator.safetensors")), "does not list"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_bundle_is_refused_with_reason(tmp_path: Path, case: str) -> None:
    make(tmp_path / "b")
    damage, reason = DAMAGE[case]
    damage(tmp_path / "b")
    with pytest.raises(BundleError, match=reason) as caught:
        open_bundle(tmp_path / "b")
    assert str(tmp_path / "b") in str(caught.value)


def test_weights_that_do_not_fit_declared_network_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "b")
    rewrite(tmp_path / "b", lambda document: document["generator"].update(z_dim=5))
    with pytest.raises(BundleError, match=r"tensors do not fit.*mapping\.fc0"):
        load_generator(open_bundle(tmp_path / "b"))


def test_oversized_network_is_refused_at_loading(tmp_path: Path) -> None:
    make(tmp_path / "b")
    rewrite(tmp_path / "b", lambda document: document["generator"].update(channel_base=2**40, channel_max=2**40))
    with pytest.raises(BundleError, match="impossible network"):
        load_generator(open_bundle(tmp_path / "b"))


def test_weights_changed_after_opening_are_not_loaded(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b")
    _flip(tmp_path / "b" / "generator.safetensors")
    with pytest.raises(BundleError, match="SHA-256"):
        load_generator(bundle)


# -- writing


@pytest.mark.parametrize(("call", "count"), [("fsync", 1), ("fsync", 3), ("rename", 1), ("rename", 2)])
@pytest.mark.parametrize("crash", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_crash_while_replacing_keeps_only_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, count: int, crash: BaseException
) -> None:
    old = make(tmp_path / "b")
    owner: Any = os if call == "fsync" else Path
    original = getattr(owner, call)
    calls = []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == count:
            raise crash
        return original(*args)

    monkeypatch.setattr(owner, call, failing)
    with pytest.raises(BundleError if isinstance(crash, OSError) else KeyboardInterrupt):
        make(tmp_path / "b", provenance={"kimg": 2}, replace=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]
    assert open_bundle(tmp_path / "b") == old


def test_a_crash_while_writing_leaves_no_half_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="No space left"):
        make(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_on_request_only(tmp_path: Path) -> None:
    old = make(tmp_path / "b")
    with pytest.raises(BundleError, match="exists already"):
        make(tmp_path / "b", provenance={"kimg": 2})
    assert open_bundle(tmp_path / "b") == old
    assert make(tmp_path / "b", provenance={"kimg": 2}, replace=True).digest != old.digest
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="contains no bundle.json"):
        make(tmp_path / "home", replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "home"]
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_invalid_bundle_is_not_written(tmp_path: Path) -> None:
    broken = network()
    broken.get_parameter("synthesis.b8.conv0.bias").data[0] = torch.nan
    cases: list[dict[str, Any]] = [
        {"generator": broken},
        {"name": "../b"},
        {"class_names": ("benign",)},
        {"class_names": ("Benign", "benign")},
        {"provenance": {"kimg": float("nan")}},
        {"images": {"../samples.png": b""}},
        {"images": {"bundle.json": b""}},
    ]
    for options in cases:
        with pytest.raises(BundleError):
            make(tmp_path / "b", **options)
    assert list(tmp_path.iterdir()) == []


def test_amending_bundle_keeps_bytes_of_weights(tmp_path: Path) -> None:
    old = make(tmp_path / "b")
    new = amend_bundle(old, metrics={"kid": 0.25}, model_card="# better\n")
    assert new.digest != old.digest and new.metrics == {"kid": 0.25} and new.model_card.startswith("# better\n")
    assert new.files["generator.safetensors"] == old.files["generator.safetensors"]


def test_bundle_commands_verify_and_show_print_digest(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b")
    good = CliRunner().invoke(app, ["bundle", "verify", str(tmp_path / "b")])
    assert good.exit_code == 0 and bundle.digest in good.output
    shown = json.loads(CliRunner().invoke(app, ["bundle", "show", str(tmp_path / "b")]).output)
    assert shown["digest"] == bundle.digest and shown["generator"]["img_resolution"] == 8
    _flip(tmp_path / "b" / "generator.safetensors")
    bad = CliRunner().invoke(app, ["bundle", "verify", str(tmp_path / "b")])
    assert isinstance(bad.exception, BundleError)


def test_card_lists_attached_and_detached_parts(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    training = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    bundle = make_complete_bundle(tmp_path, training)
    bare = make_bundle(tmp_path / "bare")
    assert "30 training images" in bundle.model_card and "`axis-1`" in bundle.model_card
    assert "## Classifier" in bundle.model_card
    done = CliRunner().invoke(app, ["bundle", "detach", bundle.location, "authenticity", "directions"])
    assert done.exit_code == 0, done.output
    left = open_bundle(bundle.location)
    assert (left.authenticity, left.directions) == (None, ()) and left.classifier == bundle.classifier
    assert "Latent space" not in left.model_card and "## Classifier" in left.model_card
    assert not any(name.startswith("authenticity/") for name in left.files)
    refused = CliRunner().invoke(app, ["bundle", "detach", bundle.location, "authenticity"])
    assert isinstance(refused.exception, RequestError) and "has no authenticity" in str(refused.exception)
    last = amend_bundle(left, remove=["classifier"])
    assert last.model_card == bare.model_card


# -- structure


def _imports(file: Path) -> set[str]:
    """Modules of dermis that a file imports, also inside functions and under TYPE_CHECKING."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{file}: imports are absolute"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def test_bundle_package_does_not_import_part_packages() -> None:
    format_folder = Path(dermis.bundle.__file__).parent
    for file in format_folder.glob("*.py"):
        for package in ("classifier", "authenticity", "projection", "directions"):
            assert not any(f"{name}.".startswith(f"dermis.{package}.") for name in _imports(file)), file.name
