"""The serving side: BentoML services, the FastAPI gateway and durable dataset jobs. Imports `dermis`, never `training`."""
