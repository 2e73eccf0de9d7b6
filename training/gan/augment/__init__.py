"""Adaptive discriminator augmentation (Karras et al., arXiv 2006.06676, section 2 and appendix B).

Every transform is applied with probability p, independently for each image, in this order: blitting and geometry
(`geometry`, one warp), colour (`colour`, one matrix), filtering, noise and cutout (`corruption`). All transforms can be
differentiated twice with respect to the images, as the R1 penalty needs. `strength` controls p.
"""

from training.gan.augment.config import AUGMENTATIONS, AugmentConfig
from training.gan.augment.geometry import warp
from training.gan.augment.pipeline import augment
from training.gan.augment.strength import AdaptiveP

__all__ = ["AUGMENTATIONS", "AdaptiveP", "AugmentConfig", "augment", "warp"]
