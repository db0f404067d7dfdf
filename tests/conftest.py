"""Settings for all tests: one thread, here and in every process that a test starts; no garbage in what is imported.

Tests marked `slow` are left out unless asked for: `pytest -m slow`.
"""

import gc
import os
import sys

# Before torch is imported; child processes inherit it. Sums depend on the number of threads, and tests compare exactly.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

_frozen = 0


def _freeze_imports():
    """Every stage ends with a full garbage collection, most of which would look at modules: 0.3 s each."""
    global _frozen
    if len(sys.modules) > _frozen:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup():
    _freeze_imports()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    _freeze_imports()


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """Runs in tests draw none, which takes as long as many of them; gives what draws, for those that test it."""
    from moedistill.runs.callbacks import curves

    with pytest.MonkeyPatch.context() as patch:
        usual = curves.draw
        patch.setattr(curves, "draw", lambda *_: None)
        yield usual


@pytest.fixture(scope="session", autouse=True)
def no_page():
    """Runs in tests write no report.html, for the same reason; gives what does."""
    from moedistill.runs import loop

    with pytest.MonkeyPatch.context() as patch:
        usual = loop.write_page
        patch.setattr(loop, "write_page", lambda *_, **__: None)
        yield usual
