"""Real images in a generator's latent space: the latent whose image comes nearest to a given one."""
