"""The script for a GPU, in miniature on a CPU: it runs to its end, and sharding changes no number."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_check.py"


@pytest.mark.slow
def test_the_script_in_miniature():
    done = subprocess.run([sys.executable, SCRIPT, "--tiny"], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    losses = {(row["case"], row["stage"]): row["losses"] for row in rows}
    assert len(losses) == 6
    for stage in ("semantic", "detail"):
        assert losses["FSDP2 on one GPU", stage] == pytest.approx(losses["one process", stage], rel=1e-3)
    assert all(row["planned"] > 0 for row in rows)
