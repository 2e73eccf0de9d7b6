"""Training, measurement and export of classifiers of dermoscopy images."""
