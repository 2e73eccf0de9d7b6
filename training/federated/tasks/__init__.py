"""The trainings that a federation can run: a generator (`gan`) or a classifier (`classifier`), behind one interface (`task`).

A task knows which tensors are exchanged and how a client trains, measures and counts with them. `training.federated.server`
writes the result (bundle or classifier) from the tensors after the last round.
"""

from __future__ import annotations

from training.federated.config import FederationConfig
from training.federated.tasks.task import FederatedTask


def task_of(federation: FederationConfig) -> FederatedTask:
    """Return the federation's task. Only the modules that it needs are imported."""
    if federation.task == "gan":
        from training.federated.tasks import gan

        return gan.TASK
    from training.federated.tasks import classifier

    return classifier.TASK
