"""A second loss, which increases the variety of the images.

It matches the mean and the covariance of generated features to those of real ones.

A discriminator scores each image alone, and a generator can satisfy it with only the most typical images. The missing
variety is visible in the covariance of the features of generated images. The optimal transport map between two Gaussians is
known in closed form (Dowson and Landau 1982; Peyré and Cuturi, arXiv 1803.00567, remark 2.31):

    t(f) = m_r + T (f - m_g),   T = C_r^(1/2) (C_r^(1/2) C_g C_r^(1/2))^(-1/2) C_r^(1/2)

with means m and covariances C of real (r) and generated (g) features. The loss is mean |f - t(f)|^2 over generated features f,
with t held constant: its gradient is, up to a constant, that of the squared Fréchet distance between the two Gaussians. With
labels, every class has its own means, and all share the covariance within classes.

The moments are running averages over the augmented batches that the discriminator sees. The eigenvalues of a covariance of d
features from N images have relative errors of the order sqrt(d / N), and the loss would follow these errors. Therefore the
averages are long, and T acts only in the first COMPONENTS principal components of the real features; in the others it is
the identity. The averages of generated features must also describe the current generator: they are shorter, and those of its
means, which need few images, are the shortest.

If classes differ little compared with the variety within each class, their difference is a small part of that distance, and
a generator learns it last. A second distance therefore counts only the directions that separate the classes best: those of
linear discriminant analysis (Fisher 1936), in units of the standard deviation within classes. It is zero when the generated
images of a class are as far from those of the other classes as real ones are.

The features are statistics of the discriminator's fixed backbone, so a generator that was trained with this loss has
distances in that feature space that are too good.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dermis.devices import to_float64

# Half-lives in images: the weight of a batch is halved after this many further images.
REAL_HALF_LIFE = 20_000
# The half-life of generated features is at most this. It is FAKE_SHARE of the images so far, so that the features of the
# untrained generator soon have little weight.
FAKE_HALF_LIFE = 4000
FAKE_SHARE = 0.2
RECENT_HALF_LIFE = 400  # half-life of the means of generated features; short, so that they follow the generator quickly
MIN_GENERATED_IMAGES = 4000  # number of generated images after which the moments are used
COMPONENTS = 128
INTERVAL = 64  # steps between two solutions for T
_RIDGE = 0.01  # added to the variances, which are 1 for real features


class FeatureMoments(nn.Module):
    """Running moments of real and generated features, and the transport map between them. Everything is a buffer.

    Args:
        c_dim: Number of classes; with 0 or 1 there is one mean.
        features: Length of a feature vector.
        device: Device of the buffers.
    """

    real_mean: Tensor
    recent_count: Tensor
    recent_sum: Tensor
    scale: Tensor
    transport: Tensor
    separation: Tensor
    ready: Tensor
    seen: Tensor

    def __init__(self, c_dim: int, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        classes = max(c_dim, 1)
        for kind in ("real", "fake"):
            self.register_buffer(f"{kind}_count", torch.zeros(classes, device=device))
            self.register_buffer(f"{kind}_sum", torch.zeros(classes, features, device=device))
            self.register_buffer(f"{kind}_outer", torch.zeros(features, features, device=device))
        self.register_buffer("seen", torch.zeros(()))  # on the CPU, where it is read in every step
        self.register_buffer("recent_count", torch.zeros(classes, device=device))
        self.register_buffer("recent_sum", torch.zeros(classes, features, device=device))
        self.register_buffer("real_mean", torch.zeros(classes, features, device=device))
        self.register_buffer("scale", torch.ones(features, device=device))
        self.register_buffer("transport", torch.eye(features, device=device))
        self.register_buffer("separation", torch.zeros(features, classes, device=device))
        self.register_load_state_dict_pre_hook(_add_separation)  # type: ignore[no-untyped-call]
        self.register_buffer("ready", torch.zeros((), device=device))

    @torch.no_grad()
    def update(self, kind: str, features: Tensor, c: Tensor, batch: int, parts: int = 1) -> list[Tensor]:
        """Add features [N, features] with labels c [N, c_dim].

        Args:
            kind: "real" or "fake".
            features: Statistics as `training.gan.projected.statistics` returns them.
            c: Labels, one-hot.
            batch: Number of images of all processes together, which decides how much older images count.
            parts: Number of processes that each add a part of the batch. The mean of their buffers is that of the batch.

        Returns:
            The buffers that changed.
        """
        c = _one_hot(c)
        count, total, outer = c.sum(dim=0), c.T @ features, features.T @ features
        average = float(REAL_HALF_LIFE)
        if kind == "fake":
            self.seen += batch
            average = min(FAKE_HALF_LIFE, max(RECENT_HALF_LIFE, FAKE_SHARE * float(self.seen)))
        changes = [
            (f"{kind}_count", count, average),
            (f"{kind}_sum", total, average),
            (f"{kind}_outer", outer, average),
        ]
        if kind == "fake":
            changes += [("recent_count", count, RECENT_HALF_LIFE), ("recent_sum", total, RECENT_HALF_LIFE)]
        buffers = []
        for name, value, half_life in changes:
            buffer: Tensor = getattr(self, name)
            buffers.append(buffer.mul_(0.5 ** (batch / half_life)).add_(value, alpha=parts))
        return buffers

    @torch.no_grad()
    def solve(self) -> None:
        """Compute means, scale, transport map and separating directions from the current moments."""
        real_mean, real = self._gaussian("real")
        _, fake = self._gaussian("fake")
        scale = real.diagonal().clamp_min(1e-8).rsqrt()
        real, fake = (x * scale * scale[:, None] for x in (real, fake))
        values, vectors = torch.linalg.eigh(real)
        count = min(COMPONENTS, len(values))
        basis = vectors[:, -count:]  # eigenvalues ascend
        identity = torch.eye(count, dtype=real.dtype, device=real.device)
        root = torch.diag((values[-count:].clamp_min(0) + _RIDGE).sqrt())
        within = root @ _inverse_root(root @ (basis.T @ fake @ basis + _RIDGE * identity) @ root) @ root
        transport = torch.eye(len(scale), dtype=real.dtype, device=real.device) + basis @ (within - identity) @ basis.T
        whitening = basis * (values[-count:].clamp_min(0) + _RIDGE).rsqrt()
        centred = (real_mean - real_mean.mean(dim=0)) * scale
        _, singular, directions = torch.linalg.svd(centred @ whitening, full_matrices=False)
        separating = whitening @ directions.T * (singular > 1e-6)  # [features, min(classes, components)]
        self.separation[:, : separating.shape[1]] = separating
        self.scale.copy_(scale)
        self.real_mean.copy_(real_mean * scale)
        self.transport.copy_(transport)
        self.ready.fill_(float(self.seen >= MIN_GENERATED_IMAGES))

    def losses(self, features: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared distance between generated features [N, features] and their images under the transport map.

        Returns:
            The mean over all features, and the sum over the directions that separate the classes.
        """
        c = _one_hot(c)
        x = features * self.scale
        with torch.no_grad():
            fake_mean = self.recent_sum / self.recent_count.clamp_min(1e-8)[:, None] * self.scale
            target = c @ self.real_mean + (x - c @ fake_mean) @ self.transport
        difference = (x - target) * self.ready
        return difference.square().mean(), (difference @ self.separation).square().sum(dim=1).mean()

    def _gaussian(self, kind: str) -> tuple[Tensor, Tensor]:
        """Means [classes, features] and the covariance within classes, in float64."""
        count, total, outer = (to_float64(getattr(self, f"{kind}_{name}")) for name in ("count", "sum", "outer"))
        mean = total / count.clamp_min(1e-8)[:, None]
        return mean, (outer - mean.T @ (count[:, None] * mean)) / count.sum().clamp_min(1e-8)


def _add_separation(module: FeatureMoments, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    # Checkpoints of early versions have no separating directions: they are zero until the next `solve`.
    state.setdefault(f"{prefix}separation", torch.zeros_like(module.separation))


def _one_hot(c: Tensor) -> Tensor:
    """Labels [N, c_dim] as [N, classes]. Without labels, all images are of one class."""
    return c if c.shape[1] else torch.ones(len(c), 1, device=c.device)


def _inverse_root(x: Tensor) -> Tensor:
    """x^(-1/2) of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(x)
    root: Tensor = (vectors * values.clamp_min(1e-10) ** -0.5) @ vectors.T
    return root
