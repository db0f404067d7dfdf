"""Rules between the keys of a recipe."""

import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from moedistill.errors import shorten, suggest
from moedistill.model.backbone import QUANTIZED, TEACHER
from moedistill.recipe.building import FAILED, Partial, Path, failed
from moedistill.recipe.keys import Recipe

if TYPE_CHECKING:
    from moedistill.flow.routers import Router
    from moedistill.flow.trajectory import Trajectory


Violation = tuple[tuple[str | int, ...], str, str]
"""Path, message, hint."""


_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}\Z")


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\Z")


class BackboneError(Exception):
    """Something cannot be told, because of what a backbone's own check says."""


class Rules:
    """Rules between the fields of a recipe. Parts that failed are passed over; the rest is checked all the same."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.experts: Mapping[str, Any] | None = None if failed(recipe.experts) else recipe.experts
        self.stages: list[Any] = [] if recipe.stages is FAILED else recipe.stages
        self.router: Router | None = None
        """As built on the recipe's trajectory; None where there is none, or none that can be used."""
        self.refused = False
        """Whether what the recipe's router builds cannot be used."""

    def all(self) -> Iterator[Violation]:
        yield from self.names()
        trajectory, problem = self.trajectory()
        if problem is not None:
            yield problem
        yield from self.routing(trajectory)
        yield from self.idle_experts()
        yield from self.ancestry()
        yield from self.starts()
        yield from self.copies_of_8_bits()
        yield from self.teachers(trajectory)
        yield from self.trained_experts()
        yield from self.probes()
        yield from self.data_and_batches()
        yield from self.sharding()
        if trajectory is not None and self.recipe.sample and not failed(self.recipe.sample):
            yield from self.sampling(trajectory)
        yield from self.stages_themselves()

    def model(self) -> Iterator[Violation]:
        """Those of a model that was trained: nothing on stages and data."""
        trajectory, problem = self.trajectory()
        if problem is not None:
            yield problem
        yield from self.routing(trajectory)
        yield from self.ancestry()
        yield from self.copies_of_8_bits()
        yield from self.teachers(trajectory)
        if trajectory is not None and self.recipe.sample and not failed(self.recipe.sample):
            yield from self.sampling(trajectory)

    def names(self) -> Iterator[Violation]:
        rule = "letters, digits, '_' and '-'"
        name = self.recipe.name
        if isinstance(name, str) and not _NAME.match(name):
            yield ("name",), f"{shorten(name, 60)!r} names a folder: only {rule} and '.', at most 100", ""
        first: dict[str, int] = {}
        for k, stage in enumerate(self.stages):
            if not isinstance(stage.name, str):
                continue
            if not _WORD.match(stage.name):
                yield ("stages", k, "name"), f"{shorten(stage.name, 60)!r}: only {rule}, at most 64", ""
            if stage.name in first:
                message = f"{stage.name!r} is also the name of stage {first[stage.name]}; names must differ"
                yield ("stages", k, "name"), message, ""
            first.setdefault(stage.name, k)
        for expert in self.experts or ():
            if expert == TEACHER:
                hint = "choose another name; route to 'teacher' without defining it"
                yield ("experts", expert), "'teacher' is reserved for the untouched weights", hint
            elif not _WORD.match(expert):
                yield ("experts", expert), f"{shorten(expert, 60)!r}: only {rule}, at most 64", ""

    def trajectory(self) -> "tuple[Trajectory | None, Violation | None]":
        """The recipe's, as built. What it leaves to the backbone is written into the recipe, for all other rules."""
        recipe = self.recipe
        if failed(recipe.trajectory) or failed(recipe.backbone):
            return None, None
        try:
            recipe.trajectory = recipe.trajectory.settled(self.time_shift)
            return recipe.trajectory.build(recipe.backbone.native_sigmas()), None
        except BackboneError:
            return None, None
        except ValueError as error:
            return None, (("trajectory",), str(error), "")

    def time_shift(self) -> float | None:
        """The backbone's; BackboneError where it says itself what is wrong with it."""
        try:
            shift: float | None = self.recipe.backbone.time_shift()
        except ValueError as error:
            raise BackboneError if list(self.recipe.backbone.check()) else error from None
        return shift

    def routing(self, trajectory: "Trajectory | None") -> Iterator[Violation]:
        """The router can be used, boundaries are in order, and the experts that it names exist."""
        router, experts = self.recipe.router, self.experts
        if router is None:
            if experts:
                hint = f"add router: {{kind: timestep, experts: [{', '.join(experts)}], boundaries: […]}}"
                yield ("router",), f"is missing: it gives {', '.join(map(repr, experts))} their noise levels", hint
            return
        if trajectory is not None and not failed(router):
            yield from self.build_router(trajectory)
        for k, name in enumerate(self.routed() or ()):
            if experts is not None and name not in experts and name != TEACHER:
                path: Path = ("router", "experts", k) if hasattr(router, "experts") else ("router",)
                yield path, f"unknown expert {name!r}; {suggest(name, [*experts, TEACHER])}", ""

    def build_router(self, trajectory: "Trajectory") -> Iterator[Violation]:
        """Sets `router`, unless what the recipe's builds is of no use."""
        config = self.recipe.router
        path = ("router", "boundaries") if hasattr(config, "boundaries") else ("router",)
        try:
            built = config.build(trajectory)
        except ValueError as error:
            yield path, str(error), ""
            return
        if problem := router_problem(built, config.build(trajectory), trajectory):
            self.refused = True
            hint = "a router chooses boundaries: let build give a TimestepRouter, or a Router with hard segments"
            yield ("router",), f"router {config.kind!r} {problem}", hint
        else:
            self.router = built

    def routed(self) -> list[str] | None:
        """Names of the experts that have a segment; None where that is unknown."""
        if self.router is not None:
            return list(self.router.experts)
        names = getattr(self.recipe.router, "experts", None)  # of one that cannot be built, as far as it says so
        known = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return names if known else None

    def idle_experts(self) -> Iterator[Violation]:
        """Experts have a segment, or a stage that trains or uses them."""
        names = self.routed() if self.recipe.router is not None else None
        if names is None:
            return
        used = {name for stage in self.stages for name in self.names_in(stage, "used_experts")}
        for name in self.experts or ():
            if name not in names and name != TEACHER and name not in used:
                hint = "add it to router.experts, with a boundary, or remove it"
                message = (
                    f"expert {name!r} has no segment, as the router does not name it, and no stage trains or uses it"
                )
                yield ("experts", name), message, hint

    @staticmethod
    def names_in(stage: Any, which: str) -> list[str]:
        """What a stage's `trained_experts` or `used_experts` gives; nothing of one that failed."""
        if failed(stage) or not hasattr(stage, which):
            name = getattr(stage, "expert", None)
            return [name] if isinstance(name, str) else []
        return list(getattr(stage, which)())

    def ancestry(self) -> Iterator[Violation]:
        """`from` names something that exists, and nothing descends from itself."""
        for name, expert in (self.experts or {}).items():
            parent = getattr(expert, "parent", TEACHER)
            if not isinstance(parent, str) or parent == TEACHER:
                continue
            path = ("experts", name, "from")
            if parent not in (self.experts or {}):
                yield path, f"unknown expert {parent!r}; {suggest(parent, [*(self.experts or {}), TEACHER])}", ""
            elif name in self.ancestors(name):
                circle = " → ".join([name, *self.ancestors(name)])
                yield path, f"goes round in a circle: {circle}", "let one of them start from the teacher"

    def starts(self) -> Iterator[Violation]:
        """What starts with weights has some."""
        for name, expert in (self.experts or {}).items():
            if getattr(expert, "init", None) is not None and getattr(expert, "trainable", True) is False:
                message = f"expert {name!r} is {expert.kind or 'frozen'}: it holds no weights that could be given to it"
                yield ("experts", name, "init"), message, "make it full or lora, or leave init out"

    def ancestors(self, name: str) -> list[str]:
        """Parents of an expert, nearest first, up to the teacher or to a name met before."""
        found: list[str] = []
        experts = self.experts or {}
        while isinstance(name, str) and name in experts:
            name = getattr(experts[name], "parent", TEACHER)
            if not isinstance(name, str) or name == TEACHER or name in found:
                break
            found.append(name)
        return found

    def copies_of_8_bits(self) -> Iterator[Violation]:
        """No expert trains a copy of weights that are kept in 8 bits."""
        if not failed(self.recipe.backbone) and self.recipe.backbone.quantized():
            for name, expert in (self.experts or {}).items():
                if getattr(expert, "copies_base", False):
                    yield ("experts", name, "kind"), QUANTIZED, ""

    def teachers(self, trajectory: "Trajectory | None") -> Iterator[Violation]:
        """Experts and guidance name networks that the teacher has; a segment lies where one of them serves."""
        backbone = self.recipe.backbone
        if failed(backbone):
            return
        for key, message in backbone.check():
            yield ("backbone", *key.split(".")), message, ""
        bases = list(backbone.bases())
        if backbone.guidance.oscillate_from is not None and backbone.has_pipeline:
            message = "the model's own pipeline guides all its steps alike; leave it out"
            yield ("backbone", "guidance", "oscillate_from"), message, ""
        scale = backbone.guidance.scale
        if isinstance(scale, dict) and set(scale) != set(bases):
            message = f"names {', '.join(scale) or 'no network'}; the teacher has {', '.join(bases)}: give each a scale"
            yield ("backbone", "guidance", "scale"), message, ""
        for name, expert in (self.experts or {}).items():
            base, parent = getattr(expert, "base", None), getattr(expert, "parent", TEACHER)
            if failed(expert):
                continue
            if base is not None and base not in bases:
                yield ("experts", name, "base"), f"unknown network {base!r}; {suggest(base, bases)}", ""
            elif base is None and parent == TEACHER and len(bases) > 1:
                message = f"is missing: the teacher has {' and '.join(bases)}; say which one {name!r} changes"
                yield ("experts", name, "base"), message, f"for example base: {bases[0]}"
            elif base is not None and parent in (self.experts or {}) and base != self.base_of(parent):
                message = f"{base!r} is not the network of {parent!r}, which {name!r} starts from"
                yield ("experts", name, "base"), message, "leave base out, or start from the teacher"
        yield from self.teacher_segments(trajectory)

    def base_of(self, name: str) -> str | None:
        """The network that an expert names, itself or through its parents."""
        chain = [(self.experts or {}).get(expert) for expert in [name, *self.ancestors(name)]]
        return next((base for expert in chain if (base := getattr(expert, "base", None))), None)

    def teacher_segments(self, trajectory: "Trajectory | None") -> Iterator[Violation]:
        if trajectory is None or self.router is None:
            return
        try:
            teachers = self.recipe.backbone.teacher_router(trajectory)
        except ValueError:
            return  # reported elsewhere
        trained = {name for stage in self.stages for name in self.names_in(stage, "trained_experts")}
        for segment in self.router.segments if teachers is not None else ():
            points = trajectory.points_in(segment)
            served = {teachers.expert_at(trajectory.sigma(point)) for point in points}
            base = self.base_of(segment.expert)
            if segment.expert in trained and len(served) == 1 and base is not None and base not in served:
                message = (
                    f"{base!r} is not what serves the segment of {segment.expert!r}: that is {' and '.join(served)}"
                )
                yield ("experts", segment.expert, "base"), message, f"base: {sorted(served)[0]}"
            elif segment.expert in trained and len(served) > 1:
                upper, *_ = teachers.segments
                edges = ", ".join(f"{above.low:.6g}" for above in teachers.segments[:-1])
                message = (
                    f"the segment of {segment.expert!r}, points {points[0]} to {points[-1]}, lies across the teacher's "
                    f"boundary at sigma {edges}: {' and '.join(sorted(served))} would both teach it"
                )
                hint = f"put a boundary there: {{sigma: {edges}}}, with closed: {upper.closed}"
                key = ("boundaries",) if hasattr(self.recipe.router, "boundaries") else ()
                yield ("router", *key), message, hint
        routed = {segment.expert for segment in self.router.segments}
        for k, stage in enumerate(self.stages if teachers is not None else ()):
            expert = getattr(stage, "expert", None)
            if expert in (self.experts or {}) and expert not in routed:
                names = " and ".join(sorted(segment.expert for segment in teachers.segments))
                message = f"{expert!r} has no segment, so {names} would both teach it"
                yield ("stages", k, "expert"), message, "give it a segment of the router's, under one of them"

    def trained_experts(self) -> Iterator[Violation]:
        """Stages train experts that exist and can be trained, parents before children."""
        trained = [self.names_in(stage, "trained_experts") for stage in self.stages]
        for k, names in enumerate(trained):
            for name in names if self.experts is not None else ():
                path: Path = ("stages", k, *self.key_of(k, name))
                if name == TEACHER:
                    yield path, "the teacher is never trained", "define an expert, such as {kind: full}"
                elif name not in (self.experts or {}):
                    yield path, f"unknown expert {name!r}; {suggest(name, self.experts or {})}", ""
                elif getattr((self.experts or {})[name], "trainable", True) is False:
                    kind = (self.experts or {})[name].kind or "frozen"
                    yield path, f"expert {name!r} is {kind}: it has nothing to train", ""
                for parent in self.ancestors(name):
                    later = [self.stages[n].name for n in range(k + 1, len(trained)) if parent in trained[n]]
                    if later and parent != name:
                        message = f"{name!r} starts from {parent!r}, which is trained later, in stage {later[0]!r}"
                        yield path, message, "change the order of the stages"

    def key_of(self, number: int, expert: str) -> Path:
        """The key of a stage whose value is this expert's name."""
        keys = (key for key, value in vars(self.stages[number]).items() if value == expert and key != "name")
        return next(((key,) for key in keys), ())

    def probes(self) -> Iterator[Violation]:
        for k, stage in enumerate(self.stages):
            if getattr(stage, "probe", FAILED) is not None or stage is FAILED:
                continue
            for i, loss in enumerate(getattr(stage, "losses", ())):
                if getattr(loss, "needs_probe", False) is True:
                    kind = getattr(loss, "kind", "") or type(loss).__name__
                    message = f"loss {kind!r} needs the teacher's features, but the stage has no probe"
                    yield ("stages", k, "losses", i), message, "add to the stage: probe: {block_stride: 2}"

    def data_and_batches(self) -> Iterator[Violation]:
        if self.recipe.data is None:
            needs = {need for stage in self.stages for need in getattr(stage, "needs", ())}
            if needs:
                first = next(k for k, stage in enumerate(self.stages) if getattr(stage, "needs", ()))
                names = " and ".join(sorted(needs))
                yield ("data",), f"is missing: stages.{first} needs {names}", "add data: {kind: …}"
        elif not failed(self.recipe.data):
            for k, stage in enumerate(self.stages):
                lacking = sorted(set(getattr(stage, "needs", ())) - self.recipe.data.provides)
                if lacking:
                    message = f"{self.recipe.data.kind!r} has no {' and '.join(lacking)}, which stages.{k} needs"
                    yield ("data", "kind"), message, "choose data that have them, such as kind: latents"
        training = self.recipe.training
        if failed(training):
            return
        size, parts = training.batch_size, training.gradient_accumulation_steps
        if size % parts:
            good = size // parts * parts or parts
            path = ("training", "gradient_accumulation_steps")
            yield path, f"{parts} does not divide batch_size {size}", f"for example batch_size: {good}"

    def sharding(self) -> Iterator[Violation]:
        training, backbone = self.recipe.training, self.recipe.backbone
        if failed(training) or training.sharding == "none":
            return
        if not failed(backbone) and backbone.dtype == "float16":
            message = "fsdp2 goes with bfloat16 or float32: the scale of float16's gradients is of one process alone"
            yield ("training", "sharding"), message, "backbone.dtype: bfloat16"
        if not failed(backbone) and getattr(backbone, "quantization", None) is not None:
            message = "an 8-bit base is not cut among processes; each has it whole, with sharding: none"
            yield ("training", "sharding"), message, "leave one of them out"
        for k, stage in enumerate(self.stages):
            if getattr(getattr(stage, "optimizer", None), "states", "float32") != "float32":
                message = "moments in 8 bits are blocks, which cannot be cut among processes"
                yield ("stages", k, "optimizer", "states"), message, "leave it out, or sharding"
        if training.offload.averages is not None:
            message = "averages are cut among the processes with sharding: fsdp2, and stay on the devices"
            yield ("training", "offload", "averages"), message, "leave one of them out"

    def sampling(self, trajectory: "Trajectory") -> Iterator[Violation]:
        sample = self.recipe.sample
        unit = next(name for name, value in vars(sample).items() if value is not None)
        try:
            sample.resolve(trajectory)
        except ValueError as error:
            yield ("sample", unit), str(error), ""

    def stages_themselves(self) -> Iterator[Violation]:
        """What each stage's own `check` finds; it sees parts that failed as None."""
        broken = isinstance(self.recipe, Partial) or self.refused
        recipe = _with_gaps(self.recipe) if broken else self.recipe
        if self.refused:
            recipe.router = None
        for k, stage in enumerate(self.stages):
            if failed(stage) or not hasattr(stage, "check"):
                continue
            try:
                findings = list(stage.check(recipe))
            except (AttributeError, TypeError, KeyError, ValueError):
                if not broken:  # A check may trip over a gap; then its turn comes when the gap is filled.
                    raise
                continue
            for suffix, message in findings:
                steps = [int(step) if step.isdigit() else step for step in suffix.split(".") if step]
                yield ("stages", k, *steps), message, ""


def router_problem(built: object, again: object, trajectory: "Trajectory") -> str:
    """What makes two routers, built alike, unfit to be used; nothing where they are fit."""
    from moedistill.flow.routers import check_router  # imports torch

    try:
        check_router(built, trajectory)
        check_router(again, trajectory)
    except ValueError as error:
        return str(error)
    first, second = (list(router.segments) for router in (built, again))  # type: ignore[attr-defined]
    if first != second:
        return f"gives other segments each time, {first} and {second}; training, sampling and export each build it"
    return ""


def _with_gaps(recipe: Partial) -> Any:
    def gap(value: Any) -> Any:
        if failed(value):
            return None
        if isinstance(value, dict):
            return {key: gap(item) for key, item in value.items()}
        return [gap(item) for item in value] if isinstance(value, list) else value

    return SimpleNamespace(**{name: gap(getattr(recipe, name)) for name in Recipe.__dataclass_fields__})
