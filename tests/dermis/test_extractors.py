"""Tests of feature extractors: names, files, and weights that are never executed."""

from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch

from dermis.errors import DermisError
from dermis.feature_presets import PRESETS
from dermis.features import feature_extractor
from dermis.torchvision_compat import import_vision

MODEL = "test_resnet.r160_in1k"  # timm's own miniature for tests
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of downloads, and no network. Returns the folder that weights lie in."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "hub" / "checkpoints"


def test_lite0_distinguishes_images_and_agrees_on_floats() -> None:
    extractor = feature_extractor("lite0")
    features = extractor.over([IMAGES[:2], IMAGES[2:]])
    assert (features.shape, features.dtype) == ((3, extractor.dim), np.float32)
    assert np.abs(features[0] - features[1]).max() > 0.1
    assert extractor.embed is not None
    floats = extractor.embed(torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float())
    np.testing.assert_allclose(floats.numpy(), features, atol=1e-3)


def test_unavailable_weights_give_one_line_of_advice(offline: Path) -> None:
    for name in ("inception", "dinov2", "clip"):
        preset = PRESETS[name]
        with pytest.raises(DermisError, match="no network.*--extractor lite0 or lite1, or put ") as caught:
            feature_extractor(name)
        message = str(caught.value)
        assert "\n" not in message
        assert all(part in message for part in (preset.file, preset.source, str(offline), preset.sha256))
    with pytest.raises(DermisError, match="is none of inception, dinov2, clip, lite0, lite1, lite2, timm:MODEL"):
        feature_extractor("inceptoin")
    with pytest.raises(DermisError, match="timm has no model 'resnet_of_mine'"):
        feature_extractor("timm:resnet_of_mine")


class _Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("executed"),)


def test_downloaded_weights_are_never_executed(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity loads its Inception in the mode of torch.load that runs what a pickle says; ours must not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    offline.mkdir(parents=True)
    for name in ("inception", "dinov2"):
        file = offline / PRESETS[name].file
        torch.save(_Trap(), file)
        with pytest.raises(DermisError, match="is not the weights file"):
            feature_extractor(name)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], sha256=digest))
        with pytest.raises(pickle.UnpicklingError, match="Weights only"):
            feature_extractor(name)
        assert not Path("executed").exists()
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.load(file, weights_only=False)
    assert Path("executed").exists(), "loading the file without the check must execute it"


def test_custom_weights_are_read_from_safetensors_only(tmp_path: Path) -> None:
    timm = import_vision("timm")
    torch.manual_seed(0)
    network = timm.create_model(MODEL, num_classes=7).eval()  # with a classifier, which is left out
    file = tmp_path / "skin.safetensors"
    safetensors.torch.save_file(network.state_dict(), file)
    extractor = feature_extractor(f"timm:{MODEL}@{file}")
    assert extractor.name == f"timm:{MODEL}@skin.safetensors"
    features = extractor.extract(IMAGES)
    assert features.shape == (3, extractor.dim)
    assert features.std() > 0

    for parameter in network.parameters():
        parameter.data.mul_(1.5)
    safetensors.torch.save_file(network.state_dict(), file)
    other = feature_extractor(f"timm:{MODEL}@{file}")
    assert other.identity != extractor.identity, "a cache would confuse the two"

    state = network.state_dict()
    state[next(iter(state))] = torch.zeros(3)
    safetensors.torch.save_file(state, file)
    with pytest.raises(DermisError, match="tensors of the model are missing or of another shape"):
        feature_extractor(f"timm:{MODEL}@{file}")
    pickled = tmp_path / "skin.pth"
    pickled.write_bytes(pickle.dumps({}))
    with pytest.raises(DermisError, match=r"must be a \.safetensors file"):
        feature_extractor(f"timm:{MODEL}@{pickled}")
    with pytest.raises(DermisError, match="no such file of weights"):
        feature_extractor(f"timm:{MODEL}@{tmp_path / 'none.safetensors'}")
    file.write_bytes(b"junk")
    with pytest.raises(DermisError, match="not a readable safetensors file"):
        feature_extractor(f"timm:{MODEL}@{file}")
