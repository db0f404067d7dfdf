"""The student: a backbone and its experts, of which one is active."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moedistill import conditioning
from moedistill.backbone import Backbone, Guidance
from moedistill.conditioning import Conditioning
from moedistill.experts import TEACHER, Expert, ExpertConfig, FrozenExpert, SharedNetwork, teacher_name
from moedistill.features import capture
from moedistill.routers import TimestepRouter


class Student(nn.Module):
    """All experts on one shared base. `using(expert)` is the only switch; outside of it the teacher is active.

    All experts' modules are attached here, before anything is wrapped or sharded; what they hold is decided later, by
    `initialise`: until it is trained, an expert is equal to its parent.

    Args:
        backbone: the pretrained model; its weights are frozen here and never change.
        experts: config by name, in any order.
        gradient_checkpointing: recompute activations in the backward pass, under the expert that made them.
        teacher_router: where the backbone has several pretrained networks, which of them serves which sigma.
        inference: nothing will be trained: full experts are kept in the dtype of the base, not in float32.

    Attributes:
        active: the expert that `forward` runs.
        forwards: samples that a network has evaluated so far, on this process; a guided teacher evaluates each twice.

    Raises:
        ValueError: an expert does not fit the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        experts: Mapping[str, ExpertConfig],
        *,
        gradient_checkpointing: bool = False,
        teacher_router: TimestepRouter | None = None,
        inference: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.teacher_router = teacher_router
        self.bases = list(backbone.networks)
        self.experts: dict[str, Expert] = {}
        for base, network in backbone.networks.items():
            name = teacher_name(base, self.bases)
            self.experts[name] = FrozenExpert(name, None, SharedNetwork(network))
        pretrained = [expert.shared for expert in self.experts.values()]
        for name, config in experts.items():
            if config.copies_base:  # before the base carries any adapter
                self.experts[name] = config.build(name, self._teacher_for(name, experts), backbone, inference)
        for name in experts:
            self._attach(name, experts, inference)
        for name in experts:
            self.experts[name].parent = self._parent(name, experts)
        # A frozen expert may be the teacher under another name.
        self.teachers = frozenset(
            name for name, expert in self.experts.items() if expert.shared in pretrained and not expert.chain
        )
        # Registered, so that wrappers and `.to(device)` find every weight.
        self.networks = nn.ModuleList({expert.shared.network: None for expert in self.experts.values()})
        self.active = TEACHER
        self.forwards = 0
        self.autocast_dtype: torch.dtype | None = None
        self.student_scale: float | None = None
        self.requires_grad_(False)
        if gradient_checkpointing:
            self._enable_checkpointing()

    def _attach(self, name: str, experts: Mapping[str, ExpertConfig], inference: bool) -> None:
        if name not in self.experts:
            config = experts[name]
            if config.parent not in self.experts:
                self._attach(config.parent, experts, inference)
            self.experts[name] = config.build(name, self._parent(name, experts), self.backbone, inference)

    def _parent(self, name: str, experts: Mapping[str, ExpertConfig]) -> Expert:
        parent = experts[name].parent
        return self._teacher_for(name, experts) if parent == TEACHER else self.experts[parent]

    def _teacher_for(self, name: str, experts: Mapping[str, ExpertConfig]) -> Expert:
        """The pretrained network that an expert changes, itself or through its parents."""
        config = experts[name]
        if config.base is None and config.parent != TEACHER:
            return self._teacher_for(config.parent, experts)
        if config.base is None and len(self.bases) > 1:
            raise ValueError(f"expert {name}: say which network it changes, with base: {' or '.join(self.bases)}")
        base = config.base or self.bases[0]
        if base not in self.bases:
            raise ValueError(f"expert {name}: there is no network {base!r}; the teacher has {', '.join(self.bases)}")
        return self._teacher(base)

    def _teacher(self, base: str) -> Expert:
        return self.experts[teacher_name(base, self.bases)]

    def _enable_checkpointing(self) -> None:
        def recompute_with_same_expert(module: nn.Module, *args: Any) -> Any:
            active = self.active

            def run(*args: Any) -> Any:
                # Another expert may be active in the backward pass; shapes are the same, and gradients would be wrong.
                with self.using(active):
                    return module(*args)

            return checkpoint(run, *args, use_reentrant=False)

        for network in {expert.shared.network for expert in self.experts.values()}:
            enable = getattr(network, "enable_gradient_checkpointing", None)
            if enable is None:
                raise ValueError(
                    f"training.gradient_checkpointing: {type(network).__name__} cannot checkpoint; set it to false"
                )
            enable(gradient_checkpointing_func=recompute_with_same_expert)

    @contextmanager
    def using(self, expert: str) -> Iterator[None]:
        """Makes `expert` the active one for the block, and restores what was."""
        previous = self.active
        self._switch(expert)
        try:
            yield
        finally:
            self._switch(previous)

    def _switch(self, expert: str) -> None:
        chosen = self.experts[expert]
        if chosen.shared.chain != chosen.chain:
            chosen.shared.switch(chosen.chain)
        self.active = expert

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity `[B, C, T, H, W]`, float32, of the active expert at `sigma` `[B]`."""
        self.forwards += len(x)
        if self.student_scale is not None and self.active not in self.teachers:
            cond = {**cond, "guidance": torch.full_like(sigma, self.student_scale)}
        with self.autocast(x.device):
            return self.backbone.velocity(self.experts[self.active].shared.network, x, sigma, cond).float()

    def guided(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: Guidance) -> Tensor:
        """Velocity of the active teacher with its guidance: v_c + (scale - 1)·(v_c - v_u).

        The conditional and the unconditional half run as one batch. With `embedded` guidance the network is told the
        scale by the backbone, and there is nothing to add.
        """
        shared = self.experts[self.active].shared
        base = next((base for base in self.bases if self._teacher(base).shared is shared), self.bases[0])
        scale = guidance.classifier_free_scale(base)
        if scale == 1.0:
            return self(x, sigma, cond)
        both = conditioning.concat(cond, self.backbone.null_conditioning(cond))
        v_cond, v_null = self(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return v_cond + (scale - 1.0) * (v_cond - v_null)

    def teacher_at(self, sigma: float) -> str:
        """The name, as an expert, of the pretrained network that serves `sigma`."""
        if self.teacher_router is None:
            return TEACHER
        return teacher_name(self.teacher_router.expert_at(sigma), self.bases)

    def hidden_states(self, x: Tensor, sigma: Tensor, cond: Conditioning, blocks: Sequence[str]) -> list[Tensor]:
        """Image tokens `[B, N, hidden_size]`, float32, after each of `blocks` (dotted paths) of the active expert."""
        with capture(self.experts[self.active].shared.network, blocks) as outputs:
            self(x, sigma, cond)
        return [self.backbone.hidden(output).float() for output in outputs]

    def unembed(self, hidden: Tensor, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Latents `[B, C, T, H, W]` of hidden states through the active expert's final norm and projection."""
        with self.autocast(x.device):
            return self.backbone.unembed(self.experts[self.active].shared.network, hidden, x, sigma, cond).float()

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which a network computes."""
        return torch.autocast(device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()

    def initialise(self, seed: int, *, but: Collection[str] = ()) -> None:
        """Makes every expert but those named equal to its parent, parents first."""

        def generation(expert: Expert) -> int:
            return 0 if expert.parent is None else 1 + generation(expert.parent)

        for expert in sorted(self.experts.values(), key=generation):
            if expert.name not in but:
                expert.initialise(seed)

    def train_only(self, expert: str | None) -> None:
        """Lets gradients reach the parameters of `expert` (or of none) and of nothing else."""
        self.requires_grad_(False)
        if expert is not None:
            for parameter in self.experts[expert].parameters.values():
                parameter.requires_grad_(True)
