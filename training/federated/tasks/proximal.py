"""The proximal term of FedProx (Li et al., arXiv 1812.06127): it pulls weights towards the global weights of the round."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def proximal_pull(modules: Iterable[nn.Module], mu: float) -> Callable[[nn.Module], None] | None:
    """Return a function that adds the gradient of the proximal term to the gradients of a module.

    The term is mu / 2 * ||w - w0||^2, where w0 are the weights at the time of this call (eq. 2 of the paper).

    Args:
        modules: The networks that are trained.
        mu: Strength of the term.

    Returns:
        The function, for one of these modules; None if mu is 0.
    """
    if not mu:
        return None
    anchors: dict[nn.Module, list[Tensor]] = {
        module: [parameter.detach().clone() for parameter in module.parameters()] for module in modules
    }

    @torch.no_grad()
    def pull(module: nn.Module) -> None:
        for parameter, anchor in zip(module.parameters(), anchors[module], strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - anchor, alpha=mu)

    return pull
