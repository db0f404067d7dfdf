"""How the teacher is guided."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moedistill.components.fields import NonNegativeInt, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Guidance:
    """How the teacher is guided.

    Args:
        mode: `none`; `classifier_free`: v = v_c + (scale - 1)·(v_c - v_u), both in one batched forward; `embedded`: the
            network takes the scale as an input.
        scale: the guidance scale; 1 means no guidance. A teacher of several networks may have one for each, by name.
        negative_prompt: what the unconditional half of classifier-free guidance, and dropped text, is told instead. A
            negative that is stored with the training data takes its place.
        student_scale: the embedded scale that the experts are told; null for the teacher's.
        oscillate_from: from this step on, the first being 0, classifier-free guidance leaves out every odd one, which
            is then the conditional velocity alone (guidance oscillation of Open-Sora 2.0). Steps are those of the
            trajectory, in training, sampling and analysis alike; a jump over several of them has the mean of their
            scales. null: every step is guided.
    """

    mode: Literal["none", "classifier_free", "embedded"] = "none"
    scale: PositiveFloat | dict[str, PositiveFloat] = 1.0
    negative_prompt: str = ""
    student_scale: PositiveFloat | None = None
    oscillate_from: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        if self.mode == "none" and self.scale != 1.0:
            raise ValueError(f"scale {self.scale} needs a mode: classifier_free or embedded")
        if self.mode != "embedded" and self.student_scale is not None:
            raise ValueError(f"student_scale {self.student_scale} needs mode: embedded; other experts take no scale")
        if self.mode != "classifier_free" and self.oscillate_from is not None:
            raise ValueError(f"oscillate_from {self.oscillate_from} needs mode: classifier_free, two forwards a step")

    def scale_of(self, base: str) -> float:
        """The scale of one of the teacher's networks."""
        return self.scale[base] if isinstance(self.scale, dict) else self.scale

    def embedded_scale(self, base: str) -> float:
        """The scale that a network with an input for it is told; 1 where it is guided otherwise, or not at all."""
        return self.scale_of(base) if self.mode == "embedded" else 1.0

    def classifier_free_scale(self, base: str) -> float:
        """The scale by which two forwards are combined; 1 where there is nothing to combine."""
        return self.scale_of(base) if self.mode == "classifier_free" else 1.0

    def share(self, first: int, following: int) -> float:
        """The share of guided steps among the trajectory's from `first` to before `following`, one at least."""
        start = math.inf if self.oscillate_from is None else self.oscillate_from
        steps = range(first, max(following, first + 1))
        return sum(step < start or step % 2 == 0 for step in steps) / len(steps)

    def guides(self, step: "Tensor") -> "Tensor":
        """Which of the trajectory's steps, int64 `[B]`, the first being 0, are guided by two forwards; bool `[B]`."""
        start = math.inf if self.oscillate_from is None else self.oscillate_from
        return (step < start) | (step % 2 == 0)
