"""The kit at work: all checks of one backbone, as rows of a table or as tests."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moedistill.components.plugins import Plugins, load_plugins
from moedistill.errors import Problem, RecipeError, shorten
from moedistill.model.backbone import BackboneConfig
from moedistill.recipe.building import Builder, Partial, failed
from moedistill.recipe.yaml_tree import apply_override, from_data
from moedistill.testing.checks import CHECKS, Check
from moedistill.testing.subject import Subject, Unchecked


@dataclass(frozen=True)
class Row:
    """What became of a check.

    Attributes:
        passed: None where there was nothing to check.
        figure: a measured number, what is wrong, or why nothing was checked.
    """

    check: Check = field(repr=False)
    passed: bool | None
    figure: str

    @property
    def mark(self) -> str:
        """✔, ✘ or –."""
        return "–" if self.passed is None else "✔" if self.passed else "✘"


def run_checks(subject: Subject) -> Iterator[Row]:
    """All checks that fit the subject, one after the other; nothing that a backbone raises gets out."""
    for check in CHECKS:
        if not check.concerns(subject.config) or (check.trained and not subject.real):
            continue
        try:
            yield Row(check, True, check.function(subject))
        except Unchecked as reason:
            yield Row(check, None, f"not checked: {reason}")
        except AssertionError as error:
            yield Row(check, False, _one_line(str(error) or "an assertion of the backbone's own"))
        except Exception as error:
            yield Row(check, False, _one_line(f"{type(error).__name__}: {error}"))


def _one_line(text: str) -> str:
    return shorten(" ".join(text.split()), 400)


def read_config(
    name: str, settings: Mapping[str, Any], overrides: Sequence[str] = (), plugins: Plugins | None = None
) -> BackboneConfig:
    """The config of the registered backbone `name`, with `settings` and `a.b.c=value` overrides of its keys.

    Where the weights' place is required but not among them, the config is good for its miniature alone.

    Raises:
        RecipeError: no such backbone or key, or a value that does not fit.
    """
    components = (plugins or load_plugins()).components
    problems: list[Problem] = []
    root = from_data({"kind": name, **settings}, problems)
    for override in overrides:
        apply_override(root, override, problems)
    builder = Builder(components, root)
    raw = root.plain()
    config = builder.component("backbone", raw, ())
    if "pretrained" not in raw and isinstance(config, Partial) and failed(getattr(config, "pretrained", None)):
        # Any place will do: the miniature looks at none.
        builder = Builder(components, root)
        config = builder.component("backbone", {**raw, "pretrained": "(not given)"}, ())
    problems += builder.problems.values()
    if problems:
        raise RecipeError(problems, f"backbone {name}")
    assert isinstance(config, BackboneConfig)
    return config


def check_backbone(config: BackboneConfig, *, real: bool = False, device: torch.device | str = "cpu") -> list[Row]:
    """Checks a backbone on its miniature, or (`real`) as configured, with its weights.

    It computes in float32, with up to three networks of the real model's size in memory.

    Raises:
        ValueError: what `config.build` raises.
    """
    subject = Subject(config, real=real, device=device)
    subject.backbone()
    return list(run_checks(subject))


class BackboneContract:
    """A pytest class to subclass: one test per check.

    Example:
        class TestMyModel(BackboneContract):
            config = MyModelConfig()
    """

    config: BackboneConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for check in CHECKS if isinstance(vars(cls).get("config"), BackboneConfig) else ():
            name = f"test_{check.name}"
            if not check.concerns(cls.config):
                setattr(cls, name, None)  # pytest collects none
            elif getattr(cls, name) is None:  # of a class between
                setattr(cls, name, getattr(BackboneContract, name))

    def subject(self) -> Subject:
        """What is checked; override it for `Subject(self.config, real=True)`."""
        return Subject(self.config)


def _as_test(check: Check) -> Callable[[BackboneContract], None]:
    def test(self: BackboneContract) -> None:
        import pytest

        cls = type(self)
        if "_subject" not in vars(cls):  # one for all tests of a class
            cls._subject = self.subject()  # type: ignore[attr-defined]
        try:
            check.function(cls._subject)  # type: ignore[attr-defined]
        except Unchecked as reason:
            pytest.skip(f"not checked: {reason}")

    test.__doc__ = check.title
    return test


for _each in CHECKS:
    setattr(BackboneContract, f"test_{_each.name}", _as_test(_each))
