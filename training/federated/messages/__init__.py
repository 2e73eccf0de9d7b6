"""Messages between server and clients of a federation: serialization, checks of replies, traffic, secure aggregation."""
