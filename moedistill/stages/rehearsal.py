"""What a training stage will make trainable, set up once before anything is trained: whatever fails, fails at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moedistill.losses.base import Loss, LossConfig, ProbeLayout
from moedistill.losses.optim import OptimizerConfig, moments_of
from moedistill.model.ema import EMA
from moedistill.model.live_parameters import LiveParameters
from moedistill.recipe.keys import TrainingStageConfig
from moedistill.runtime.quantized import held
from moedistill.runtime.randomness import torch_seed
from moedistill.runtime.sharding import part
from moedistill.stages.base import TrainingStage
from moedistill.stages.run import Run
from moedistill.stages.training import Trainable, Training


@dataclass(frozen=True)
class Part:
    """What one trainable of a stage will take, in bytes.

    Attributes:
        name: of the trainable.
        expert: its name; None for a module that the stage brings.
        trained: what an optimiser steps.
        moments: what the optimiser keeps of that.
        brought: the module, with what of it is not trained.
        averaged: its average, if it keeps one.
    """

    name: str
    expert: str | None
    trained: int
    moments: int
    brought: int
    averaged: int

    @property
    def memory(self) -> int:
        """Of all that is made for it: gradients, as large as what is trained, and what stays beside them."""
        return self.trained + self.standing

    @property
    def standing(self) -> int:
        """Of what stays from one step to the next: moments, the module itself, the average."""
        return self.moments + self.brought + self.averaged

    @property
    def state(self) -> int:
        """Of what a checkpoint amid the stage holds of it, but for the expert and its average."""
        return self.moments + self.brought


class Rehearsal(Training):
    """A training stage under way in which nothing is wrapped, nothing averaged, and critics have no memory: their
    tensors are on torch's meta device, on which a layer of any size can be built.
    """

    def __init__(self, run: Run, config: TrainingStageConfig) -> None:
        super().__init__(run, config)
        self._averaged: set[str] = set()

    def _bring(self, expert: str) -> None:
        """It stays where it is: nothing is computed."""

    def _place(self, module: nn.Module) -> None:
        """It stays where it was built."""

    def _built(self, config: LossConfig, layout: ProbeLayout | None) -> Loss:
        try:
            with torch.device("meta"):
                return config.build(layout)
        except (NotImplementedError, RuntimeError):  # one that reads numbers when it is built
            return config.build(layout)

    def _prepared(
        self, module: nn.Module, parameters: LiveParameters, config: OptimizerConfig, updates: int
    ) -> Trainable:
        optimizer, scheduler = config.build(parameters.values(), updates)
        return Trainable(parameters, module, optimizer, scheduler, config.max_grad_norm)

    def _average(self, expert: str, decay: float | None) -> EMA | None:
        if decay is not None:
            self._averaged.add(expert)
        return None

    def parts(self) -> list[Part]:
        """What each trainable will take."""
        return [self._part(name, trainable) for name, trainable in self.trained.items()]

    def _part(self, name: str, trainable: Trainable) -> Part:
        trained = sum(map(size, trainable.parameters.values()))
        module = trainable.bare
        brought = 0 if module is None else sum(map(size, [*module.parameters(), *module.buffers()]))
        kept = sum(_bytes(moments_of(trainable.optimizer, each)) for each in trainable.parameters.values())
        averaged = trained if trainable.expert in self._averaged else 0
        return Part(name, trainable.expert, trained, kept, brought, averaged)


def _bytes(tree: Mapping[str, Any]) -> int:
    """Bytes of the tensors in nested mappings."""
    return sum(_bytes(each) if isinstance(each, Mapping) else size(each) for each in tree.values())


def needed(parts: Sequence[Part], *, accumulating: bool) -> int:
    """Bytes that a stage's trainables take together when they take the most.

    An update frees its gradients before the next one begins; only where they are accumulated do all stand together.
    """
    gradients = [part.trained for part in parts]
    return (sum(gradients) if accumulating else max(gradients, default=0)) + sum(part.standing for part in parts)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor on this process; of a quantised one, those of what it holds."""
    return sum(each.numel() * each.element_size() for each in held(part(tensor)))


def rehearse(run: Run, config: TrainingStageConfig) -> list[Part]:
    """Sets a stage up as training will, and takes it down again.

    Raises:
        ValueError: it would fail.
    """
    stage = config.build()
    assert isinstance(stage, TrainingStage)
    rehearsal = Rehearsal(run, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(run.recipe.seed, config.name, "setup"))
        stage.setup(rehearsal)
    rehearsal.check_set_up()
    parts = rehearsal.parts()
    run.mixture.train_only()
    return parts
