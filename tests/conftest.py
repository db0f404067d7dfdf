"""Settings for all tests: one thread, here and in every process that a test starts.

Tests marked `slow` are left out unless asked for: `pytest -m slow`.
"""

import os

# Before torch is imported; child processes inherit it. Sums depend on the number of threads, and tests compare exactly.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
