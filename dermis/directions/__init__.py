"""Directions in a generator's latent space w: fit them, and edit latents along them."""
