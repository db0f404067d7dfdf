"""A few cases of every attack of `make attack`: nothing ends in a traceback or hangs, is lost, or silently wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "recipes": "recipes/0-9",
    "smoke": "smoke/121 smoke/130",
    "checkpoints": "checkpoints/5 checkpoints/13 checkpoints/24 checkpoints/38",
    "exports": "exports/19 exports/32",
    "data": "data/7 data/12 data/52 data/152 data/163 data/167 data/173",
    "weights": "weights/1 weights/2 weights/29",
    "kills": "kills/0",
    "disk": "disk/0-1",
    "folders": "folders/2 folders/8-9 folders/11-12",
    "hints": "hints/5",
}
"""Of each part, those that have found most."""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """What the command said, its results, and their folder's name; one process imports everything once."""
    folder = tmp_path_factory.mktemp("attack")
    cases = [word for case in CASES.values() for name in case.split() for word in ("--case", name)]
    command = [sys.executable, ROOT / "benchmarks" / "attack.py", "--output", folder, *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600, check=False
    )
    [results] = folder.glob("*/results.jsonl")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return done, rows, results.parent.name


@pytest.mark.parametrize("part", CASES)
def test_attacks_end_well(attacked, part):
    done, rows, _ = attacked
    mine = [row for row in rows if row["part"] == part]
    assert mine, done.stderr
    faults = [f"{row['case']}: {row['verdict']}: {row['reason']}" for row in mine]
    assert [fault for fault, row in zip(faults, mine, strict=True) if row["verdict"] not in ("refused", "right")] == []


def test_the_table_and_the_exit_code(attacked):
    done, rows, _ = attacked
    assert f"| all | {len(rows)} |" in done.stdout
    assert "| runs killed and resumed (4 kills) | 1 |" in done.stdout
    assert done.returncode == any(row["verdict"] not in ("refused", "right") for row in rows)


def test_a_whole_run_of_too_few_kills_is_a_failure(attacked, tmp_path):
    row = next(row for row in attacked[1] if row["part"] == "kills") | {"verdict": "right", "counts": ["kills"] * 3}
    results = tmp_path / attacked[2] / "results.jsonl"
    results.parent.mkdir()
    results.write_text("".join(json.dumps(row | {"number": number}) + "\n" for number in range(60)))
    command = [sys.executable, ROOT / "benchmarks" / "attack.py", "--output", tmp_path, "--part", "kills"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "(180 kills) | 60 |" in done.stdout
    assert "180 kills are fewer than 200" in done.stdout
    assert done.returncode == 1
