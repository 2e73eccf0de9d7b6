"""The public HTTP API: a FastAPI application that knows nothing of BentoML, DBOS or torch."""
