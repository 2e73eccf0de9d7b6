"""Experiments as files: what is trained on which images, and what the paper reported. `experiment` reads them."""
