"""What stands on each process through a stage, by counting parameters: no step is tried, and no weight is there.

Frozen weights lie in the dtype of the base, what is trained in float32 with a gradient and two moments. What a stage
does not use lies on the host (`training.offload`); what is sharded is cut among the processes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moedistill.errors import UserError, user_errors
from moedistill.model.experts import Expert
from moedistill.model.mixture import Mixture
from moedistill.recipe.building import to_plain
from moedistill.recipe.keys import Recipe, StageConfig, TrainingStageConfig
from moedistill.runs.memory import ways_to_fewer_weights
from moedistill.runs.planning.depths import stacks
from moedistill.runs.planning.fake_step import empty_mixture, empty_run
from moedistill.stages.rehearsal import Part, rehearse, size
from moedistill.stages.training import Training

FLOAT32 = 4
GIB = 2**30


@dataclass(frozen=True)
class Standing:
    """Bytes on each process, while a stage runs.

    Attributes:
        weights: that are not trained, on the device.
        trained: of experts, and of critics, which are whole on every process.
        critics: what of `trained` is critics'.
        moments, averages: on the device.
        shared: what distribution adds: DDP's buckets of gradients, or with FSDP2 what is gathered at a time.
        host: what lies there meanwhile, on each process; on the main one a checkpoint comes on top.
        checkpoint: one that is saved amid the stage.
    """

    weights: int
    trained: int = 0
    critics: int = 0
    moments: int = 0
    averages: int = 0
    shared: int = 0
    host: int = 0
    checkpoint: int = 0

    @property
    def device(self) -> int:
        """Of all that stands on the device through a step; gradients come and go."""
        return self.weights + self.trained + self.moments + self.averages + self.shared

    @property
    def gradients(self) -> int:
        """Of all that is trained: as large, float32."""
        return self.trained


def least(standing: Standing, *, accumulating: bool) -> int:
    """What a stage takes at least: no activations, and of gradients the larger ones alone unless they accumulate."""
    experts = standing.trained - standing.critics
    return standing.device + (standing.trained if accumulating else max(experts, standing.critics))


def check_before_loading(recipe: Recipe, processes: int, memory: int, *, force: bool = False) -> str:
    """What each stage takes at least, in a line; no step is tried.

    Args:
        memory: of the device, in bytes.
        force: say it even where it cannot fit.

    Raises:
        UserError: a stage cannot fit, whatever a step takes.
    """
    with user_errors("experts"):
        standing = count(recipe, empty_mixture(recipe, recipe.backbone.skeleton()), processes)
    accumulating = recipe.training.gradient_accumulation_steps > 1
    sizes = {name: least(each, accumulating=accumulating) for name, each in standing.items()}
    name = max(sizes, key=sizes.__getitem__)
    there = f"{sizes[name] / GIB:.1f} GiB of {memory / GIB:.1f} GiB on each process (stage {name})"
    if sizes[name] <= memory or force:
        return f"plan: at least {there}"
    config = next(config for config in recipe.stages if config.name == name)
    raise UserError(
        f"stage {name} cannot fit: at least {there}, for weights, gradients, moments and averages alone; "
        f"`moedistill plan` says what fits; {ways_to_fewer_weights(recipe, config)}. --force begins all the same"
    )


def count(
    recipe: Recipe, mixture: Mixture, processes: int, known: dict[str, list[Part]] | None = None
) -> dict[str, Standing]:
    """What stands through each stage, by its name.

    Args:
        mixture: the recipe's, which may be without weights.
        known: what stages of this mixture train, as JSON of theirs, if they were set up before; it is added to.

    Raises:
        ValueError: a stage cannot be set up.
    """
    counter = _Counter(recipe, mixture, processes, {} if known is None else known)
    return {config.name: counter.stage(config) for config in recipe.stages}


class _Counter:
    """Goes through the stages in order: what was trained before is in every later checkpoint."""

    def __init__(self, recipe: Recipe, mixture: Mixture, processes: int, known: dict[str, list[Part]]) -> None:
        self.recipe, self.mixture, self.processes, self.known = recipe, mixture, processes, known
        self.sharded = recipe.training.sharding == "fsdp2" and processes > 1
        self.cut = processes if self.sharded else 1
        self.parked = recipe.training.offload.idle == "cpu" and not self.sharded
        self.pretrained = {id(mixture.experts[name].shared) for name in mixture.teachers}
        self.low = _kept_in_8_bits(mixture) if getattr(recipe.backbone, "quantization", None) == "int8" else set()
        self.saved: dict[str, int] = {}
        self.averages: dict[str, int] = {}

    def stage(self, config: StageConfig) -> Standing:
        if not isinstance(config, TrainingStageConfig):
            used = [expert for name, expert in self.mixture.experts.items() if name not in self.mixture.teachers]
            used += [self.mixture.experts[name] for name in self.mixture.teachers]
            return self._weights(used, ())
        run = empty_run(self.recipe, self.mixture)
        key = json.dumps(to_plain(config))
        parts = self.known[key] = self.known.get(key) or rehearse(run, config)
        trained = [part.expert for part in parts if part.expert is not None]
        names = {*trained, *config.used_experts(), Training(run, config).teacher_name}
        standing = self._weights([self.mixture.experts[name] for name in names], trained)
        return self._with_training(standing, config, parts)

    def _with_training(self, standing: Standing, config: TrainingStageConfig, parts: Sequence[Part]) -> Standing:
        offload, cut = self.recipe.training.offload, self.cut
        own = {part.expert: part.averaged for part in parts if part.expert is not None}
        earlier = sum(size for name, size in self.averages.items() if name not in own)
        self.averages |= own
        self.saved |= {part.expert: part.trained for part in parts if part.expert is not None}
        averages, host = sum(own.values()) // cut, 0
        if offload.averages == "cpu":
            averages, host = 0, averages
        if self.parked or offload.averages == "cpu":
            host += earlier // cut
        else:
            averages += earlier // cut
        experts = sum(part.trained for part in parts if part.expert is not None) // cut
        critics = sum(part.brought for part in parts)
        trained_critics = sum(part.trained for part in parts if part.expert is None)
        moments = sum(part.moments // (cut if part.expert is not None else 1) for part in parts)
        checkpoint = sum(self.saved.values()) + sum(self.averages.values()) + sum(part.state for part in parts)
        buckets = experts + trained_critics if self.processes > 1 and not self.sharded else 0
        return replace(
            standing, trained=experts + critics, critics=critics, moments=moments, averages=averages,
            shared=standing.shared + buckets, host=standing.host + host, checkpoint=checkpoint,
        )  # fmt: skip

    def _weights(self, used: Sequence[Expert], trained: Sequence[str]) -> Standing:
        """Of what is not trained, and what FSDP2 gathers."""
        mixture, idle = self.mixture, self.parked
        shared = {id(expert.shared): expert.shared for expert in mixture.experts.values()}
        running = {id(expert.shared) for expert in used}
        switched = {key for expert in used for key in expert.chain}
        of_trained = {id(p) for name in trained for p in mixture.experts[name].parameters.values()}
        weights = host = 0
        resting: dict[int, int] = {}
        for key, network in shared.items():
            tensors = list(network.weights.items())
            in_training = any(id(each) in of_trained for _, each in tensors)
            low = sum(self._resting(name, each, key in self.pretrained) for name, each in tensors)
            high = sum(map(size, network.network.buffers())) + low
            full = sum(FLOAT32 * each.numel() for _, each in tensors)
            resting |= {id(each): self._resting(name, each, key in self.pretrained) for name, each in tensors}
            if in_training:
                continue
            if key in running:
                weights += high
                host += 0 if key in self.pretrained or self.sharded else full
            elif idle:
                host += high if key in self.pretrained else full
            else:
                weights += high if key in self.pretrained else full
        for name, expert in mixture.experts.items():
            if not expert.chain or name in trained:
                continue
            own = sum(map(size, expert.parameters.values()))
            if expert.chain[-1] in switched or not idle:
                weights += own
            else:
                host += own
        gathered = self._gathered({id(e.shared): e.shared.network for e in used}.values(), resting, of_trained)
        return Standing(weights // self.cut, shared=gathered, host=host // self.cut)

    def _resting(self, name: str, weight: Tensor, pretrained: bool) -> int:
        """Bytes of one of a network's own weights while it is not trained."""
        if pretrained and name in self.low:
            return weight.numel() + FLOAT32 * weight.shape[0]
        if pretrained:
            return size(weight)
        if self.sharded:
            return FLOAT32 * weight.numel()
        dtype: torch.dtype = getattr(torch, self.recipe.backbone.dtype)
        return weight.numel() * dtype.itemsize

    def _gathered(self, networks: Iterable[nn.Module], resting: Mapping[int, int], trained: Iterable[int]) -> int:
        """What FSDP2 has whole at a time: what lies outside of blocks, two of the largest ones, and their gradients."""
        if not self.sharded:
            return 0
        of_trained, roots, blocks = set(trained), 0, [0]
        for network in networks:
            found: dict[str, int] = {"": 0}
            paths = stacks(network)
            for name, each in network.named_parameters():
                path = next((path for path in paths if name.startswith(f"{path}.")), "")
                block = ".".join(name.split(".")[: path.count(".") + 2]) if path else ""
                taken = size(each) if id(each) in of_trained else resting.get(id(each), size(each))
                found[block] = found.get(block, 0) + taken + (size(each) if id(each) in of_trained else 0)
            roots += found.pop("")
            blocks += found.values()
        return roots + 2 * max(blocks)


def _kept_in_8_bits(mixture: Mixture) -> set[str]:
    """The weights of the linears in the networks' lists of blocks, but for those that experts copy."""
    copied = tuple(f"{path}." for path in mixture.backbone.time_dependent)
    names = set()
    for teacher in mixture.teachers:
        shared = mixture.experts[teacher].shared
        lists = {name for name, each in shared.network.named_children() if isinstance(each, nn.ModuleList)}
        paths = (path for path in shared.linears(".+") if path.partition(".")[0] in lists)
        names |= {f"{path}.weight" for path in paths if not f"{path}.".startswith(copied)}
    return names
