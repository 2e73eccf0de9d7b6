"""One training step: every phase that is due, with its optimizer, and the update of the averages.

Everything random in a step follows from (seed, step).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dermis.errors import TrainingError
from dermis.latents import mixed_seed
from dermis.networks import Generator, one_hot
from training.data.images import ImageDataset
from training.gan.batches import Batch, class_weights
from training.gan.config import GanConfig
from training.gan.loss import Phases
from training.gan.moments import INTERVAL as MOMENTS_INTERVAL
from training.gan.private.gradients import discriminator_gradients
from training.gan.private.sampling import PrivateBatch
from training.gan.state import GanState, set_learning_rates
from training.precision import float32_convolutions


@float32_convolutions()
def training_step(
    state: GanState,
    phases: Phases,
    dataset: ImageDataset,
    batch: Batch | PrivateBatch,
    config: GanConfig,
    adjust: Callable[[nn.Module], None] | None = None,
    rate_factor: float = 1.0,
) -> dict[str, float]:
    """Update the state and its progress.

    Gradients that are not finite are replaced as in the official code (NaN by 0, infinities by 1e5). The returned norm is
    that before the replacement.

    Args:
        state: Networks, optimizers, averages and progress.
        phases: The losses of these networks.
        dataset: Training images, whose labels decide the classes that are generated.
        batch: This rank's part of the real images; with differential privacy the patients of the step.
        config: Hyper-parameters.
        adjust: Adds to the gradients of a network (G, D) after its main phase. The norms do not include it.
        rate_factor: Factor of the learning rates of this step (`training.gan.compact.warm_up_factor`).

    Returns:
        Losses, gradient norms and, if p was adjusted, r_t and p: of the whole batch, the same on all ranks. With
        differential privacy D is the loss of the generated images alone.

    Raises:
        TrainingError: The configuration has `dp`, and the batch was not drawn for it.
    """
    private = isinstance(batch, PrivateBatch)
    if config.dp != private:
        raise TrainingError("dp: only `dermis train gan --dp` trains with differential privacy")
    ranks, progress, p = phases.ranks, state.progress, state.adaptive.p
    n, device = config.batch // ranks.count, state.pl_mean.device
    torch.manual_seed(mixed_seed(config.seed, progress.step))
    if isinstance(batch, PrivateBatch):  # nothing but the discriminator's gradient may use real images
        real, real_c = torch.empty(0, device=device), torch.empty(0, device=device)
    else:
        real, real_c = _prepare(batch, config, phases)
    statistics: dict[str, Tensor] = {}
    cumulative = torch.from_numpy(class_weights(dataset.labels, config)).cumsum(0) if config.class_balance else None

    def latents(paired: bool = False) -> tuple[Tensor, Tensor]:
        """Draw z, and labels in the proportions in which real images are shown, or `paired` those of the real images.

        With differential privacy all classes are equally frequent.
        """
        with ranks.draws(n):
            if paired:
                c = real_c
            elif private:  # all classes equally often: their proportions are a property of the real images
                c = one_hot(torch.randint(max(config.c_dim, 1), (n,)).numpy(), config.c_dim, device)
            else:
                if cumulative is None:
                    indices = torch.randint(len(dataset.labels), (n,))
                else:  # by inverting the cumulative distribution: one uniform number per sample, as `ranks.draws` needs
                    uniform = torch.rand(n, dtype=torch.float64).contiguous()
                    indices = torch.searchsorted(cumulative, uniform).clamp_max(len(cumulative) - 1)
                c = one_hot(dataset.labels[indices.numpy()], config.c_dim, device)
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
    statistics |= phases.generator_main(*latents(paired), p, real)
    statistics["G_gradient"] = apply(state.G_opt, state.G, adjusted=True)
    if config.pl_weight and progress.step % config.pl_interval == 0:
        z, c = latents()
        shrunk = max(n // config.pl_batch_shrink, 1)
        statistics["path_length_penalty"] = phases.generator_path_length(z[:shrunk], c[:shrunk])
        apply(state.G_opt, state.G)
    state.D.requires_grad_(True)
    state.G.requires_grad_(False)
    real_logits: Tensor | None = None
    if isinstance(batch, PrivateBatch):
        statistics["D"] = discriminator_gradients(phases, batch, *latents(), p)
    else:
        statistics["D"], real_logits = phases.discriminator_main(real, real_c, *latents(paired), p)
    statistics["D_gradient"] = apply(state.D_opt, state.D, adjusted=True)
    if config.r1_gamma and progress.step % config.r1_interval == 0:
        statistics["r1"] = phases.discriminator_penalty(real, real_c, p)
        if config.relativistic:
            z, c = latents()
            statistics["r2"] = phases.discriminator_penalty(phases.generated(z, c), c, p)
        apply(state.D_opt, state.D)
    state.G.requires_grad_(True)

    ranks.average_([state.G.mapping.w_avg])
    update_ema(state.G_ema, state.G, config, progress.nimg)
    values = ranks.mean(torch.stack(list(statistics.values())).float()).tolist()  # waits for the device, once per step
    stats = dict(zip(statistics, values, strict=True))
    if real_logits is not None:
        state.adaptive.observe(ranks.gather(real_logits))
        r_t = state.adaptive.update(progress.step + 1, config.batch)
        if r_t is not None:
            stats |= {"r_t": r_t, "p": state.adaptive.p}
    progress.step += 1
    progress.nimg += config.batch
    return stats


def _prepare(batch: Batch, config: GanConfig, phases: Phases) -> tuple[Tensor, Tensor]:
    """Images [n, 3, R, R] in [-1, 1], mirrored at random if config.mirror, and labels [n, c_dim]."""
    x = batch.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    if config.mirror:
        with phases.ranks.draws(len(x)):
            flip = torch.rand(len(x), 1, 1, 1) < 0.5
        x = torch.where(flip.to(x.device), x.flip(3), x)
    return x, one_hot(batch.labels, config.c_dim, x.device)


@torch.no_grad()
def update_ema(G_ema: Generator, G: Generator, config: GanConfig, nimg: int) -> None:
    """Update the average of the weights, with a half-life of ema_kimg, at most ema_rampup times the images so far."""
    half_life = config.ema_kimg * 1000
    if config.ema_rampup is not None:
        half_life = min(half_life, nimg * config.ema_rampup)
    beta = 0.5 ** (config.batch / max(half_life, 1e-8))
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - beta)
    for copied, buffer in zip(G_ema.buffers(), G.buffers(), strict=True):
        copied.copy_(buffer)
