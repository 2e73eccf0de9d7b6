"""A federation on several machines: Flower's programs with TLS and keys, the proxy for clients, invitations, site checks."""
