"""Perceptual distances for path lengths: two batches of float images [N, 3, H, W] in 0..255 -> [N]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dermis.errors import DermisError
from dermis.features import FeatureExtractor, hub_folder, published_weights
from dermis.metrics.path_length import PerceptualDistance
from dermis.torchvision_compat import import_vision


def lpips(device: torch.device | str = "cpu") -> PerceptualDistance:
    """Load LPIPS on VGG16 (Zhang et al., arXiv 1801.03924) of torch-fidelity, the distance of published PPLs.

    Its weights (540 MB) are downloaded once.

    Raises:
        DermisError: The weights are not available.
    """
    files = "weights-vgg16-lpips.pth and vgg16-397923af.pth"
    with published_weights("the LPIPS weights", f"give --extractor lite0, or put {files} into {hub_folder()}"):
        utils = import_vision("torch_fidelity.utils")
        module = utils.create_sample_similarity("lpips-vgg16", cuda=False, verbose=False, sample_similarity_resize=None)
    module = module.to(torch.device(device))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = module(a, b)
        return result.flatten()

    return distance


def feature_distance(extractor: FeatureExtractor) -> PerceptualDistance:
    """Make the squared distance of features of unit length, |f(a)/|f(a)| - f(b)/|f(b)||^2, in 0 .. 4.

    LPIPS does the same in every layer; here it is done with pooled features.

    Raises:
        DermisError: The extractor takes only 8-bit images.
    """
    embed = extractor.embed
    if embed is None:
        raise DermisError(f"feature extractor {extractor.name}: takes 8-bit images only, too coarse for path lengths")

    def distance(a: Tensor, b: Tensor) -> Tensor:
        first, second = F.normalize(embed(torch.cat([a, b])), dim=1).chunk(2)
        return (first - second).square().sum(dim=1)

    return distance
