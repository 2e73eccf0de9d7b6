"""The phases of a training step. Each is a function that adds to the gradients of a network.

The adversarial loss is the non-saturating logistic one (Goodfellow et al. 2014) for StyleGAN2's discriminator, the hinge loss
for the projected one, or the pairing loss for either; feature moments (`training.gan.moments`) can be added. Gradient
penalties (R1 on real images, Mescheder et al., arXiv 1801.04406; R2 on generated ones) and path-length regularisation (Karras
et al., arXiv 1912.04958, section 3.2) are evaluated lazily: every `interval` steps with their loss multiplied by the
interval. All losses are means over this rank's samples; averaging gradients over the ranks makes them means over the whole
batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dermis.networks import Discriminator, Generator
from training.distributed import ALONE, Ranks
from training.gan.augment import AUGMENTATIONS, augment
from training.gan.config import GanConfig
from training.gan.moments import FeatureMoments
from training.gan.projected import ProjectedDiscriminator

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class AdversarialLoss:
    """The losses of generator and discriminator: functions of the logits of generated and of real images to a scalar.

    If `paired`, the generator's loss needs the real logits too, and the images of a pair are of one class. Otherwise the
    discriminator's loss is the sum of `fake_term` and `real_term`.
    """

    generator: Callable[[Tensor, Tensor], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]
    paired: bool = False
    fake_term: Callable[[Tensor], Tensor] = lambda fake: fake.new_zeros(())
    real_term: Callable[[Tensor], Tensor] = lambda real: real.new_zeros(())


def _sum_of_terms(
    generator: Callable[[Tensor, Tensor], Tensor],
    fake_term: Callable[[Tensor], Tensor],
    real_term: Callable[[Tensor], Tensor],
) -> AdversarialLoss:
    return AdversarialLoss(
        generator, lambda fake, real: fake_term(fake) + real_term(real), fake_term=fake_term, real_term=real_term
    )


LOGISTIC = _sum_of_terms(
    generator=lambda fake, real: F.softplus(-fake).mean(),
    fake_term=lambda fake: F.softplus(fake).mean(),
    real_term=lambda real: F.softplus(-real).mean(),
)
"""The non-saturating logistic loss."""

HINGE = _sum_of_terms(
    generator=lambda fake, real: -fake.mean(),
    fake_term=lambda fake: F.relu(1 + fake).mean(),
    real_term=lambda real: F.relu(1 - real).mean(),
)
"""The hinge loss (Lim and Ye, arXiv 1705.02894), for `training.gan.projected`."""

RELATIVISTIC = AdversarialLoss(
    generator=lambda fake, real: F.softplus(real - fake).mean(),
    discriminator=lambda fake, real: F.softplus(fake - real).mean(),
    paired=True,
)
"""The relativistic pairing loss (Jolicoeur-Martineau, arXiv 1807.00734). It compares a generated image with a real one and
not with a fixed threshold. R3GAN (Huang et al., arXiv 2501.05441) shows that no mode of the data is lost with it."""


@dataclass
class Phases:
    """The phases, with the networks and settings that all of them use. The running mean path length `pl_mean` is updated.

    `compiled` compiles the networks in the main phases. The phases with second derivatives stay eager, because compiled
    graphs do not support these. Random numbers are drawn outside of compiled graphs, so that both draw the same.
    """

    G: Generator
    D: Discriminator | ProjectedDiscriminator
    pl_mean: Tensor
    config: GanConfig
    ranks: Ranks = ALONE
    compiled: bool = False
    moments: FeatureMoments | None = None

    def __post_init__(self) -> None:
        self._dtype = DTYPES[self.config.precision]
        self._augment = AUGMENTATIONS[self.config.augment]
        self.adversarial = HINGE if self.config.projected else LOGISTIC
        if self.config.relativistic:
            self.adversarial = RELATIVISTIC
        self._synthesis: Callable[..., Tensor] = self.G.synthesis
        self._discriminate: Callable[..., tuple[Tensor, Tensor | None]] = self._logits_and_statistics
        if self.compiled:  # there are only two batch sizes, and dynamic shapes would slow down both
            self._synthesis = torch.compile(self.G.synthesis, dynamic=False)
            self._discriminate = torch.compile(self._logits_and_statistics, dynamic=False)

    def _logits_and_statistics(
        self, images: Tensor, c: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and the statistics of the discriminator's features if the moments need them."""
        if self.moments is not None and isinstance(self.D, ProjectedDiscriminator):
            return self.D.logits_and_statistics(images, c, dtype)
        return self.D(images, c, dtype), None

    def _draw_styles(self, z: Tensor, c: Tensor, update_w_avg: bool = False) -> tuple[Tensor, list[Tensor | None]]:
        """Map z [N, z_dim] to ws, and draw noise for them.

        With probability style_mixing_prob, a random layer and those after it follow a second z.
        """
        with self.ranks.draws(len(z)):
            ws: Tensor = self.G.mapping(z, c, update_w_avg=update_w_avg)
            if torch.rand(()).item() < self.config.style_mixing_prob:
                cutoff = int(torch.randint(1, self.G.num_ws, ()).item())
                other = self.G.mapping(torch.randn_like(z), c)
                ws = torch.cat([ws[:, :cutoff], other[:, cutoff:]], dim=1)
            return ws, self.G.synthesis.draw_noise("random", len(z))

    def logits(self, images: Tensor, c: Tensor) -> Tensor:
        """The discriminator's logits, in the arithmetic of the run."""
        logits: Tensor = self.D(images, c, self._dtype)
        return logits

    def transformed(self, images: Tensor, p: float) -> Tensor:
        """The images after the run's augmentation of strength p."""
        with self.ranks.draws(len(images)):
            return augment(images, p, self._augment).contiguous()

    def generator_main(self, z: Tensor, c: Tensor, p: float, real: Tensor) -> dict[str, Tensor]:
        """The generator's loss. It is low if D classifies G(z) as real.

        Args:
            z: Latents [n, z_dim].
            c: Labels [n, c_dim].
            p: Augmentation strength.
            real: Images [n, 3, R, R] of the classes c, which a paired loss compares with the generated ones.

        Returns:
            The losses by their names in the log.
        """
        ws, noise = self._draw_styles(z, c, update_w_avg=True)
        fake = self.transformed(self._synthesis(ws, dtype=self._dtype, noise=noise), p)
        if self.adversarial.paired:
            fake_logits, real_logits, features, _ = self._logits_of_both(fake, self.transformed(real, p), c, c)
        else:
            fake_logits, features = self._discriminate(fake, c, self._dtype)
            real_logits = fake_logits.new_zeros(())
        loss = self.adversarial.generator(fake_logits, real_logits)
        losses = {"G": loss.detach()}
        if self.moments is not None and features is not None:
            distance, class_distance = self.moments.losses(features, c)
            losses["moments"] = distance.detach()
            loss = loss + self.config.moments_weight * distance
            if self.config.class_moments_weight:
                losses["class_moments"] = class_distance.detach()
                loss = loss + self.config.class_moments_weight * class_distance
        loss.backward()  # type: ignore[no-untyped-call]
        return losses

    def _logits_of_both(
        self, fake: Tensor, real: Tensor, fake_c: Tensor, real_c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Logits of generated and of real images, and their features, in one pass that converts every weight once."""
        groups = min(self.config.group_size, len(fake))
        images, c = _interleave(fake, real, groups), _interleave(fake_c, real_c, groups)
        logits, features = self._discriminate(images, c, self._dtype)
        fake_features, real_features = (None, None) if features is None else _separate(features, groups)
        return *_separate(logits, groups), fake_features, real_features

    def generator_path_length(self, z: Tensor, c: Tensor) -> Tensor:
        """Penalise deviations of |J_w^T y| from its running mean; y is a random image with unit expected norm per pixel."""
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
        """The discriminator's loss. It is low if D distinguishes real from generated images.

        Returns:
            The loss, and the logits from which the augmentation strength follows: D(real), or D(real) - D(fake) for a
            paired loss, whose logits have no fixed zero.
        """
        fake, real = self.transformed(self.generated(z, c), p), self.transformed(real, p)
        fake_logits, real_logits, fake_features, real_features = self._logits_of_both(fake, real, c, real_c)
        if self.moments is not None and fake_features is not None and real_features is not None:
            batch, parts = self.config.batch, self.ranks.count
            changed = self.moments.update("fake", fake_features, c, batch, parts)
            self.ranks.average_(changed + self.moments.update("real", real_features, real_c, batch, parts))
        loss = self.adversarial.discriminator(fake_logits, real_logits)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), (real_logits - fake_logits if self.adversarial.paired else real_logits).detach()

    def discriminator_penalty(self, images: Tensor, c: Tensor, p: float) -> Tensor:
        """Penalise gamma / 2 |dD/dx|^2 on images, through the augmentation. Returns |dD/dx|^2.

        This is R1 if the images are real, R2 if they are generated. x is the image; for the projected discriminator it is
        the features that are the input of its heads, because the mapping from the image to these is fixed.
        """
        inputs: list[Tensor]
        if isinstance(self.D, ProjectedDiscriminator):
            with torch.no_grad():
                _, mixed = self.D.features(self.transformed(images, p), self._dtype)
            inputs = [x.float().requires_grad_(True) for x in mixed]
            logits = self.D.heads(inputs, c, self._dtype)
        else:
            inputs = [images.detach().requires_grad_(True)]
            logits = self.D(self.transformed(inputs[0], p), c, self._dtype)
        gradients = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
        penalty = torch.stack([x.square().sum(dim=(1, 2, 3)).mean() for x in gradients]).sum()
        (penalty * (self.config.r1_gamma / 2 * self.config.r1_interval)).backward()  # type: ignore[no-untyped-call]
        return penalty.detach()

    @torch.no_grad()
    def generated(self, z: Tensor, c: Tensor) -> Tensor:
        """Generate images [N, 3, R, R] with the generator in training mode."""
        ws, noise = self._draw_styles(z, c)
        return self._synthesis(ws, dtype=self._dtype, noise=noise)


def _interleave(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """Join two batches [N, ...] to one [2N, ...] in which no group of `minibatch_std` holds samples of both.

    If the batch is written in `groups` rows, the groups of `minibatch_std` are its columns: a fills the first columns.
    """
    rows = [x.reshape(groups, len(x) // groups, *x.shape[1:]) for x in (a, b)]
    return torch.cat(rows, dim=1).reshape(2 * len(a), *a.shape[1:])


def _separate(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Undo `_interleave`."""
    half = len(x) // 2
    a, b = x.reshape(groups, 2, half // groups, *x.shape[1:]).unbind(dim=1)
    return a.reshape(half, *x.shape[1:]), b.reshape(half, *x.shape[1:])
