"""One training step: every phase that is due, with its optimizer, and the averages that follow.

Everything random in a step follows from (seed, step).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dermis.networks import Generator, one_hot
from training.data.isic import ImageDataset
from training.gan.batches import Batch, class_weights
from training.gan.config import GanConfig
from training.gan.loss import Phases
from training.gan.moments import INTERVAL as MOMENTS_INTERVAL
from training.gan.state import State, set_learning_rates


def training_step(
    state: State,
    phases: Phases,
    dataset: ImageDataset,
    batch: Batch,
    config: GanConfig,
    adjust: Callable[[nn.Module], None] | None = None,
    rate_factor: float = 1.0,
) -> dict[str, float]:
    """Update the state, its position included. Returns losses, gradient norms and, when it was adjusted, r_t and p.

    `rate_factor` multiplies the learning rates of this step (`training.gan.compact.warm_up_factor`). `adjust` may add to the
    gradients of a network (G, D) once its main phase is complete; the norms do not include it.

    The numbers are those of the whole batch, the same on all ranks. Gradients that are not finite are cleaned as in the
    official code (NaN becomes 0, infinities 1e5); their norm then tells.
    """
    ranks, progress, p = phases.ranks, state.progress, state.adaptive.p
    n, device = config.batch // ranks.count, state.pl_mean.device
    torch.manual_seed((config.seed << 32) + progress.step + 1)
    real, real_c = _prepare(batch, config, phases)
    found: dict[str, Tensor] = {}
    chances = torch.from_numpy(class_weights(dataset.labels, config)).cumsum(0) if config.class_balance else None

    def latents(paired: bool = False) -> tuple[Tensor, Tensor]:
        """z, and labels in the proportions in which real images are shown; `paired`: those of the real images."""
        with ranks.draws(n):
            if paired:
                c = real_c
            else:
                if chances is None:
                    drawn = torch.randint(len(dataset.labels), (n,))
                else:  # by the inverse of the cumulative chances: one uniform number a sample, as `ranks.draws` knows it
                    drawn = torch.rand(n, dtype=torch.float64).contiguous()
                    drawn = torch.searchsorted(chances, drawn).clamp_max(len(chances) - 1)
                c = one_hot(dataset.labels[drawn.numpy()], config.c_dim, device)
            return torch.randn(n, config.z_dim, device=device), c

    set_learning_rates(state, config, rate_factor)
    paired = phases.adversarial.paired
    if phases.moments is not None and progress.step % MOMENTS_INTERVAL == 0:
        phases.moments.solve()

    def apply(optimizer: torch.optim.Adam, module: nn.Module, adjusted: bool = False) -> Tensor:
        gradients = [x.grad for x in module.parameters() if x.grad is not None]
        ranks.average_(gradients)
        norm = nn.utils.get_total_norm(gradients)
        if adjusted and adjust is not None:
            adjust(module)
        for gradient in gradients:
            torch.nan_to_num_(gradient, nan=0.0, posinf=1e5, neginf=-1e5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    state.D.requires_grad_(False)
    found |= phases.generator_main(*latents(paired), p, real)
    found["G_gradient"] = apply(state.G_opt, state.G, adjusted=True)
    if config.pl_weight and progress.step % config.pl_interval == 0:
        z, c = latents()
        shrunk = max(n // config.pl_batch_shrink, 1)
        found["path_length_penalty"] = phases.generator_path_length(z[:shrunk], c[:shrunk])
        apply(state.G_opt, state.G)
    state.D.requires_grad_(True)
    state.G.requires_grad_(False)
    found["D"], real_logits = phases.discriminator_main(real, real_c, *latents(paired), p)
    found["D_gradient"] = apply(state.D_opt, state.D, adjusted=True)
    if config.r1_gamma and progress.step % config.r1_interval == 0:
        found["r1"] = phases.discriminator_penalty(real, real_c, p)
        if config.relativistic:
            z, c = latents()
            found["r2"] = phases.discriminator_penalty(phases.generated(z, c), c, p)
        apply(state.D_opt, state.D)
    state.G.requires_grad_(True)

    ranks.average_([state.G.mapping.w_avg])
    update_ema(state.G_ema, state.G, config, progress.nimg)
    values = ranks.mean(torch.stack(list(found.values())).float()).tolist()  # waits for the device, once a step
    stats = dict(zip(found, values, strict=True))
    state.adaptive.observe(ranks.gather(real_logits))
    r_t = state.adaptive.update(progress.step + 1, config.batch)
    if r_t is not None:
        stats |= {"r_t": r_t, "p": state.adaptive.p}
    progress.step += 1
    progress.nimg += config.batch
    return stats


def _prepare(batch: Batch, config: GanConfig, phases: Phases) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] [n, 3, R, R], mirrored at random if so configured, and labels [n, c_dim]."""
    x = batch.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    if config.mirror:
        with phases.ranks.draws(len(x)):
            flip = torch.rand(len(x), 1, 1, 1) < 0.5
        x = torch.where(flip.to(x.device), x.flip(3), x)
    return x, one_hot(batch.labels, config.c_dim, x.device)


@torch.no_grad()
def update_ema(G_ema: Generator, G: Generator, config: GanConfig, nimg: int) -> None:
    """Average of the weights with a half-life of ema_kimg, shorter early on (ema_rampup times the images seen)."""
    half_life = config.ema_kimg * 1000
    if config.ema_rampup is not None:
        half_life = min(half_life, nimg * config.ema_rampup)
    beta = 0.5 ** (config.batch / max(half_life, 1e-8))
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - beta)
    for copied, buffer in zip(G_ema.buffers(), G.buffers(), strict=True):
        copied.copy_(buffer)
