"""The four training phases of StyleGAN2-ADA, each a function that leaves gradients behind.

Non-saturating logistic loss (Goodfellow et al. 2014), R1 gradient penalty (Mescheder et al., arXiv 1801.04406) and
path-length regularisation (Karras et al., arXiv 1912.04958, section 3.2), the last two evaluated lazily: every
`interval` steps with their loss multiplied by the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dermis.networks import Discriminator, Generator
from training.gan.augment import AugmentConfig, augment
from training.gan.projected import ProjectedDiscriminator


@dataclass(frozen=True)
class AdversarialLoss:
    """What generator and discriminator minimise, each a function of logits of any shape to a scalar."""

    generator: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]
    real: Callable[[Tensor], Tensor]


LOGISTIC = AdversarialLoss(
    generator=lambda logits: F.softplus(-logits).mean(),
    fake=lambda logits: F.softplus(logits).mean(),
    real=lambda logits: F.softplus(-logits).mean(),
)
"""The non-saturating logistic loss."""

HINGE = AdversarialLoss(
    generator=lambda logits: -logits.mean(),
    fake=lambda logits: F.relu(1 + logits).mean(),
    real=lambda logits: F.relu(1 - logits).mean(),
)
"""The hinge loss (Lim and Ye, arXiv 1705.02894), for `training.gan.projected`."""


@dataclass
class Phases:
    """The networks and settings that every phase uses. `pl_mean` is the running mean path length."""

    G: Generator
    D: Discriminator | ProjectedDiscriminator
    dtype: torch.dtype | None
    augment: AugmentConfig
    style_mixing_prob: float
    r1_gamma: float
    pl_weight: float
    pl_batch_shrink: int
    pl_decay: float
    pl_mean: Tensor
    synthesis: Callable[..., Tensor]  # G.synthesis, compiled or not
    discriminate: Callable[..., Tensor]  # D, compiled or not
    adversarial: AdversarialLoss = LOGISTIC

    def _ws(self, z: Tensor, c: Tensor, update_w_avg: bool = True) -> Tensor:
        """Map z [N, z_dim]; with probability style_mixing_prob the layers from a random one on follow a second z."""
        ws: Tensor = self.G.mapping(z, c, update_w_avg=update_w_avg)
        if torch.rand(()).item() < self.style_mixing_prob:
            cutoff = int(torch.randint(1, self.G.num_ws, ()).item())
            other = self.G.mapping(torch.randn_like(z), c)
            ws = torch.cat([ws[:, :cutoff], other[:, cutoff:]], dim=1)
        return ws

    def _judge(self, images: Tensor, c: Tensor, p: float, eager: bool = False) -> Tensor:
        """Logits of augmented images. The second-derivative phase runs eagerly: compiled graphs have no such thing."""
        return (self.D if eager else self.discriminate)(augment(images, p, self.augment), c, self.dtype)

    def generator_main(self, z: Tensor, c: Tensor, p: float) -> float:
        """Make D believe that G(z) is real."""
        logits = self._judge(self.synthesis(self._ws(z, c), "random", self.dtype), c, p)
        loss = self.adversarial.generator(logits)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def generator_path_length(self, z: Tensor, c: Tensor, interval: int) -> float:
        """Penalise changes of |J_w^T y| from its running mean, y a random image of unit expected norm a pixel."""
        n = max(len(z) // self.pl_batch_shrink, 1)
        ws = self._ws(z[:n], c[:n], update_w_avg=False)
        images = self.G.synthesis(ws, "random", self.dtype)
        y = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
        (gradient,) = torch.autograd.grad((images * y).sum(), ws, create_graph=True)
        lengths = gradient.square().sum(dim=2).mean(dim=1).sqrt()
        mean = self.pl_mean.lerp(lengths.detach().mean(), self.pl_decay)
        self.pl_mean.copy_(mean)
        penalty = (lengths - mean).square().mean()
        (penalty * (self.pl_weight * interval)).backward()  # type: ignore[no-untyped-call]
        return penalty.item()

    def discriminator_main(self, real: Tensor, real_c: Tensor, z: Tensor, c: Tensor, p: float) -> tuple[float, Tensor]:
        """Tell real from generated. Returns the loss and D(x)."""
        with torch.no_grad():
            fake = self.synthesis(self._ws(z, c, update_w_avg=False), "random", self.dtype)
        fake_loss = self.adversarial.fake(self._judge(fake, c, p))
        fake_loss.backward()  # type: ignore[no-untyped-call]
        real_logits = self._judge(real, real_c, p)
        real_loss = self.adversarial.real(real_logits)
        real_loss.backward()  # type: ignore[no-untyped-call]
        return fake_loss.item() + real_loss.item(), real_logits.detach()

    def discriminator_r1(self, real: Tensor, real_c: Tensor, p: float, interval: int) -> float:
        """Penalise gamma / 2 |dD/dx|^2 on real images, through the augmentation."""
        real = real.detach().requires_grad_(True)
        logits = self._judge(real, real_c, p, eager=True)
        (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        penalty = gradient.square().sum(dim=(1, 2, 3)).mean()
        (penalty * (self.r1_gamma / 2 * interval)).backward()  # type: ignore[no-untyped-call]
        return penalty.item()
