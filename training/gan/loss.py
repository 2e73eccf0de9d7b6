"""The training phases, each a function that leaves gradients behind.

The adversarial loss is the non-saturating logistic one (Goodfellow et al. 2014) for StyleGAN2's discriminator, the hinge loss
for the projected one, or the pairing loss for either; feature moments (`training.gan.moments`) may be added. Gradient
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
from training.gan.augment import AUGMENTATIONS, augment
from training.gan.config import GanConfig
from training.gan.moments import FeatureMoments
from training.gan.parallel import ALONE, Ranks
from training.gan.projected import ProjectedDiscriminator

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class AdversarialLoss:
    """What generator and discriminator minimise, each a function of logits of generated and of real images to a scalar.

    Where `paired`, the generator's loss needs the real logits too, and the images of a pair are of one class.
    """

    generator: Callable[[Tensor, Tensor], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]
    paired: bool = False


LOGISTIC = AdversarialLoss(
    generator=lambda fake, real: F.softplus(-fake).mean(),
    discriminator=lambda fake, real: F.softplus(fake).mean() + F.softplus(-real).mean(),
)
"""The non-saturating logistic loss."""

HINGE = AdversarialLoss(
    generator=lambda fake, real: -fake.mean(),
    discriminator=lambda fake, real: F.relu(1 + fake).mean() + F.relu(1 - real).mean(),
)
"""The hinge loss (Lim and Ye, arXiv 1705.02894), for `training.gan.projected`."""

RELATIVISTIC = AdversarialLoss(
    generator=lambda fake, real: F.softplus(real - fake).mean(),
    discriminator=lambda fake, real: F.softplus(fake - real).mean(),
    paired=True,
)
"""The relativistic pairing loss (Jolicoeur-Martineau, arXiv 1807.00734), of which R3GAN (Huang et al., arXiv 2501.05441)
shows that it leaves no mode out: a generated image is judged against a real one, not against a fixed threshold."""


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
    moments: FeatureMoments | None = None

    def __post_init__(self) -> None:
        self._dtype = DTYPES[self.config.precision]
        self._augment = AUGMENTATIONS[self.config.augment]
        self.adversarial = HINGE if self.config.projected else LOGISTIC
        if self.config.relativistic:
            self.adversarial = RELATIVISTIC
        self._synthesis: Callable[..., Tensor] = self.G.synthesis
        self._discriminate: Callable[..., tuple[Tensor, Tensor | None]] = self._judged
        if self.compiled:  # dynamic shapes would slow down all for the sake of two batch sizes
            self._synthesis = torch.compile(self.G.synthesis, dynamic=False)
            self._discriminate = torch.compile(self._judged, dynamic=False)

    def _judged(self, images: Tensor, c: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """Logits, and the statistics of the discriminator's features where the moments need them."""
        if self.moments is not None and isinstance(self.D, ProjectedDiscriminator):
            return self.D.judged(images, c, dtype)
        return self.D(images, c, dtype), None

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

    def generator_main(self, z: Tensor, c: Tensor, p: float, real: Tensor) -> dict[str, Tensor]:
        """Make D believe that G(z) is real; `real` images [n, 3, R, R] of the classes c are its pairs where the loss has them.

        Returns:
            The losses by their names in the log.
        """
        ws, noise = self._draw_styles(z, c, update_w_avg=True)
        fake = self._transform(self._synthesis(ws, dtype=self._dtype, noise=noise), p)
        if self.adversarial.paired:
            fake_logits, real_logits, features, _ = self._judge_both(fake, self._transform(real, p), c, c)
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

    def _judge_both(
        self, fake: Tensor, real: Tensor, fake_c: Tensor, real_c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Logits of generated and of real images, and their features, in one pass: every weight is converted once."""
        groups = min(self.config.group_size, len(fake))
        images, c = _interleave(fake, real, groups), _interleave(fake_c, real_c, groups)
        logits, features = self._discriminate(images, c, self._dtype)
        fake_features, real_features = (None, None) if features is None else _separate(features, groups)
        return *_separate(logits, groups), fake_features, real_features

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
        """Tell real from generated.

        Returns:
            The loss, and the logits that say how surely D knows real images: D(real), or for pairs, where logits have no
            zero, D(real) - D(fake).
        """
        fake, real = self._transform(self.generated(z, c), p), self._transform(real, p)
        fake_logits, real_logits, fake_features, real_features = self._judge_both(fake, real, c, real_c)
        if self.moments is not None and fake_features is not None and real_features is not None:
            batch, parts = self.config.batch, self.ranks.count
            changed = self.moments.update("fake", fake_features, c, batch, parts)
            self.ranks.average_(changed + self.moments.update("real", real_features, real_c, batch, parts))
        loss = self.adversarial.discriminator(fake_logits, real_logits)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), (real_logits - fake_logits if self.adversarial.paired else real_logits).detach()

    def discriminator_penalty(self, images: Tensor, c: Tensor, p: float) -> Tensor:
        """Penalise gamma / 2 |dD/dx|^2 on images, through the augmentation. Returns |dD/dx|^2.

        R1 where the images are real, R2 where they are generated. x is the image; for the projected discriminator it is
        the features that its heads judge, as the way from the image to these is fixed.
        """
        inputs: list[Tensor]
        if isinstance(self.D, ProjectedDiscriminator):
            with torch.no_grad():
                _, mixed = self.D.features(self._transform(images, p), self._dtype)
            inputs = [x.float().requires_grad_(True) for x in mixed]
            logits = self.D.heads(inputs, c, self._dtype)
        else:
            inputs = [images.detach().requires_grad_(True)]
            logits = self.D(self._transform(inputs[0], p), c, self._dtype)
        gradients = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
        penalty = torch.stack([x.square().sum(dim=(1, 2, 3)).mean() for x in gradients]).sum()
        (penalty * (self.config.r1_gamma / 2 * self.config.r1_interval)).backward()  # type: ignore[no-untyped-call]
        return penalty.detach()

    @torch.no_grad()
    def generated(self, z: Tensor, c: Tensor) -> Tensor:
        """Images [N, 3, R, R] of the generator as it is in training."""
        ws, noise = self._draw_styles(z, c)
        return self._synthesis(ws, dtype=self._dtype, noise=noise)


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
