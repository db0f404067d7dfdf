"""Recipes: YAML files that name everything a run is made of. Data, never code.

`load_recipe` reads, merges and checks a recipe; all problems that can be seen are reported together, before anything
is built. What a recipe may hold is the annotations of the dataclasses below and of the components' configs.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from annotated_types import MinLen

from moedistill.backbone import BackboneConfig
from moedistill.data.base import DatasetConfig
from moedistill.errors import Problem, RecipeError, nearest, shorten, suggest
from moedistill.fields import Component, NonEmptyStr, NonNegativeInt, PositiveInt
from moedistill.plugins import Plugins, load_plugins
from moedistill.steps import SampleConfig
from moedistill.validation import FAILED, Builder, Partial, failed, to_plain
from moedistill.yaml_tree import Node, apply_override, dotted, from_data, merge, read_file

if TYPE_CHECKING:
    from moedistill.experts import ExpertConfig
    from moedistill.routers import RouterConfig
    from moedistill.stages.base import StageConfig
    from moedistill.trajectory import Trajectory, TrajectoryConfig
else:  # These import torch. For checking a recipe the markers below are enough.
    ExpertConfig = RouterConfig = StageConfig = TrajectoryConfig = object

__all__ = ["Problem", "Recipe", "RecipeError", "SampleConfig", "TrainingConfig", "find_recipe", "json_schema"]
__all__ += ["load_recipe", "read_recipe", "shipped_recipes"]

TEACHER = "teacher"
"""The reserved name of the untouched pretrained weights."""


@dataclass(kw_only=True)
class HeldOutConfig:
    """The consistency loss, prediction - target, on fixed draws; not excluded from training. See `moedistill.heldout`.

    Args:
        every: optimiser steps between measurements; the first one is before the first step.
        samples: how many, spread evenly over the dataset. They are trained on as well.
        levels: starting points, spread evenly over the expert's segment.
    """

    every: PositiveInt = 100
    samples: PositiveInt = 4
    levels: PositiveInt = 4


@dataclass(kw_only=True)
class TrainingConfig:
    """What all training stages share.

    Args:
        batch_size: samples per optimiser step, over all processes and micro-batches.
        gradient_accumulation_steps: micro-batches per optimiser step; divides `batch_size`.
        gradient_checkpointing: recompute activations in the backward pass: slower, less memory.
        num_workers: processes that load data.
        num_threads: CPU threads within an operation; null for torch's choice. Small networks are fastest with 1.
        checkpoint_every: optimiser steps between checkpoints; null for one at the end of each stage only.
        keep_checkpoints: how many of the last checkpoints stay.
        log_every: optimiser steps between lines of metrics.
        trackers: names of accelerate's trackers, such as tensorboard.
        heldout: measure consistency stages on fixed draws as they go, for 1 to 3 % of their time; null for never.
    """

    batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    gradient_checkpointing: bool = False
    num_workers: NonNegativeInt = 0
    num_threads: PositiveInt | None = None
    checkpoint_every: PositiveInt | None = 100
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10
    trackers: list[NonEmptyStr] = field(default_factory=list)
    heldout: HeldOutConfig | None = field(default_factory=HeldOutConfig)


def _default_trajectory() -> Any:
    from moedistill.trajectory import FlowMatching

    return FlowMatching()


@dataclass(kw_only=True)
class Recipe:
    """Everything a run is made of.

    Args:
        name: names the run's folder.
        description: one line for people.
        seed: all randomness of the run comes from it.
        backbone: the model.
        trajectory: the discretised ODE.
        router: which expert serves which noise level.
        experts: named changes to the backbone's weights; `teacher` is reserved for the untouched weights.
        data: the dataset; only stages that need data need it.
        training: what all training stages share.
        stages: what is done, in order.
        sample: the student's sampling steps.
    """

    name: NonEmptyStr
    description: str = ""
    seed: NonNegativeInt = 0
    backbone: Annotated[BackboneConfig, Component("backbone")]
    trajectory: Annotated[TrajectoryConfig, Component("trajectory")] = field(default_factory=_default_trajectory)
    router: Annotated[RouterConfig, Component("router")] | None = None
    experts: dict[str, Annotated[ExpertConfig, Component("expert")]] = field(default_factory=dict)
    data: Annotated[DatasetConfig, Component("dataset")] | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    stages: Annotated[list[Annotated[StageConfig, Component("stage")]], MinLen(1)]
    sample: SampleConfig | None = None

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data with all defaults filled in; `load_recipe` reads it back to an equal recipe."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    def to_yaml(self) -> str:
        """`resolved()` as YAML."""
        return dump_yaml(self.resolved())

    def notes(self) -> list[str]:
        """How values near trajectory points were understood, for people to read."""
        trajectory = self.trajectory.build(self.backbone.native_sigmas())
        notes = list(getattr(self.router.build(trajectory), "notes", ())) if self.router else []
        return notes + (self.sample.notes(trajectory) if self.sample else [])


# -- reading ----------------------------------------------------------------------------------------------------------


def load_recipe(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    plugins: Plugins | None = None,
) -> Recipe:
    """Reads and checks a recipe.

    Args:
        source: a file, the name of a shipped recipe (`dcm_digits`), or the recipe as plain data.
        overrides: `a.b.c=value` each, as of `--set`: they replace values of keys that exist.
        plugins: where components come from; all installed plugins by default.

    Raises:
        RecipeError: with all problems that can be seen at once.
    """
    plugins = plugins if plugins is not None else load_plugins()
    problems: list[Problem] = []
    name = "recipe" if isinstance(source, Mapping) else str(source)
    root = read_recipe(source, overrides, problems)
    if not root.value:  # Nothing could be read: that its keys are missing too helps nobody.
        raise RecipeError(problems or [Problem("", "the recipe is empty")], name)
    builder = Builder(plugins.components, root)
    for problem in problems:
        # A key reported by the reader is not reported again.
        builder.problems.setdefault(problem.path or f"\0{len(builder.problems)}", problem)
    recipe = builder.build(Recipe, root.plain(), ())
    found = list(builder.problems.values())
    if recipe is not FAILED:
        checks = _Checks(recipe)
        found += [Problem(dotted(path), message, root.where_is(path), hint) for path, message, hint in checks.all()]
    if found:
        raise RecipeError(sorted(found, key=_in_file_order), name)
    assert isinstance(recipe, Recipe)
    return recipe


def read_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str], problems: list[Problem]) -> Node:
    """A recipe's tree with `extends` and `overrides` applied, unchecked; what cannot be read goes to `problems`."""
    if isinstance(source, Mapping):
        root, folder, seen = from_data(source, problems), Path(), []
    else:
        file = find_recipe(source)
        root, folder, seen = read_file(file, problems), file.parent, [_identity(file)]
    root = _extended(root, folder, seen, problems)
    for override in overrides:
        apply_override(root, override, problems)
    return root


def _in_file_order(problem: Problem) -> tuple[bool, str, int]:
    """By line; what concerns a file as a whole comes first, what --set brought last."""
    file, _, line = problem.where.rpartition(":")
    whole = (problem.where.startswith("--set"), problem.where, 0)
    return (False, file, int(line)) if line.isdigit() and not whole[0] else whole


def _extended(node: Node, folder: Path, seen: list[Path], problems: list[Problem]) -> Node:
    """`node` over the recipe that its `extends` names, if it has one."""
    extends = node.value.pop("extends", None)
    if extends is None:
        return node
    if not isinstance(extends.value, str) or not extends.value:
        problems.append(Problem("extends", "must be the path of a recipe", extends.where))
        return node
    path = folder / extends.value
    if _identity(path) in seen:
        chain = " → ".join(file.name for file in [*seen, path])
        problems.append(Problem("extends", f"goes round in a circle: {shorten(chain, 200)}", extends.where))
        return node
    missing: list[Problem] = []
    base = read_file(path, missing)
    if not base.value:
        problems += [
            Problem("extends", problem.message, extends.where, problem.where and f"in {problem.where}")
            for problem in missing
        ]
        return node
    problems += missing
    return merge(_extended(base, path.parent, [*seen, _identity(path)], problems), node, problems)


def _identity(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return path


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with moedistill, by name (`dcm_digits`, `baselines/…`)."""
    package = Path(__file__).resolve().parent
    # Beside the source first: what lies inside an installed package could be older.
    beside = package.parent / "recipes"
    folder = beside if (package.parent / "pyproject.toml").is_file() and beside.is_dir() else package / "recipes"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find_recipe(source: str | Path) -> Path:
    """The file that `source` names: a path, else a shipped recipe (`dcm_digits` or `recipes/dcm_digits.yaml`).

    Raises:
        RecipeError: there is no such file.
    """
    path = Path(source)
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise RecipeError([Problem("", f"cannot read it: {error}")], str(source)) from None
    shipped = shipped_recipes()
    name = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    match = nearest(name, shipped)
    hint = (
        f"did you mean the shipped recipe {match!r}?" if match else f"shipped recipes: {', '.join(shipped) or 'none'}"
    )
    raise RecipeError([Problem("", f"there is no file {shorten(str(source), 120)!r}", hint=hint)], str(source))


class _Dumper(yaml.SafeDumper):
    """Plain block style; numbers as YAML 1.2 and our reader take them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # What YAML 1.1 takes for text but YAML 1.2 for a number, such as 1e-5, needs quotes too.
    style = "'" if re.fullmatch(r"[-+.0-9].*", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML in the order given."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


# -- rules between fields ---------------------------------------------------------------------------------------------

Finding = tuple[tuple[str | int, ...], str, str]
"""Path, message, hint."""
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}\Z")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\Z")


class _Checks:
    """Rules between the fields of a recipe. Parts that failed are passed over; the rest is checked all the same."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.experts: Mapping[str, Any] | None = None if failed(recipe.experts) else recipe.experts
        self.stages: list[Any] = [] if recipe.stages is FAILED else recipe.stages
        self.segments: list[str] | None = None
        """Names of the experts that have a segment; None where that is unknown."""

    def all(self) -> Iterator[Finding]:
        yield from self.names()
        trajectory, problem = self.trajectory()
        if problem is not None:
            yield problem
        yield from self.routing(trajectory)
        yield from self.ancestry()
        yield from self.teachers(trajectory)
        yield from self.trained_experts()
        yield from self.probes()
        yield from self.data_and_batches()
        if trajectory is not None and self.recipe.sample and not failed(self.recipe.sample):
            yield from self.sampling(trajectory)
        yield from self.stages_themselves()

    def names(self) -> Iterator[Finding]:
        rule = "letters, digits, '_' and '-'"
        name = self.recipe.name
        if isinstance(name, str) and not _NAME.match(name):
            yield ("name",), f"{shorten(name, 60)!r} names a folder: only {rule} and '.', at most 100", ""
        first: dict[str, int] = {}
        for k, stage in enumerate(self.stages):
            if not isinstance(stage.name, str):
                continue
            if not _WORD.match(stage.name):
                yield ("stages", k, "name"), f"{shorten(stage.name, 60)!r}: only {rule}, at most 64", ""
            if stage.name in first:
                message = f"{stage.name!r} is also the name of stage {first[stage.name]}; names must differ"
                yield ("stages", k, "name"), message, ""
            first.setdefault(stage.name, k)
        for expert in self.experts or ():
            if expert == TEACHER:
                hint = "choose another name; route to 'teacher' without defining it"
                yield ("experts", expert), "'teacher' is reserved for the untouched weights", hint
            elif not _WORD.match(expert):
                yield ("experts", expert), f"{shorten(expert, 60)!r}: only {rule}, at most 64", ""

    def trajectory(self) -> "tuple[Trajectory | None, Finding | None]":
        recipe = self.recipe
        if failed(recipe.trajectory) or failed(recipe.backbone):
            return None, None
        try:
            return recipe.trajectory.build(recipe.backbone.native_sigmas()), None
        except ValueError as error:
            return None, (("trajectory",), str(error), "")

    def routing(self, trajectory: "Trajectory | None") -> Iterator[Finding]:
        """Routed experts exist, experts have segments, boundaries are in order."""
        router, experts = self.recipe.router, self.experts
        if router is None:
            if experts:
                hint = f"add router: {{kind: timestep, experts: [{', '.join(experts)}], boundaries: […]}}"
                yield ("router",), f"is missing: it gives {', '.join(map(repr, experts))} their noise levels", hint
            return
        names, built = router.experts if hasattr(router, "experts") else FAILED, None
        if trajectory is not None and not failed(router):
            try:
                built = router.build(trajectory)
            except ValueError as error:
                yield ("router", "boundaries") if hasattr(router, "boundaries") else ("router",), str(error), ""
        if names is FAILED and built is not None:
            names = [segment.expert for segment in built.segments]
        if names is FAILED or experts is None:
            return
        self.segments = list(names)
        for k, name in enumerate(names):
            if name not in experts and name != TEACHER:
                yield ("router", "experts", k), f"unknown expert {name!r}; {suggest(name, [*experts, TEACHER])}", ""
        for name in experts:
            if name not in names and name != TEACHER:
                hint = "add it to router.experts, with a boundary, or remove it"
                yield ("experts", name), f"expert {name!r} has no segment: the router does not name it", hint

    def ancestry(self) -> Iterator[Finding]:
        """`from` names something that exists, and nothing descends from itself."""
        for name, expert in (self.experts or {}).items():
            parent = getattr(expert, "parent", TEACHER)
            if not isinstance(parent, str) or parent == TEACHER:
                continue
            path = ("experts", name, "from")
            if parent not in (self.experts or {}):
                yield path, f"unknown expert {parent!r}; {suggest(parent, [*(self.experts or {}), TEACHER])}", ""
            elif name in self.ancestors(name):
                circle = " → ".join([name, *self.ancestors(name)])
                yield path, f"goes round in a circle: {circle}", "let one of them start from the teacher"

    def ancestors(self, name: str) -> list[str]:
        """Parents of an expert, nearest first, up to the teacher or to a name met before."""
        found: list[str] = []
        experts = self.experts or {}
        while isinstance(name, str) and name in experts:
            name = getattr(experts[name], "parent", TEACHER)
            if not isinstance(name, str) or name == TEACHER or name in found:
                break
            found.append(name)
        return found

    def teachers(self, trajectory: "Trajectory | None") -> Iterator[Finding]:
        """Experts and guidance name networks that the teacher has; a segment lies where one of them serves."""
        backbone = self.recipe.backbone
        if failed(backbone):
            return
        for key, message in backbone.check():
            yield ("backbone", *key.split(".")), message, ""
        bases = list(backbone.bases())
        scale = backbone.guidance.scale
        if isinstance(scale, dict) and set(scale) != set(bases):
            message = f"names {', '.join(scale) or 'no network'}; the teacher has {', '.join(bases)}: give each a scale"
            yield ("backbone", "guidance", "scale"), message, ""
        for name, expert in (self.experts or {}).items():
            base, parent = getattr(expert, "base", None), getattr(expert, "parent", TEACHER)
            if failed(expert):
                continue
            if base is not None and base not in bases:
                yield ("experts", name, "base"), f"unknown network {base!r}; {suggest(base, bases)}", ""
            elif base is None and parent == TEACHER and len(bases) > 1:
                message = f"is missing: the teacher has {' and '.join(bases)}; say which one {name!r} changes"
                yield ("experts", name, "base"), message, f"for example base: {bases[0]}"
            elif base is not None and parent in (self.experts or {}) and base != self.base_of(parent):
                message = f"{base!r} is not the network of {parent!r}, which {name!r} starts from"
                yield ("experts", name, "base"), message, "leave base out, or start from the teacher"
        yield from self.teacher_segments(trajectory)

    def base_of(self, name: str) -> str | None:
        """The network that an expert names, itself or through its parents."""
        chain = [(self.experts or {}).get(expert) for expert in [name, *self.ancestors(name)]]
        return next((base for expert in chain if (base := getattr(expert, "base", None))), None)

    def teacher_segments(self, trajectory: "Trajectory | None") -> Iterator[Finding]:
        if trajectory is None or self.recipe.router is None or failed(self.recipe.router):
            return
        try:
            teachers = self.recipe.backbone.teacher_router(trajectory)
            segments = self.recipe.router.build(trajectory).segments
        except ValueError:
            return  # reported elsewhere
        trained = {getattr(stage, "expert", None) for stage in self.stages}
        for segment in segments if teachers is not None else ():
            points = trajectory.points_in(segment)
            served = {teachers.expert_at(trajectory.sigma(point)) for point in points}
            base = self.base_of(segment.expert)
            if segment.expert in trained and len(served) == 1 and base is not None and base not in served:
                message = (
                    f"{base!r} is not what serves the segment of {segment.expert!r}: that is {' and '.join(served)}"
                )
                yield ("experts", segment.expert, "base"), message, f"base: {sorted(served)[0]}"
            elif segment.expert in trained and len(served) > 1:
                edges = ", ".join(f"{boundary:.6g}" for boundary in teachers.boundaries)
                message = (
                    f"the segment of {segment.expert!r}, points {points[0]} to {points[-1]}, lies across the teacher's "
                    f"boundary at sigma {edges}: {' and '.join(sorted(served))} would both teach it"
                )
                hint = f"put a boundary there: {{sigma: {edges}}}, with closed: {teachers.closed}"
                yield ("router", "boundaries"), message, hint

    def trained_experts(self) -> Iterator[Finding]:
        """Stages train experts that exist and can be trained, parents before children."""
        trained = [stage.expert if isinstance(getattr(stage, "expert", None), str) else None for stage in self.stages]
        for k, name in enumerate(trained):
            if name is None or self.experts is None:
                continue
            path = ("stages", k, "expert")
            if name == TEACHER:
                yield path, "the teacher is never trained", "define an expert, such as {kind: full}"
            elif name not in self.experts:
                yield path, f"unknown expert {name!r}; {suggest(name, self.experts)}", ""
            elif getattr(self.experts[name], "trainable", True) is False:
                yield path, f"expert {name!r} is {self.experts[name].kind or 'frozen'}: it has nothing to train", ""
            for parent in self.ancestors(name):
                if parent in trained[k + 1 :] and parent != name:
                    later = self.stages[k + 1 + trained[k + 1 :].index(parent)].name
                    message = f"{name!r} starts from {parent!r}, which is trained later, in stage {later!r}"
                    yield path, message, "change the order of the stages"

    def probes(self) -> Iterator[Finding]:
        for k, stage in enumerate(self.stages):
            if getattr(stage, "probe", FAILED) is not None or stage is FAILED:
                continue
            for i, loss in enumerate(getattr(stage, "losses", ())):
                if getattr(loss, "needs_probe", False) is True:
                    kind = getattr(loss, "kind", "") or type(loss).__name__
                    message = f"loss {kind!r} needs the teacher's features, but the stage has no probe"
                    yield ("stages", k, "losses", i), message, "add to the stage: probe: {block_stride: 2}"

    def data_and_batches(self) -> Iterator[Finding]:
        if self.recipe.data is None:
            needs = {need for stage in self.stages for need in getattr(stage, "needs", ())}
            if needs:
                first = next(k for k, stage in enumerate(self.stages) if getattr(stage, "needs", ()))
                names = " and ".join(sorted(needs))
                yield ("data",), f"is missing: stages.{first} needs {names}", "add data: {kind: …}"
        elif not failed(self.recipe.data):
            for k, stage in enumerate(self.stages):
                lacking = sorted(set(getattr(stage, "needs", ())) - self.recipe.data.provides)
                if lacking:
                    message = f"{self.recipe.data.kind!r} has no {' and '.join(lacking)}, which stages.{k} needs"
                    yield ("data", "kind"), message, "choose data that have them, such as kind: latents"
        training = self.recipe.training
        if failed(training):
            return
        size, parts = training.batch_size, training.gradient_accumulation_steps
        if size % parts:
            good = size // parts * parts or parts
            path = ("training", "gradient_accumulation_steps")
            yield path, f"{parts} does not divide batch_size {size}", f"for example batch_size: {good}"

    def sampling(self, trajectory: "Trajectory") -> Iterator[Finding]:
        sample = self.recipe.sample
        unit = next(name for name, value in vars(sample).items() if value is not None)
        try:
            sample.resolve(trajectory)
        except ValueError as error:
            yield ("sample", unit), str(error), ""

    def stages_themselves(self) -> Iterator[Finding]:
        """What each stage's own `check` finds; it sees parts that failed as None."""
        broken = isinstance(self.recipe, Partial)
        recipe = _with_gaps(self.recipe) if broken else self.recipe
        for k, stage in enumerate(self.stages):
            if failed(stage) or not hasattr(stage, "check"):
                continue
            try:
                findings = list(stage.check(recipe))
            except (AttributeError, TypeError, KeyError, ValueError):
                if not broken:  # A check may trip over a gap; then its turn comes when the gap is filled.
                    raise
                continue
            for suffix, message in findings:
                steps = [int(step) if step.isdigit() else step for step in suffix.split(".") if step]
                yield ("stages", k, *steps), message, ""


def _with_gaps(recipe: Partial) -> Any:
    def gap(value: Any) -> Any:
        if failed(value):
            return None
        if isinstance(value, dict):
            return {key: gap(item) for key, item in value.items()}
        return [gap(item) for item in value] if isinstance(value, list) else value

    return SimpleNamespace(**{name: gap(getattr(recipe, name)) for name in Recipe.__dataclass_fields__})


# -- JSON Schema ------------------------------------------------------------------------------------------------------


def json_schema(plugins: Plugins | None = None) -> dict[str, Any]:
    """The JSON Schema of a recipe with all components that can be loaded; for editors."""
    from moedistill.schema import recipe_schema

    return recipe_schema(Recipe, (plugins or load_plugins()).components)
