"""The server of a federation: Flower's ServerApp, the rounds, their state and record, strategies, results."""
