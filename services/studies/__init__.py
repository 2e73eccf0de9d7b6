"""Reader studies: real and generated images that people are asked to tell apart."""
