"""Webhooks: requests to URLs of a tenant when its datasets and projections end."""
