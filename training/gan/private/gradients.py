"""The discriminator's gradient with differential privacy.

    gradient = (sum over sampled patients of clip(gradient of the patient's loss) + noise) / expected number of patients
             + mean over generated images of clip(gradient of the image's loss)

The noise has the standard deviation dp_noise * dp_clip in each weight. The first line is the only place where real images
are used. The second line needs no noise: generated images follow from the generator's weights, which are post-processing of
earlier noisy sums, and from public random numbers. They are clipped alike only so that both sides of the loss keep their
balance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dermis.devices import to_float64
from dermis.networks import one_hot
from training.gan.loss import Phases
from training.gan.private.sampling import PatientImages, PrivateBatch

_ROUNDING = 1e-5  # norms are computed in float32; clipping to slightly less keeps the bound


def discriminator_gradients(phases: Phases, batch: PrivateBatch, z: Tensor, c: Tensor, p: float) -> Tensor:
    """Set the gradients of the discriminator.

    The discriminator is in evaluation mode meanwhile: its spectral norms must not change from patient to patient, because a
    patient's gradient would then depend on how many came before.

    Args:
        phases: The networks and their losses.
        batch: The sampled patients and the noise.
        z: Latents [n, z_dim].
        c: Labels [n, c_dim]. They must not depend on the real images.
        p: Augmentation strength, fixed.

    Returns:
        The loss of the generated images. That of the real ones is not returned, since it would not be private.
    """
    config, D = phases.config, phases.D
    renew_spectral_norms(D)
    D.eval()
    try:
        # First, so that no random number of theirs can depend on the patients: no noise covers this part of the gradient.
        fake_images = phases.transformed(phases.generated(z, c), p)
        real = clipped_sum_of_patients(phases, batch.patients, p)
        fake = _zeros(D)
        losses = []
        for i in range(len(fake_images)):
            loss = phases.adversarial.fake_term(phases.logits(fake_images[i : i + 1], c[i : i + 1]))
            losses.append(loss.detach())
            _add_clipped(fake, torch.autograd.grad(loss, list(D.parameters())), config.dp_clip)
    finally:
        D.train()
    add_noise(real, batch, config.dp_clip * (config.dp_noise or 0.0))
    for parameter, real_sum, fake_sum in zip(D.parameters(), real, fake, strict=True):
        parameter.grad = real_sum / config.batch + fake_sum / len(fake_images)
    return torch.stack(losses).mean()


def clipped_sum_of_patients(phases: Phases, patients: Sequence[PatientImages], p: float) -> list[Tensor]:
    """Sum over patients of their gradients, each with a norm of at most dp_clip. This is what the noise is added to.

    One patient more or less changes the sum by at most dp_clip: every patient's gradient is computed alone, from the weights
    and the patient's own images and seed.
    """
    total = _zeros(phases.D)
    for patient in patients:
        device = patient.images.device
        on_cpu = device.type == "cpu"  # whose numbers are always restored
        with torch.random.fork_rng(devices=[] if on_cpu else [device], device_type=None if on_cpu else device.type):
            torch.manual_seed(patient.seed)
            x = patient.images.permute(0, 3, 1, 2).float() / 127.5 - 1
            if phases.config.mirror:
                flip = torch.rand(len(x), 1, 1, 1) < 0.5
                x = torch.where(flip.to(x.device), x.flip(3), x)
            x = phases.transformed(x, p)
        c = one_hot(patient.labels, phases.config.c_dim, x.device)
        loss = phases.adversarial.real_term(phases.logits(x, c))
        _add_clipped(total, torch.autograd.grad(loss, list(phases.D.parameters())), phases.config.dp_clip)
    return total


def add_noise(total: Sequence[Tensor], batch: PrivateBatch, deviation: float) -> None:
    """Add independent normal numbers to every value."""
    if deviation == 0:
        return
    for tensor in total:
        noise = torch.from_numpy(batch.randomness.normal(tensor.numel())).view(tensor.shape)
        tensor.add_(noise.to(tensor.device), alpha=deviation)


@torch.no_grad()
def renew_spectral_norms(network: nn.Module) -> None:
    """One power iteration of every spectral norm, from the weights alone. Only training mode does it."""
    for module in network.modules():
        if parametrize.is_parametrized(module, "weight"):
            _ = module.weight


def _zeros(network: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(parameter) for parameter in network.parameters()]


@torch.no_grad()
def _add_clipped(total: Sequence[Tensor], gradient: Sequence[Tensor], clip: float) -> None:
    """Add a gradient, scaled so that its norm is at most `clip`. One that is not finite is left out, which is a norm of 0."""
    norm = to_float64(torch.stack(torch._foreach_norm(list(gradient)))).norm()
    factor = torch.where(norm.isfinite(), (clip * (1 - _ROUNDING) / norm.clamp_min(1e-30)).clamp_max(1.0), 0.0).float()
    if float(factor) > 0:
        torch._foreach_add_(list(total), torch._foreach_mul(list(gradient), float(factor)))
