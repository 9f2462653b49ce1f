"""Tests on a real SLURM, started by the tests themselves; see cluster.py."""
