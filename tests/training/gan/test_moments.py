"""Tests of matching of feature moments: the transport map, and what a generator learns from the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.gan import moments
from training.gan.moments import FeatureMoments

DIM, COUNT = 6, 8000


def _classes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real and generated features [COUNT, DIM] with labels: other means a class, another covariance."""
    random = torch.Generator().manual_seed(0)
    labels = torch.nn.functional.one_hot(torch.arange(COUNT) % 2, 2).float()
    mix = torch.eye(DIM) + 0.4 * torch.randn(DIM, DIM, generator=random)
    real = torch.randn(COUNT, DIM, generator=random) @ mix + labels @ torch.tensor([[0.0] * DIM, [3.0] * DIM])
    fake = 0.6 * torch.randn(COUNT, DIM, generator=random) + labels @ torch.tensor([[1.0] * DIM, [-1.0] * DIM])
    return real, labels, fake, labels.flip(0)


def _within(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the classes, and the covariance within them."""
    means = labels.T @ x / labels.sum(dim=0)[:, None]
    return means, torch.cov((x - labels @ means).T)


def test_transport_map_gives_features_moments_of_real_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_RIDGE", 1e-6)
    for name in ("REAL_HALF_LIFE", "FAKE_HALF_LIFE", "RECENT_HALF_LIFE"):
        monkeypatch.setattr(moments, name, 1e12)  # nothing is forgotten
    real, real_c, fake, fake_c = _classes()
    matched = FeatureMoments(2, DIM)
    for part in range(0, COUNT, 500):
        rows = slice(part, part + 500)
        matched.update("real", real[rows], real_c[rows], batch=500)
        matched.update("fake", fake[rows], fake_c[rows], batch=500)
    matched.solve()
    scaled = fake * matched.scale
    fake_means, _ = _within(scaled, fake_c)
    moved = fake_c @ matched.real_mean + (scaled - fake_c @ fake_means) @ matched.transport
    for ours, theirs in zip(_within(moved, fake_c), _within(real * matched.scale, real_c), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3)
    assert matched.losses(fake, fake_c)[0] == pytest.approx(float((scaled - moved).square().mean()), rel=1e-4)


def test_no_moments_are_matched_before_enough_images_were_seen() -> None:
    real, real_c, fake, fake_c = _classes()
    matched = FeatureMoments(2, DIM)
    few = moments.MIN_GENERATED_IMAGES // 2
    for kind, x, c in (("real", real, real_c), ("fake", fake, fake_c)):
        matched.update(kind, x[:few], c[:few], batch=few)
    matched.solve()
    assert float(matched.losses(fake, fake_c)[0]) == 0.0


def test_collapsed_generator_regains_moments_of_real_features() -> None:
    real, real_c, _, c = _classes()
    torch.manual_seed(0)
    weight = torch.nn.Parameter(0.05 * torch.eye(DIM))  # one twentieth of the spread that it should have
    bias = torch.nn.Parameter(torch.zeros(2, DIM))
    optimizer = torch.optim.Adam([weight, bias], lr=0.02)
    matched = FeatureMoments(2, DIM)
    matched.update("real", real, real_c, batch=COUNT)
    for _ in range(400):
        fake = torch.randn(COUNT, DIM) @ weight + c @ bias
        matched.update("fake", fake.detach(), c, batch=moments.REAL_HALF_LIFE)
        matched.solve()
        loss = matched.losses(fake, c)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    means, covariance = _within(fake.detach(), c)
    real_means, real_covariance = _within(real, real_c)
    assert torch.allclose(means, real_means, atol=0.1)
    assert (covariance - real_covariance).norm() < 0.1 * real_covariance.norm()


def test_generated_classes_become_as_distinct_as_real_classes() -> None:
    real, real_c, _, c = _classes()
    matched = FeatureMoments(2, DIM)
    matched.update("real", real, real_c, batch=COUNT)
    torch.manual_seed(0)
    (low, high), covariance = _within(real, real_c)
    axis = torch.linalg.solve(covariance, high - low)  # Fisher's linear discriminant
    expected = float((high - low) @ axis)
    for start in (0.0, 3.0):  # times the difference of the real classes
        shift = torch.nn.Parameter(start * torch.stack([low, high]))
        optimizer = torch.optim.Adam([shift], lr=0.02)
        for _ in range(300):
            fake = torch.randn(COUNT, DIM) @ torch.linalg.cholesky(covariance).T + c @ shift
            matched.update("fake", fake.detach(), c, batch=moments.REAL_HALF_LIFE)
            matched.solve()
            loss = matched.losses(fake, c)[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        low_fake, high_fake = _within(fake.detach(), c)[0]
        assert float((high_fake - low_fake) @ axis) == pytest.approx(expected, rel=0.1)


def test_checkpoint_without_separating_directions_is_loaded() -> None:
    state = FeatureMoments(2, DIM).state_dict()
    del state["separation"]
    matched = FeatureMoments(2, DIM)
    matched.separation.fill_(1.0)
    matched.load_state_dict(state)
    assert not matched.separation.any()


def test_moment_loss_of_equal_distributions_is_almost_zero() -> None:
    """What is matched already, but known from few images, must not be pulled far: sampling errors are no differences."""
    random = torch.Generator().manual_seed(0)
    dim = 2 * moments.COMPONENTS
    spread = torch.linspace(0.1, 3, dim)
    matched = FeatureMoments(0, dim)
    for _ in range(150):
        for kind in ("real", "fake"):
            features = spread * torch.randn(64, dim, generator=random)
            matched.update(kind, features, torch.zeros(64, 0), batch=64)
    matched.solve()
    assert float(matched.ready) == 1.0
    assert float(matched.losses(spread * torch.randn(500, dim, generator=random), torch.zeros(500, 0))[0]) < 0.02


def test_moments_of_batch_parts_average_to_those_of_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "REAL_HALF_LIFE", 16)
    monkeypatch.setattr(moments, "RECENT_HALF_LIFE", 8)
    real, c, fake, _ = _classes()
    whole, *parts = (FeatureMoments(2, DIM) for _ in range(3))
    for step in range(3):
        for kind, x in (("real", real), ("fake", fake)):
            rows = slice(8 * step, 8 * step + 8)
            expected = whole.update(kind, x[rows], c[rows], batch=8)
            own = [part.update(kind, x[rows][r::2], c[rows][r::2], batch=8, parts=2) for r, part in enumerate(parts)]
            for value, one, two in zip(expected, *own, strict=True):
                assert torch.allclose(value, (one + two) / 2, rtol=1e-5, atol=1e-5)
                mean = (one + two) / 2  # as Ranks.average_ does
                one.copy_(mean), two.copy_(mean)
    assert all(part.seen == whole.seen == 24 for part in parts)
