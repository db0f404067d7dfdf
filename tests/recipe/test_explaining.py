"""What `moedistill list KIND NAME` says of every shipped component and recipe."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import MinLen

from moedistill import cli
from moedistill.components.fields import Config, Decay, Fraction, NonEmptyStr, PositiveInt
from moedistill.components.plugins import load_plugins
from moedistill.recipe.building import aliases, field_types
from moedistill.recipe.explaining import WIDTH, _dataclasses_in, explain, in_words, key_texts
from moedistill.recipe.keys import Recipe
from moedistill.recipe.loading import shipped_recipes

PLUGINS = load_plugins()


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Fraction, "a number, from 0 to 1"),
        (Decay | None, "a number, at least 0, less than 1, or null"),
        (Annotated[list[PositiveInt], MinLen(1)], "a list, not empty; each an integer, greater than 0"),
        (Literal["a", "b"] | list[str], "one of a, b, or a list; each text"),
        (dict[str, bool], "a mapping of names; each value true or false"),
        (tuple[int, str], "a list of 2: an integer; text"),
    ],
)
def test_types_in_words(hint, words):
    assert in_words(hint) == words


@dataclass(kw_only=True)
class Inner:
    """A part.

    Args:
        low, high: its ends, of which
            each counts.
    """

    low: int = 1
    high: int = 2


@dataclass(kw_only=True)
class Base(Config):
    """Common.

    Args:
        name: what it is called.
    """

    name: NonEmptyStr


@dataclass(kw_only=True)
class Outer(Base):
    """What it is: `much`.

    More of it.

    Args:
        part: what it is made of.

    Raises:
        ValueError: never.
    """

    part: Inner = field(default_factory=lambda: Inner(low=7))
    silent: bool = False


def test_a_screen():
    """Keys of parents, of parts with the values they have there, and of no text at all."""
    assert explain(Outer) == [
        "  What it is: much.",
        "",
        "  More of it.",
        "",
        "  name: text, not empty; required",
        "      what it is called.",
        "  part: a mapping",
        "      what it is made of.",
        "      A part.",
        "      low: an integer; default 7",
        "          its ends, of which each counts.",
        "      high: an integer; default 2",
        "          its ends, of which each counts.",
        "  silent: true or false; default false",
    ]


def silent_keys(cls, above=()):
    """Keys of a config class, and inside of them, of which nothing is said."""
    found = [key for key, text in key_texts(cls).items() if not text]
    for key, hint in field_types(cls).items():
        for inner in _dataclasses_in(hint):
            if inner not in above:
                found += [f"{key}.{below}" for below in silent_keys(inner, (*above, inner))]
    return found


@pytest.mark.parametrize("entry", list(PLUGINS.components), ids=lambda entry: f"{entry.registry}-{entry.name}")
def test_every_key_of_every_component_is_explained(entry):
    cls = PLUGINS.components.get(entry.registry, entry.name)
    assert silent_keys(cls) == []
    lines = explain(cls, entry.description)
    assert max(map(len, lines)) <= WIDTH
    shown = [line[2:].partition(":")[0] for line in lines if re.match(r"  \w+: ", line)]
    assert shown == [key for key, each in aliases(cls).items() if each.init]


def test_every_key_of_a_recipe_is_explained():
    assert silent_keys(Recipe) == []


def call(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["list", *words])
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


def test_the_command(capsys):
    code, out, _ = call(capsys, "loss", "gan")
    assert code == 0
    assert out.startswith("loss gan, of plugin moedistill_dcm\n\n  Hinge GAN")
    key = "critic_updates: an integer, greater than 0, at most 1000; default 1"
    assert f"\n  {key}\n      critic steps per student step.\n" in out
    assert call(capsys, "loss", "gam") == (
        2, "", "error: list: unknown loss 'gam'; did you mean 'gan'? "
        "allowed: feature_matching, gan, huber, mse, temporal_coherence\n",
    )  # fmt: skip


def test_a_recipe(capsys):
    code, out, _ = call(capsys, "recipe", "digits_teacher")
    assert code == 0
    assert out.splitlines()[1:] == [
        "",
        "  the teacher of the digits task, trained from scratch",
        "",
        "  backbone: digits",
        "  trajectory: flow_matching",
        "  router: timestep",
        "  data: digits",
        "  experts: teacher_network (full)",
        "  stages:",
        "    fit: finetune of expert teacher_network, 32000 steps, losses mse",
        "    export: export",
    ]
    code, _, err = call(capsys, "recipe", "digits_teacherr")
    assert code == 2
    assert "did you mean the shipped recipe 'digits_teacher'?" in err
    for name in list(shipped_recipes())[::8]:
        code, out, _ = call(capsys, "recipe", name)
        assert code == 0
        assert max(map(len, out.splitlines()[1:])) <= WIDTH
