"""The client of a federation: Flower's ClientApp."""
