"""Feature spaces: the pretrained network computes what timm computes from the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import dermis.features
from dermis.features import FeatureExtractor, _by_torch, _lite0_weights, feature_extractor, lite0_network
from dermis.features_openvino import OpenvinoFeatures
from dermis.vision import import_vision


def test_lite0_is_timms_network_with_the_weights_of_the_package() -> None:
    theirs = import_vision("timm").create_model("tf_efficientnet_lite0").eval()
    weights = torch.load(_lite0_weights(), weights_only=True)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights.values(), strict=True)))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = theirs.global_pool(theirs.forward_features(x))
    ours = lite0_network()
    assert torch.allclose(ours(x), expected, atol=1e-4)
    assert expected.std() > 0.1
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_features_of_an_image_do_not_depend_on_its_batch() -> None:
    extractor = feature_extractor("lite0")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    together = extractor.over([images])
    assert together.shape == (3, extractor.dim) and together.dtype == np.float32
    assert np.allclose(together, extractor.over(images[i : i + 1] for i in range(3)), atol=1e-4)


TOLERANCE = 2e-5  # of the length of a feature vector, as docs/evaluation.md says


def extractor_of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureExtractor:
    """lite0 as it is, the others with random weights."""
    torch.manual_seed(0)
    if name == "timm":
        network = import_vision("timm").create_model("test_resnet.r160_in1k", num_classes=0)
        safetensors.torch.save_file(network.state_dict(), folder / "x.safetensors")
        return feature_extractor(f"timm:test_resnet.r160_in1k@{folder / 'x.safetensors'}")
    if name == "inception":
        module = import_vision("torch_fidelity.feature_extractor_inceptionv3")
        monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    return feature_extractor(name)


@pytest.mark.parametrize("name", ["lite0", "timm", "inception"])
def test_openvino_computes_what_torch_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    extractor = extractor_of(name, tmp_path, monkeypatch)
    monkeypatch.setattr(dermis.features, "have_openvino", lambda: False)
    by_torch = extractor_of(name, tmp_path, monkeypatch)
    assert isinstance(extractor.extract, OpenvinoFeatures) and not isinstance(by_torch.extract, OpenvinoFeatures)
    assert (extractor.identity, extractor.dim) == (by_torch.identity, by_torch.dim)
    random = np.random.default_rng(0)
    for height, width in ((48, 48), (330, 300), extractor.extract._size):
        noise = random.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        images = np.concatenate([noise, np.full((1, height, width, 3), 255, np.uint8)])
        ours, theirs = extractor.extract(images), by_torch.extract(images)
        apart = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
        assert ours.dtype == np.float32 and theirs.std() > 0 and apart.max() < TOLERANCE
    assert not extractor.extract._failed


def test_openvinos_features_do_not_depend_on_the_batch() -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    first = feature_extractor("lite0").extract(images)
    extract = feature_extractor("lite0").extract
    assert isinstance(extract, OpenvinoFeatures)
    extract._threads = 3
    np.testing.assert_array_equal(extract(images[::-1].copy())[::-1], first)
    np.testing.assert_array_equal(np.concatenate([extract(images[i : i + 1]) for i in range(5)]), first)


def test_torch_computes_what_openvino_cannot(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x[:, :, :3, :3].mean(dim=1)).real

    odd, images = Odd(), np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    by_torch = _by_torch(odd, torch.device("cpu"))
    mean = torch.zeros(3, 1, 1)
    extract = OpenvinoFeatures(odd, (16, 16), dermis.features._bicubic, mean, mean + 1, by_torch)
    np.testing.assert_allclose(extract(images), by_torch(images), rtol=1e-4)
    assert "OpenVINO cannot compile this feature space" in caplog.text
