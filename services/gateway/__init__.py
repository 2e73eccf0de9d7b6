"""The public HTTP API: a FastAPI application that imports neither BentoML nor DBOS nor torch."""
