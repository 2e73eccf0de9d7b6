"""Explanations of a classifier: heat maps, embeddings, concepts and edge cases. Needs the extra `explain`."""
