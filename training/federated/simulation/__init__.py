"""A federation in one process: a local grid in place of the network, simulated hospitals, and a trial round."""
