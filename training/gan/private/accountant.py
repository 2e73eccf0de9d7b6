"""The cost of a number of noisy steps: epsilon of the Poisson-subsampled Gaussian mechanism, by Rényi differential privacy.

Two sets of patients are neighbours if one of them has one patient more. The computation is that of the package
dp-accounting. Its other accountant (privacy loss distributions) states 10 to 20 percent less, but takes too long to be asked
after every step; the tests compare both.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from dermis.errors import TrainingError, install_command

ACCOUNTANT = "RDP"
_LEAST_NOISE, MAX_NOISE = 0.01, 1e4  # noise multipliers
_MAX_STEPS = 10**8  # more than any training makes


def accounting() -> Any:
    """The package dp-accounting.

    Raises:
        TrainingError: It is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting import rdp as _  # noqa: F401  (a subpackage, which is then an attribute)
    except ImportError:
        raise TrainingError(f"--dp: needs the package dp-accounting: {install_command('dp')}") from None
    return dp_accounting


@lru_cache(maxsize=4096)
def epsilon_spent(steps: int, rate: float, noise: float, delta: float) -> float:
    """Epsilon after a number of steps.

    Args:
        steps: Noisy sums that were computed.
        rate: Probability with which each patient takes part in a step.
        noise: Standard deviation of the noise divided by the clipping norm. 0: infinite epsilon.
        delta: Probability with which epsilon may be exceeded.
    """
    if steps == 0:
        return 0.0
    if noise == 0:
        return math.inf
    package = accounting()
    accountant = package.rdp.RdpAccountant()
    with _without_warnings():
        accountant.compose(_step(package, rate, noise), steps)
        return float(accountant.get_epsilon(delta))


def steps_within(epsilon: float, rate: float, noise: float, delta: float) -> int:
    """The largest number of steps whose epsilon is not above `epsilon`."""
    low, high = 0, 1
    while high < _MAX_STEPS and epsilon_spent(high, rate, noise, delta) <= epsilon:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if epsilon_spent(middle, rate, noise, delta) <= epsilon:
            low = middle
        else:
            high = middle
    return low


def noise_for(epsilon: float, steps: int, rate: float, delta: float) -> float:
    """The smallest noise multiplier, rounded up to four digits, with which `steps` steps do not cost more than `epsilon`.

    Raises:
        TrainingError: No noise multiplier up to 10,000 is enough.
    """
    package = accounting()
    try:
        with _without_warnings():
            noise = package.calibrate_dp_mechanism(
                package.rdp.RdpAccountant,
                lambda value: package.SelfComposedDpEvent(_step(package, rate, value), steps),
                epsilon,
                delta,
                bracket_interval=package.ExplicitBracketInterval(_LEAST_NOISE, MAX_NOISE),
                tol=1e-5,
            )
    except (package.mechanism_calibration.NoBracketIntervalFoundError, ValueError) as error:
        raise TrainingError(
            f"--dp-epsilon: no noise from {_LEAST_NOISE} to {MAX_NOISE:,.0f} gives {epsilon:g} for {steps:,} steps ({error})"
        ) from None
    rounded: float = math.ceil(noise * 1e4) / 1e4
    while epsilon_spent(steps, rate, rounded, delta) > epsilon:
        rounded = round(rounded + 1e-4, 4)
    return rounded


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide the warnings that an order of Rényi divergence is left out because its series did not converge.

    Each order gives a valid bound, so one less can only make epsilon larger.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _step(package: Any, rate: float, noise: float) -> Any:
    return package.PoissonSampledDpEvent(rate, package.GaussianDpEvent(noise))
