"""Training of encoders: images to latents of one generator, for projections to start from."""
