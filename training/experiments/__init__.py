"""The paper's experiments, as files or as programs: what is trained on which images, and tables of the results."""
