"""Experts inside a diffusers pipeline: as its transformer, with a scheduler that holds their few steps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from moedistill.components.fields import WhichWeights
from moedistill.model.backbone import TEACHER
from moedistill.model.mixture import Mixture

if TYPE_CHECKING:
    from moedistill.integrations.diffusers.scheduler import FewStepScheduler


Pass = Literal["conditional", "unconditional", "both"]
"""Which pass of a guided call it is; both: in one batch, the unconditional half first."""


class RoutedTransformer(nn.Module):
    """Stands in for a pipeline's transformer: each call runs the expert that serves the scheduler's current step.

    Expert and native time come from the scheduler, never from the time that a pipeline passes, which may be rounded.
    Experts were distilled with their guidance: of a guided pipeline's two passes they run the conditional one only, and
    give its result for both, which any guidance scale leaves as it is. The untouched teacher runs both.

    Compiled, by `torch.compile`, its own `compile` or `compile_repeated_blocks`, it compiles the networks, once for
    each expert; which of them runs is chosen outside.
    """

    def __init__(self, pipeline: Any, mixture: Mixture, scheduler: "FewStepScheduler", weights: WhichWeights) -> None:
        super().__init__()
        self.mixture = mixture
        self._pipeline, self._scheduler, self._weights = pipeline, scheduler, weights
        self._mark = ""
        self._is_doubled = False
        self._step: int | None = None
        self._conditional: Tensor | None = None
        _choose_outside_of_graphs()

    @property
    def _network(self) -> Any:
        return self.mixture.backbone.network

    @property
    def config(self) -> Any:
        """Of the network."""
        return self._network.config

    @property
    def dtype(self) -> Any:
        """Of the network."""
        return self._network.dtype

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return next(self._network.parameters()).device

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Pipelines name their passes in this way: see `DiffusersBackbone.pass_names`."""
        self._mark = name
        try:
            yield
        finally:
            self._mark = ""

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Of every network; see diffusers' `ModelMixin.compile_repeated_blocks`."""
        for network in self.mixture.networks:
            network.compile_repeated_blocks(*args, **kwargs)  # type: ignore[operator]

    def forward(self, hidden_states: Tensor, timestep: Tensor, **arguments: Any) -> tuple[Tensor]:
        """The network's forward, by the expert of the current step, at the exact native time.

        Raises:
            ValueError: it is not the turn of a step at `timestep`, or it cannot be told which pass this is.
        """
        with ExitStack() as running:
            running_pass, network, arguments = self._choose(running, hidden_states, timestep, arguments)
            if running_pass == "unconditional":
                assert self._conditional is not None
                return (_again(self._conditional),)
            output: Tensor = network(**arguments)[0]
        self._conditional = torch.cat([output, output]) if running_pass == "both" else output
        return (self._conditional,)

    def _choose(
        self, running: ExitStack, hidden_states: Tensor, timestep: Tensor, arguments: dict[str, Any]
    ) -> tuple[Pass, nn.Module, dict[str, Any]]:
        """What to run, with what: the pass, the network, switched to its expert for as long as `running`, arguments."""
        mixture, scheduler = self.mixture, self._scheduler
        if self._pipeline.scheduler is not scheduler:
            raise ValueError(
                f"the pipeline has a {type(self._pipeline.scheduler).__name__} now, but experts take the steps of the "
                "scheduler that they came with; choose other steps with moedistill.apply(pipeline, source, sigmas=[…])"
            )
        if scheduler.step_index is None:  # a call of the pipeline begins, whose scale may change on the way
            self._is_doubled = getattr(self._pipeline, "guidance_scale", 1.0) > 1.0
            self._step = None
        step = scheduler.enter(timestep)
        if step != self._step:
            self._step, self._conditional = step, None
        expert = expert_at(mixture, scheduler.sigmas[step].item())
        network = mixture.experts[expert].shared.network
        distilled = expert not in mixture.teachers
        backbone: Any = mixture.backbone
        running_pass: Pass = backbone.which_pass(self._pipeline, self._mark) if distilled else "conditional"
        if running_pass == "both" and not self._is_doubled:
            running_pass = "conditional"
        if running_pass == "unconditional":
            if self._conditional is None:
                raise ValueError("the pipeline asks for its unconditional pass first, which an expert does not have")
            return running_pass, network, {}
        arguments = {"hidden_states": hidden_states, **arguments, "return_dict": False}
        if running_pass == "both":  # the unconditional half comes first
            arguments = _second_half(arguments, len(hidden_states))
        batch = len(arguments["hidden_states"])
        scheduler.batch = batch if distilled else None
        if distilled and arguments.get("guidance") is not None:
            # What the expert was told in training; the pipeline's is the caller's, and rounded: 6016 for 6000 in bf16.
            scale = mixture.guidance.student_scale or mixture.guidance.embedded_scale(mixture.bases[0])
            arguments["guidance"] = torch.full_like(arguments["guidance"], 1000.0 * scale, dtype=torch.float32)
        arguments |= backbone.as_trained()
        arguments["timestep"] = scheduler.timesteps[step].to(hidden_states.device).expand(batch)
        running.enter_context(mixture.running(expert, self._weights))
        running.enter_context(mixture.autocast(hidden_states.device))
        return running_pass, network, arguments


@cache
def _choose_outside_of_graphs() -> None:
    """What is to be compiled of a `RoutedTransformer` are the networks, not the choice of one.

    Not by decorators: they would import the compiler wherever a recipe is read.
    """
    cls: Any = RoutedTransformer
    cls.forward = torch.compiler.disable(cls.forward, recursive=False)
    cls._choose = torch.compiler.disable(cls._choose)


def _again(output: Tensor) -> Tensor:
    """Equal to `output`, and computed: torch.compile(fullgraph=True) takes a call that computes nothing for a fault."""
    return output.clone()


def refuse_eta(eta: float) -> None:
    """ValueError for anything but 0: pipelines pass their generator to no scheduler, so a step can draw no noise."""
    if eta:
        raise ValueError(f"eta {eta:g}: a pipeline's steps draw no fresh noise; give steps or sigmas, whose eta is 0")


def expert_at(mixture: Mixture, sigma: float) -> str:
    """The expert that serves `sigma`; of a teacher of several networks, the one that does."""
    expert = mixture.router.expert_at(sigma) if mixture.router else TEACHER
    return mixture.teacher_at(sigma) if expert == TEACHER else expert


def _second_half(arguments: Mapping[str, Any], size: int) -> dict[str, Any]:
    """What belongs to the second half of a batch of `size`."""
    return {
        name: value[size // 2 :] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
        for name, value in arguments.items()
    }


class Applied:
    """Experts inside a pipeline. `undo` gives the pipeline back as it was; so does leaving a `with` block.

    Attributes:
        notes: what should be known of the sampling steps, one line each.
    """

    def __init__(self, pipeline: Any, names: Sequence[str]) -> None:
        self.notes: list[str] = []
        self._undo = ExitStack()
        for name in names:
            self._undo.callback(setattr, pipeline, name, getattr(pipeline, name))

    def undo(self) -> None:
        """Puts the pipeline's own transformer and scheduler back; nothing more if that was done."""
        self._undo.close()

    def __enter__(self) -> "Applied":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def attach(pipeline: Any, mixture: Mixture, sigmas: Tensor, *, weights: WhichWeights = "trained") -> Applied:
    """Puts a mixture's experts and its few steps into a pipeline around the mixture's own networks."""
    backbone: Any = mixture.backbone
    scheduler = backbone.few_step_scheduler(pipeline, sigmas)
    applied = Applied(pipeline, [*backbone.networks, "scheduler"])
    routed = RoutedTransformer(pipeline, mixture, scheduler, weights)
    for name in backbone.networks:
        setattr(pipeline, name, routed)
    pipeline.scheduler = scheduler
    pipeline.save_pretrained = _refuse_to_save
    applied._undo.callback(delattr, pipeline, "save_pretrained")
    return applied


def _refuse_to_save(*_: object, **__: object) -> None:
    raise ValueError(
        "the pipeline carries experts, and would be saved without its transformer; undo() on the handle that `apply` "
        "gave comes first, and an `export` is what keeps experts"
    )
