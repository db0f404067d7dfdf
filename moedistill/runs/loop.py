"""Runs a recipe: its stages in order, with checkpoints, resuming and signals."""

import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import torch

from moedistill.components.plugins import Plugins, load_plugins
from moedistill.data.loading import Batch, batch_of_step, load_batches, share_of_batch
from moedistill.errors import Interrupted, SaidElsewhere, UserError, WriteError, shorten, user_errors
from moedistill.recipe.keys import Recipe, StageConfig, TrainingStageConfig
from moedistill.recipe.loading import load_recipe
from moedistill.recipe.miniature import miniature
from moedistill.runs.ahead import look_ahead, memory_of
from moedistill.runs.asked_sharding import asked_sharding
from moedistill.runs.build import build_run, is_sharded, make_accelerator
from moedistill.runs.callbacks import Curves, MetricsFile, Progress, Trackers, drop_later_lines
from moedistill.runs.check import check_before
from moedistill.runs.commands import RunCommand
from moedistill.runs.encode import with_encoded_videos
from moedistill.runs.launch import check_launch, launched_here, tell_launcher
from moedistill.runs.memory import loading_remedies, memory_errors, remedies
from moedistill.runs.not_finite import explain
from moedistill.runs.page.write import PAGE, write_page
from moedistill.runs.planning.count import check_before_loading
from moedistill.runs.planning.fake_step import empty_mixture
from moedistill.runs.processes import described, on_main, versions
from moedistill.runs.resume import Plan, belongs_to, plan, ways_out
from moedistill.runs.saved import read_weights
from moedistill.runs.starting import check_starts
from moedistill.runtime.checkpoint import (
    FORMAT,
    Checkpoints,
    bytes_of,
    checkpoint_name,
    load_tree,
    parse_name,
    write_text,
)
from moedistill.runtime.devices import cpu_threads
from moedistill.runtime.integrity import Damaged, read_json
from moedistill.runtime.lock import claimed
from moedistill.runtime.randomness import torch_seed
from moedistill.runtime.saving import Saving
from moedistill.runtime.signals import Interruption
from moedistill.runtime.writing import disk_errors, new_file
from moedistill.stages.base import Stage, TrainingStage
from moedistill.stages.monitor import Monitor
from moedistill.stages.preview import Preview
from moedistill.stages.run import COST, ENDED, ENVIRONMENT, LEVELS, MEMORY, METRICS, MINIATURE, RESULT
from moedistill.stages.training import NotFinite, Training

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    command: RunCommand | None = None,
    force: bool = False,
    **overrides: Any,
) -> RunResult:
    """Runs all stages of a recipe.

    Args:
        recipe: a recipe, its file or name, or its content.
        output: the run's folder, a new or an empty one unless a run is resumed; `runs/<name>/<time>` if not given
            (`runs/<name>-smoke/…` for a miniature), with a number where that is there.
        resume: go on with the newest checkpoint of `output`, or of the newest run of this name.
        resume_from: go on with this checkpoint, or the newest one of this run. With another `output` than its own, the
            recipe may differ in what comes later: see `changed_keys`.
        smoke: replace sizes, never code: a miniature backbone, few samples, few steps.
        device: as torch names it; the accelerator if there is one, else "cpu".
        plugins: as loaded by `load_plugins`; all installed ones if not given.
        command: how messages name this run, if another way than by these arguments.
        force: begin even where what stands in memory cannot fit the accelerator.
        overrides: top-level keys of the recipe to replace, such as `seed=1`.

    Raises:
        UserError: something is wrong with the recipe, the checkpoint or the data; the disk is full; or another process
            writes in that folder.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; the state is saved.
    """
    settings = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    if command is None:
        given = str(recipe) if isinstance(recipe, str | Path) else None
        command = RunCommand(smoke, device, tuple(plugins.files) if plugins else (), given, tuple(settings))
    again = command.as_given(output=output, resume=resume, resume_from=resume_from)
    with (
        Interruption(lambda: f"stopped before training; nothing is lost, start it again with: {again}"),
        ExitStack() as stack,
    ):
        plugins = plugins or load_plugins()
        if not isinstance(recipe, Recipe) or overrides:
            source = recipe.resolved() if isinstance(recipe, Recipe) else recipe
            recipe = load_recipe(source, settings, plugins)
        if smoke:
            recipe = miniature(recipe)
        recipe = with_encoded_videos(recipe, device, click.echo)
        if asked_sharding(os.environ).sharded:
            recipe = replace(recipe, training=replace(recipe.training, sharding="fsdp2"))
        accelerator = make_accelerator(recipe, device)
        check_launch(accelerator.num_processes)
        if accelerator.is_main_process:
            click.echo(described(accelerator, recipe.backbone.dtype, sharded=is_sharded(recipe, accelerator)))
        memory = None if smoke else _accelerator_memory(accelerator.device)
        if memory is not None:
            sharded = is_sharded(recipe, accelerator)
            shards = accelerator.num_processes // (asked_sharding(os.environ).replicas if sharded else 1)
            on_main(accelerator, partial(_tell_least, recipe, shards, memory, force))
        # By one process: a checkpoint that is compared with its sums may have 100 GB.
        begin = partial(
            _begin, recipe, accelerator.num_processes, stack, command,
            output=output, resume=resume, resume_from=resume_from,
        )  # fmt: skip
        where, warnings = on_main(accelerator, begin)
        saved = (
            f"saved is {where.checkpoint}; go on with" if where.checkpoint else "nothing is saved yet; begin anew with"
        )
        if accelerator.is_main_process or launched_here() is None:
            tell_launcher(f"{saved}: {again}")
        with cpu_threads(recipe.training.num_threads):
            runner = _Runner(recipe, where, accelerator, plugins, command)
            for warning in warnings:
                runner.run.say(f"warning: {warning}")
            return runner.go()


def _tell_least(recipe: Recipe, processes: int, memory: int, force: bool) -> None:
    """Says what must stand in an accelerator's memory; UserError if it cannot."""
    click.echo(check_before_loading(recipe, processes, memory, force=force))


def _accelerator_memory(device: torch.device) -> int | None:
    """Bytes of it; None for a CPU, whose memory others use too."""
    return memory_of(device) if device.type != "cpu" else None


def _begin(
    recipe: Recipe,
    processes: int,
    stack: ExitStack,
    command: RunCommand,
    *,
    output: str | Path | None,
    resume: bool,
    resume_from: str | Path | None,
) -> tuple[Plan, list[str]]:
    """Where the run writes and goes on, and what is likely wrong with its data; `stack` holds its folder.

    Raises:
        UserError: something is missing, in a line for each thing; or the data, the checkpoint or the folder won't do.
    """
    training = recipe.training
    with user_errors("this run"):
        share_of_batch(training.batch_size, training.gradient_accumulation_steps, processes)
    if missing := list(recipe.missing(starts=False)):
        raise UserError("\n".join(missing))
    checked = check_before(recipe, processes)
    for named in (output, resume_from):
        if named is not None:
            _give_names(Path(named))
    where = plan(recipe, output=output, resume=resume, resume_from=resume_from, command=command)
    odd_starts = _check_starts(recipe, where.state.get("trained", ()))
    numbered = output is None and (where.checkpoint is None or where.branch)
    folder = stack.enter_context(claimed(where.folder, numbered=numbered))
    with disk_errors(folder):
        Checkpoints(folder / "checkpoints", keep=1).remove_leftovers()
    # Once more, now that nobody else writes there.
    where = plan(recipe, output=folder, resume=resume, resume_from=resume_from, command=command, seen=where)
    return where, [*(checked.warnings if checked is not None else ()), *odd_starts]


def _check_starts(recipe: Recipe, known: Collection[str]) -> list[str]:
    """Tries what experts start with, on a model without weights; what is likely not meant."""
    if not recipe.started() - set(known):
        return []
    with user_errors("experts"):
        return check_starts(recipe, empty_mixture(recipe, recipe.backbone.skeleton()), known)


def _give_names(folder: Path) -> None:
    """A checkpoint that was written whole, but not renamed when the run was killed, is one to go on from."""
    with suppress(OSError, UserError):  # what is no run's, or is under way, is the plan's affair
        if next((folder / "checkpoints").glob(".tmp-*"), None) is not None:
            with claimed(folder):
                Checkpoints(folder / "checkpoints", keep=1).give_names()


class _Runner:
    def __init__(
        self, recipe: Recipe, where: Plan, accelerator: "Accelerator", plugins: Plugins, command: RunCommand
    ) -> None:
        self.recipe, self.where, self.accelerator, self.plugins = recipe, where, accelerator, plugins
        self.folder = folder = where.folder
        # What goes on with a miniature is one.
        self.command = replace(command, smoke=where.state.get("smoke", command.smoke))
        with memory_errors(lambda: "loading the model", lambda _: loading_remedies(recipe)):
            known = where.state.get("trained", ())
            self.run = build_run(recipe, folder, accelerator, smoke=self.command.smoke, known=known)
        self.checkpoints = Checkpoints(folder / "checkpoints", recipe.training.keep_checkpoints, self.run.say)
        first, step = (where.state["stage"], where.state["step"]) if where.checkpoint is not None else (0, 0)
        with memory_errors(lambda: "trying the stages", lambda _: loading_remedies(recipe)):
            look_ahead(self.run, first, step, self._saved_experts(first))
        self.last_checkpoint: Path | None = None
        self.saving: Saving | None = None
        self.group: Any = None
        self.under_way = ""
        self.training: Training | None = None
        self.worked = False
        self.interruption = Interruption(lambda: f"stopped in stage {self.under_way}; {self._where_to_go_on()}")
        self.progress = Progress()
        self.trackers = Trackers(accelerator, recipe.training.trackers, str(folder), recipe.name)
        self.observers: list[Any] = [self.trackers]
        if self.run.main:
            self.observers = [MetricsFile(folder), Curves(folder), self.progress, self.trackers]

    def go(self) -> RunResult:
        """All stages, or those after the checkpoint."""
        smoke = " (a miniature)" if self.run.smoke else ""
        with ExitStack() as stack:
            stack.callback(self.trackers.stop)
            self._restore()
            if self.run.main:
                with disk_errors(self.folder):
                    self.checkpoints.folder.mkdir(exist_ok=True)  # first: by it a folder is known as a run's
                write_text(self.folder / "recipe.yaml", (MINIATURE if self.run.smoke else "") + self.recipe.to_yaml())
                self._take_history()
                self._write_cost()
                stack.enter_context(self._end_noted())
            self._tell(self.last_checkpoint)
            self.run.say(f"{self.recipe.name}{smoke} → {self.folder}")
            for observer in self.observers:
                self.plugins.manager.register(observer)
                stack.callback(self.plugins.manager.unregister, observer)
            stack.callback(self.progress.stop)
            try:
                with self.interruption:
                    self._stages()
            except WriteError as error:
                raise WriteError(f"{error}; {self._where_to_go_on()}") from error
            finally:  # what was begun does not go with what stops the run
                with suppress(UserError, RuntimeError):
                    self._await_checkpoint()
        self._write_page()
        self.run.say(f"done{smoke}: {self.folder}")
        return RunResult(self.folder, self.run.metrics, self.run.cost, self.last_checkpoint, self.run.smoke)

    def _write_page(self) -> None:
        """report.html; what keeps it from being written is said, and is no failure of a run that is done.

        What is planned is compared where it counts, on an accelerator; of a miniature few draws are enough.
        """
        if not self.run.main or (not self.worked and (self.folder / PAGE).exists()):
            return
        planned = self.accelerator.device.type != "cpu" and not self.run.smoke
        try:
            write_page(
                [self.folder],
                self.folder / PAGE,
                self.plugins,
                planned=planned,
                resamples=10 if self.run.smoke else 200,
            )
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.run.say(f"warning: no {PAGE}: {shorten(why, 200)}")

    def _begin_work(self) -> None:
        """Notes where this run goes on, and with which versions, where there is still something to do."""
        if self.worked or not self.run.main:
            return
        self.worked = True
        about = {
            "begun": time.strftime("%Y-%m-%d %H:%M"),
            "processes": described(
                self.accelerator, self.recipe.backbone.dtype, sharded=is_sharded(self.recipe, self.accelerator)
            ),
            "num_processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "versions": versions(),
        }
        write_text(self.folder / ENVIRONMENT, json.dumps(about, indent=1))

    @contextmanager
    def _end_noted(self) -> Iterator[None]:
        """Leaves a line in the folder on why the run ends before it is done; on the main process."""
        with disk_errors(self.folder):
            (self.folder / ENDED).unlink(missing_ok=True)
        try:
            yield
        except BaseException as error:
            word = "stopped" if isinstance(error, Interrupted) else "failed"
            why = str(error) if isinstance(error, Interrupted | UserError) else f"{type(error).__name__}: {error}"
            with suppress(OSError):  # a full disk may be what stops it
                (self.folder / ENDED).write_text(f"{word}: {' '.join(why.split())}\n", encoding="utf-8")
            raise

    def _restore(self) -> None:
        """Takes over everything from the checkpoint but the state of a training stage under way."""
        checkpoint, state = self.where.checkpoint, self.where.state
        if checkpoint is None:
            return
        with ways_out(self.command):
            experts, averages = read_weights(checkpoint, state, verified=True, pieces=True)
        self.run.mixture.load(experts, averages, str(checkpoint))
        self.run.metrics.update(state["metrics"])
        self.run.cost.update(state["cost"])
        self.last_checkpoint = checkpoint
        self.run.say(f"resuming from {checkpoint}: stage {state['stage_name']}, step {state['step']}")
        if others := sorted({".".join(key.split(".")[:2]) for key in self.where.changed}):
            self.run.say(f"other than there: {', '.join(others)}")

    def _take_history(self) -> None:
        """What was logged up to the checkpoint, where the run goes on in another folder."""
        checkpoint, state = self.where.checkpoint, self.where.state
        if checkpoint is None:
            return
        stages = [stage["name"] for stage in state["recipe"]["stages"]]
        for name in (METRICS, MEMORY, LEVELS):
            history = checkpoint.parent.parent / name
            if not (self.folder / name).exists() and history.is_file():
                with new_file(self.folder / name) as new:
                    shutil.copyfile(history, new)
                drop_later_lines(self.folder / name, stages, state["stage"], state["step"])

    def _stages(self) -> None:
        """The stages in order, from where the checkpoint stands."""
        checkpoint, state = self.where.checkpoint, self.where.state
        first, first_step = (state["stage"], state["step"]) if checkpoint is not None else (0, 0)
        reported = self._reported_since_checkpoint()
        for number, config in list(enumerate(self.recipe.stages))[first:]:
            self.under_way = config.name
            if isinstance(config, TrainingStageConfig):
                step = first_step if number == first else 0
                if step < config.steps:
                    self._begin_work()
                    if reported and self.where.changed and self.run.main:  # by a run that trained less
                        write_text(self.folder / RESULT, json.dumps(self.run.metrics, indent=1))
                    with self._memory_errors(config):
                        self._train(number, config, step, checkpoint if step else None)
                    reported = {}  # of other weights
            elif config.name in reported:
                self.run.metrics[config.name] = reported[config.name]
                self.run.say(f"stage {config.name}: done before")
            else:
                self._begin_work()
                self.run.say(f"stage {config.name}")
                self.run.mixture.settle()
                with self._memory_errors(config), user_errors(f"stage {config.name}"):
                    stage = config.build()
                    assert isinstance(stage, Stage)
                    stage.execute(self.run)
                if self.run.main:
                    self.run.metrics.setdefault(config.name, {})
                    write_text(self.folder / RESULT, json.dumps(self.run.metrics, indent=1))

    def _reported_since_checkpoint(self) -> dict[str, Any]:
        """What stages that train nothing reported after the checkpoint, if this folder's run was there before."""
        file = self.folder / RESULT
        if not file.is_file():
            return {}
        try:
            reported: dict[str, Any] = read_json(file)
            if not isinstance(reported, dict) or not all(isinstance(each, dict) for each in reported.values()):
                raise Damaged(file, "is damaged: it is not what stages reported, by name")
        except Damaged as error:
            raise UserError(f"{error}; remove it, and what it reported is done again") from error
        return reported

    def _train(self, number: int, config: TrainingStageConfig, step: int, checkpoint: Path | None) -> None:
        """One training stage, from `step` on; `checkpoint` holds its state if it is under way."""
        settings, hook = self.recipe.training, self.plugins.hook
        stage, dataset = config.build(), self.run.dataset
        assert isinstance(stage, TrainingStage)
        assert dataset is not None
        self.run.mixture.settle(*config.trained_experts())
        self.training = training = Training(self.run, config, step)
        with user_errors(f"stage {config.name}"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.recipe.seed, config.name, "setup"))  # what critics start as
            stage.setup(training)
            training.check_set_up()
            batches = load_batches(
                dataset,
                batch_size=settings.batch_size,
                accumulation=settings.gradient_accumulation_steps,
                seed=self.recipe.seed,
                stage=config.name,
                steps=range(step, config.steps),
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                num_workers=settings.num_workers,
            )
        if checkpoint is not None:
            with ways_out(self.command):
                try:
                    training.load_state(load_tree(checkpoint, "training", verified=True, pieces=True))
                except ValueError as error:
                    raise Damaged(checkpoint / "training.json", str(error)) from error
        with user_errors(f"stage {config.name}"):
            monitor = stage.monitor(training)
            preview = Preview(config.preview, training) if config.preview is not None else None
        cost = self.run.cost.setdefault(config.name, {"steps": 0, "forwards": 0, "seconds": 0.0})
        hook.on_stage_start(training=training)
        # Closed whatever happens: a worker left waiting would keep the process from ending.
        with closing(batches), self.interruption.deferred(), training.mixture.using(config.expert):
            if monitor is not None and step == 0:
                self._log(number, training, monitor, {})
            if step == 0:
                self._preview(training, preview)
            for batch in self._with_a_way_out(batches):
                begun, forwards = time.perf_counter(), training.mixture.forwards
                with training.micro_batch(), user_errors(f"stage {config.name}"):
                    stage.step(training, training.begin(batch))
                cost["forwards"] += (training.mixture.forwards - forwards) * self.accelerator.num_processes
                cost["seconds"] += time.perf_counter() - begun
                if batch.boundary:
                    training.end_step()
                    cost["steps"] += 1
                    self.progress.advance(training)
                    self._end_step(number, training, monitor, preview)
        if self.run.main:
            self._write_cost()
        hook.on_stage_end(training=training)
        training.release()
        self.training = None
        self.run.mixture.settle()
        # What is not trained yet starts as its parent is now; an evaluation may come before its turn.
        self.run.mixture.initialise(but=self._saved_experts(number + 1))

    def _with_a_way_out(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; says of data that cannot be read what is saved, and how to go on."""
        try:
            yield from batches
        except UserError as error:
            raise UserError(f"{error}; {self._where_to_go_on()}") from error

    def _end_step(self, number: int, training: Training, monitor: Monitor | None, preview: Preview | None) -> None:
        """After an optimiser step: numbers, a checkpoint, a stop, a preview, where they are due."""
        settings = self.recipe.training
        last = training.step == training.steps
        signum, written = self._on_any_rank(self.interruption.signum)
        saving = last or signum or (settings.checkpoint_every and training.step % settings.checkpoint_every == 0)
        measuring = monitor is not None and monitor.due()
        logging = last or measuring or training.step % settings.log_every == 0
        if saving or logging or training.metrics_are_due:
            try:
                metrics = training.take_metrics()  # such weights are never saved
            except NotFinite as error:
                self._stop_at(number, training, monitor, error)
            if logging:
                self._log(number, training, monitor if measuring else None, metrics)
        if written:
            self._await_checkpoint()
        if saving:
            self._save(number, training)
        if last or signum:
            self._await_checkpoint()
        if signum:
            raise Interrupted(
                signum, f"stopped at step {training.step} of {training.config.name}; {self._where_to_go_on()}"
            )
        self._preview(training, preview)

    def _preview(self, training: Training, preview: Preview | None) -> None:
        """After the checkpoint of the same step, which is safe then."""
        if preview is not None and preview.due() and (made := preview.make()) is not None:
            self.plugins.hook.on_preview(training=training, path=made)

    def _log(self, number: int, training: Training, monitor: Monitor | None, metrics: dict[str, float]) -> None:
        """Hands a step's numbers to the observers, with those of the monitor, if it is given."""
        if monitor is not None:
            with user_errors(f"stage {training.config.name}"):
                metrics = metrics | monitor.measure()
            try:
                training.check_finite(training.step, metrics)
            except NotFinite as error:
                self._stop_at(number, training, monitor, error)
        self.plugins.hook.on_step_end(training=training, metrics=metrics)

    def _stop_at(self, number: int, training: Training, monitor: Monitor | None, error: NotFinite) -> NoReturn:
        """Logs the step whose numbers are not finite, and raises what there is to say of it."""
        training.step = error.step
        self.plugins.hook.on_step_end(training=training, metrics=error.metrics)
        if monitor is not None and all(name.startswith("monitor") for name in error.broken):
            samples = monitor.samples
        else:
            assert self.run.dataset is not None
            samples = batch_of_step(
                self.run.dataset, batch_size=self.recipe.training.batch_size, seed=self.recipe.seed,
                stage=training.config.name, step=error.step - 1,
            )  # fmt: skip
        earlier = [path for path in self.checkpoints.all() if (parse_name(path.name) or (number,))[0] < number]
        with user_errors(str(error)):  # where a sample cannot be read again
            where = self._where_to_go_on()
            lower = partial(self.command.change, self.folder, source=earlier[-1] if earlier else None)
            message = explain(training, error, samples, self.last_checkpoint, where, lower)
        raise (UserError if self.run.main else SaidElsewhere)(message) from None  # all processes come here

    def _memory_errors(self, config: StageConfig) -> AbstractContextManager[None]:
        """Says of a stage that it runs out of memory, at which step, what to change and what is saved."""

        def where() -> str:
            return f"stage {config.name}" + (f", step {self.training.step + 1}" if self.training is not None else "")

        def advice(error: BaseException) -> str:
            return f"{remedies(self.run, config, error)}; {self._where_to_go_on()}"

        return memory_errors(where, advice)

    def _write_cost(self) -> None:
        file, text = self.folder / COST, json.dumps(self.run.cost, indent=1)
        if self.run.cost and not (file.is_file() and file.read_bytes() == text.encode()):
            write_text(file, text)

    def _on_any_rank(self, signum: int) -> tuple[int, bool]:
        """The signal that any process has got, or 0, and whether a checkpoint that was begun is done with on all.

        All processes must stop, and hear of a failure, at the same step.
        """
        if self.accelerator.num_processes == 1:
            return signum, self.saving is not None and self.saving.done()
        under_way = self.saving is not None and not self.saving.done()
        flags = torch.tensor([[signum, int(under_way)]], device=self.accelerator.device)
        most = self.accelerator.gather(flags).amax(0).tolist()
        return int(most[0]), self.saving is not None and not most[1]

    def _where_to_go_on(self) -> str:
        with suppress(UserError, RuntimeError):  # one that was begun may be there yet; if it fails, it is not named
            self._await_checkpoint()
        return self._going_on_from(self.last_checkpoint)

    def _going_on_from(self, checkpoint: Path | None) -> str:
        """What is saved, and the command that goes on."""
        if checkpoint is None:
            anew = self.command.begin(self.folder)
            return f"nothing is saved yet; begin it anew with: {anew}"
        branch = not belongs_to(checkpoint, self.folder)
        newest = self.checkpoints.there()[-1:] == [checkpoint]
        on = self.command.go_on(self.folder, None if newest else checkpoint, branch=branch)
        return f"saved is {checkpoint}; go on with: {on}"

    def _tell(self, checkpoint: Path | None) -> None:
        """Keeps for the launcher, or for this process itself, what is to be said where another one is lost."""
        if self.run.main or launched_here() is None:
            tell_launcher(self._going_on_from(checkpoint))

    def _saved_experts(self, number: int) -> set[str]:
        """The experts that stages before `number` train, and those that start with weights of their own.

        Both are in every checkpoint, so that what an `init` names may change or go once a run has one.
        """
        return self.recipe.started().union(*(stage.trained_experts() for stage in self.recipe.stages[:number]))

    def _save(self, number: int, training: Training) -> None:
        name = checkpoint_name(number, training.config.name, training.step)
        mixture = self.run.mixture
        trees = {
            "experts": {
                expert: dict(mixture.experts[expert].saved) for expert in sorted(self._saved_experts(number + 1))
            },
            "ema": {expert: average.average for expert, average in mixture.ema.items()},
            "training": training.state(),
            "state": {
                "format": FORMAT,
                "smoke": self.run.smoke,
                "stage": number,
                "stage_name": training.config.name,
                "step": training.step,
                "metrics": self.run.metrics,
                "cost": self.run.cost,
                "recipe": self.recipe.resolved(),
                "trained": sorted(self._saved_experts(number + 1)),
                "used": sorted({name for stage in self.recipe.stages[: number + 1] for name in stage.used_experts()}),
            },
        }
        if mixture.sharded:
            self._save_together(name, trees)
            return
        if self.run.main:
            with self._no_leftovers(), disk_errors(self.checkpoints.folder / name, bytes_of(trees)):
                self.checkpoints.save(name, trees)
        self.accelerator.wait_for_everyone()
        self._saved(self.checkpoints.folder / name)

    def _save_together(self, name: str, trees: Mapping[str, Any]) -> None:
        """Begins to save what is cut among processes: each writes its part, while training goes on."""
        self._await_checkpoint()

        def begin() -> Path:
            with self._no_leftovers(), disk_errors(self.checkpoints.folder / name, bytes_of(trees)):
                return self.checkpoints.begin(name)

        if self.group is None:
            self.group = torch.distributed.new_group(
                backend="gloo", timeout=timedelta(seconds=self.recipe.training.timeout)
            )
        temporary = on_main(self.accelerator, begin)
        self.saving = Saving(self.checkpoints, name, temporary, trees, self.group, done=self._tell)

    def _await_checkpoint(self) -> None:
        """Waits for a checkpoint that was begun, and takes note of it."""
        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        with self._no_leftovers():
            saving.wait()
        self._saved(saving.path)

    @contextmanager
    def _no_leftovers(self) -> Iterator[None]:
        """Removes what is half written where the block fails."""
        try:
            yield
        except BaseException:
            if self.run.main:
                with suppress(OSError):
                    self.checkpoints.remove_leftovers()
            raise

    def _saved(self, checkpoint: Path) -> None:
        self.last_checkpoint = checkpoint
        self._tell(checkpoint)
        if self.run.main:
            assert self.training is not None
            self.plugins.hook.on_checkpoint(training=self.training, path=checkpoint)
