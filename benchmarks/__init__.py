"""Benchmarks beside their peers: `python -m benchmarks [NAME ...]`, from the root of a checkout."""
