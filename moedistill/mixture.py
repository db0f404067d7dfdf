"""A student, the router over its experts and the trajectory: everything that sampling needs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moedistill.backbone import Backbone, Guidance
from moedistill.conditioning import Conditioning
from moedistill.ema import EMA
from moedistill.errors import UserError, user_errors
from moedistill.experts import TEACHER
from moedistill.routers import TimestepRouter
from moedistill.sampling import FreshNoise, sample_in_batches
from moedistill.student import Student
from moedistill.trajectory import Trajectory

if TYPE_CHECKING:
    from moedistill.recipe import Recipe

Weights = Mapping[str, Mapping[str, Tensor]]


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}


@dataclass
class Mixture:
    """See the module.

    Attributes:
        router: None where the recipe has none; the teacher is alone then.
        guidance: the teacher's.
        ema: averages of the experts that were trained with one, by expert.
        seed: of the random numbers that experts start with.
    """

    student: Student
    trajectory: Trajectory
    router: TimestepRouter | None
    guidance: Guidance = field(default_factory=Guidance)
    ema: dict[str, EMA] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def build(
        cls,
        recipe: "Recipe",
        device: torch.device | str = "cpu",
        backbone: Backbone | None = None,
        *,
        inference: bool = False,
    ) -> "Mixture":
        """Loads the backbone, unless it is given, and attaches the experts; each starts as its parent.

        For `inference` copies of the base are kept in its dtype.

        Raises:
            UserError: what is wrong with the recipe but cannot be seen in it.
        """
        with user_errors("trajectory"):
            trajectory = recipe.trajectory.build(recipe.backbone.native_sigmas())
        with user_errors("router"):
            router = recipe.router.build(trajectory) if recipe.router else None
        with user_errors("backbone"):
            teacher_router = recipe.backbone.teacher_router(trajectory)
            if backbone is None:
                backbone = recipe.backbone.build(recipe.seed)
        with user_errors("experts"):
            student = Student(
                backbone,
                recipe.experts,
                gradient_checkpointing=recipe.training.gradient_checkpointing and not inference,
                teacher_router=teacher_router,
                inference=inference,
            )
        student.to(device)
        student.student_scale = recipe.backbone.guidance.student_scale
        if recipe.backbone.dtype != "float32":
            student.autocast_dtype = getattr(torch, recipe.backbone.dtype)
        student.initialise(recipe.seed)
        return cls(student, trajectory, router, recipe.backbone.guidance, seed=recipe.seed)

    @torch.no_grad()
    def load(self, experts: Weights, averages: Weights, source: str) -> None:
        """Takes over trained experts and averages, each as tensors by parameter name, by expert.

        The other experts become equal to their parents.

        Raises:
            UserError: they do not fit the recipe's experts; `source` says where they came from.
        """
        for name, weights in experts.items():
            expert = self.student.experts.get(name)
            if expert is None:
                raise UserError(f"{source} has weights of an expert {name!r}, which the recipe does not name")
            if _shapes(weights) != _shapes(expert.parameters):
                raise UserError(f"the weights of expert {name!r} in {source} do not fit the recipe; use its own recipe")
            for key, parameter in expert.parameters.items():
                parameter.copy_(weights[key])
        self.student.initialise(self.seed, but=experts)
        for name, average in averages.items():
            self.ema[name] = EMA(self.student.experts[name].parameters, decay=0.0)
            self.ema[name].load(average)

    @contextmanager
    def running(self, expert: str, weights: str = "trained") -> Iterator[None]:
        """Makes `expert` the active one for the block, with its `trained` weights or, if it has one, its `ema`.

        An average is of one expert alone: what it stands on keeps the weights that it was trained with.
        """
        average = self.ema.get(expert) if weights == "ema" else None
        with self.student.using(expert), average.swapped() if average else nullcontext():
            yield

    @torch.no_grad()
    def generate(
        self,
        noise: Tensor,
        cond: Conditioning,
        sigmas: Tensor,
        *,
        stand_ins: Mapping[str, str] | None = None,
        guidance: Guidance | None = None,
        weights: Literal["trained", "ema"] = "trained",
        eta: float = 0.0,
        fresh_noise: FreshNoise | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Samples from `noise` `[N, C, T, H, W]` along `sigmas`, each step by the expert that the router names.

        Args:
            stand_ins: expert to run in place of another, such as {"detail": "teacher"}.
            guidance: of the teacher's steps; experts are distilled with theirs and take none.
            weights: each expert's trained weights or, of those that have one, its average.
            eta, fresh_noise: noise drawn anew between the steps, as in `moedistill.sampling.sample_in_batches`.
            batch_size: how many samples run at once.
        """
        stand_ins = stand_ins or {}
        router = self.router or TimestepRouter([TEACHER], [])

        def velocity(x: Tensor, sigma: Tensor, expert: str, cond: Conditioning) -> Tensor:
            expert = stand_ins.get(expert, expert)
            expert = self.student.teacher_at(sigma[0].item()) if expert == TEACHER else expert
            with self.running(expert, weights):
                if expert in self.student.teachers and guidance is not None:
                    return self.student.guided(x, sigma, cond, guidance)
                return self.student(x, sigma, cond)

        return sample_in_batches(
            velocity, noise, cond, sigmas, router, eta=eta, fresh_noise=fresh_noise, batch_size=batch_size
        )
