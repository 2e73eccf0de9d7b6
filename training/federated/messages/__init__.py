"""What server and clients of a federation exchange: serialization, checks of replies, traffic, secure aggregation."""
