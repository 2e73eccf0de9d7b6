"""Request and response bodies of the API as pydantic models, one module for each noun.

The body of `POST /v1/datasets` is `dermis.dataset.request.DatasetRequest`.
"""
