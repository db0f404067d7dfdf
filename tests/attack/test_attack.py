"""A few cases of every attack of `make attack`: nothing ends in a traceback or hangs, is lost, or silently wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "recipes": "recipes/0-14 recipes/150",
    "smoke": "smoke/121 smoke/130",
    "checkpoints": "checkpoints/5 checkpoints/13 checkpoints/24 checkpoints/38",
    "exports": "exports/19 exports/32",
    "data": "data/7 data/12 data/52",
    "kills": "kills/0",
    "disk": "disk/0-1",
    "folders": "folders/2 folders/15",
}
"""Of each part, those that have found most."""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """The command's exit code, what it said, and its results by part; one process imports everything once."""
    folder = tmp_path_factory.mktemp("attack")
    cases = [word for case in CASES.values() for name in case.split() for word in ("--case", name)]
    command = [sys.executable, ROOT / "benchmarks" / "attack.py", "--output", folder, *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600, check=False
    )
    [results] = folder.glob("*/results.jsonl")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return done, rows


@pytest.mark.parametrize("part", CASES)
def test_attacks_end_well(attacked, part):
    done, rows = attacked
    mine = [row for row in rows if row["part"] == part]
    assert mine, done.stderr
    faults = [f"{row['case']}: {row['verdict']}: {row['reason']}" for row in mine]
    assert [fault for fault, row in zip(faults, mine, strict=True) if row["verdict"] not in ("refused", "right")] == []


def test_the_table_and_the_exit_code(attacked):
    done, rows = attacked
    assert f"| all | {len(rows)} |" in done.stdout
    assert done.returncode == any(row["verdict"] not in ("refused", "right") for row in rows)
