"""Reading a recipe: files and what they extend, overrides, and every problem that can be seen, reported at once.

Nothing is built here but config objects: a recipe is data, never code.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moedistill.components.plugins import Plugins, load_plugins
from moedistill.errors import Problem, RecipeError, nearest, shorten
from moedistill.recipe.building import FAILED, Builder
from moedistill.recipe.keys import Recipe, StageConfig, TrainingConfig
from moedistill.recipe.rules import Rules, Violation
from moedistill.recipe.sampling import settle
from moedistill.recipe.yaml_tree import Node, apply_override, dotted, from_data, merge, read_file

if TYPE_CHECKING:
    from moedistill.flow.routers import RouterConfig


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
    return _checked(root, problems, plugins, name, Rules.all)


def load_model(
    saved: Mapping[str, Any], plugins: Plugins, *, router: "RouterConfig | None" = None, name: str = "recipe"
) -> Recipe:
    """What sampling needs of a resolved recipe: its model, and of its stages what they were trained to jump to.

    Data, losses and metrics are left out, so that their plugins may be missing.

    Args:
        router: takes the place of the recipe's own.
        name: of the recipe in messages.

    Raises:
        RecipeError: with all problems of these parts.
    """
    problems: list[Problem] = []
    kept = {key: saved[key] for key in MODEL if key in saved and not (router is not None and key == "router")}
    listed = saved.get("stages")
    mappings = [stage for stage in (listed if isinstance(listed, list) else ()) if isinstance(stage, Mapping)]
    stages = [stage for saved_stage in mappings if (stage := _kept(saved_stage, plugins))]
    root = read_recipe({**kept, "stages": stages or [STAND_IN]}, (), problems)
    recipe = _checked(root, problems, plugins, name, Rules.model, router)
    return recipe if stages else replace(recipe, stages=[])


def _kept(saved: Mapping[str, Any], plugins: Plugins) -> dict[str, Any] | None:
    """What sampling needs of a saved stage; None where that is nothing.

    A stage of a plugin that is missing counts as one of consistency, if it says what that needs to.
    """
    kind = saved.get("kind", "")
    if kind not in plugins.components.names("stage"):
        if not {"expert", "phases"} <= saved.keys():
            return None
        kind = "consistency"
    config = cast("type[StageConfig]", plugins.components.get("stage", kind))
    kept = config.kept_for_sampling(saved)
    return {**kept, "kind": kind} if kept is not None else None


MODEL = ("name", "description", "seed", "backbone", "trajectory", "router", "experts", "training", "sample")
"""The keys of a recipe that sampling needs."""

STAND_IN = {"name": "none", "kind": "export"}
"""Read in place of the stages, as a recipe has at least one."""


def _checked(
    root: Node,
    problems: list[Problem],
    plugins: Plugins,
    name: str,
    rules: Callable[[Rules], Iterator[Violation]],
    router: "RouterConfig | None" = None,
) -> Recipe:
    """The recipe of a tree; RecipeError with the `problems` of reading it, and all that are found on the way."""
    builder = Builder(plugins.components, root)
    for problem in problems:
        # A key reported by the reader is not reported again.
        builder.problems.setdefault(problem.path or f"\0{len(builder.problems)}", problem)
    recipe = builder.build(Recipe, root.plain(), ())
    found = list(builder.problems.values())
    if recipe is not FAILED:
        if router is not None:
            recipe.router = router
        violations = rules(Rules(recipe))
        found += [Problem(dotted(path), message, root.where_is(path), hint) for path, message, hint in violations]
    if found:
        raise RecipeError(sorted(found, key=_in_file_order), name)
    assert isinstance(recipe, Recipe)
    settle(recipe)
    return recipe


def in_todays_words(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe, as a run or an export of any version saved it, with the names that its keys have now."""
    training = saved.get("training")
    if not isinstance(training, Mapping):  # none, or an edited one
        return dict(saved)
    return {**saved, "training": {TrainingConfig.renamed.get(key, key): value for key, value in training.items()}}


def read_saved(file: Path, plugins: Plugins | None = None) -> Recipe:
    """The `recipe.yaml` that a run of any version left in its folder.

    Raises:
        RecipeError: as `load_recipe`.
    """
    problems: list[Problem] = []
    saved = read_recipe(file, (), problems)
    return load_recipe(file if problems else in_todays_words(saved.plain()), plugins=plugins)


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
    package = Path(__file__).resolve().parents[1]
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
