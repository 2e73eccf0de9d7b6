"""Training images: sources of real images, and their preparation."""
