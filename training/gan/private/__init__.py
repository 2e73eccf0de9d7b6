"""Differential privacy of a generator: DP-SGD for the discriminator.

Only the discriminator sees real images. The generator learns from the discriminator, from random numbers and from nothing
else, so its weights are post-processing of the discriminator's. `units` says whose images are protected as one,
`accountant` what a number of steps costs, `sampling` draws patients and noise from secret random numbers and counts the
steps, `gradients` clips and adds. docs/differential-privacy.md has the whole promise and what it does not cover.
"""
