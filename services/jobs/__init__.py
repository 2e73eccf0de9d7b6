"""Durable dataset jobs: our own table of them, and DBOS behind one small module (`workflow`)."""
