"""Classifiers: what one is, the pixels that it sees, and running it. No training, no web."""
