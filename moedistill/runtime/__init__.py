"""Processes, disk and chance: devices, checkpoints, addressed randomness, signals."""
