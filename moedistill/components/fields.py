"""Types for the fields of component configs: the keys a recipe may hold.

A component's config is a plain dataclass. Its annotations are its rules: they give the checks, the error messages and
the JSON Schema. Nothing here imports torch or pydantic.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

if TYPE_CHECKING:
    from pydantic_core import CoreSchema
    from typing_extensions import Self

MOST = 2**31 - 1
"""Of anything that is counted: more steps, samples or channels than any run has."""
FLOAT32_MAX = 3.4028234663852886e38
"""Networks and optimisers compute in float32, in which what is larger is infinite."""

PositiveInt = Annotated[int, Gt(0), Le(MOST)]
NonNegativeInt = Annotated[int, Ge(0)]
GridSize = Annotated[int, Gt(0), Le(100_000)]
"""Points of a trajectory, frames or pixels along an edge: far more than any model has, and still cheap."""
PositiveFloat = Annotated[float, Gt(0.0), Le(FLOAT32_MAX)]
NonNegativeFloat = Annotated[float, Ge(0.0), Le(FLOAT32_MAX)]
LearningRate = Annotated[float, Gt(0.0), Le(1e6)]
"""Beyond any use; near the largest float32 an optimiser's own corrections overflow."""
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
"""A number in [0, 1]: a probability, or a sigma."""
Decay = Annotated[float, Ge(0.0), Lt(1.0)]
"""How much of an average each update keeps."""
NonEmptyStr = Annotated[str, MinLen(1)]
WhichWeights = Literal["trained", "ema"]
"""An expert's weights as trained, or, where it has one, their average."""


@dataclass(frozen=True)
class Component:
    """Marks a field whose value is a component of a registry, chosen by its `kind`.

    Args:
        registry: which one.
        by_name: a name alone will do, for a component with the defaults of its keys.

    Example:
        `losses: list[Annotated[LossConfig, Component("loss")]]`
    """

    registry: str
    by_name: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> "CoreSchema":
        """For pydantic the value is `{"$component": n}`, n a place in the table that `recipe.building` made."""
        from pydantic_core import core_schema

        def look_up(value: Any, info: Any) -> Any:
            if not isinstance(value, dict) or list(value) != ["$component"]:
                raise ValueError(f"must be a {self.registry}: a mapping with a kind")
            return info.context[value["$component"]]

        return core_schema.with_info_plain_validator_function(look_up)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"$component": self.registry, **({"$by_name": True} if self.by_name else {})}


@dataclass(kw_only=True)
class Config:
    """Base of every component config. `kind` is the name under which the recipe chose it; the recipe sets it."""

    kind: ClassVar[str] = ""

    def replace(self, **changes: Any) -> "Self":
        """A copy with other values for some fields, and the same kind."""
        copy = replace(self, **changes)
        object.__setattr__(copy, "kind", self.kind)
        return copy
