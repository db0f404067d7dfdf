"""What a checkpoint says of its run, and the weights in it, checked: it may have been damaged, or edited."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from moedistill.model.mixture import Weights
from moedistill.runtime.checkpoint import FORMAT, SUMS, checkpoint_name, load_tree, parse_name
from moedistill.runtime.integrity import Damaged
from moedistill.runtime.sharding import Pieces

_Count: TypeAlias = Annotated[int, Field(ge=0)]
_Expert = TypedDict("_Expert", {"from": str})


class _Stage(TypedDict):
    name: str
    kind: str
    steps: NotRequired[Any]
    expert: NotRequired[str | None]


class _Recipe(TypedDict):
    stages: list[_Stage]
    experts: dict[str, _Expert]
    training: dict[str, Any]


class _Cost(TypedDict):
    steps: float
    forwards: float
    seconds: float


class _State(TypedDict):
    stage: _Count
    stage_name: str
    step: _Count
    metrics: dict[str, Any]
    cost: dict[str, _Cost]
    recipe: _Recipe
    trained: NotRequired[list[str]]
    used: NotRequired[list[str]]
    smoke: NotRequired[bool]
    format: NotRequired[_Count]


_STATE = TypeAdapter(_State)


def read_state(checkpoint: Path, *, verified: bool = False) -> dict[str, Any]:
    """What a checkpoint says of the run that made it: recipe, stage and step, what was reported.

    Raises:
        Damaged: it is not what was written, or cannot be of a run, or is of a newer moedistill.
    """
    file = checkpoint / "state.json"
    state: dict[str, Any] = load_tree(checkpoint, "state", verified=verified)
    version = state.get("format", 1) if isinstance(state, Mapping) else 1
    if isinstance(version, int) and version > FORMAT:
        raise Damaged(file, f"has format {version}; this moedistill reads up to {FORMAT}: update it")
    if version == FORMAT and not (checkpoint / SUMS).exists():
        raise Damaged(checkpoint / SUMS, "is missing: what was written cannot be told from what was not")
    try:
        _STATE.validate_python(state, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Damaged(file, f"is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    number, stages = state["stage"], state["recipe"]["stages"]
    if number >= len(stages) or stages[number]["name"] != state["stage_name"]:
        raise Damaged(file, f"is damaged: its recipe has no stage {number} {state['stage_name']!r}")
    steps = stages[number].get("steps")
    if isinstance(steps, int) and state["step"] > steps:
        raise Damaged(file, f"is damaged: step {state['step']} of a stage of {steps} steps")
    name = checkpoint_name(number, state["stage_name"], state["step"])
    if parse_name(checkpoint.name) and checkpoint.name != name:
        raise Damaged(file, f"is that of {name}: give the folder its name back")
    return state


def read_weights(
    checkpoint: Path, state: Mapping[str, Any], *, verified: bool = False, averaged: bool = True, pieces: bool = False
) -> tuple[Weights, Weights]:
    """The weights of the experts trained so far, and the averages of those that have one, if wanted.

    With `pieces` nothing that several processes wrote is put together, as in `load_tree`.

    Raises:
        Damaged: they are not what was written, or not those that the checkpoint's `state` names.
    """
    experts = load_tree(checkpoint, "experts", verified=verified, pieces=pieces)
    averages = load_tree(checkpoint, "ema", verified=verified, pieces=pieces) if averaged else {}
    for tree, weights in (("experts", experts), ("ema", averages)):
        each = weights.values() if isinstance(weights, Mapping) else [None]
        tensors = [list(one.values()) if isinstance(one, Mapping) else [None] for one in each]
        if not all(isinstance(weight, Tensor | Pieces) for one in tensors for weight in one):
            raise Damaged(checkpoint / f"{tree}.json", "is damaged: it is not tensors by expert and name")
    if "trained" in state and set(experts) != set(state["trained"]):
        found, wanted = (", ".join(sorted(map(str, names))) or "none" for names in (experts, state["trained"]))
        raise Damaged(checkpoint / "experts.json", f"is damaged: it has experts {found}, and {wanted} were trained")
    return experts, averages
