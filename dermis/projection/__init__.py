"""Projection: find the latent whose image is nearest to a given real image."""
