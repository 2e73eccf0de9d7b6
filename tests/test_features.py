"""Feature spaces: the pretrained network computes what timm computes from the same weights."""

from __future__ import annotations

import numpy as np
import torch

from dermis.features import _lite0_weights, feature_extractor, lite0_network
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
