"""Train a classifier of dermoscopy images, measure it and export it for services."""
