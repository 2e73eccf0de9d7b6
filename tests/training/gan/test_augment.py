"""Tests of augmentation: off changes nothing, transforms equal the paper's, and the R1 penalty is differentiable."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from training.gan.augment import AUGMENTATIONS, AugmentConfig, augment, warp
from training.gan.augment.colour import apply_colour, random_colour
from training.gan.augment.corruption import BAND_POWER, amplify_bands, band_taps, random_gains
from training.gan.augment.geometry import random_transform

TRANSFORMS = [field.name for field in fields(AugmentConfig) if field.default == 0.0]


def _alone(transform: str) -> AugmentConfig:
    return replace(AUGMENTATIONS["none"], **{transform: 1.0})  # type: ignore[arg-type]


def _waves(n: int, size: int) -> torch.Tensor:
    """Smooth, coloured, unlike their mirror images."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    return torch.stack([torch.stack([torch.sin(5 * x + k), torch.cos(4 * y - k), x * y + 0.1 * k]) for k in range(n)])


def test_augmentation_groups_match_official_groups() -> None:
    parts = {"b": "blit", "g": "geom", "c": "color", "f": "filter", "n": "noise"}
    for name in ("bg", "bgc", "bgcf", "bgcfn"):
        union = {on for letter in name for on in TRANSFORMS if getattr(AUGMENTATIONS[parts[letter]], on)}
        assert {on for on in TRANSFORMS if getattr(AUGMENTATIONS[name], on)} == union
    assert all(getattr(AUGMENTATIONS["bgcfnc"], on) == 1 for on in TRANSFORMS)
    assert replace(AUGMENTATIONS["bgcfnc"], cutout=0) == AUGMENTATIONS["bgcfn"]
    assert len(TRANSFORMS) == 15


def test_augment_returns_same_images_at_zero_probability() -> None:
    images = torch.rand(2, 3, 16, 16)
    state = torch.get_rng_state()
    assert all(augment(images, 0.0, config) is images for config in AUGMENTATIONS.values())
    assert augment(images, 1.0, AUGMENTATIONS["none"]) is images
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_each_transform_acts_on_share_p_of_images(transform: str) -> None:
    torch.manual_seed(0)
    config, images = _alone(transform), _waves(1, 8)
    all_of_them = augment(images.expand(64, -1, -1, -1), 1.0, config)
    assert (all_of_them - images).abs().mean() > 0.01
    n, p = 4000, 0.3
    warps = random_transform(n, 8, p, config)  # are as informative as the warped images, and faster
    difference = augment(images.expand(n, -1, -1, -1), p, config) - images if warps is None else warps - torch.eye(3)
    changed = (difference.abs().flatten(1).amax(dim=1) > 1e-5).float().mean().item()
    # A flip, a quarter turn, a shift by whole pixels can come out as the identity.
    still = {"xflip": 1 / 2, "rotate90": 1 / 4, "lumaflip": 1 / 2, "xint": 1 / 4}.get(transform, 0.0)
    expected = p * (1 - still)
    if transform == "filter":
        expected = 1 - (1 - p) ** len(BAND_POWER)  # any of the bands
    assert changed == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))


def test_blit_and_geometry_transforms_match_recorded_values() -> None:
    """Runs that began with an earlier version continue with the same transforms: these values are that version's."""
    torch.manual_seed(7)
    out = augment(_waves(6, 16), 0.3, AUGMENTATIONS["bg"])
    expected = torch.tensor([0.37918, 0.8488, -0.32801, -0.89499, 0.71822, 0.70989])
    assert torch.allclose(out[:, 0, 3, 5], expected, atol=1e-4)
    assert torch.rand(2)[1].item() == 0.7687715291976929


@pytest.mark.parametrize("group", ["blit", "geom", "bg"])
def test_geometry_equals_scipys_affine_warp(group: str) -> None:
    size = 64
    images = _waves(4, size)
    torch.manual_seed(1)
    matrix = random_transform(4, size, 1.0, AUGMENTATIONS[group])
    assert matrix is not None
    ours = warp(images, matrix)
    swap = np.array([[0, 1], [1, 0]])  # scipy counts (row, column), we (x, y)
    centre = (size - 1) / 2
    compared = 0
    for image, out, m in zip(images, ours, matrix.double().numpy(), strict=True):
        linear, shift = swap @ m[:2, :2] @ swap, swap @ m[:2, 2]
        offset = centre - linear @ np.full(2, centre) + shift
        grid = np.stack(np.meshgrid(*[np.arange(size) - centre] * 2, indexing="ij"), axis=-1) @ linear.T + shift
        inside = np.abs(grid).max(axis=-1) < centre - 8  # away from borders, which are reflected about other points
        for channel in range(3):
            theirs = affine_transform(image[channel].double().numpy(), linear, offset, order=3)
            assert np.abs(theirs - out[channel].numpy())[inside].max() < 0.01
        compared += inside.sum()
    assert compared > 4 * size


def test_colour_strengths_match_paper() -> None:
    n = 20000
    torch.manual_seed(0)

    def matrices(transform: str) -> torch.Tensor:
        drawn = random_colour(n, 1.0, _alone(transform))
        assert drawn is not None
        assert torch.equal(drawn[:, 3], torch.tensor([0.0, 0, 0, 1]).expand(n, 4))
        return drawn[:, :3]

    shift = matrices("brightness")[:, :, 3]
    assert shift.std().item() == pytest.approx(0.2, rel=0.03) and shift.mean().abs() < 0.01
    assert torch.equal(shift, shift[:, :1].expand(n, 3))
    gain = matrices("contrast")[:, 0, 0].log2()
    assert gain.std().item() == pytest.approx(0.5, rel=0.03) and gain.mean().abs() < 0.02

    grey, red_minus_green = torch.ones(3) / math.sqrt(3), torch.tensor([1.0, -1, 0]) / math.sqrt(2)
    saturation = matrices("saturation")[:, :, :3]
    assert torch.allclose(saturation @ grey, grey.expand(n, 3), atol=1e-5)
    chroma = (saturation @ red_minus_green) @ red_minus_green
    assert chroma.log2().std().item() == pytest.approx(1.0, rel=0.03) and chroma.log2().mean().abs() < 0.03

    hue = matrices("hue")[:, :, :3]
    assert torch.allclose(hue @ grey, grey.expand(n, 3), atol=1e-5)
    assert torch.allclose(hue @ hue.transpose(1, 2), torch.eye(3).expand(n, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(hue), torch.ones(n), atol=1e-5)
    turned = torch.atan2(
        (hue @ red_minus_green) @ torch.linalg.cross(grey, red_minus_green), hue @ red_minus_green @ red_minus_green
    )
    assert turned.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.02) and turned.abs().max() > 3.1

    flip = matrices("lumaflip")[:, :, :3]
    assert torch.allclose(flip @ flip, torch.eye(3).expand(n, 3, 3), atol=1e-5)
    flipped = (flip @ grey) @ grey < 0
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.allclose(flip @ red_minus_green, red_minus_green.expand(n, 3), atol=1e-5)


def test_colour_is_one_affine_map_of_every_pixel() -> None:
    images = torch.rand(3, 3, 5, 4)
    matrix = random_colour(3, 1.0, AUGMENTATIONS["color"])
    assert matrix is not None
    out = apply_colour(images, matrix)
    pixel = matrix[1] @ torch.cat([images[1, :, 4, 2], torch.ones(1)])
    assert torch.allclose(out[1, :, 4, 2], pixel[:3], atol=1e-6)
    with pytest.raises(ValueError, match="RGB"):
        apply_colour(torch.rand(3, 1, 5, 4), matrix)


def test_filter_bands_are_sym2_octaves_and_sum_to_identity() -> None:
    taps, root = band_taps(), math.sqrt(3)
    assert taps.shape == (4, 43)
    assert np.allclose(taps, taps[:, ::-1])
    assert np.allclose(taps.sum(axis=0), np.arange(43) == 21)
    sym2 = np.array([1 + root, 3 + root, 3 - root, 1 - root]) / (4 * math.sqrt(2))
    frequency = np.linspace(0, np.pi, 2001)

    def low(w: np.ndarray) -> np.ndarray:
        return np.abs(np.exp(-1j * np.outer(w, np.arange(4))) @ sym2) ** 2 / 2

    response = (np.exp(-1j * np.outer(frequency, np.arange(43) - 21)) @ taps.T).real
    assert np.allclose(response[:, 3], low(frequency + np.pi))
    assert np.allclose(response[:, 0], low(frequency) * low(2 * frequency) * low(4 * frequency))
    edges = [0, np.pi / 8, np.pi / 4, np.pi / 2, np.pi]
    for band, (start, end) in enumerate(pairwise(edges)):
        centre = (frequency > start + (end - start) / 4) & (frequency < end - (end - start) / 4)
        assert (response[centre].argmax(axis=1) == band).all()


@pytest.mark.parametrize("size", [8, 16, 64])
def test_filter_equals_convolution_with_reflected_borders(size: int) -> None:
    images = torch.rand(3, 3, size, size, dtype=torch.float64)
    assert torch.allclose(amplify_bands(images, torch.ones(3, 4)), images, atol=1e-12)
    gains = torch.tensor([[1.0, 2, 0.5, 3]]).expand(3, 4)
    kernel = np.array([1, 2, 0.5, 3]) @ band_taps()
    out = amplify_bands(images, gains)[2, 1].numpy()
    padded = np.pad(images[2, 1].numpy(), 21, mode="reflect")
    for axis in (0, 1):
        padded = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    assert np.allclose(out, padded)


def test_filter_gains_are_log_normal_and_keep_the_expected_power() -> None:
    torch.manual_seed(0)
    gains = random_gains(20000, 1.0, AUGMENTATIONS["filter"]).double()
    # Rescaling multiplies all four alike, so the ratio of two bands is the ratio of two independent draws.
    ratio = (gains[:, 1] / gains[:, 3]).log2()
    assert ratio.std().item() == pytest.approx(math.sqrt(2), rel=0.03) and ratio.mean().abs() < 0.04
    lone = random_gains(20000, 0.02, AUGMENTATIONS["filter"]).double()
    drawn = (lone - lone.median(dim=1, keepdim=True).values).abs() > 1e-6  # the other three are equal
    lone = lone[drawn.sum(dim=1) == 1]
    assert len(lone) > 500
    assert torch.allclose(lone.square() @ torch.tensor(BAND_POWER, dtype=torch.float64), torch.ones(1).double())
    assert torch.equal(random_gains(5, 0.0, AUGMENTATIONS["filter"]), torch.ones(5, 4))


def test_noise_sigma_of_each_image_is_half_normal() -> None:
    torch.manual_seed(0)
    images = torch.rand(3000, 3, 16, 16)
    noise = augment(images, 1.0, AUGMENTATIONS["noise"]) - images
    sigma = noise.std(dim=(1, 2, 3))
    assert sigma.mean().item() == pytest.approx(0.1 * math.sqrt(2 / math.pi), rel=0.05)
    assert sigma.square().mean().sqrt().item() == pytest.approx(0.1, rel=0.05)
    assert noise.mean().abs() < 1e-3


def test_cutout_removes_square_that_may_cross_border() -> None:
    torch.manual_seed(0)
    out = augment(torch.ones(4000, 3, 32, 32), 1.0, AUGMENTATIONS["cutout"])
    gone = out == 0
    assert torch.equal(gone | (out == 1), torch.ones_like(gone))
    area = gone[:, 0].float().mean(dim=(1, 2))
    assert area.max() == 0.25
    # With a uniform centre 7/16 of each side is covered on average.
    assert area.mean().item() == pytest.approx((7 / 16) ** 2, rel=0.03)
    rows, columns = gone[:, 0].any(dim=2).sum(dim=1), gone[:, 0].any(dim=1).sum(dim=1)
    assert torch.equal(area * 32 * 32, (rows * columns).float()), "a rectangle"


def test_augmentation_is_twice_differentiable() -> None:
    images = torch.rand(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def energy(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return (augment(x, 1.0, AUGMENTATIONS["bgcfn"]) ** 3).sum()

    assert torch.autograd.gradcheck(energy, (images,), fast_mode=True)
    assert torch.autograd.gradgradcheck(energy, (images,), fast_mode=True)


@pytest.mark.parametrize("group", ["color", "bgcfnc"])
def test_r1_gradient_passes_through_augmentation(group: str) -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 16, 16, requires_grad=True)
    weight = torch.randn(1, 3, 3, 3, requires_grad=True)
    logits = torch.nn.functional.conv2d(augment(images, 1.0, AUGMENTATIONS[group]), weight).square().sum()
    (gradient,) = torch.autograd.grad(logits, images, create_graph=True)
    gradient.square().sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and images.grad is not None
    assert weight.grad.abs().sum() > 0 and images.grad.abs().sum() > 0
