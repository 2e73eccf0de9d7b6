"""Training images: reading what users have."""
