"""Heat maps as numbers: how much each part of an image adds to a classifier's logit of the positive class.

Integrated gradients (Sundararajan et al., arXiv 1703.01365, eq. 1), by captum: along the straight line from a baseline to
the image, the gradient times the difference. The baselines are black and white, as XRAI's authors use them, and the
attributions of both are averaged; those of a pixel's three channels are added up.

XRAI (Kapishnikov et al., arXiv 1906.02825), by its authors' package `saliency`: the image is cut into overlapping segments
at six scales, and the segments are taken in the order of their mean attribution; a pixel gets the mean over what its
segment added. So a region stands out where pixels agree, which single pixels hardly show.

Both are complete: the attributions of an image sum up to its logit less the mean logit of the baselines, but for the error
of numerical integration (`Attribution.gap`). They tell what this network computes, not what is true of the skin.
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
VERSION = 1  # of the numbers: goes up whenever the same image and network would give others
_BASELINES = (0.0, 255.0)
_BATCH_PIXELS = 8 * 128 * 128  # what a step holds in memory for its backward pass is in proportion


@dataclass(frozen=True)
class Attribution:
    """What the parts of one image add to the logit of the positive class. Above 0 speaks for it, below 0 against it."""

    method: Method
    image: Images
    """uint8 [S, S, 3]: what the network saw."""
    values: NDArray[np.float32]
    """[S, S], in logits a pixel."""
    logit: float
    baseline: float
    """Mean logit of a black and a white image."""

    @property
    def gap(self) -> float:
        """By how many logits the values miss `logit` - `baseline`: the error of numerical integration."""
        return float(self.values.sum(dtype=np.float64)) - (self.logit - self.baseline)


class Explainer:
    """A classifier as a torch network, ready to be explained. Safe to call from several threads.

    source: a bundle, or the folder or fsspec URL of a classifier or of a bundle. device: "auto", "cpu", "cuda", ... On one
    kind of machine, with one number of torch's threads, the same image gives the same bytes. Raises BundleError if the source
    has no classifier that is whole, DermisError if a package or the device is missing.
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
        """The attribution of a uint8 image [H, W, 3] of any size: of its centred square, as the classifier sees it.

        check: called before every step; an exception from it gives the work up.
        """
        return attribute(self._network, to_input(image, self.description.input.size), method, check=check)


def missing_packages() -> str | None:
    """What to install before heat maps can be made, or None. Imports nothing."""
    wanted = ("torch", "timm", "captum", "onnx", "saliency")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    return f"heat maps need the package {' and '.join(missing)}: {install_command('explain')}" if missing else None


def require_packages() -> None:
    """DermisError if what heat maps need is not installed."""
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
    """The attribution of uint8 [S, S, 3] for a network that gives (logits [N], ...) of float images [N, 3, S, S], 0..255.

    check: as in `Explainer.attribute`.
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
    """float64 [S, S], and the logits of the image and, averaged, of the baselines."""
    import torch
    from captum.attr import IntegratedGradients

    device = next((each.device for each in (*network.parameters(), *network.buffers())), torch.device("cpu"))

    def logits(images: Any) -> Any:
        check()
        return network(images)[0]

    explained = IntegratedGradients(logits, multiply_by_inputs=True)
    x = torch.tensor(image, device=device).permute(2, 0, 1)[None].float()
    baselines = [torch.full_like(x, value) for value in _BASELINES]
    rows = max(1, _BATCH_PIXELS // (image.shape[0] * image.shape[1]))
    found = [
        explained.attribute(x, baseline, n_steps=steps, method="gausslegendre", internal_batch_size=rows)
        for baseline in baselines
    ]
    with torch.inference_mode():
        logit = float(logits(x)[0])
        baseline = float(torch.cat([logits(each) for each in baselines]).double().mean())
    mean = torch.stack(found).double().mean(0)[0].sum(0)
    return mean.cpu().numpy(), logit, baseline


def _xrai(image: Images, attributions: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [S, S]: the mean of `attributions` over each region, regions taken in the order of it."""
    if int(image.min()) == int(image.max()):  # one colour has no segments, and the package would divide by zero
        return np.full_like(attributions, attributions.mean())
    import saliency.core as saliency

    # The package would take the largest of the three channels. Their sum instead keeps the attributions complete.
    found: NDArray[np.float64] = saliency.XRAI().GetMask(
        image, None, base_attribution=np.repeat(attributions[..., None], 3, axis=2)
    )
    return found
