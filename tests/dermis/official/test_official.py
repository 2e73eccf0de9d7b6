"""Tests of official checkpoints: they are read correctly, and no code of a hostile one runs.

`official_pickles.py` makes the files: small persisted objects with the names and the shape that the official format has.
"""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle import load_generator, open_bundle
from dermis.errors import BundleError
from dermis.networks import Discriminator, Generator, one_hot
from dermis.official.convert import build_networks, read_official
from dermis.official.source import check_source
from dermis.official.stored import write_stored
from official_pickles import (
    AUGMENT_SOURCE,
    CONFIG,
    D_CONFIG,
    SOURCE,
    Persisted,
    _official_names,  # noqa: F401
    discriminator,
    generator,
    save,
    snapshot,
)

# -- good files


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_stored_networks_are_read_unchanged(tmp_path: Path, protocol: int) -> None:
    read = read_official(save(tmp_path, snapshot(), protocol))
    assert read.generator.config == CONFIG and read.discriminator is not None
    assert read.discriminator.config == D_CONFIG
    torch.manual_seed(0)
    expected = Generator(CONFIG)
    expected.mapping.w_avg.normal_()
    z, c = torch.randn(2, 8), one_hot([0, 1], 2)
    ours = read.generator(z, c, truncation_psi=0.5, noise_mode="const")
    assert torch.equal(ours, expected(z, c, truncation_psi=0.5, noise_mode="const"))
    torch.manual_seed(1)
    assert torch.equal(read.discriminator(ours, c), Discriminator(D_CONFIG)(ours, c))
    assert read.training_set["path"] == "/home/someone/isic.zip"


def test_stored_attributes_replace_missing_constructor_arguments(tmp_path: Path) -> None:
    config = replace(CONFIG, c_dim=0, mapping_lr_multiplier=0.1, num_fp16_res=1)
    stored = generator(config, mapping_kwargs={}, synthesis_kwargs={"channel_base": 256, "channel_max": 16})
    assert read_official(save(tmp_path, {"G_ema": stored})).generator.config == config


def test_frozen_layers_and_group_size_of_discriminator_are_read(tmp_path: Path) -> None:
    stored = discriminator(epilogue_kwargs={})
    empty: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    layer = Persisted("MinibatchStdLayer", {**empty, "group_size": np.int64(2), "num_channels": 1})
    stored.state["_modules"]["b4"].state["_modules"]["mbstd"] = layer
    frozen = stored.state["_modules"]["b16"].state["_modules"]["conv0"].state
    frozen["_buffers"]["weight"] = frozen["_parameters"].pop("weight").detach()
    read = read_official(save(tmp_path, snapshot(D=stored))).discriminator
    assert read is not None and read.config == replace(D_CONFIG, mbstd_group_size=2)


def test_half_precision_and_non_contiguous_weights_are_read(tmp_path: Path) -> None:
    stored = generator()
    affine = stored.state["_modules"]["synthesis"].state["_modules"]["b8"].state["_modules"]["conv0"].state
    weight = affine["_parameters"]["weight"].detach()
    affine["_parameters"]["weight"] = weight.half().permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    read_weight = read_official(save(tmp_path, {"G_ema": stored})).generator.state_dict()["synthesis.b8.conv0.weight"]
    assert torch.equal(read_weight, weight.half().float()) and read_weight.is_contiguous()


def test_zip_serialised_storages_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce(storage: Any) -> tuple[Any, ...]:
        stream = io.BytesIO()
        torch.save(storage, stream)
        return torch.storage._load_from_bytes, (stream.getvalue(),)

    monkeypatch.setattr(torch.storage.TypedStorage, "__reduce__", reduce)
    path = save(tmp_path, {"G_ema": generator()})
    assert b"PK\x03\x04" in path.read_bytes()
    assert read_official(path).generator.config == CONFIG


def test_official_network_sources_pass_source_check() -> None:
    check_source(SOURCE)
    check_source(AUGMENT_SOURCE)


# -- options

UNSUPPORTED: dict[str, Callable[[], Persisted]] = {
    "architecture": lambda: generator(
        synthesis_kwargs={"channel_base": 256, "channel_max": 16, "architecture": "orig"}
    ),
    "use_noise": lambda: generator(synthesis_kwargs={"channel_base": 256, "channel_max": 16, "use_noise": False}),
    "resample_filter": lambda: generator(synthesis_kwargs={"resample_filter": [1, 2, 1]}),
    "activation": lambda: generator(mapping_kwargs={"num_layers": 3, "activation": "relu"}),
    "magnitude_ema_beta": lambda: generator(synthesis_kwargs={"magnitude_ema_beta": 0.99}),
    "img_resolution": lambda: generator(img_resolution=24),
    "w_dim": lambda: generator(w_dim="wide"),
    "channel_base must": lambda: generator(img_resolution=2**30),
    "mapping_layers from 1 to 64": lambda: generator(mapping_kwargs={"num_layers": 10**9}),
    "tensors do not fit": lambda: generator(img_resolution=32),
    "conv_clamp": lambda: generator(synthesis_kwargs={"channel_base": 256, "channel_max": 16, "conv_clamp": 8}),
}


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_unsupported_network_option_is_refused_by_name(tmp_path: Path, option: str) -> None:
    with pytest.raises(BundleError, match=f"G_ema.*{option}"):
        read_official(save(tmp_path, {"G_ema": UNSUPPORTED[option]()}))


def test_another_filter_in_the_weights_is_refused(tmp_path: Path) -> None:
    stored = generator()
    stored.state["_modules"]["synthesis"].state["_modules"]["b8"].state["_buffers"]["resample_filter"] = torch.eye(4)
    with pytest.raises(BundleError, match=r"synthesis.b8.resample_filter"):
        read_official(save(tmp_path, {"G_ema": stored}))


# -- hostile and damaged files


class Runs:
    """Unpickling this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.marker}",)


class Evil:
    """An unknown class."""


def _rebuilt(tensor: torch.Tensor) -> tuple[Any, Any]:
    """The function and the arguments that rebuild a tensor."""
    function, args = tensor.__reduce_ex__(4)[:2]  # type: ignore[no-untyped-call]
    return function, args


def _with_tensor(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> bytes:
    """A checkpoint whose bias of mapping.fc0 is rebuilt with other arguments."""

    class Changed:
        def __reduce__(self) -> tuple[Any, ...]:
            function, args = _rebuilt(torch.zeros(12))
            return function, change(args)

    stored = generator()
    stored.state["_modules"]["mapping"].state["_modules"]["fc0"].state["_parameters"]["bias"] = Changed()
    return pickle.dumps({"G_ema": stored}, protocol=4)


def _hostile_storage(data: bytes) -> bytes:
    class Storage:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (data,)

    return _with_tensor(lambda args: (Storage(), *args[1:]))


def _with_source(source: str) -> bytes:
    return pickle.dumps({"G_ema": Persisted("Generator", generator().state, source)})


def _other_class() -> bytes:
    stored = generator()
    stored.state["_modules"]["mapping"].meta["class_name"] = "Backdoor"
    return pickle.dumps({"G_ema": stored})


def _shared_modules(depth: int) -> Persisted:
    """A record that a naive traversal expands to 2^depth modules."""
    empty: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    inner = Persisted("FullyConnectedLayer", empty)
    for _ in range(depth):
        inner = Persisted("SynthesisBlock", {**empty, "_modules": {"a": inner, "b": inner}})
    stored = generator()
    stored.state["_modules"]["other"] = inner
    return stored


def _shared_lists() -> dict[str, Any]:
    """A record that a naive copy expands to 10^12 numbers."""
    value: Any = 1
    for _ in range(4):
        value = [value] * 1000
    return {"num_layers": value}


def _nested() -> list[Any]:
    value: list[Any] = []
    for _ in range(400):
        value = [value]
    return value


def _with_version(version: Any) -> bytes:
    stored = generator()
    stored.meta["version"] = version
    return pickle.dumps({"G_ema": stored})


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system": (lambda marker: pickle.dumps(snapshot(extra=Runs(marker))), "system"),
    "os.system beside the networks": (lambda m: pickle.dumps(snapshot(training_set_kwargs=Runs(m))), "system"),
    "os.system in a storage": (lambda marker: _hostile_storage(pickle.dumps(Runs(marker))), "system"),
    "unknown class": (lambda _: pickle.dumps(snapshot(extra=Evil())), "Evil"),
    "unknown persisted class": (lambda _: _other_class(), "Backdoor"),
    "call at import": (lambda m: _with_source(SOURCE + f"\nnp.save({str(m)!r}, 1)\n"), "side effects"),
    "import of os": (lambda m: _with_source(SOURCE + f"\nimport os\nos.system('touch {m}')\n"), "'os'"),
    "import inside a function": (lambda _: _with_source("def f():\n    import subprocess\n"), "subprocess"),
    "exec": (lambda _: _with_source("def f():\n    exec('1')\n"), "exec"),
    "decorator": (lambda _: _with_source("import torch\n@torch.hub.load\ndef f(): pass\n"), "decorator"),
    "default value": (lambda _: _with_source("import torch\ndef f(x=torch.load('x')): pass\n"), "computes"),
    "class body": (lambda _: _with_source("import torch\nclass A:\n    x = torch.load('x')\n"), "computes"),
    "metaclass": (lambda _: _with_source("import torch\nclass A(metaclass=torch.B): pass\n"), "metaclass"),
    "patch": (lambda _: _with_source("import torch\ntorch.load = None\n"), "side effects"),
    "not Python": (lambda _: _with_source("def ("), "not Python"),
    "deep source": (lambda _: _with_source("x = " + "-" * 100_000 + "1"), "not Python"),
    "not a pickle": (lambda _: b"\x89PNG\r\n\x1a\n" + bytes(100), "is a PNG image"),
    "empty": (lambda _: b"", "is empty"),
    "truncated": (lambda _: pickle.dumps(snapshot())[:-1000], "is truncated or damaged"),
    "trailing data": (lambda _: pickle.dumps(snapshot()) + b"x", "after the end"),
    "not a dictionary": (lambda _: pickle.dumps([1, 2]), "not a dictionary"),
    "no G_ema": (lambda _: pickle.dumps({"G": None}), "has no G_ema"),
    "G_ema of text": (lambda _: pickle.dumps({"G_ema": "x"}), "not a persisted network"),
    "discriminator as G_ema": (lambda _: pickle.dumps({"G_ema": discriminator()}), "not a Generator"),
    "TensorFlow": (lambda _: b"cdnnlib.tflib.network\nNetwork\n.", "TensorFlow"),
    "nesting": (lambda _: b"]" * 200_000 + b"a" * 199_999 + b".", "not a dictionary"),
    "memo bomb": (lambda _: b"\x80\x04Nr\xff\xff\xff\xff.", "large number"),
    "bytes bomb": (lambda _: b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.", "is truncated or damaged"),
    "hash bomb": (lambda _: b"(K\x01" + b"2\x86" * 200 + b"N" + b"d.", "as a key"),
    "itself": (lambda _: b"\x80\x04}\x94\x8c\x05G_emah\x00s.", "not a persisted network"),
    "deep modules": (lambda _: pickle.dumps({"G_ema": _shared_modules(100)}), "deeper ones"),
    "shared modules": (lambda _: pickle.dumps({"G_ema": _shared_modules(10)}), "in two places"),
    "shared lists": (lambda _: pickle.dumps({"G_ema": generator(mapping_kwargs=_shared_lists())}), "configuration"),
    "endless version": (lambda _: _with_version(10**5000), "version 6"),
    "nested version": (lambda _: _with_version(_nested()), "version 6"),
    "stretched tensor": (
        lambda _: _with_tensor(lambda args: (_rebuilt(torch.zeros(1))[1][0], 0, (12,), (0,))),
        "fc0",
    ),
    "long tensor": (lambda _: _with_tensor(lambda args: (args[0], 8, (12,), (1,))), "mapping.fc0.bias"),
    "negative stride": (lambda _: _with_tensor(lambda args: (args[0], 11, (12,), (-1,))), "mapping.fc0.bias"),
    "storage of text": (lambda _: _hostile_storage(b"text"), "mapping.fc0.bias"),
    "not finite": (lambda _: _with_tensor(lambda _args: _rebuilt(torch.full((12,), torch.nan))[1]), "finite"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_or_damaged_file_is_refused_and_runs_no_code(tmp_path: Path, case: str) -> None:
    make, reason = HOSTILE[case]
    marker = tmp_path / "pwned"
    path = save(tmp_path, make(marker))
    with pytest.raises(BundleError, match=reason) as caught:
        read_official(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert not marker.exists()


def test_damaged_checkpoint_gives_bundle_error_or_generator(tmp_path: Path) -> None:
    data = pickle.dumps({"G_ema": generator(replace(CONFIG, img_resolution=8, mapping_layers=1))})
    random = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(data)
        for position in random.integers(0, len(data), 4):
            changed[position] = random.integers(256)
        for candidate in (bytes(changed), data[: random.integers(len(data))]):
            try:
                write_stored(save(tmp_path, candidate), "G_ema", tmp_path)  # without a process: these are 120 files
                assert isinstance(build_networks(tmp_path, "G_ema").generator, Generator)
            except BundleError as error:
                assert str(error).isprintable() and len(str(error)) < 1000


# -- dermis bundle import


def test_import_writes_a_bundle(tmp_path: Path) -> None:
    path = save(tmp_path, snapshot())
    out = tmp_path / "moles"
    options = ["--class-names", "benign,malignant", "--licence", "CC-BY-NC-4.0", "--attribution", "ISIC"]
    result = CliRunner().invoke(app, ["bundle", "import", str(path), str(out), *options])
    assert result.exit_code == 0, result.output
    bundle = open_bundle(out)
    assert (bundle.name, bundle.class_names) == ("moles", ("benign", "malignant"))
    assert bundle.discriminator == D_CONFIG and bundle.generator == CONFIG
    assert bundle.provenance["kimg"] == 120 and bundle.provenance["licence"] == "CC-BY-NC-4.0"
    assert "someone" not in (out / "bundle.json").read_text()
    read = read_official(path).generator.state_dict()
    assert all(torch.equal(value, read[key]) for key, value in load_generator(bundle).state_dict().items())


def test_unsupported_discriminator_is_left_out_with_warning(tmp_path: Path) -> None:
    path = save(tmp_path, snapshot(D=discriminator(architecture="orig")))
    result = CliRunner().invoke(
        app, ["bundle", "import", str(path), str(tmp_path / "strict"), "--require-discriminator"]
    )
    assert isinstance(result.exception, BundleError) and not (tmp_path / "strict").exists()
    result = CliRunner().invoke(app, ["bundle", "import", str(path), str(tmp_path / "loose")])
    assert result.exit_code == 0 and "warning" in result.stderr and "'orig'" in result.stderr
    assert open_bundle(tmp_path / "loose").discriminator is None


def test_foreign_names_are_escaped_in_card(tmp_path: Path) -> None:
    training_set = {"path": "/home/someone/<img src=x>|\x1b[2J\n# ISIC.zip" + "z" * 1000}
    path = save(tmp_path, snapshot(training_set_kwargs=training_set))
    result = CliRunner().invoke(app, ["bundle", "import", str(path), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in open_bundle(tmp_path / "out").model_card.splitlines() if "training data" in line]
    assert r"\<img src=x\>\|\\x1b\[2J\\n# ISIC.zipzzz" in line and len(line) < 300


def test_refused_import_prints_one_line_and_leaves_no_files(tmp_path: Path) -> None:
    path = save(tmp_path, pickle.dumps(Runs(tmp_path / "pwned")))
    command = [sys.executable, "-m", "commands.main", "bundle", "import", str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and str(path) in done.stderr
    assert list(tmp_path.iterdir()) == [path]
