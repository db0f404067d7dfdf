"""Runs that several tests export, each made once."""

import json

import pytest
from two_expert_runs import finished


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Of a family, a kind of semantic expert, and other keys of the recipe: the run's folder."""
    made = {}

    def run_of(family, semantic="lora", **changes):
        key = (family, semantic, json.dumps(changes, sort_keys=True))
        if key not in made:
            made[key] = finished(tmp_path_factory.mktemp(family), family, semantic, **changes)
        return made[key]

    return run_of
