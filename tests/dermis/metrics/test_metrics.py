"""Tests of metrics against closed forms, independent naive implementations and other libraries."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from dermis.errors import DermisError
from dermis.features import FeatureExtractor
from dermis.latents import z_for
from dermis.metrics import frechet_distance, kernel_distance, kernels
from dermis.metrics.alpha import alpha_precision, authentic, beta_recall, same_distance
from dermis.metrics.density import density_coverage, expected_coverage
from dermis.metrics.fidelity import precision_recall
from dermis.metrics.intervals import frechet_interval, gaussian_estimate, kernel_estimate
from dermis.metrics.kernels import cmmd_kernel, median_kernel
from dermis.metrics.likelihood import feature_likelihood, fit_variances
from dermis.metrics.membership import membership_attack
from dermis.metrics.memorisation import memorisation_test
from dermis.metrics.neighbours import nearest, radii, squared_distances
from dermis.metrics.path_length import Sampling, path_length, path_lengths
from dermis.metrics.perceptual import feature_distance
from dermis.networks import Generator, GeneratorConfig, one_hot
from dermis.torchvision_compat import import_vision

Array = NDArray[np.float64]


def _normal(seed: int, n: int, dim: int, scale: float = 1.0) -> Array:
    return np.random.default_rng(seed).normal(size=(n, dim)) * scale


def _distances(a: Array, b: Array) -> Array:
    """All distances, by the naive method."""
    return np.array([[np.sqrt(np.sum((x - y) ** 2)) for y in b] for x in a])


def _naive_radii(x: Array, k: int) -> Array:
    return np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(_distances(x, x))])


# Small integer grids: many ties and duplicates, and every distance is exact.
sets = st.tuples(st.integers(0, 2**32 - 1), st.integers(7, 14), st.integers(7, 14), st.integers(1, 4))


def _grids(drawn: tuple[int, int, int, int]) -> tuple[Array, Array]:
    seed, n, m, dim = drawn
    rng = np.random.default_rng(seed)
    return rng.integers(-4, 5, (n, dim)).astype(float), rng.integers(-4, 5, (m, dim)).astype(float)


@given(sets)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_blocked_neighbours_equal_naive_neighbours(drawn: tuple[int, int, int, int]) -> None:
    a, b = _grids(drawn)
    naive = _distances(a, b)
    blocked = np.concatenate([squared.sqrt().numpy() for _, squared in squared_distances(a, b, block=2 * len(b))])
    np.testing.assert_allclose(blocked, naive, atol=1e-9)
    distance, index = nearest(a, b, 3)
    np.testing.assert_allclose(distance, np.sort(naive, axis=1)[:, :3], atol=1e-9)
    np.testing.assert_allclose(np.take_along_axis(naive, index, axis=1), distance, atol=1e-9)
    np.testing.assert_allclose(radii(a, 2), _naive_radii(a, 2), atol=1e-7)


def test_copy_has_distance_zero_in_many_dimensions() -> None:
    base = _normal(0, 300, 1280).astype(np.float32) + 5
    distance, index = nearest(base[[7, 250]], base)
    assert distance[:, 0].tolist() == [0.0, 0.0]
    assert index[:, 0].tolist() == [7, 250]
    with pytest.raises(ValueError, match="300 neighbours were requested, but there are only 299"):
        nearest(base, base, 300, exclude_self=True)
    with pytest.raises(ValueError, match="no distances"):
        next(squared_distances(base, base[:0]))


@given(sets)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_sample_level_metrics_equal_naive_values(drawn: tuple[int, int, int, int]) -> None:
    """Density, coverage, the precision and recall curves and authenticity, each from its formula by loops."""
    real, generated = _grids(drawn)
    k, d = 3, _distances(real, generated)
    ball = _naive_radii(real, k)
    inside = [[d[i, j] <= ball[i] + 1e-9 for j in range(len(generated))] for i in range(len(real))]
    density, coverage = density_coverage(real, generated, k)
    assert density == pytest.approx(sum(map(sum, inside)) / (k * len(generated)))
    assert coverage == pytest.approx(sum(map(any, inside)) / len(real))

    def ball_of(x: Array, share: float) -> float:
        """The smallest distance from the mean within which at least this share lies."""
        sorted_ = np.sort(np.linalg.norm(x - x.mean(axis=0), axis=1))
        return float(sorted_[max(int(np.ceil(share * len(x) - 1e-9)) - 1, 0)])

    precision, recall = alpha_precision(real, generated), beta_recall(real, generated, k)
    for level in (0.0, 0.25, 0.5, 0.75, 1.0):
        within = np.linalg.norm(generated - real.mean(axis=0), axis=1) <= ball_of(real, level)
        assert precision.values[round(100 * level)] == pytest.approx(within.mean())
        limit, g_centre, represented = ball_of(generated, level), generated.mean(axis=0), []
        for i in range(len(real)):
            candidates = [j for j in range(len(generated)) if d[i, j] == d[i].min()]
            # A distance that equals the limit may be rounded to either side of it.
            represented.append(
                {
                    inside[i][j] and np.linalg.norm(generated[j] - g_centre) <= limit * (1 + rounding)
                    for j in candidates
                    for rounding in (-1e-6, 1e-6)
                }
            )
        # Where several generated images are equally near, either may be taken for the nearest.
        low, high = np.mean([min(x) for x in represented]), np.mean([max(x) for x in represented])
        assert low - 1e-9 <= recall.values[round(100 * level)] <= high + 1e-9

    next_real, verdicts = _naive_radii(real, 1), authentic(real, generated)
    for j in range(len(generated)):
        possible = {d[i, j] > next_real[i] + 1e-9 for i in range(len(real)) if d[i, j] == d[:, j].min()}
        assert verdicts[j] in possible


def test_metrics_rate_identical_sets_best_and_disjoint_worst() -> None:
    real, far = _normal(0, 400, 8), _normal(1, 400, 8) + 1000
    assert density_coverage(real, real)[1] == 1.0
    assert alpha_precision(real, real).integrated == pytest.approx(1, abs=0.01)
    assert beta_recall(real, real).integrated == pytest.approx(1, abs=0.01)
    assert not authentic(real, real).any()
    assert density_coverage(real, far) == (0.0, 0.0)
    assert alpha_precision(real, far).integrated == pytest.approx(0, abs=0.01)
    assert beta_recall(real, far).integrated == pytest.approx(0, abs=0.01)
    assert authentic(real, far).all()


def test_equal_distributions_have_expected_coverage_and_density() -> None:
    """Lemma 2 of Naeem et al., whatever the distribution; 8 draws bring the mean within its own standard error."""
    n, m, k = 300, 200, 5
    draws = [density_coverage(_normal(2 * s, n, 3) ** 3, _normal(2 * s + 1, m, 3) ** 3, k) for s in range(8)]
    density, coverage = np.mean(draws, axis=0)
    assert coverage == pytest.approx(expected_coverage(n, m, k), abs=0.02)
    assert expected_coverage(10**6, 10**6, k) == pytest.approx(1 - 2**-k, abs=1e-4)
    assert density == pytest.approx(1, abs=0.1)


def test_alpha_precision_of_gaussians_equals_closed_form() -> None:
    """Real N(0, I), generated N(0, s^2 I): |y|^2 / s^2 is chi-squared, so P_alpha = F(F^-1(alpha) / s^2)."""
    dim, real = 6, _normal(0, 20000, 6)
    chi2 = stats.chi2(dim)
    for scale in (0.7, 1.4):
        curve = alpha_precision(real, _normal(1, 20000, dim, scale))
        np.testing.assert_allclose(curve.values, chi2.cdf(chi2.ppf(curve.levels) / scale**2), atol=0.02)


def test_beta_recall_of_one_of_two_clusters_is_one_half() -> None:
    """Generated = the real images of one of two far clusters: R_beta = beta / 2, so the integral is 1 - 2 / 4."""
    half = _normal(0, 500, 4)
    real = np.concatenate([half, _normal(1, 500, 4) + 1000])
    curve = beta_recall(real, half)
    np.testing.assert_allclose(curve.values, curve.levels / 2, atol=0.002)
    assert curve.integrated == pytest.approx(0.5, abs=0.002)


def test_authentic_share_of_uniform_points_on_line_is_one_third() -> None:
    """Uniform training and generated points on a line: authentic in 1/3 of the cases.

    Distances to the left and right neighbours of y are independent Exp(1) in units of the mean gap, a their minimum.
    The training neighbour x* of y has its own neighbour beyond at E ~ Exp(1), and the one on the side of y is never
    nearer than y: P(E < a) = 1 - E[exp(-a)] = 1 - 2/3.
    """
    rng = np.random.default_rng(0)
    verdicts = authentic(rng.random((6000, 1)), rng.random((3000, 1)))
    assert verdicts.mean() == pytest.approx(1 / 3, abs=0.03)


def test_memorisation_test_detects_near_copies() -> None:
    train, holdout = _normal(0, 120, 16), _normal(1, 120, 16)
    copies = train[np.random.default_rng(2).integers(0, len(train), 400)] + _normal(3, 400, 16, 0.3)
    result = memorisation_test(copies, train, holdout, permutations=1500)
    assert result.p_value < 1e-3
    assert result.nearer_train > 0.95 > result.expected_nearer_train
    assert memorisation_test(copies, holdout, train, permutations=200).p_value > 0.99, "avoidance is not copying"


def test_memorisation_test_detects_few_copies_among_bad_images() -> None:
    """1 in 10 generated images is a near copy, the rest is far from all real images."""
    train, holdout = _normal(0, 150, 16), _normal(1, 150, 16)
    bad = _normal(2, 500, 16, 2.0)
    bad[:50] = train[:50] + _normal(3, 50, 16, 0.1)
    assert memorisation_test(bad, train, holdout, permutations=1500).p_value < 1e-3


def test_memorisation_test_passes_generators_without_copies() -> None:
    """p-values of generators that never saw the training set are uniform, though far more is generated than real.

    Those of a Wilcoxon test of the same distances are not: it reports that several of these generators copy.
    """
    ours, textbook = [], []
    for seed in range(40):
        train, holdout, generated = (_normal(3 * seed + i, n, 16) for i, n in enumerate((100, 60, 800)))
        ours.append(memorisation_test(generated, train, holdout, permutations=250, seed=seed).p_value)
        distances = (nearest(generated, real[:60])[0][:, 0] for real in (train, holdout))
        textbook.append(stats.wilcoxon(*distances, alternative="less").pvalue)
    assert min(ours) > 1e-3
    assert stats.kstest(ours, "uniform").pvalue > 0.05
    assert sum(p < 1e-3 for p in textbook) >= 2


def test_memorisation_permutes_whole_patients() -> None:
    """Five equal images a patient: to permute images instead of patients would find a signal in the clusters."""
    ps = []
    for seed in range(20):
        patients, generated = _normal(2 * seed, 60, 8), _normal(2 * seed + 1, 400, 8)
        images = np.repeat(patients, 5, axis=0)
        names = [f"patient{i // 5}" for i in range(300)]
        ps.append(memorisation_test(generated, images[:150], images[150:], groups=names, permutations=200).p_value)
    assert stats.kstest(ps, "uniform").pvalue > 0.05
    with pytest.raises(ValueError, match="both in the training and in the held-out"):
        memorisation_test(generated, images[:148], images[148:], groups=names)


# -- likelihood and membership


def test_fitted_variances_equal_those_of_known_mixtures() -> None:
    """About one point the likeliest variance is the mean square; about two far clusters, each has that of its own."""
    x = _normal(0, 500, 8)
    squared = np.sum(x**2, axis=1, keepdims=True).astype(np.float32)
    assert fit_variances(squared, 8) == pytest.approx(np.mean(x**2), rel=1e-5)
    clusters = [_normal(0, 400, 8, 0.5), _normal(1, 100, 8, 2.0) + 100]
    images, centres = np.concatenate(clusters), np.array([np.zeros(8), np.full(8, 100.0)])
    variances = fit_variances((_distances(images, centres) ** 2).astype(np.float32), 8)
    assert variances == pytest.approx([np.mean(clusters[0] ** 2), np.mean((clusters[1] - 100) ** 2)], rel=1e-4)


def _clusters(seed: int, n: int, kinds: int = 4) -> Array:
    """Features of `kinds` of four clusters, each on a plane of 8 of 64 dimensions."""
    rng = np.random.default_rng(seed)
    plane, centres = _normal(100, 8, 64), 3 * _normal(101, 4, 64)
    return centres[rng.integers(0, kinds, n)] + rng.normal(size=(n, 8)) @ plane + 0.3 * rng.normal(size=(n, 64))


def test_likelihood_gap_of_new_samples_equals_reference_gap() -> None:
    differences = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        training, held_out, generated = (rng.normal(size=(n, 32)).astype(np.float32) for n in (300, 150, 300))
        numbers = feature_likelihood(training, held_out, generated, seed=seed)
        differences.append((numbers.fld, numbers.gap - numbers.reference_gap))
    fld, gap = np.mean(differences, axis=0)
    assert abs(fld) < 1 and abs(gap) < 1


def test_feature_likelihood_detects_copies_and_missing_clusters() -> None:
    training, held_out = _clusters(0, 600), _clusters(1, 300)
    honest = feature_likelihood(training, held_out, _clusters(2, 600))
    copier = feature_likelihood(training, held_out, training[:500])
    dropper = feature_likelihood(training, held_out, _clusters(3, 600, kinds=2))
    blurred = feature_likelihood(training, held_out, _clusters(4, 600) * 1.5)
    assert honest.gaussians == 300
    assert honest.fld == pytest.approx(0, abs=2)
    assert honest.gap == pytest.approx(honest.reference_gap, abs=2)
    assert copier.fld > honest.fld + 5 and copier.gap < honest.reference_gap - 30
    assert dropper.fld > honest.fld + 5 and dropper.gap > honest.reference_gap - 5, "it copies nothing"
    assert blurred.fld > honest.fld + 5
    half = feature_likelihood(training, held_out, np.concatenate([training[:150], _clusters(5, 150)]))
    assert copier.gap < half.gap < honest.gap - 10
    scaled = feature_likelihood(7 * training + 3, 7 * held_out + 3, 7 * _clusters(2, 600) + 3)
    assert scaled.fld == pytest.approx(honest.fld, abs=1e-2), "units of features do not matter"
    with pytest.raises(ValueError, match="too few"):
        feature_likelihood(training[:1], held_out, training)


def test_few_copies_raise_hits_at_few_false_alarms_but_not_auc() -> None:
    training, held_out, generated = _normal(0, 500, 16), _normal(1, 300, 16), _normal(2, 800, 16)
    honest = membership_attack(training, held_out, generated)
    assert honest is not None and honest.auc.low < 0.5 < honest.auc.high and honest.found_at_1_percent.low <= 0.01
    generated[:25] = training[:25] + 0.01
    some = membership_attack(training, held_out, generated)
    assert some is not None and some.auc.value < 0.6 and some.found_at_1_percent.low > 0.02
    everything = membership_attack(training, held_out, training)
    assert everything is not None and everything.auc.value == everything.found_at_1_percent.value == 1.0
    groups = [f"t{i // 250}" for i in range(500)] + [f"h{i // 150}" for i in range(300)]
    grouped = membership_attack(training, held_out, _normal(2, 800, 16), groups=groups)
    assert grouped is not None and grouped.auc.value == pytest.approx(honest.auc.value)
    assert membership_attack(training[:19], held_out, generated) is None


# -- distances of distributions


def _with_moments(seed: int, n: int, mean: Array, root: Array) -> Array:
    """n samples whose mean is `mean` and whose covariance is root root^T exactly."""
    x = _normal(seed, n, len(mean))
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T @ root.T + mean


def test_frechet_distance_of_known_moments_equals_closed_form() -> None:
    """Commuting covariances: |m|^2 + sum (s_i - t_i)^2 of the standard deviations along the common axes."""
    axes = np.linalg.qr(_normal(0, 4, 4))[0]
    s, t, mean = np.array([1.0, 2, 3, 0.5]), np.array([2.0, 2, 1, 0.1]), np.array([1.0, -2, 0, 0.5])
    a = _with_moments(1, 60, np.zeros(4), axes * s)
    b = _with_moments(2, 50, mean, axes * t)
    expected = mean @ mean + np.sum((s - t) ** 2)
    assert frechet_distance(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(expected, rel=1e-4)


def test_precision_and_recall_equal_naive_values() -> None:
    real, generated = _normal(0, 60, 3).astype(np.float32), (_normal(1, 40, 3) + 1).astype(np.float32)
    d = _distances(real, generated)
    precision = (d <= _naive_radii(real, 3)[:, None]).any(axis=0).mean()
    recall = (d <= _naive_radii(generated, 3)[None, :]).any(axis=1).mean()
    assert 0 < precision < 1 > recall > 0
    assert precision_recall(real, generated) == pytest.approx((precision, recall))
    assert precision_recall(real, real) == (1.0, 1.0)


def _naive_mmd(x: Array, y: Array, origin_x: Array, origin_y: Array) -> float:
    """Unbiased MMD^2 with (x.y / dim + 1)^3; pairs of an image with itself are left out."""

    def mean(a: Array, b: Array, pairs: NDArray[np.bool_]) -> float:
        return float(((a @ b.T / a.shape[1] + 1) ** 3)[pairs].mean())

    apart_x, apart_y = origin_x[:, None] != origin_x, origin_y[:, None] != origin_y
    return mean(x, x, apart_x) + mean(y, y, apart_y) - 2 * mean(x, y, np.ones((len(x), len(y)), dtype=bool))


def test_kernel_replicates_equal_mmd_of_resampled_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROWS", 7)  # more blocks than one
    x, y = _normal(0, 30, 5), _normal(1, 20, 5) + 0.3
    kid, _ = kernel_distance(x[:20].astype(np.float32), y.astype(np.float32), subsets=1)
    assert kid == pytest.approx(_naive_mmd(x[:20], y, np.arange(20), np.arange(20)), abs=1e-5)
    rng = np.random.default_rng(0)
    w, v = (rng.multinomial(n, np.full(n, 1 / n), size=200) for n in (30, 20))
    i, j = ([np.repeat(np.arange(weights.shape[1]), row) for row in weights] for weights in (w, v))
    naive = np.array([_naive_mmd(x[a], y[b], a, b) for a, b in zip(i, j, strict=True)])
    estimate = kernel_estimate(x.astype(np.float32), y.astype(np.float32), replicates=200, seed=0)
    expected = estimate.value + np.quantile(naive - naive.mean(), [0.025, 0.975])
    assert (estimate.interval.low, estimate.interval.high) == pytest.approx(tuple(expected), abs=1e-4)
    distance = kernel_distance(x.astype(np.float32), y.astype(np.float32))
    assert (estimate.value, estimate.deviation) == pytest.approx(distance, abs=1e-6)


def test_feature_distances_agree_with_torch_fidelity() -> None:
    """In more dimensions than images, where covariances have no full rank."""
    x, y = _normal(0, 60, 90).astype(np.float32), (_normal(1, 50, 90) * 1.2 + 0.1).astype(np.float32)
    doubles = [torch.from_numpy(features.astype(np.float64)) for features in (x, y)]
    fid, kid, prc = (import_vision(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "prc"))
    statistics = [fid.fid_features_to_statistics(features) for features in doubles]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(x, y) == pytest.approx(theirs, rel=1e-5)
    options = {"kid_subsets": 20, "kid_subset_size": 50, "rng_seed": 0, "verbose": False}
    theirs = kid.kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), **options)
    ours = dict(zip(("mean", "std"), kernel_distance(x, y, subsets=20), strict=True))
    assert [theirs[f"kernel_inception_distance_{key}"] for key in ours] == pytest.approx(list(ours.values()), abs=1e-6)
    options = {"prc_neighborhood": 3, "prc_batch_size": 20, "save_cpu_ram": True, "verbose": False}
    theirs = prc.prc_features_to_metric(*reversed(doubles), **options)
    assert (theirs["precision"], theirs["recall"]) == pytest.approx(precision_recall(x, y))


def test_gaussian_discrepancies_equal_naive_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROWS", 7)
    x, y = _normal(0, 30, 5) + 3, _normal(1, 20, 5) + 3.3
    pairs = _distances(x, x)[np.triu_indices(30, 1)]

    def naive(a: Array, b: Array, bandwidth: float) -> float:
        kernel = {
            (i, j): np.exp(-(_distances(p, q) ** 2) / (2 * bandwidth**2))
            for i, p in enumerate((a, b))
            for j, q in enumerate((a, b))
        }
        apart = [~np.eye(len(s), dtype=bool) for s in (a, b)]
        return float(kernel[0, 0][apart[0]].mean() + kernel[1, 1][apart[1]].mean() - 2 * kernel[0, 1].mean())

    median = median_kernel(x.astype(np.float32))
    assert median is not None and median.bandwidth == pytest.approx(np.median(pairs), rel=1e-6)
    estimate = gaussian_estimate(x.astype(np.float32), y.astype(np.float32), median, 20)
    assert estimate.value == pytest.approx(naive(x, y, median.bandwidth), abs=1e-6)
    assert estimate.interval.low < estimate.value < estimate.interval.high
    of_unit_length = [features / np.linalg.norm(features, axis=1, keepdims=True) for features in (x, y)]
    estimate = gaussian_estimate(x.astype(np.float32), y.astype(np.float32), cmmd_kernel(), 20)
    assert estimate.value == pytest.approx(naive(*of_unit_length, 10.0), abs=1e-6)
    assert median_kernel(np.ones((20, 3), np.float32)) is None


def test_intervals_have_their_stated_coverage() -> None:
    """95 % intervals from 40 draws: of FID they hold the mean FID at this size, of KID the true distance.

    Of 40 draws a true coverage of 95 % gives fewer than 34 hits once in 1,500 times.
    """
    n, dim, draws = 100, 4, 40
    pairs = [(_normal(2 * s, n, dim), _normal(2 * s + 1, n, dim) * 1.3 + 0.4) for s in range(draws)]
    sets = [(x.astype(np.float32), y.astype(np.float32)) for x, y in pairs]
    fids = [frechet_distance(*pair) for pair in sets]
    fid_intervals = [frechet_interval(*p, fid, replicates=60) for p, fid in zip(sets, fids, strict=True)]
    assert sum(i.low <= np.mean(fids) <= i.high for i in fid_intervals) >= 34
    truth = dim * (1.3 - 1) ** 2 + dim * 0.4**2
    assert np.mean([i.bias for i in fid_intervals]) == pytest.approx(np.mean(fids) - truth, rel=0.5)

    many = np.arange(2000)
    true_mmd = _naive_mmd(_normal(1000, 2000, dim), _normal(1001, 2000, dim) * 1.3 + 0.4, many, many)
    kid_intervals = [kernel_estimate(*pair, replicates=60).interval for pair in sets]
    assert sum(i.low <= true_mmd <= i.high for i in kid_intervals) >= 34
    assert abs(np.mean([i.bias for i in kid_intervals])) < 0.1 * true_mmd


def test_frechet_replicates_agree_with_torch_fidelity() -> None:
    """In as many directions as there are dimensions nothing is left out."""
    x, y = _normal(0, 80, 6).astype(np.float32), (_normal(1, 70, 6) * 2 + 1).astype(np.float32)
    rng = np.random.default_rng(3)
    drawn = []
    for _ in range(30):
        a, b = x[rng.integers(0, 80, 80)], y[rng.integers(0, 70, 70)]
        drawn.append(frechet_distance(a, b))
    fid = frechet_distance(x, y)
    interval = frechet_interval(x, y, fid, replicates=30, directions=6, seed=3)
    low, high = fid + np.quantile(drawn - np.mean(drawn), [0.025, 0.975])
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-3)
    assert interval.bias == pytest.approx(np.mean(drawn) - fid, rel=1e-2)


# -- path length


@pytest.mark.parametrize("sampling", ["end", "full"])
def test_path_length_equals_norm_of_derivative(sampling: Sampling) -> None:
    """With mean squared pixels as the distance, a path's length is that of d image / dt, by central differences."""
    torch.manual_seed(0)
    config = GeneratorConfig(8, c_dim=2, z_dim=6, w_dim=6, mapping_layers=1, channel_base=32, channel_max=8)
    G = Generator(config).eval().requires_grad_(False)
    labels = np.array([0, 1] * 8)

    def squares(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean(dim=(1, 2, 3))

    sorted_lengths = np.sort(path_lengths(G, squares, labels, sampling=sampling, seed=5, batch=5))

    precise = copy.deepcopy(G).double()
    ws = [G.mapping(torch.from_numpy(z_for(5, range(k, 32, 2), 6)), one_hot(labels, 2)).double() for k in (0, 1)]
    t = torch.from_numpy(np.random.default_rng(5).random(16))[:, None, None] if sampling == "full" else 0.0
    noise = precise.synthesis.draw_noise("const", 16)

    def image(x: Tensor) -> Tensor:  # the network casts its inputs to float32, so its blocks are called one by one
        x0, img = precise.synthesis.b4(None, None, x[:, 0:2], noise[:1], torch.float64)
        return precise.synthesis.b8(x0, img, x[:, 1:4], noise[1:], torch.float64)[1]

    # The image is summed in float32, where the difference of a much smaller step would be lost.
    start, step = (ws[0].lerp(ws[1], t) if sampling == "full" else ws[0]), 1e-4 * (ws[1] - ws[0])
    rate = (image(start + step) - image(start - step)) / 2e-4
    lengths = np.sort((rate * 127.5).square().mean(dim=(1, 2, 3)).numpy())
    np.testing.assert_allclose(sorted_lengths, lengths, rtol=0.02)


def test_path_length_excludes_extreme_paths() -> None:
    length = path_length(np.random.default_rng(0).permutation(np.r_[np.arange(1.0, 500), 1e9]))
    kept = np.arange(5.0, 497)  # of 500 paths, the 4 least and the 4 greatest are out
    assert (length.paths, length.mean) == (492, kept.mean())
    assert length.standard_error == pytest.approx(kept.std() / np.sqrt(492))


def test_feature_distance_is_of_second_order() -> None:
    def embed(images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    extractor = FeatureExtractor("mean", "mean", 3, lambda images: images.mean(axis=(1, 2)), embed)
    a, step = torch.rand(4, 3, 8, 8) * 255, torch.rand(4, 3, 1, 1)
    distance = feature_distance(extractor)
    assert distance(a, a).abs().max() == 0
    assert distance(a, -a).tolist() == pytest.approx([4.0] * 4)
    ratio = distance(a.double(), (a + 0.02 * step).double()) / distance(a.double(), (a + 0.01 * step).double())
    assert ratio.tolist() == pytest.approx([4.0] * 4, rel=0.01)
    with pytest.raises(DermisError, match="8-bit"):
        feature_distance(FeatureExtractor("coarse", "coarse", 3, extractor.extract))


def test_repeated_training_images_do_not_make_copies_authentic() -> None:
    training = np.random.default_rng(1).normal(size=(80, 16))
    again = training + 1e-3 * np.random.default_rng(2).normal(size=training.shape)
    copies = training + 0.02 * np.random.default_rng(3).normal(size=training.shape)
    for real in (training, np.concatenate([training, again[:2]]), np.concatenate([training, again, again])):
        assert not authentic(real, copies, same=same_distance(real)).any()
