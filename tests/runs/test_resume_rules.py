"""Rules of resuming that hold for all recipes: which of them may go on from which checkpoint."""

from functools import cache

import properties  # noqa: F401  its settings
from helpers import distil, evaluate, tiny_recipe
from hypothesis import given
from hypothesis import strategies as st

from moedistill.components.plugins import load_plugins
from moedistill.recipe.loading import load_recipe
from moedistill.runs.resume import OPERATIONAL, changed_keys, comparable

CHANGES = {
    "name": "other",
    "seed": 1,
    "backbone.width": 32,
    "router.boundaries": [{"point": 3}],
    "experts.semantic": {"kind": "lora", "rank": 2},
    "experts.detail.rank": 4,
    "data.text_dropout": 0.5,
    "training.batch_size": 8,
    "training.log_every": 3,
    "training.checkpoint_every": None,
    "training.keep_checkpoints": 7,
    "training.num_workers": 2,
    "stages.0.optimizer.lr": 0.5,
    "stages.0.losses": [{"kind": "huber", "c": 0.1}],
    "stages.1.optimizer.lr": 0.5,
    "stages.1.name": "fine",
    "stages.2.samples": 8,
    "sample.points": [8, 2],
}
CHOICES = st.frozensets(st.sampled_from(sorted(CHANGES)), max_size=4)
STAGES = range(3)
plugins = cache(load_plugins)


@cache
def recipe(changes):
    stages = [distil(), distil("detail"), evaluate()]
    return load_recipe(tiny_recipe(stages, {key: CHANGES[key] for key in sorted(changes)}), (), plugins())


def state(made, stage):
    """What a checkpoint amid a stage says of its run."""
    names = ["semantic", "detail"][: stage + 1]
    return {"recipe": made.resolved(), "stage": stage, "step": 1, "trained": names, "used": []}


def changed(a, b, stage):
    before, after = changed_keys(recipe(b), state(recipe(a), stage))
    return set(before), set(after)


@given(CHOICES)
def test_the_same_recipe_goes_on_anywhere(changes):
    for stage in STAGES[:2]:
        assert changed(changes, changes, stage) == (set(), set())


@given(CHOICES, CHOICES)
def test_each_key_that_differs_is_named_once_and_no_other(a, b):
    one, other = comparable(recipe(a).resolved()), comparable(recipe(b).resolved())
    differing = {key for key in one | other if one.get(key) != other.get(key)}
    for stage in STAGES[:2]:
        before, after = changed(a, b, stage)
        assert before | after == differing
        assert not before & after
        assert not any(key.startswith(f"training.{name}") for key in differing for name in OPERATIONAL)


@given(CHOICES, CHOICES)
def test_there_and_back_are_alike(a, b):
    """What may not differ one way may not differ the other way, unless an expert is there on one side only."""
    for stage in STAGES[:2]:
        assert changed(a, b, stage) == changed(b, a, stage)


@given(CHOICES, CHOICES)
def test_what_is_settled_stays_settled(a, b):
    """A later checkpoint of the same run allows no change that an earlier one did not."""
    (earlier, _), (later, _) = changed(a, b, 0), changed(a, b, 1)
    assert earlier <= later


@given(CHOICES)
def test_operational_keys_never_matter(changes):
    operational = frozenset(key for key in CHANGES if key.removeprefix("training.") in OPERATIONAL)
    for stage in STAGES[:2]:
        assert changed(changes, changes | operational, stage) == (set(), set())
