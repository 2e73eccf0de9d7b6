"""Federated training: clients, such as hospitals, train one generator or classifier together without sharing images.

    config        options of a federation, the same for all clients; site: the options of one client
    messages      messages between server and clients: serialization, checks of replies, traffic, secure aggregation
    tasks         what a federation can train, a generator or a classifier: exchanged tensors, a client's round
    server        Flower's ServerApp, rounds, their state and record, strategies, privacy, results
    client        Flower's ClientApp
    simulation    a federation in one process, for simulations, tests and trial rounds
    deployment    Flower's programs with TLS and keys, the proxy for clients, invitations, checks of sites

Each package imports only those above it; server and client do not import each other. Flower's telemetry and its check for
updates are off unless the environment switches them on.
"""

import os
from typing import Literal

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

# Here, so that command lines list them without importing torch.
TaskName = Literal["gan", "classifier"]
StrategyName = Literal[
    "fedavg",
    "fedprox",
    "fedadam",
    "fedadagrad",
    "fedyogi",
    "fedavgm",
    "fedmedian",
    "fedtrimmedavg",
    "krum",
    "multikrum",
]
