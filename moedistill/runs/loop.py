"""Runs a recipe: its stages in order, with checkpoints, resuming and signals."""

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moedistill.callbacks import MetricsFile, Progress, Trackers, drop_later_lines
from moedistill.checkpoint import Checkpoints, find_checkpoint, load_tree, write_text
from moedistill.context import Job, Run
from moedistill.data.base import Dataset
from moedistill.data.loading import collate, load_batches
from moedistill.devices import cpu_threads, find_device, make_folder
from moedistill.errors import Interrupted, UserError, user_errors
from moedistill.heldout import HeldOut
from moedistill.mixture import Mixture
from moedistill.plugins import Plugins, load_plugins
from moedistill.randomness import torch_seed
from moedistill.recipe import Recipe, load_recipe
from moedistill.signals import Interruption
from moedistill.smoke import miniature
from moedistill.stages.base import Stage, TrainingStage, TrainingStageConfig
from moedistill.stages.consistency import ConsistencyStage

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moedistill.backbone import Backbone

OPERATIONAL = ("checkpoint_every", "keep_checkpoints", "log_every", "trackers", "num_workers", "num_threads", "heldout")
"""Keys of `training` that may differ when a run is resumed: they do not change what is learned."""

METRICS = "metrics.jsonl"
RESULT = "result.json"
"""What the stages reported, by name; written anew after every stage that trains nothing."""
COST = "cost.json"
"""What the training stages cost, by name: see `RunResult.cost`."""


@dataclass
class RunResult:
    """What a run left.

    Attributes:
        output: the run's folder: recipe.yaml, metrics.jsonl, checkpoints, and what its stages made.
        metrics: what each stage reported, by stage name.
        cost: of each training stage, interruptions not counted: `steps`; `forwards`, the samples that a network
            evaluated, on all processes together; `seconds` spent in steps.
        checkpoint: the newest one; None if the recipe trains nothing.
        smoke: whether it was a miniature.
    """

    output: Path
    metrics: dict[str, Any]
    cost: dict[str, dict[str, float]]
    checkpoint: Path | None
    smoke: bool = False


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    output: str | Path | None = None,
    resume: bool = False,
    resume_from: str | Path | None = None,
    smoke: bool = False,
    device: str | None = None,
    plugins: Plugins | None = None,
    **overrides: Any,
) -> RunResult:
    """Runs all stages of a recipe.

    Args:
        recipe: a recipe, its file or name, or its content.
        output: the run's folder; `runs/<name>/<time>` if not given (`runs/<name>-smoke/…` for a smoke run).
        resume: go on with the newest checkpoint of `output`, or of the newest run of this name.
        resume_from: go on with this checkpoint, or the newest one of this run. With another `output` than its own, the
            recipe may differ in what comes later: see `changed_keys`.
        smoke: replace sizes, never code: a miniature backbone, few samples, few steps.
        device: as torch names it; the accelerator if there is one, else "cpu".
        plugins: as loaded by `load_plugins`; all installed ones if not given.
        overrides: top-level keys of the recipe to replace, such as `seed=1`.

    Raises:
        UserError: something is wrong with the recipe, the checkpoint or the data.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    plugins = plugins or load_plugins()
    if not isinstance(recipe, Recipe) or overrides:
        settings = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        source = recipe.resolved() if isinstance(recipe, Recipe) else recipe
        recipe = load_recipe(source, settings, plugins)
    if smoke:
        recipe = miniature(recipe)
    checkpoint = _checkpoint_to_resume(recipe, output, resume, resume_from, smoke)
    if checkpoint is not None:
        branch = output is not None and not _belongs_to(checkpoint, Path(output))
        _check_same_recipe(recipe, checkpoint, branch)
    accelerator = make_accelerator(recipe, device)
    folder = _output_folder(recipe, output, checkpoint, smoke)
    accelerator.wait_for_everyone()  # nobody writes there before all have looked
    make_folder(folder)
    try:
        with cpu_threads(recipe.training.num_threads):
            return _Runner(recipe, folder, accelerator, plugins, smoke).run(checkpoint)
    except UserError:
        with suppress(OSError):  # a run that could not begin leaves nothing; what holds a file stays
            folder.rmdir()
        raise


def _check_layout(recipe: Recipe, mixture: Mixture, dataset: Dataset | None) -> None:
    """ValueError where latents of a shape, or the first sample's text, do not fit the model."""
    backbone = mixture.student.backbone
    layout = recipe.backbone.layout()
    if dataset is None or layout is None or not len(dataset):
        return
    for shape, index in {dataset.shape(index): index for index in reversed(range(len(dataset)))}.items():
        channels, _, *size = shape  # a stage may take some of the frames only
        if channels != layout.channels:
            raise ValueError(f"sample {index} has latents {list(shape)}; the model's have {layout.channels} channels")
        if any(length % multiple for length, multiple in zip(size, layout.multiple[1:], strict=True)):
            raise ValueError(
                f"sample {index} has latents {list(shape)}: (T, H, W) must be multiples of {layout.multiple}"
            )
    _, text = backbone.prepare(*collate([dataset[0]]))
    for name in layout.conditioning:
        if name not in text:
            raise ValueError(f"sample 0 has no {name}, which the model takes; encode its text and store it")
        found = text[name].shape[1:]
        if not layout.fits(name, found):
            raise ValueError(f"sample 0 has {name} {list(found)}; the model takes {layout.pattern(name)}")


def _prepare_null(recipe: Recipe, mixture: Mixture, dataset: Dataset | None) -> None:
    """Takes over the negative prompt's conditioning stored with the data, or has it encoded, where it will be needed.

    Raises:
        ValueError: it is neither stored nor can it be encoded.
    """
    if dataset is None:
        return
    backbone, guidance = mixture.student.backbone, recipe.backbone.guidance
    stored = dataset.null_conditioning()
    if stored is not None:
        backbone.set_null(stored)
    guided = any(guidance.classifier_free_scale(base) != 1.0 for base in recipe.backbone.bases())
    if recipe.data and (guided or recipe.data.text_dropout) and len(dataset):
        _, cond = backbone.prepare(*collate([dataset[0]]))
        backbone.null_conditioning(cond)


def make_job(
    recipe: Recipe,
    folder: Path,
    accelerator: "Accelerator",
    *,
    smoke: bool = False,
    backbone: "Backbone | None" = None,
) -> Job:
    """Loads the models, or takes a `backbone` that is there, and opens the data; UserError where they do not fit."""
    mixture = Mixture.build(recipe, accelerator.device, backbone)
    with user_errors("data"):
        dataset = recipe.data.build(mixture.student.backbone) if recipe.data else None
        _check_layout(recipe, mixture, dataset)
    with user_errors("backbone.guidance"):
        _prepare_null(recipe, mixture, dataset)
    return Job(recipe, folder, accelerator, mixture, dataset, smoke=smoke)


class _Runner:
    def __init__(self, recipe: Recipe, folder: Path, accelerator: "Accelerator", plugins: Plugins, smoke: bool) -> None:
        self.recipe, self.folder, self.accelerator, self.plugins = recipe, folder, accelerator, plugins
        self.checkpoints = Checkpoints(folder / "checkpoints", recipe.training.keep_checkpoints)
        self.job = make_job(recipe, folder, accelerator, smoke=smoke)
        for stage in recipe.stages:
            with user_errors(f"stage {stage.name}"):
                stage.look_ahead(recipe)
        self.last_checkpoint: Path | None = None
        self.under_way = ""
        self.interruption = Interruption(self._where_to_go_on)
        self.progress = Progress()
        self.trackers = Trackers(accelerator, recipe.training.trackers, str(folder), recipe.name)
        self.observers: list[Any] = [self.trackers]
        if self.job.main:
            self.observers = [MetricsFile(folder), self.progress, self.trackers]

    def run(self, checkpoint: Path | None) -> RunResult:
        """All stages, or those after `checkpoint`."""
        smoke = " (smoke run: a miniature)" if self.job.smoke else ""
        stage, step = self._restore(checkpoint) if checkpoint is not None else (0, 0)
        if self.job.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints.remove_leftovers()
            write_text(self.folder / "recipe.yaml", self.recipe.to_yaml())
            self._write_cost()
        self.job.say(f"{self.recipe.name}{smoke} → {self.folder}")
        for observer in self.observers:
            self.plugins.manager.register(observer)
        try:
            with self.interruption:
                self._stages(stage, step, checkpoint)
        finally:
            self.progress.stop()
            self.trackers.stop()
            for observer in self.observers:
                self.plugins.manager.unregister(observer)
        self.job.say(f"done{smoke}: {self.folder}")
        return RunResult(self.folder, self.job.metrics, self.job.cost, self.last_checkpoint, self.job.smoke)

    def _restore(self, checkpoint: Path) -> tuple[int, int]:
        """Takes over everything but the state of a training stage under way; gives that stage's number and its step."""
        state = load_tree(checkpoint, "state")
        self.job.mixture.load(load_tree(checkpoint, "experts"), load_tree(checkpoint, "ema"), str(checkpoint))
        self.job.metrics.update(state["metrics"])
        self.job.cost.update(state["cost"])
        self.last_checkpoint = checkpoint
        history = checkpoint.parent.parent / METRICS
        if self.job.main and not (self.folder / METRICS).exists() and history.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(history, self.folder / METRICS)  # a run that goes on in another folder
            stages = [stage["name"] for stage in state["recipe"]["stages"]]
            drop_later_lines(self.folder / METRICS, stages, state["stage"], state["step"])
        self.job.say(f"resuming from {checkpoint}: stage {state['stage_name']}, step {state['step']}")
        if others := sorted({".".join(key.split(".")[:2]) for key in changed_keys(self.recipe, checkpoint)[1]}):
            self.job.say(f"other than there: {', '.join(others)}")
        return state["stage"], state["step"]

    def _stages(self, first: int, first_step: int, checkpoint: Path | None) -> None:
        """The stages from number `first` on, that one from `first_step` on."""
        reported = self._reported_since(checkpoint)
        for number, config in list(enumerate(self.recipe.stages))[first:]:
            self.under_way = config.name
            if isinstance(config, TrainingStageConfig):
                step = first_step if number == first else 0
                if step < config.steps:
                    self._train(number, config, step, checkpoint if step else None)
                    reported = {}  # of other weights
            elif config.name in reported:
                self.job.metrics[config.name] = reported[config.name]
                self.job.say(f"stage {config.name}: done before")
            else:
                self.job.say(f"stage {config.name}")
                with user_errors(f"stage {config.name}"):
                    stage = config.build()
                    assert isinstance(stage, Stage)
                    stage.execute(self.job)
                if self.job.main:
                    self.job.metrics.setdefault(config.name, {})
                    write_text(self.folder / RESULT, json.dumps(self.job.metrics, indent=1))

    def _reported_since(self, checkpoint: Path | None) -> dict[str, Any]:
        """What stages that train nothing reported after `checkpoint`, if this folder's run was there before."""
        file = self.folder / RESULT
        if checkpoint is None or not _belongs_to(checkpoint, self.folder) or not file.is_file():
            return {}
        reported: dict[str, Any] = json.loads(file.read_text())
        return reported

    def _train(self, number: int, config: TrainingStageConfig, step: int, checkpoint: Path | None) -> None:
        """One training stage, from `step` on; `checkpoint` holds its state if it is under way."""
        training, hook = self.recipe.training, self.plugins.hook
        stage, dataset = config.build(), self.job.dataset
        assert isinstance(stage, TrainingStage)
        assert dataset is not None
        run = Run(self.job, config, step)
        with user_errors(f"stage {config.name}"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.recipe.seed, config.name, "setup"))  # what critics start as
            stage.setup(run)
            batches = load_batches(
                dataset,
                batch_size=training.batch_size,
                accumulation=training.gradient_accumulation_steps,
                seed=self.recipe.seed,
                stage=config.name,
                steps=range(step, config.steps),
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                num_workers=training.num_workers,
            )
        if checkpoint is not None:
            run.load_state(load_tree(checkpoint, "training"))
        with user_errors(f"stage {config.name}"):
            heldout = self._held_out(run, stage)
        cost = self.job.cost.setdefault(config.name, {"steps": 0, "forwards": 0, "seconds": 0.0})
        hook.on_stage_start(run=run)
        # Closed whatever happens: a worker left waiting would keep the process from ending.
        with closing(batches), self.interruption.deferred(), run.student.using(config.expert):
            if heldout is not None and step == 0:
                hook.on_step_end(run=run, metrics=heldout.measure())
            for batch in batches:
                begun, forwards = time.perf_counter(), run.student.forwards
                with run.micro_batch(), user_errors(f"stage {config.name}"):
                    stage.step(run, run.begin(batch))
                cost["forwards"] += (run.student.forwards - forwards) * self.accelerator.num_processes
                cost["seconds"] += time.perf_counter() - begun
                if batch.boundary:
                    run.step += 1
                    cost["steps"] += 1
                    self._end_step(number, run, heldout)
        if self.job.main:
            self._write_cost()
        hook.on_stage_end(run=run)
        run.release()
        # What is not trained yet starts as its parent is now; an evaluation may come before its turn.
        self.job.mixture.student.initialise(self.recipe.seed, but=self._trained(number + 1))

    def _held_out(self, run: Run, stage: TrainingStage) -> HeldOut | None:
        """The held-out loss of a consistency stage, where it is wanted."""
        config = self.recipe.training.heldout
        return HeldOut(config, run, stage) if config is not None and isinstance(stage, ConsistencyStage) else None

    def _end_step(self, number: int, run: Run, heldout: HeldOut | None) -> None:
        """After an optimiser step: numbers, a checkpoint, a stop, where they are due."""
        training = self.recipe.training
        last = run.step == run.steps
        signum = self._any_rank(self.interruption.signum)
        saving = last or signum or (training.checkpoint_every and run.step % training.checkpoint_every == 0)
        measuring = heldout is not None and heldout.due()
        logging = last or measuring or run.step % training.log_every == 0
        if saving or logging:
            metrics = run.take_metrics()  # raises if one is not finite: such weights are never saved
            if heldout is not None and measuring:
                metrics |= heldout.measure()
            if logging:
                self.plugins.hook.on_step_end(run=run, metrics=metrics)
        run.forget_metrics()
        if saving:
            self._save(number, run)
        if signum:
            raise Interrupted(signum, f"stopped at step {run.step} of {run.config.name}; {self._where_to_go_on()}")

    def _write_cost(self) -> None:
        file, text = self.folder / COST, json.dumps(self.job.cost, indent=1)
        if self.job.cost and not (file.is_file() and file.read_text() == text):
            write_text(file, text)

    def _any_rank(self, signum: int) -> int:
        """The signal that any process has got, or 0; all processes must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return signum
        flag = torch.tensor(signum, device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max())

    def _where_to_go_on(self) -> str:
        if self.last_checkpoint is None:
            return f"stopped in stage {self.under_way}; nothing is saved yet"
        folder = self.folder if _belongs_to(self.last_checkpoint, self.folder) else self.last_checkpoint
        return f"saved is {self.last_checkpoint}; go on with --resume-from {folder}"

    def _trained(self, number: int) -> set[str]:
        """The experts that stages before `number` train."""
        return {stage.expert for stage in self.recipe.stages[:number] if isinstance(stage, TrainingStageConfig)}

    def _save(self, number: int, run: Run) -> None:
        name = f"{number:02d}_{run.config.name}_{run.step:08d}"
        if self.job.main:
            mixture = self.job.mixture
            state = {
                "stage": number,
                "stage_name": run.config.name,
                "step": run.step,
                "metrics": self.job.metrics,
                "cost": self.job.cost,
                "recipe": self.recipe.resolved(),
            }
            trees = {
                "state": state,
                "experts": {
                    expert: dict(mixture.student.experts[expert].parameters)
                    for expert in sorted(self._trained(number + 1))
                },
                "ema": {expert: average.average for expert, average in mixture.ema.items()},
                "training": run.state(),
            }
            self.checkpoints.save(name, trees)
        self.accelerator.wait_for_everyone()
        self.last_checkpoint = self.checkpoints.folder / name
        if self.job.main:
            self.plugins.hook.on_checkpoint(run=run, path=self.last_checkpoint)


def _checkpoint_to_resume(
    recipe: Recipe, output: str | Path | None, resume: bool, resume_from: str | Path | None, smoke: bool
) -> Path | None:
    if resume_from is not None:
        return find_checkpoint(Path(resume_from))
    if not resume:
        return None
    if output is not None:
        return find_checkpoint(Path(output))
    runs = _runs(recipe, smoke)
    found = [folder for folder in sorted(runs.glob("*")) if Checkpoints(folder / "checkpoints", keep=1).all()]
    if not found:
        raise UserError(f"--resume: no run of {recipe.name!r} with a checkpoint under {runs}")
    return find_checkpoint(found[-1])


def _runs(recipe: Recipe, smoke: bool) -> Path:
    """Where runs of this name lie; miniatures apart, so that --resume never takes one for the other."""
    return Path("runs", f"{recipe.name}-smoke" if smoke else recipe.name)


def _belongs_to(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == (folder / "checkpoints").resolve()


def _output_folder(recipe: Recipe, output: str | Path | None, checkpoint: Path | None, smoke: bool) -> Path:
    """The run's folder, the same on every rank.

    Raises:
        UserError: it holds another run.
    """
    if output is not None:
        folder = Path(output)
    elif checkpoint is not None and checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent
    else:
        from accelerate.utils import broadcast_object_list

        stamp = [time.strftime("%Y%m%d-%H%M%S")]
        folder = _runs(recipe, smoke) / broadcast_object_list(stamp)[0]
    if checkpoint is not None and _belongs_to(checkpoint, folder):
        return folder
    if Checkpoints(folder / "checkpoints", keep=1).all() or (folder / RESULT).exists():
        raise UserError(f"{folder} already holds a run; add --resume to go on with it, or choose another --output")
    return folder


def _check_same_recipe(recipe: Recipe, checkpoint: Path, branch: bool) -> None:
    """Raises a UserError if `recipe` cannot go on from `checkpoint`; a branch may differ in what comes later."""
    before, after = changed_keys(recipe, checkpoint)
    if keys := before if branch else before + after:
        ways = "Resume with the recipe.yaml in its run's folder"
        if not before:
            ways += f"; use --resume-from {checkpoint} with a new --output, where what comes later may differ"
        raise UserError(
            f"the recipe is not the one that {checkpoint} was made with: {', '.join(sorted(keys))} differ. "
            f"{ways}; or start a new run"
        )


def changed_keys(recipe: Recipe, checkpoint: str | Path) -> tuple[list[str], list[str]]:
    """Keys in which `recipe` differs from the one that `checkpoint` was made with, as dotted paths.

    The second list are those on which nothing before the checkpoint depends: later stages and names; also sampling and
    experts that no stage has trained so far, unless a stage has evaluated, sampled or exported in between. A recipe
    that differs in these alone can go on from there in a folder of its own, and gives what it would have given from its
    beginning.
    """
    state = load_tree(Path(checkpoint), "state")
    made, number = state["recipe"], state["stage"]
    used = any("expert" not in stage for stage in made["stages"][:number])
    settled = {stage["expert"] for stage in made["stages"][: number + 1] if "expert" in stage}
    while parents := {made["experts"][name]["from"] for name in settled & made["experts"].keys()} - settled:
        settled |= parents
    saved, now = comparable(made), comparable(recipe.resolved())

    def later(key: str) -> bool:
        top, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if top == "stages":
            return int(name) > number
        if top == "sample" or (top == "experts" and name not in settled):
            return not used
        return top in ("name", "description")

    changed = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    return [key for key in changed if not later(key)], [key for key in changed if later(key)]


def comparable(resolved: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe as dotted keys, without what may differ."""
    flat: dict[str, Any] = {}

    def walk(tree: Any, path: str) -> None:
        if isinstance(tree, dict) and tree:
            for key, value in tree.items():
                walk(value, f"{path}.{key}" if path else str(key))
        elif isinstance(tree, (list, tuple)) and tree:
            for index, value in enumerate(tree):
                walk(value, f"{path}.{index}")
        else:
            flat[path] = tree

    walk(resolved, "")
    operational = tuple(f"training.{key}." for key in OPERATIONAL)
    return {path: value for path, value in flat.items() if not f"{path}.".startswith(operational)}


def make_accelerator(recipe: Recipe, device: str | None) -> "Accelerator":
    """One process, or this one's part of what a launcher started."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    chosen = find_device(device)
    cpu = chosen.type == "cpu"
    dtype = recipe.backbone.dtype
    if dtype == "float16" and cpu:
        raise UserError("backbone.dtype: float16 does not train on a CPU; use float32, or bfloat16")
    # One process may run several recipes, each with its own precision.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=cpu,
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype],
        gradient_accumulation_steps=recipe.training.gradient_accumulation_steps,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
