"""Training of copy detectors."""
