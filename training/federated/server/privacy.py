"""Central differential privacy: Flower's wrapper around FedAvg, with its accountant.

What is protected is a whole hospital's part in the weights that are released each round (neighbours differ by one
member), not a patient's: with few members the noise that this takes is large. Numbers that are measured beside the weights
(losses, validation) are outside of it.
"""

from __future__ import annotations

from typing import Any, cast

from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, Strategy
from flwr.supercore.privacy_accounting import NeighboringRelation, PrivacyConfig, SamplingMethod

from dermis.errors import TrainingError
from training.federated.config import FederationConfig


def with_privacy(strategy: Strategy, federation: FederationConfig, spent: dict[str, Any] | None) -> Strategy:
    """The strategy as it is, or with clipping, noise and accounting if the federation asks for noise.

    `spent` is the accountant's state of earlier rounds. TrainingError if the accountant's package is missing.
    """
    if not federation.dp_noise:
        return strategy
    from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

    config = PrivacyConfig(
        target_delta=federation.dp_delta,
        population_size=federation.clients,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,
    )
    try:
        accountant = RdpAccountant(config)
    except ImportError:
        raise TrainingError('dp_noise: needs the package dp-accounting: pip install "flwr[dp]"') from None
    if spent is not None:
        accountant.load_state_dict(spent)
    return DifferentialPrivacyServerSideFixedClipping(
        strategy, federation.dp_noise, federation.dp_clip, federation.clients, accountant=accountant
    )


def withdraw_release(strategy: Strategy, round_number: int) -> None:
    """Nothing is released of a round that failed: it is asked for again, and accounted for once."""
    if isinstance(strategy, DifferentialPrivacyServerSideFixedClipping):
        strategy.aggregate_train(round_number, [])


def privacy_spent(strategy: Strategy) -> dict[str, Any] | None:
    """{"epsilon", "delta", "releases"} so far, and the accountant's state; None without privacy."""
    if not isinstance(strategy, DifferentialPrivacyServerSideFixedClipping) or strategy.accountant is None:
        return None
    spent = cast(Any, strategy.privacy_spent())
    return {
        "epsilon": spent.epsilon if spent.num_releases else 0.0,
        "delta": spent.delta,
        "releases": spent.num_releases,
        "accountant": strategy.accountant.state_dict(),
    }
