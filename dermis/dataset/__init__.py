"""Datasets: request -> plan -> shards -> manifest, and their verification. Import the module you need."""
