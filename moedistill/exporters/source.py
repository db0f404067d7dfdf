"""What is exported: a run's experts and the weights that they change, read tensor by tensor.

No network is built. What lies in files is mapped, so that a tensor takes memory when it is asked for, and let go again.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moedistill.components.plugins import Plugins
from moedistill.errors import UserError, user_errors
from moedistill.flow.routers import Router
from moedistill.flow.trajectory import Trajectory
from moedistill.model.backbone import TEACHER, teacher_name
from moedistill.model.ema import WhichWeights
from moedistill.model.experts import FullConfig, LoRAConfig
from moedistill.model.mixture import Weights
from moedistill.recipe.keys import Recipe
from moedistill.recipe.sampling import sampling_sigmas
from moedistill.runs.build import flow_of
from moedistill.runs.sample import read_trained
from moedistill.runs.saved import read_state
from moedistill.runtime.checkpoint import find_checkpoint, load_tree
from moedistill.runtime.sharding import whole
from moedistill.stages.export import INDEX, read_export, read_index

ExpertKind = Literal["full", "adapter", "teacher"]

_ADAPTER = re.compile(r"\.lora_[AB]\.weight$")


class Pair(NamedTuple):
    """A low-rank change of a linear's weight, `b @ a`: `a` `[r, in]`, `b` `[out, r]`, float32, the scale inside `b`."""

    a: Tensor
    b: Tensor


class Step(NamedTuple):
    """A sampling step and the expert that serves it, from one sigma down to another."""

    expert: str
    sigma_from: float
    sigma_to: float


class Lazy(Mapping[str, Any]):
    """A mapping whose values are made when they are asked for, and not kept."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Any]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Mapped:
    """Tensors by name that lie in files: mapped at their first use, until `release`."""

    def __init__(self, read: Callable[[], Mapping[str, Any]]) -> None:
        self._read = read
        self._tensors: Mapping[str, Any] | None = None

    @property
    def tensors(self) -> Mapping[str, Any]:
        """By name, in the order of the files; `Pieces` where several processes have written one."""
        if self._tensors is None:
            self._tensors = self._read()
        return self._tensors

    def release(self) -> None:
        """Gives the memory back that pages of the files take."""
        self._tensors = None


class Pretrained(Mapped):
    """A pretrained network's tensors as its files have them; `tensor` gives one in training's dtype."""

    def __init__(self, recipe: Recipe, base: str) -> None:
        super().__init__(self._map)
        self._recipe, self._base = recipe, base
        self._dtypes: dict[str, torch.dtype] = {}

    def _map(self) -> dict[str, Tensor]:
        if not self._dtypes:
            network = self._recipe.backbone.skeleton().networks[self._base]
            self._dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
        found: dict[str, Tensor] = {}

        def take(network: str, name: str, tensor: Tensor) -> None:
            if network == self._base:
                found[name] = tensor

        with user_errors("backbone"):
            self._recipe.backbone.give_weights(take, self._recipe.seed)
        return found

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        return self.tensors[name].to(self._dtypes[name])


@dataclass(frozen=True)
class _Trained:
    """What was trained under a name: the recipe's config of it, and its tensors as they are saved."""

    name: str
    config: FullConfig | LoRAConfig
    stored: Mapped

    def change(self, path: str) -> Pair | None:
        """What an adapter adds to a linear; None where it adds nothing."""
        assert isinstance(self.config, LoRAConfig)
        tensors = self.stored.tensors
        if f"{path}.lora_A.weight" not in tensors:
            return None
        a, b = (whole(tensors[f"{path}.lora_{side}.weight"]).float() for side in "AB")
        return Pair(a, b * (self.config.alpha / self.config.rank))


class ExpertSource:
    """An expert that sampling uses, as a change of the weights that it stands on.

    Attributes:
        name: as the router calls it; the untouched teacher is `teacher`, or `teacher.transformer_2`.
        base: which of the model's networks it runs on.
        kind: `full`: all weights are its own; `adapter`: low-rank changes and modules trained in full; `teacher`: the
            pretrained network as it is.
        over: of an adapter: the full expert that it changes; None where that is the pretrained network.
        pairs: of an adapter: its change of each linear, by dotted path. What changes another adapter's result has both
            changes in it: the rows of `a` and the columns of `b` one after the other.
        copies: of an adapter: new values of the parameters of the modules that are trained in full, by name.
    """

    def __init__(
        self, name: str, base: str, pretrained: Pretrained, full: _Trained | None, chain: Sequence[_Trained]
    ) -> None:
        self.name, self.base = name, base
        self._pretrained, self._full, self._chain = pretrained, full, chain
        self.kind: ExpertKind = "adapter" if chain else "full" if full else "teacher"
        self.over = full.name if full and chain else None
        saved = list(dict.fromkeys(name for trained in chain for name in trained.stored.tensors))
        adapted = [name.removesuffix(".lora_A.weight") for name in saved if name.endswith(".lora_A.weight")]
        self.pairs: Mapping[str, Pair] = Lazy(adapted, self._pair)
        self.copies: Mapping[str, Tensor] = Lazy([name for name in saved if not _ADAPTER.search(name)], self._copy)

    def _pair(self, path: str) -> Pair:
        found = [change for trained in self._chain if (change := trained.change(path)) is not None]
        return Pair(torch.cat([pair.a for pair in found]), torch.cat([pair.b for pair in found], 1))

    def _copy(self, name: str) -> Tensor:
        last = next(each for each in reversed(self._chain) if name in each.stored.tensors)
        return whole(last.stored.tensors[name]).float()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of a plain network equal to this expert, in the order of `merged`."""
        return {name: tuple(tensor.shape) for name, tensor in self._pretrained.tensors.items()}

    def original(self, name: str) -> Tensor:
        """A tensor, by its name in `shapes`, of what this expert is a change of: the full expert that an adapter stands
        on, or the pretrained network.
        """
        return self._under(name) if self.over is not None else self.pretrained(name)

    def pretrained(self, name: str) -> Tensor:
        """A tensor of the pretrained network, in the dtype that training had it in."""
        return self._pretrained.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """A tensor of a plain network equal to this expert: float32 where it was trained, else in the base's dtype."""
        if name in self.copies:
            copied: Tensor = self.copies[name]
            return copied
        value, path = self._under(name), name.removesuffix(".weight")
        if path != name and path in self.pairs:
            a, b = self.pairs[path]
            return torch.addmm(value.float(), b, a)
        return value

    def _under(self, name: str) -> Tensor:
        """A tensor of the network that adapters change."""
        if self._full is not None and name in self._full.stored.tensors:
            return whole(self._full.stored.tensors[name])
        return self.pretrained(name)

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of a plain network equal to this expert, by its names, one at a time in the order of its files;
        afterwards the files are let go.
        """
        for name in self.shapes:
            yield name, self.tensor(name)
        self.release()

    def release(self) -> None:
        """Lets the files go that it is read from; what is asked for next maps them again."""
        for stored in (self._pretrained, *(trained.stored for trained in (self._full, *self._chain) if trained)):
            stored.release()


@dataclass(frozen=True)
class Source:
    """A run, checkpoint or export with its base weights, read tensor by tensor: never a whole network in memory.

    Attributes:
        sigmas: where the student stops, from 1 down to 0; None where the recipe has no list.
        eta: share of noise that is drawn anew after each step.
        experts: those that sampling uses, from high noise to low, untouched teachers too.
        steps: the sampling steps in order; none where there is no list.
        provenance: where it comes from: what an export says of itself, or a checkpoint's metrics.
        place: the folder that was opened.
    """

    recipe: Recipe
    router: Router | None
    trajectory: Trajectory
    sigmas: list[float] | None
    eta: float
    experts: dict[str, ExpertSource]
    steps: list[Step]
    provenance: Mapping[str, Any]
    place: Path

    @property
    def is_export(self) -> bool:
        """Whether `place` is an export's folder."""
        return os.path.lexists(self.place / INDEX)

    def boundary(self, after: int = 0) -> float:
        """The sigma that parts two neighbouring experts, `after` the first, second …: from it up is the upper one's.

        It lies in the middle of the gap between the lowest point that the upper expert serves and the highest that the
        lower one does, among all points of the trajectory and of sampling: on which side of a boundary a point at it
        lies is answered in different ways by different tools.

        Raises:
            ValueError: there is no expert after it.
        """
        names = list(self.experts)
        if after + 1 >= len(names):
            raise ValueError(f"{self.place} samples with {' and '.join(names)}: there is no boundary {after}")
        points = {*self.trajectory.points.tolist(), *(self.sigmas or ())}
        served = {sigma: _serving(self.recipe, self.router, self.trajectory, sigma) for sigma in points}
        upper = min(sigma for sigma, name in served.items() if name == names[after])
        lower = max(sigma for sigma, name in served.items() if name == names[after + 1])
        return (upper + lower) / 2


def open_source(
    folder: str | Path,
    *,
    weights: WhichWeights = "trained",
    recipe: Recipe | None = None,
    plugins: Plugins | None = None,
) -> Source:
    """Opens a run's folder, a checkpoint, or an export's folder; nothing of the model is loaded.

    Args:
        recipe: of an export, where it is at hand: it is then not read again.

    Raises:
        UserError: as `read_trained`; or an expert is of a kind whose equal as a plain network is not known here.
    """
    place = Path(folder)
    if recipe is not None:
        trained: Weights = read_export(place)[1]
        averages: Weights = {}
    else:
        recipe, trained, averages = read_trained(place, weights=weights, plugins=plugins, pieces=True)
    flow = flow_of(recipe)
    with user_errors("sample"):
        sigmas = sampling_sigmas(recipe).tolist() if recipe.sample else None
    stops = sigmas or flow.trajectory.points.flip(0).tolist()
    served = [_serving(recipe, flow.router, flow.trajectory, sigma) for sigma in stops[:-1]]
    stored = {name: Mapped(partial(_read_expert, place, name, name in averages)) for name in {**trained, **averages}}
    pretrained = {base: Pretrained(recipe, base) for base in recipe.backbone.bases()}
    experts = {name: _expert_source(recipe, name, stored, pretrained) for name in dict.fromkeys(served)}
    return Source(
        recipe=recipe,
        router=flow.router,
        trajectory=flow.trajectory,
        sigmas=sigmas,
        eta=recipe.sample.eta if recipe.sample else 0.0,
        experts=experts,
        steps=[Step(*step) for step in zip(served, sigmas[:-1], sigmas[1:], strict=True)] if sigmas else [],
        provenance=_provenance(place, weights),
        place=place,
    )


def _serving(recipe: Recipe, router: Router | None, trajectory: Trajectory, sigma: float) -> str:
    """The expert that serves `sigma`; of a teacher of several networks, the one that does."""
    expert = router.expert_at(sigma) if router else TEACHER
    teachers = recipe.backbone.teacher_router(trajectory)
    if expert != TEACHER or teachers is None:
        return expert
    return teacher_name(teachers.expert_at(sigma), recipe.backbone.bases())


def _expert_source(
    recipe: Recipe, name: str, stored: Mapping[str, Mapped], pretrained: Mapping[str, Pretrained]
) -> ExpertSource:
    """The expert of a name, through its parents down to the pretrained network.

    Raises:
        UserError: one of them is of a kind that is not known here.
    """
    bases = list(recipe.backbone.bases())
    teachers = {teacher_name(base, bases): base for base in bases}
    base: str | None = None
    full: _Trained | None = None
    chain: list[_Trained] = []
    at = name
    while at not in teachers:
        config = recipe.experts[at]
        base = base or config.base
        if full is None and at in stored:  # one that is not trained yet is its parent
            if isinstance(config, FullConfig):
                full = _Trained(at, config, stored[at])
            elif isinstance(config, LoRAConfig):
                chain.insert(0, _Trained(at, config, stored[at]))
            else:
                raise UserError(
                    f"expert {at!r} is of kind {config.kind!r}, whose weights as a plain network are not known; only "
                    "full, lora and frozen experts are exported to other formats"
                )
        at = config.parent
    base = base or teachers[at]
    return ExpertSource(name, base, pretrained[base], full, chain)


def _read_expert(place: Path, name: str, average: bool) -> Mapping[str, Any]:
    """An expert's tensors as they are saved; that they are whole was seen when the source was opened."""
    if os.path.lexists(place / INDEX):
        return read_export(place, only=name, verified=True)[1][name]
    tree = load_tree(find_checkpoint(place), "ema" if average else "experts", verified=True, pieces=True)
    tensors: Mapping[str, Any] = tree[name]
    return tensors


def _provenance(place: Path, weights: WhichWeights) -> Mapping[str, Any]:
    if os.path.lexists(place / INDEX):
        said: Mapping[str, Any] = read_index(place)["provenance"]
        return said
    state = read_state(find_checkpoint(place))
    return {"weights": weights, "smoke": state.get("smoke", False), "metrics": state["metrics"]}
