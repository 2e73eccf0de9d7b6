"""The trainings that a federation can run, a generator or a classifier: their tensors, and a round at a client."""
