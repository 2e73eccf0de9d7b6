"""Tests of the generator as an ONNX file: ONNX Runtime and OpenVINO make the images that torch makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dermis.bundle import Bundle, load_generator, write_bundle
from dermis.errors import BundleError, DermisError
from dermis.exports.generator_onnx import check_generator_onnx, generator_onnx
from dermis.networks import Generator, GeneratorConfig
from dermis.synthesizer.network import to_uint8
from optional_packages import needs_openvino
from tiny import make_bundle

pytestmark = pytest.mark.full  # an export takes 12 s
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("noisy") / "tiny", noise_strength=0.3)


def _by_torch(bundle: Bundle, z: Any, labels: Any, psi: list[float], noise: Any, cutoff: int | None = None) -> Any:
    """Images one by one, by the network of the paper, whose truncation is one number."""
    generator = load_generator(bundle)
    images = []
    for row, label, strength, maps in zip(z, labels, psi, noise, strict=True):
        parts = torch.split(torch.from_numpy(maps), [16, 64, 64, 256, 256])
        shaped = [part.reshape(1, 1, int(len(part) ** 0.5), -1) for part in parts]
        with torch.inference_mode():
            c = torch.zeros(1, generator.config.c_dim)
            c[0, int(label)] = 1
            ws = generator.mapping(torch.from_numpy(row)[None], c, strength, cutoff)
            images.append(to_uint8(generator.synthesis(ws, dtype=torch.float32, noise=shaped)).numpy()[0])
    return np.stack(images).astype(int)


@needs_openvino
def test_onnx_runtime_and_openvino_make_the_images_of_torch_in_any_batch(noisy: Bundle) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    from dermis.synthesizer.openvino_cpu import import_openvino

    model = generator_onnx(noisy, truncation_cutoff=2)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    ov = import_openvino()
    compiled = ov.Core().compile_model(ov.Core().read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    random = np.random.default_rng(0)
    for size in (1, 5):
        z = random.standard_normal((size, 16), np.float32)
        labels = random.integers(0, 2, size)
        psi = random.uniform(0, 1, size).astype(np.float32)
        noise = random.standard_normal((size, 656), np.float32)
        expected = _by_torch(noisy, z, labels, [float(each) for each in psi], noise, cutoff=2)
        assert expected.std() > 1
        inputs = {"z": z, "label": labels, "truncation_psi": psi, "noise": noise}
        for images in (session.run(["images"], inputs)[0], compiled(inputs)["images"]):
            assert images.dtype == np.uint8 and images.shape == (size, 16, 16, 3)
            assert np.abs(images.astype(int) - expected).max() <= 1
    with pytest.raises(Exception, match="invalid index"):
        session.run(["images"], inputs | {"label": labels + 2})
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["dermis.class_names"]) == ["benign", "malignant"]
    assert json.loads(properties["dermis.noise_resolutions"]) == [4, 8, 8, 16, 16]
    assert properties["dermis.bundle_sha256"] == noisy.digest and "Not for diagnosis" in properties["dermis.notice"]


def test_halves_give_the_same_as_the_whole_and_a_changed_file_is_found(noisy: Bundle) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    exported = {part: generator_onnx(noisy, part) for part in ("all", "mapping", "synthesis")}
    whole, mapping, synthesis = (
        onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]) for model in exported.values()
    )
    random = np.random.default_rng(1)
    latents = {
        "z": random.standard_normal((3, 16), np.float32),
        "label": np.array([0, 1, 1]),
        "truncation_psi": np.float32([1, 0.5, 0]),
    }
    noise = {"noise": np.zeros((3, 656), np.float32)}
    images, ws = whole.run(["images", "ws"], latents | noise)
    assert np.array_equal(mapping.run(["ws"], latents)[0], ws)
    assert np.array_equal(synthesis.run(["images"], {"ws": ws} | noise)[0], images)
    other = make_bundle(Path(noisy.location).parent / "other", seed=1)
    with pytest.raises(BundleError, match="differ by .* from those of torch"):
        check_generator_onnx(exported["all"], other)


def test_the_command_writes_an_unconditional_generator(run: Run, tmp_path: Path) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    torch.manual_seed(0)
    config = GeneratorConfig(8, c_dim=0, z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8)
    bundle = write_bundle(
        tmp_path / "b", name="b", generator=Generator(config), class_names=(), provenance={}, model_card="# B\n"
    )
    status, out, _ = run("bundle", "export-onnx", tmp_path / "b", "--out", tmp_path / "b.onnx")
    assert status == 0 and f"b@{bundle.digest}" in out and "opset 18" in out
    assert generator_onnx(bundle) == (tmp_path / "b.onnx").read_bytes()
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["z", "truncation_psi", "noise"]
    with pytest.raises(DermisError, match="from 0 to 4, the style vectors of b, not 5"):
        generator_onnx(bundle, truncation_cutoff=5)
