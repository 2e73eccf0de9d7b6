"""Attributions (heat maps as numbers): how much each part of an image adds to a classifier's logit of the positive class.

Integrated gradients (Sundararajan et al., arXiv 1703.01365, eq. 1), by captum: the gradient along the straight line from a
baseline to the image, times the difference. The baselines are black and white, as XRAI's authors use them. The attributions
of both are averaged, and those of the three channels of a pixel are added.

XRAI (Kapishnikov et al., arXiv 1906.02825), by its authors' package `saliency`: the image is divided into overlapping segments
at six scales, and the segments are added in the order of their mean attribution. A pixel gets the mean attribution of the
pixels that its segment added. So regions become visible in which pixels agree, which single pixels hardly show.

Both are complete: the sum of an image's attributions is its logit less the mean logit of the baselines, but for the error of
numerical integration (`Attribution.gap`). They describe what this network computes. They are no evidence about the lesion.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dermis.classifier.preprocess import to_input
from dermis.errors import DermisError, install_command
from dermis.imaging import Images

if TYPE_CHECKING:
    from torch import nn

    from dermis.bundle import Bundle

Method = Literal["xrai", "integrated-gradients"]
METHODS: tuple[Method, ...] = get_args(Method)
STEPS = 64  # Gauss-Legendre points on each line
# Version of the numbers: raised by every change after which the same image and network have other attributions.
VERSION = 1
_BASELINES = (0.0, 255.0)
_BATCH_PIXELS = 8 * 128 * 128  # the memory of a step is proportional to it


@dataclass(frozen=True)
class Attribution:
    """Attribution of one image: values above 0 raise the probability of the positive class, values below 0 lower it."""

    method: Method
    image: Images
    """uint8 [S, S, 3]: the input of the network."""
    values: NDArray[np.float32]
    """[S, S]: logits of each pixel."""
    logit: float
    baseline: float
    """Mean logit of a black and a white image."""

    @property
    def gap(self) -> float:
        """Difference in logits of the sum of `values` and `logit` - `baseline`: the error of numerical integration."""
        return float(self.values.sum(dtype=np.float64)) - (self.logit - self.baseline)


class Explainer:
    """Computes attributions of a classifier. Safe to call from several threads.

    On one kind of machine, and with one number of torch's threads, the same image gives the same bytes.

    Args:
        source: A bundle, or the folder or fsspec URL of a classifier or of a bundle.
        device: "auto" or a name of torch.

    Raises:
        BundleError: The source has no classifier, or a damaged one.
        DermisError: A package is not installed, or the device is not available.
    """

    def __init__(self, source: Bundle | str | Path, *, device: str = "cpu") -> None:
        require_packages()
        from dermis.classifier.onnx_session import find_classifier
        from dermis.classifier.torch_network import load_torch_classifier
        from dermis.devices import resolve_device

        self.description, _ = find_classifier(source)
        self._network = load_torch_classifier(source).to(resolve_device(device))

    def attribute(
        self, image: Images, method: Method = "xrai", *, check: Callable[[], None] = lambda: None
    ) -> Attribution:
        """Compute the attribution of an image.

        Args:
            image: uint8 [H, W, 3] of any size. Its centred square is used, as for the classifier.
            method: "xrai" or "integrated-gradients".
            check: Called before every step. An exception from it ends the work.
        """
        return attribute(self._network, to_input(image, self.description.input.size), method, check=check)


def missing_packages() -> str | None:
    """Return what must be installed for heat maps, or None. Imports nothing."""
    packages = ("torch", "timm", "captum", "onnx", "saliency")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"heat maps need the package {' and '.join(missing)}: {install_command('explain')}" if missing else None


def require_packages() -> None:
    """Raise DermisError if a package that heat maps need is not installed."""
    missing = missing_packages()
    if missing is not None:
        raise DermisError(missing)


def attribute(
    network: nn.Module,
    image: Images,
    method: Method = "xrai",
    *,
    steps: int = STEPS,
    check: Callable[[], None] = lambda: None,
) -> Attribution:
    """Compute the attribution of an image for a network.

    Args:
        network: Float images [N, 3, S, S] in 0..255 -> (logits [N], ...).
        image: uint8 [S, S, 3].
        method: "xrai" or "integrated-gradients".
        steps: Points of the numerical integration for each baseline.
        check: Called before every step. An exception from it ends the work.
    """
    if method not in METHODS:
        raise ValueError(f"{method!r} is none of {', '.join(METHODS)}")
    values, logit, baseline = _integrated_gradients(network, image, steps, check)
    check()
    if method == "xrai":
        values = _xrai(image, values)
    return Attribution(method, image, values.astype(np.float32), logit, baseline)


def _integrated_gradients(
    network: nn.Module, image: Images, steps: int, check: Callable[[], None]
) -> tuple[NDArray[np.float64], float, float]:
    """Return attributions float64 [S, S], the logit of the image, and the mean logit of the baselines."""
    import torch
    from captum.attr import IntegratedGradients

    from dermis.devices import to_float64

    device = next((each.device for each in (*network.parameters(), *network.buffers())), torch.device("cpu"))

    def logits(images: Any) -> Any:
        check()
        return network(images)[0]

    explained = IntegratedGradients(logits, multiply_by_inputs=True)
    x = torch.tensor(image, device=device).permute(2, 0, 1)[None].float()
    baselines = [torch.full_like(x, value) for value in _BASELINES]
    rows = max(1, _BATCH_PIXELS // (image.shape[0] * image.shape[1]))
    attributions = [
        explained.attribute(x, baseline, n_steps=steps, method="gausslegendre", internal_batch_size=rows)
        for baseline in baselines
    ]
    with torch.inference_mode():
        logit = float(logits(x)[0])
        baseline = float(to_float64(torch.cat([logits(each) for each in baselines])).mean())
    mean = to_float64(torch.stack(attributions)).mean(0)[0].sum(0)
    return mean.cpu().numpy(), logit, baseline


def _xrai(image: Images, attributions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return float64 [S, S]: the mean of `attributions` in each region, with regions in the order of their mean."""
    if int(image.min()) == int(
        image.max()
    ):  # an image of one colour has no segments, and the package would divide by zero
        return np.full_like(attributions, attributions.mean())
    import saliency.core as saliency

    # The package would use the largest of three channels. Their sum keeps the attributions complete.
    regions: NDArray[np.float64] = saliency.XRAI().GetMask(
        image, None, base_attribution=np.repeat(attributions[..., None], 3, axis=2)
    )
    return regions
