"""Whether generated images are copies: an index of a training set's embeddings, verdicts on images, and attacks."""
