"""Training of encoders: networks from an image to a latent of one generator, from which projections can start."""
