"""The four training phases of StyleGAN2-ADA, each a function that leaves gradients behind.

Non-saturating logistic loss (Goodfellow et al. 2014), R1 gradient penalty (Mescheder et al., arXiv 1801.04406) and
path-length regularisation (Karras et al., arXiv 1912.04958, section 3.2), the last two evaluated lazily: every
`interval` steps with their loss multiplied by the interval. All losses are means over this rank's samples; averaging
gradients over the ranks makes them means over the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dermis.networks import Discriminator, Generator
from training.gan.augment import AUGMENTATIONS, augment
from training.gan.config import GanConfig
from training.gan.parallel import ALONE, Ranks
from training.gan.projected import ProjectedDiscriminator

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    """The networks and settings that every phase uses. `pl_mean` is the running mean path length, updated in place.

    `compiled` compiles what the main phases call. The phases with second derivatives stay eager: compiled graphs have
    no such thing. Random numbers are drawn outside of compiled graphs, so that both draw the same.
    """

    G: Generator
    D: Discriminator | ProjectedDiscriminator
    pl_mean: Tensor
    config: GanConfig
    ranks: Ranks = ALONE
    compiled: bool = False

    def __post_init__(self) -> None:
        self._dtype = DTYPES[self.config.precision]
        self._augment = AUGMENTATIONS[self.config.augment]
        self._adversarial = HINGE if self.config.projected else LOGISTIC
        self._synthesis: Callable[..., Tensor] = self.G.synthesis
        self._discriminate: Callable[..., Tensor] = self.D
        if self.compiled:  # dynamic shapes would slow down all for the sake of two batch sizes
            self._synthesis = torch.compile(self.G.synthesis, dynamic=False)
            self._discriminate = torch.compile(self.D, dynamic=False)

    def _draw_styles(self, z: Tensor, c: Tensor, update_w_avg: bool = False) -> tuple[Tensor, list[Tensor | None]]:
        """Map z [N, z_dim] to ws, and draw noise for them.

        With probability style_mixing_prob the layers from a random one on follow a second z.
        """
        with self.ranks.draws(len(z)):
            ws: Tensor = self.G.mapping(z, c, update_w_avg=update_w_avg)
            if torch.rand(()).item() < self.config.style_mixing_prob:
                cutoff = int(torch.randint(1, self.G.num_ws, ()).item())
                other = self.G.mapping(torch.randn_like(z), c)
                ws = torch.cat([ws[:, :cutoff], other[:, cutoff:]], dim=1)
            return ws, self.G.synthesis.draw_noise("random", len(z))

    def _transform(self, images: Tensor, p: float) -> Tensor:
        with self.ranks.draws(len(images)):
            return augment(images, p, self._augment).contiguous()

    def generator_main(self, z: Tensor, c: Tensor, p: float) -> Tensor:
        """Make D believe that G(z) is real. Returns the loss."""
        ws, noise = self._draw_styles(z, c, update_w_avg=True)
        fake = self._synthesis(ws, dtype=self._dtype, noise=noise)
        loss = self._adversarial.generator(self._discriminate(self._transform(fake, p), c, self._dtype))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def generator_path_length(self, z: Tensor, c: Tensor) -> Tensor:
        """Penalise changes of |J_w^T y| from its running mean, y a random image of unit expected norm a pixel."""
        ws, noise = self._draw_styles(z, c)
        images = self.G.synthesis(ws, dtype=self._dtype, noise=noise)
        with self.ranks.draws(len(z)):
            y = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
        (gradient,) = torch.autograd.grad((images * y).sum(), ws, create_graph=True)
        lengths = gradient.square().sum(dim=2).mean(dim=1).sqrt()
        mean = self.pl_mean.lerp(self.ranks.mean(lengths.mean()), self.config.pl_decay)
        self.pl_mean.copy_(mean)
        penalty = (lengths - mean).square().mean()
        (penalty * (self.config.pl_weight * self.config.pl_interval)).backward()  # type: ignore[no-untyped-call]
        return penalty.detach()

    def discriminator_main(self, real: Tensor, real_c: Tensor, z: Tensor, c: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """Tell real from generated. Returns the loss and D(real)."""
        with torch.no_grad():
            ws, noise = self._draw_styles(z, c)
            fake = self._synthesis(ws, dtype=self._dtype, noise=noise)
        # Both in one pass: every weight is converted and read once instead of twice.
        groups = min(self.config.mbstd_group_size, len(z))
        images = _interleave(self._transform(fake, p), self._transform(real, p), groups)
        logits = self._discriminate(images, _interleave(c, real_c, groups), self._dtype)
        fake_logits, real_logits = _separate(logits, groups)
        loss = self._adversarial.fake(fake_logits) + self._adversarial.real(real_logits)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), real_logits.detach()

    def discriminator_r1(self, real: Tensor, real_c: Tensor, p: float) -> Tensor:
        """Penalise gamma / 2 |dD/dx|^2 on real images, through the augmentation. Returns |dD/dx|^2."""
        real = real.detach().requires_grad_(True)
        logits = self.D(self._transform(real, p), real_c, self._dtype)
        (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        penalty = gradient.square().sum(dim=(1, 2, 3)).mean()
        (penalty * (self.config.r1_gamma / 2 * self.config.r1_interval)).backward()  # type: ignore[no-untyped-call]
        return penalty.detach()


def _interleave(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """Two batches [N, ...] as one [2N, ...] in which no group of `minibatch_std` holds samples of both.

    Its groups of size `groups` are the columns of the batch written in `groups` rows: a fills the first columns.
    """
    rows = [x.reshape(groups, len(x) // groups, *x.shape[1:]) for x in (a, b)]
    return torch.cat(rows, dim=1).reshape(2 * len(a), *a.shape[1:])


def _separate(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Undo `_interleave`."""
    half = len(x) // 2
    a, b = x.reshape(groups, 2, half // groups, *x.shape[1:]).unbind(dim=1)
    return a.reshape(half, *x.shape[1:]), b.reshape(half, *x.shape[1:])
