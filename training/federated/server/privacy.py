"""Central differential privacy: Flower's wrapper around FedAvg, with its accountant.

It protects the contribution of a whole client to the weights that are released each round (neighbouring data sets differ by
one client), not that of a patient. With few clients this needs much noise. Measured numbers (losses, validation) are not
covered.
"""

from __future__ import annotations

from typing import Any, cast

from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, Strategy
from flwr.supercore.privacy_accounting import NeighboringRelation, PrivacyConfig, SamplingMethod

from dermis.errors import TrainingError
from training.federated.config import FederationConfig


def with_privacy(strategy: Strategy, federation: FederationConfig, accountant_state: dict[str, Any] | None) -> Strategy:
    """Wrap a strategy with clipping, noise and accounting if the federation has noise.

    Args:
        strategy: FedAvg.
        federation: Options.
        accountant_state: The accountant's state after earlier rounds; None before the first.

    Returns:
        The wrapped strategy; without noise the strategy as it is.

    Raises:
        TrainingError: The accountant's package is missing, or its state is of another number of clients.
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
    if accountant_state is not None:
        try:
            accountant.load_state_dict(accountant_state)
        except ValueError as error:
            raise TrainingError(f"clients: the privacy spent so far was counted for other options ({error})") from None
    return DifferentialPrivacyServerSideFixedClipping(
        strategy, federation.dp_noise, federation.dp_clip, federation.clients, accountant=accountant
    )


def cancel_accounting(strategy: Strategy, round_number: int) -> None:
    """Cancel the accounting of a failed round: none of its weights are released, and its repetition is counted once."""
    if isinstance(strategy, DifferentialPrivacyServerSideFixedClipping):
        strategy.aggregate_train(round_number, [])


def privacy_spent(strategy: Strategy) -> dict[str, Any] | None:
    """Return "epsilon", "delta" and "releases" so far, and the accountant's state as "accountant"; None without privacy."""
    if not isinstance(strategy, DifferentialPrivacyServerSideFixedClipping) or strategy.accountant is None:
        return None
    spent = cast(Any, strategy.privacy_spent())
    return {
        "epsilon": spent.epsilon if spent.num_releases else 0.0,
        "delta": spent.delta,
        "releases": spent.num_releases,
        "accountant": strategy.accountant.state_dict(),
    }
