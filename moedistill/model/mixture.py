"""The mixture: one backbone, its experts, the switch between them, and which of them serves which noise level."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moedistill.components.fields import WhichWeights
from moedistill.errors import UserError
from moedistill.flow.process import guide
from moedistill.flow.routers import Router, TimestepRouter
from moedistill.flow.trajectory import Trajectory
from moedistill.model import conditioning
from moedistill.model.backbone import TEACHER, Backbone, BackboneConfig, teacher_name
from moedistill.model.capture import capture
from moedistill.model.conditioning import Conditioning
from moedistill.model.ema import EMA
from moedistill.model.experts import Expert, ExpertConfig, FrozenExpert
from moedistill.model.guidance import Guidance
from moedistill.model.residency import Residency
from moedistill.model.sample_in_batches import FreshNoise, followings, sample_in_batches
from moedistill.model.shared_network import SharedNetwork
from moedistill.runtime.devices import HOST
from moedistill.runtime.integrity import misfit
from moedistill.runtime.sharding import Pieces, fill, gather_root, materialise, rest, shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Weights = Mapping[str, Mapping[str, Tensor]]
"""Tensors by the name of an expert and of a parameter."""


class Mixture(nn.Module):
    """All experts of a backbone, and what serves which noise level: everything that training and sampling need.

    `using(expert)` is the only switch; outside of it the teacher is active. All experts' modules are attached here,
    before anything is wrapped or sharded; what they hold is decided later, by `initialise`: until it is trained, an
    expert is equal to its parent.

    Args:
        backbone: the pretrained model; its weights are frozen here and never change.
        experts: config by name, in any order.
        trajectory: the discretised ODE; DCM's, if not given.
        router: which expert serves which sigma; without one the teacher is alone.
        guidance: the teacher's.
        seed: of the random numbers that experts start with.
        gradient_checkpointing: recompute activations in the backward pass, under the expert that made them.
        teacher_router: where the backbone has several pretrained networks, which of them serves which sigma.
        inference: nothing will be trained: full experts are kept in the dtype of the base, not in float32.
        autocast_dtype: what networks compute in; None for the dtype of their weights.

    Attributes:
        active: the expert that `forward` runs.
        forwards: samples that a network has evaluated so far, on this process; a guided teacher evaluates each twice.
        ema: averages of the experts that were trained with one, by expert.
        sharded: whether networks are cut among processes, which must then call them alike.
        started: experts that were given what they start with.
        averages_on_host: whether averages stay there, also those that are used.

    Raises:
        ValueError: an expert does not fit the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        experts: Mapping[str, ExpertConfig],
        *,
        trajectory: Trajectory | None = None,
        router: Router | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        teacher_router: Router | None = None,
        inference: bool = False,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.trajectory = trajectory or Trajectory.flow_matching()
        self.router, self.teacher_router = router, teacher_router
        self.guidance, self.seed = guidance or Guidance(), seed
        self.autocast_dtype = autocast_dtype
        self.ema: dict[str, EMA] = {}
        self.started: set[str] = set()
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
        self.sharded = self.averages_on_host = False
        self._residency: Residency | None = None
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

        for network in self.networks:
            try:
                self.backbone.enable_checkpointing(network, recompute_with_same_expert)
            except ValueError as error:
                raise ValueError(f"training.gradient_checkpointing: {error}") from error

    @property
    def device(self) -> torch.device:
        """Where networks compute."""
        return self.backbone.placed or next(self.backbone.network.parameters()).device

    def place(self, device: torch.device | str, *, idle_on_host: bool = False) -> None:
        """Puts everything on a device. With `idle_on_host` an expert comes there when it is first switched on."""
        device = torch.device(device)
        self.backbone.placed = device if idle_on_host else None
        self.to(HOST if idle_on_host else device)
        self._residency = Residency(self.experts, device) if idle_on_host else None

    def shard(self, mesh: "DeviceMesh", device: torch.device) -> None:
        """Cuts all networks, without weights so far, among the processes of a mesh; each then holds any numbers."""
        for network in self.networks:
            shard(network, mesh)
            materialise(network, device)
        self.backbone.placed = device
        self.sharded = True

    def fill(self, config: BackboneConfig, seed: int = 0) -> None:
        """Takes over the pretrained weights, of which each process keeps its part.

        Raises:
            ValueError: not all of them are given.
        """
        own = {base: dict(self._teacher(base).shared.weights) for base in self.bases}

        def take(base: str, name: str, value: Tensor) -> None:
            if (parameter := own[base].pop(name, None)) is not None:
                fill(parameter, value)

        config.give_weights(take, seed)
        if left := [name for weights in own.values() for name in weights]:
            raise ValueError(f"{len(left)} of the network's weights are not given, the first {left[0]}")

    def settle(self, *training: str) -> None:
        """Between stages: experts to be `training` are float32, the others rest, and all wait for their first use."""
        for name, expert in self.experts.items():
            if name in training:
                expert.wake()
            else:
                expert.rest()
        if self._residency is not None:
            self._residency.park()
            for average in self.ema.values():
                average.to(HOST)

    def bring(self, expert: str) -> None:
        """What an expert computes with, to the device, if it is not there."""
        if self._residency is not None:
            self._residency.bring(expert)

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """For a look amid training: experts and averages that the block brings to the device do not stay there."""
        if self._residency is None:
            yield
            return
        places = {name: next(iter(average.average.values())).device for name, average in self.ema.items()}
        try:
            with self._residency.visiting():
                yield
        finally:
            for name, place in places.items():
                self.ema[name].to(place)

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
        self.bring(expert)
        if chosen.shared.chain != chosen.chain:
            chosen.shared.switch(chosen.chain)
        self.active = expert

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity `[B, C, T, H, W]`, float32, of the active expert at `sigma` `[B]`."""
        self.forwards += len(x)
        student_scale = self.guidance.student_scale
        if student_scale is not None and self.active not in self.teachers:
            cond = {**cond, "guidance": torch.full_like(sigma, student_scale)}
        with self.autocast(x.device):
            return self.backbone.velocity(self.experts[self.active].shared.network, x, sigma, cond).float()

    def guided(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: Guidance, *, until: float | None = None
    ) -> Tensor:
        """Velocity of the active teacher with its guidance: v_c + (scale - 1)·(v_c - v_u).

        The conditional and the unconditional half run as one batch. With `embedded` guidance the network is told the
        scale by the backbone, and there is nothing to add.

        Args:
            until: where the jump from `sigma`, the same for all samples, ends. Guidance that oscillates is then its
                mean over the trajectory's steps in between; else each sample's is that of its step, and the
                unconditional half has the guided ones alone.
        """
        shared = self.experts[self.active].shared
        base = next((base for base in self.bases if self._teacher(base).shared is shared), self.bases[0])
        scale = guidance.classifier_free_scale(base)
        if until is not None:
            scale = 1.0 + (scale - 1.0) * self.share_guided(guidance, sigma[0].item(), until)
        if scale == 1.0:
            return self(x, sigma, cond)
        null = self.backbone.null_conditioning(cond)
        if guidance.oscillate_from is None or until is not None:
            both = conditioning.concat(cond, null)
            v_cond, v_null = self(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            return guide(v_cond, v_null, scale)
        rows = guidance.guides(self.trajectory.steps_at(sigma))
        both = conditioning.concat(cond, conditioning.select(null, rows))
        v = self(torch.cat([x, x[rows]]), torch.cat([sigma, sigma[rows]]), both)
        guided, v_null = v.split([len(x), len(v) - len(x)])
        return guided.index_put((rows,), guide(guided[rows], v_null, scale))

    def share_guided(self, guidance: Guidance, sigma: float, until: float) -> float:
        """Which share of the trajectory's steps from `sigma` to `until` is guided."""
        if guidance.oscillate_from is None:
            return 1.0
        first, following = self.trajectory.steps_at(torch.tensor([sigma, until])).tolist()
        return guidance.share(first, following if until > self.trajectory.sigma(0) else self.trajectory.num_steps)

    def teacher_at(self, sigma: float) -> str:
        """The name, as an expert, of the pretrained network that serves `sigma`."""
        if self.teacher_router is None:
            return TEACHER
        return teacher_name(self.teacher_router.expert_at(sigma), self.bases)

    def teacher_of(self, expert: str) -> str:
        """The name, as an expert, of the pretrained network that an expert changes, itself or through its parents."""
        found = self.experts[expert]
        while found.parent is not None:
            found = found.parent
        return found.name

    def hidden_states(self, x: Tensor, sigma: Tensor, cond: Conditioning, blocks: Sequence[str]) -> list[Tensor]:
        """Image tokens `[B, N, hidden_size]`, as the blocks give them, after each of `blocks` (dotted paths) of the
        active expert.
        """
        with capture(self.experts[self.active].shared.network, blocks) as outputs:
            self(x, sigma, cond)
        tokens = math.prod(self.backbone.token_grid(x.shape))
        return [self.backbone.hidden(output, tokens) for output in outputs]

    def unembed(self, hidden: Tensor, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Latents `[B, C, T, H, W]` of hidden states through the active expert's final norm and projection."""
        network = self.experts[self.active].shared.network
        gather_root(network)
        with self.autocast(x.device):
            return self.backbone.unembed(network, hidden, x, sigma, cond).float()

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which a network computes.

        Weights that it casts are not kept: of a full expert that would be another copy, for the whole forward pass.
        """
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, self.autocast_dtype, cache_enabled=False)

    def start(self, expert: str, weights: Mapping[str, Tensor | Pieces], source: str) -> None:
        """Gives an expert, by parameter name, what it starts with in place of its parent's weights.

        Raises:
            UserError: they do not fit the recipe's expert; `source` says where they came from.
        """
        self.experts[expert].wake()
        if fault := self.misfit(expert, weights):
            raise UserError(f"experts.{expert}.init: {source} does not fit: {fault}")
        for key, parameter in self.experts[expert].parameters.items():
            fill(parameter, weights[key])
        self.started.add(expert)

    def misfit(self, expert: str, weights: Mapping[str, Tensor | Pieces]) -> str | None:
        """In what weights by parameter name are not an expert's; None if they are."""
        # What is trained is float32, and saved so; for inference it may lie in the dtype of the base.
        own = {
            key: parameter if key in weights and weights[key].dtype == parameter.dtype else _float32(parameter)
            for key, parameter in self.experts[expert].parameters.items()
        }
        return misfit(weights, own)

    def initialise(self, *, but: Collection[str] = ()) -> None:
        """Makes every expert equal to its parent, parents first, but those named, and those that were `started`."""

        def generation(expert: Expert) -> int:
            return 0 if expert.parent is None else 1 + generation(expert.parent)

        for expert in sorted(self.experts.values(), key=generation):
            if expert.name not in but and expert.name not in self.started:
                expert.initialise(self.seed)

    def train_only(self, *experts: str) -> None:
        """Lets gradients reach the parameters of `experts` and of nothing else."""
        for network in self.networks:
            rest(network)
        self.requires_grad_(False)
        for expert in experts:
            for parameter in self.experts[expert].parameters.values():
                parameter.requires_grad_(True)

    @torch.no_grad()
    def load(self, experts: Weights, averages: Weights, source: str) -> None:
        """Takes over trained experts and averages, each as tensors by parameter name, by expert.

        The other experts become equal to their parents, unless they were `started`.

        Raises:
            UserError: they do not fit the recipe's experts; `source` says where they came from.
        """
        for expert in self.experts.values():
            expert.wake()
        kinds = [("weights", *item) for item in experts.items()] + [("average", *item) for item in averages.items()]
        for kind, name, weights in kinds:
            if name not in self.experts:
                raise UserError(f"{source} has weights of an expert {name!r}, which the recipe does not name")
            if fault := self.misfit(name, weights):
                raise UserError(
                    f"the {kind} of expert {name!r} in {source} do not fit the recipe: {fault}; use its own recipe"
                )
        for name, weights in experts.items():
            expert = self.experts[name]
            for key, parameter in expert.parameters.items():
                fill(parameter, weights[key])
        self.initialise(but=experts)
        for name, average in averages.items():
            self.ema[name] = EMA(self.experts[name].parameters, decay=0.0, on_host=self.averages_on_host)
            self.ema[name].load(average)

    @contextmanager
    def running(self, expert: str, weights: WhichWeights = "trained") -> Iterator[None]:
        """Makes `expert` the active one for the block, with its `trained` weights or, if it has one, its `ema`.

        An average is of one expert alone: what it stands on keeps the weights that it was trained with.
        """
        average = self.ema.get(expert) if weights == "ema" else None
        if average is not None and self._residency is not None:
            average.to(self._residency.device)
        with self.using(expert), average.swapped() if average else nullcontext():
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
        weights: WhichWeights = "trained",
        eta: float = 0.0,
        fresh_noise: FreshNoise | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Samples from `noise` `[N, C, T, H, W]` along `sigmas`, each step by the expert that the router names.

        Args:
            stand_ins: expert to run in place of another, such as {"detail": "teacher"}.
            guidance: of the teacher's steps; experts are distilled with theirs and take none.
            weights: each expert's trained weights or, of those that have one, its average.
            eta, fresh_noise: noise drawn anew between the steps, as in `sample_in_batches`.
            batch_size: how many samples run at once.
        """
        stand_ins = stand_ins or {}
        router: Router = self.router or TimestepRouter([TEACHER], [])
        until = followings(sigmas)

        def velocity(x: Tensor, sigma: Tensor, expert: str, cond: Conditioning) -> Tensor:
            expert = stand_ins.get(expert, expert)
            expert = self.teacher_at(sigma[0].item()) if expert == TEACHER else expert
            with self.running(expert, weights):
                if expert in self.teachers and guidance is not None:
                    return self.guided(x, sigma, cond, guidance, until=until[sigma[0].item()])
                return self(x, sigma, cond)

        return sample_in_batches(
            velocity, noise, cond, sigmas, router, eta=eta, fresh_noise=fresh_noise, batch_size=batch_size
        )


def _float32(parameter: Tensor) -> Tensor:
    """A tensor of the parameter's shape, without memory."""
    return torch.empty(parameter.shape, dtype=torch.float32, device="meta")
