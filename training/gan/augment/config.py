"""Probabilities and strengths of the transforms, and the official groups of transforms."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AugmentConfig:
    """Factors of p in [0, 1] for each transform (0: off), and the official strengths (appendix B)."""

    xflip: float = 0.0
    rotate90: float = 0.0
    xint: float = 0.0
    scale: float = 0.0
    rotate: float = 0.0
    aniso: float = 0.0
    xfrac: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    lumaflip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    filter: float = 0.0
    noise: float = 0.0
    cutout: float = 0.0
    xint_max: float = 0.125  # share of the image's side
    scale_std: float = 0.2  # standard deviation, in powers of 2
    rotate_max: float = 1.0  # share of a half turn
    aniso_std: float = 0.2  # standard deviation, in powers of 2
    xfrac_std: float = 0.125  # standard deviation, as a share of the image's side
    brightness_std: float = 0.2  # standard deviation, for images in [-1, 1]
    contrast_std: float = 0.5  # standard deviation, in powers of 2
    hue_max: float = 1.0  # share of a half turn
    saturation_std: float = 1.0  # standard deviation, in powers of 2
    filter_std: float = 1.0  # standard deviation, in powers of 2
    noise_std: float = 0.1  # scale of the half-normal distribution of the noise's sigma
    cutout_size: float = 0.5  # share of the image's side


_BLIT = {"xflip": 1.0, "rotate90": 1.0, "xint": 1.0}
_GEOM = {"scale": 1.0, "rotate": 1.0, "aniso": 1.0, "xfrac": 1.0}
_COLOR = {"brightness": 1.0, "contrast": 1.0, "lumaflip": 1.0, "hue": 1.0, "saturation": 1.0}
_BG = _BLIT | _GEOM
_BGC = _BG | _COLOR

AUGMENTATIONS = {
    "none": AugmentConfig(),
    "blit": AugmentConfig(**_BLIT),
    "geom": AugmentConfig(**_GEOM),
    "color": AugmentConfig(**_COLOR),
    "filter": AugmentConfig(filter=1),
    "noise": AugmentConfig(noise=1),
    "cutout": AugmentConfig(cutout=1),
    "bg": AugmentConfig(**_BG),
    "bgc": AugmentConfig(**_BGC),
    "bgcf": AugmentConfig(**_BGC, filter=1),
    "bgcfn": AugmentConfig(**_BGC, filter=1, noise=1),
    "bgcfnc": AugmentConfig(**_BGC, filter=1, noise=1, cutout=1),
}
