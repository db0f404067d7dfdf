"""The digits task: real handwritten digits that move across a small canvas, and everything to distil on it in minutes.

Dataset, fixed patch codec, a tiny video diffusion transformer with shipped teacher weights, and metrics. It is a plugin
like any other: found by its entry point, registered by the one hook.
"""
