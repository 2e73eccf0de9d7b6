"""Tests that the networks agree with the official ones and with their definition.

`../shared/parity`, or the folder DERMIS_PARITY, holds what the official networks compute from given weights; its README.md says
how it was made.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from dermis.networks import (
    Discriminator,
    DiscriminatorConfig,
    Generator,
    GeneratorConfig,
    NoiseMode,
    fir_filter,
    minibatch_std,
    modulated_conv2d,
    one_hot,
)
from parity import PARITY, TOLERANCE, case

needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason=f"the parity cases are not at {PARITY}")
both = pytest.mark.parametrize(("kind", "c_dim"), [("cond", 2), ("uncond", 0)])


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@needs_parity
@both
def test_generator_agrees_with_official_network(kind: str, c_dim: int) -> None:
    state, t = case(f"generator_32px_{kind}.npz")
    G = Generator(GeneratorConfig(32, c_dim, 64, 64, mapping_layers=4, channel_base=1024, channel_max=64)).eval()
    G.load_state_dict(state)
    with torch.no_grad():
        assert error(G.mapping(t["z"], t["c"]), t["ws"]) <= TOLERANCE
        assert error(G.mapping(t["z"], t["c"], truncation_psi=0.7), t["ws_psi07"]) <= TOLERANCE
        assert error(G.synthesis(t["ws"], "const"), t["image_const"]) <= TOLERANCE
        assert error(G.synthesis(t["ws"], "none"), t["image_none"]) <= TOLERANCE
        assert error(G.synthesis(t["ws_psi07"], "const"), t["image_psi07_const"]) <= TOLERANCE


@needs_parity
@both
def test_discriminator_and_r1_agree_with_official_network(kind: str, c_dim: int) -> None:
    state, t = case(f"discriminator_32px_{kind}.npz")
    layers = {"mapping_layers": len({key for key in state if key.startswith("mapping.fc")}) // 2} if c_dim else {}
    D = Discriminator(DiscriminatorConfig(32, c_dim, channel_base=1024, channel_max=64, **layers))
    D.load_state_dict(state)
    image = t["image"].requires_grad_()
    logits = D(image, t["c"])
    assert error(logits, t["logits"]) <= TOLERANCE
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    assert error(gradient.square().sum((1, 2, 3)), t["r1_per_image"]) <= TOLERANCE


@needs_parity
def test_parameter_names_and_shapes_match_official_networks() -> None:
    keys = json.loads((PARITY / "official_state_keys_256px.json").read_text())
    with torch.device("meta"):
        G = Generator(GeneratorConfig(256, 2, mapping_layers=2, channel_base=16384))
        D = Discriminator(DiscriminatorConfig(256, 2, channel_base=16384))
    assert {key: list(value.shape) for key, value in G.state_dict().items()} == keys["generator"]
    assert {key: list(value.shape) for key, value in D.state_dict().items()} == keys["discriminator"]


# -- without the parity cases


def small(c_dim: int = 2, **options: int) -> Generator:
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(16, c_dim, 8, 8, mapping_layers=2, channel_base=128, channel_max=16, **options))
    G.mapping.w_avg.normal_()
    return G.requires_grad_(False).eval()


@pytest.mark.parametrize("up", [1, 2])
def test_modulating_activations_equals_modulating_weights(up: int) -> None:
    """Against a literal reading of the paper: one weight a sample, modulated, then demodulated to unit norm."""
    torch.manual_seed(0)
    x, weight, styles = torch.randn(3, 5, 6, 6), torch.randn(4, 5, 3, 3), torch.randn(3, 5)
    f = fir_filter()
    for i in range(3):
        own = weight * styles[i][None, :, None, None]
        own = own / own.square().sum((1, 2, 3), keepdim=True).add(1e-8).sqrt()
        one = torch.ones(1, 5)
        literal = modulated_conv2d(x[i : i + 1], own, one, f, demodulate=False, up=up)
        assert error(modulated_conv2d(x, weight, styles, f, up=up)[i : i + 1], literal) < 1e-5
    if up == 1:
        assert error(literal, torch.nn.functional.conv2d(x[2:], own, padding=1)) < 1e-5


@pytest.mark.parametrize("noise_mode", ["const", "none"])
def test_a_sample_does_not_depend_on_its_batch(noise_mode: NoiseMode) -> None:
    G = small()
    z, c = torch.randn(5, 8), one_hot([0, 1, 1, 0, 1], 2)
    together = G(z, c, noise_mode=noise_mode)
    for i in range(5):
        assert error(together[i : i + 1], G(z[i : i + 1], c[i : i + 1], noise_mode=noise_mode)) < 1e-5


def test_truncation_moves_first_style_vectors_towards_mean() -> None:
    G = small()
    z, c = torch.randn(3, 8), one_hot([0, 1, 1], 2)
    ws, mean = G.mapping(z, c), G.mapping.w_avg
    assert error(G.mapping(z, c, truncation_psi=0.0), mean.expand_as(ws)) == 0
    half = G.mapping(z, c, truncation_psi=0.5, truncation_cutoff=2)
    assert error(half[:, :2], (ws[:, :2] + mean) / 2) < 1e-6
    assert torch.equal(half[:, 2:], ws[:, 2:])


def test_label_and_noise_reach_the_image() -> None:
    G = small()
    G.get_parameter("synthesis.b16.conv1.noise_strength").fill_(1.0)
    z = torch.randn(1, 8)
    benign, malignant = (G(z, one_hot([label], 2), noise_mode="none") for label in (0, 1))
    assert error(benign, malignant) > 1e-3
    const = [G(z, one_hot([0], 2), noise_mode="const") for _ in range(2)]
    random = [G(z, one_hot([0], 2), noise_mode="random") for _ in range(2)]
    assert torch.equal(*const) and not torch.equal(const[0], benign) and error(*random) > 1e-3


def test_clamp_bounds_pixel_values() -> None:
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(8, 0, 8, 8, mapping_layers=1, channel_base=64, channel_max=8, conv_clamp=0.25)).eval()
    with torch.no_grad():
        image = G.synthesis(torch.randn(2, G.num_ws, 8) * 100, "const")
    assert image.abs().max() <= 2 * 0.25 + 1e-6  # two RGB layers; the up-sampling filter has unit gain


def test_minibatch_std_is_computed_within_groups() -> None:
    x = torch.zeros(8, 3, 4, 4)
    x[1::2] = torch.randn(4, 3, 4, 4)  # with group size 4, group members are 2 apart: the odd samples are one group
    std = minibatch_std(x, 4, 1)[:, 3]
    assert std[::2].max() < 2e-4 and std[1::2].min() > 0.5
    with pytest.raises(ValueError, match="multiple"):
        minibatch_std(torch.zeros(6, 3, 4, 4), 4, 1)


@pytest.mark.parametrize("resolution", [0, 4, 24, 100])
def test_impossible_resolutions_are_refused(resolution: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        GeneratorConfig(resolution)
    with pytest.raises(ValueError, match="power of two"):
        DiscriminatorConfig(resolution)
