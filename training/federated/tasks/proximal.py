"""FedProx at a member (Li et al., arXiv 1812.06127): weights are pulled towards the global ones that the round began with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def proximal_pull(modules: Iterable[nn.Module], mu: float) -> Callable[[nn.Module], None] | None:
    """Adds the gradient of mu / 2 |w - w0|^2 to that of a module, w0 being its weights now. None if mu is 0."""
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
