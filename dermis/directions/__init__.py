"""Meaningful directions of a generator's latent space w: finding them, keeping them in a bundle, moving images along them."""
