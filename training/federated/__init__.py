"""Federated training: hospitals train one generator, or one classifier, together, and no image leaves its hospital.

    config      what a federation decides; site: what a hospital decides (its data, its folder, its device)
    wire        tensors as Flower's arrays and back; what is refused
    task        what a federation trains: gan_task and classifier_task
    client_app  Flower's ClientApp, which runs at a hospital
    strategies  Flower's strategies by name, secure aggregation (secure) and differential privacy (privacy)
    rounds      the server's rounds, their state and their record; server_app: Flower's ServerApp
    local_grid  all of it in one process, for simulation and tests
    deployment  SuperLink and SuperNodes with TLS and keys; invitation, check

Flower's telemetry and its check for updates are off unless somebody has switched them on.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
