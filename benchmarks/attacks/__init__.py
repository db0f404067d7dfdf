"""Attacks on the command: see `benchmarks/attack.py`."""
