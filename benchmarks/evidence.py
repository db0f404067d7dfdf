"""DCM against its baselines and ablations on the digits task: tuned rates, several seeds, one table.

    python benchmarks/evidence.py                 baselines and DCM
    python benchmarks/evidence.py --ablations     DCM with one thing changed, at DCM's rate
    python benchmarks/evidence.py --quick         a fifth of the steps, 400 samples, two seeds, two rates

It may be stopped at any time: called again, it goes on where it was and skips what is done. The cost is stated first.

Rules. DCM and its baselines spend the same number of network forwards in training; ablations do, where what they leave
out can be made up for in steps. Each method has its learning rate tuned on the same grid, by the Fréchet distance at 4
steps, with a training seed and evaluation noise of their own; sampling along the ODE and sampling with fresh noise are
tuned apart. A grid whose best rate lies at its edge is extended there. Then every method is trained once for each seed,
and all are evaluated on the same noise.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import charts
import torch

from moedistill import MetricInputs, load_recipe, plotting
from moedistill.data.loading import collate
from moedistill.recipe.keys import Recipe, TrainingStageConfig
from moedistill.runs.resume import changed_keys, comparable
from moedistill.runs.saved import read_state
from moedistill.runs.tables import Estimate, Line, Table, methods, read_records, tabulate
from moedistill.runtime.checkpoint import Checkpoints, parse_name
from moedistill.stages.evaluate import EvaluateConfig
from moedistill.stages.run import COST


@dataclass(frozen=True)
class Method:
    """A way of sampling what a recipe trains: its candidates called by a number of steps, followed by `sampling`."""

    title: str
    recipe: str
    sampling: str = ""

    def candidate(self, steps: str) -> str:
        return steps + self.sampling


TEACHER = "baselines/digits_few_step_teacher"
RE_NOISED, SOME = ", re-noised", ", eta 0.3"
"""With all noise drawn anew after each step, and with some of it."""
DCM = Method("DCM", "evidence_digits")
ONE_PHASE = Method("DCM, one phase each", "baselines/digits_one_phase")
LCM = Method("LCM", "baselines/digits_lcm")
PCM_EDGES = Method("PCM, DCM's edges", "baselines/digits_pcm_edges")
TWO_PHASE = Method("one student, two phases", "baselines/digits_two_phase")
PROGRESSIVE = Method("progressive phases", "baselines/digits_progressive")
PROGRESSIVE_RE_NOISED = replace(PROGRESSIVE, title=PROGRESSIVE.title + RE_NOISED, sampling=RE_NOISED)


def _with_noise(*methods: Method) -> list[Method]:
    """Each, and the same with some noise and with all noise drawn anew after every step."""
    noisy = [replace(m, title=m.title + sampling, sampling=sampling) for m in methods for sampling in (SOME, RE_NOISED)]
    return [*methods, *noisy]


METHODS = (
    *_with_noise(DCM, ONE_PHASE),
    *_with_noise(LCM),
    Method("PCM", "baselines/digits_pcm"),
    PCM_EDGES,
    TWO_PHASE,
    PROGRESSIVE,
    PROGRESSIVE_RE_NOISED,
)
TEACHERS = (Method("teacher", TEACHER), Method("teacher, shift 5", TEACHER, ", shift 5"))
"""Untrained."""
PLOTTED = (DCM, ONE_PHASE, PCM_EDGES, PROGRESSIVE_RE_NOISED, TEACHERS[1])
"""DCM, and those it is compared with first of all."""
CONTROLS = (", semantic + teacher", ", semantic alone")
"""Samplings with the untouched teacher, or the semantic expert, in place of the other experts."""
ABLATIONS = (
    "without_tc",
    "without_gan",
    "without_fm",
    "without_gan_fm",
    "huber_only",
    "semantic_only",
    "semantic_lora",
    "detail_from_teacher",
    "two_full_experts",
    "boundary_25",
    "boundary_35",
    "student_target",
)
"""Those whose answer may depend on where phases end, of the shipped ones on digits."""
SEEDS = (0, 1, 2)
RATES = (1e-4, 3e-4, 9.5e-4)
QUICK: dict[str, Any] = {"scale": 0.2, "samples": 400}
QUICK_RATES = (3e-4, 9.5e-4)
"""One or the other was the best of each method, found with all of the steps; too few to tune anew with."""
FACTOR = 10**0.5
EXTENSIONS = 3
TUNING_SEED = 1000
"""Of training and of the evaluation's noise, so that neither is part of the result."""
TUNED_BY = ("4 steps", "frechet")
STEPS = {name: int(name.partition(" ")[0]) for name in ("1 step", *(f"{n} steps" for n in (2, 3, 4, 6, 8, 12)))}
TITLES = {"frechet": "Fréchet distance to real videos", "paired_distance": "Distance to the teacher's 50 steps"}
MORE = {
    "median_distance": "Median distance to the teacher's 50 steps",
    "flips": "Share of samples that land elsewhere than the teacher's",
    "diversity": "Diversity, relative to the teacher's",
    "coverage": "Coverage of held-out videos",
    "density": "Density around held-out videos",
}
PAIRED = ("paired_distance", "median_distance", "flips", "diversity")
"""Kinds that compare with the reference, which has nothing to be compared with itself."""
REFERENCE = "teacher, 50 steps"
RESAMPLES = 200
"""Of the evaluation's samples, for intervals."""
SECONDS_PER_FORWARD = 1.7e-3
"""On one of two busy cores, backward passes included: the estimate until a run has been timed."""
OVERHEAD = 40.0
"""Seconds of a run that are not training: start and evaluation."""


@dataclass(frozen=True)
class Job:
    """One run of a recipe."""

    recipe: str
    folder: Path
    settings: tuple[str, ...]
    forwards: int
    begun: Path | None = None
    """A checkpoint of another run to go on from."""

    @property
    def metrics(self) -> dict[str, dict[str, float]] | None:
        """What its evaluation said; None if it is not done."""
        file = self.folder / "result.json"
        results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        metrics: dict[str, dict[str, float]] | None = results.get("evaluate")
        if metrics is None:
            return None
        found = load_recipe(self.folder / "recipe.yaml")
        if comparable(found.resolved()) != comparable(self.load().resolved()):
            raise SystemExit(
                f"{self.folder} is of another recipe or other settings: move it away, or use another --output"
            )
        return metrics

    def load(self) -> Recipe:
        return load_recipe(self.recipe, self.settings)

    def branching(self, other: "Job") -> "Job":
        """The same run begun where the first stage of `other`, a finished run, ends; itself if its own is different."""
        checkpoints = Checkpoints(other.folder / "checkpoints", keep=1).all()
        begun = next((path for path in reversed(checkpoints) if (parse_name(path.name) or (1,))[0] == 0), None)
        if begun is None or changed_keys(self.load(), read_state(begun))[0]:
            return self
        first, *_ = json.loads((other.folder / COST).read_text(encoding="utf-8")).values()
        return replace(self, begun=begun, forwards=self.forwards - first["forwards"])

    def execute(self) -> None:
        command = [sys.executable, "-m", "moedistill", "run", self.recipe, "--output", str(self.folder)]
        command += [f"--set={setting}" for setting in self.settings]
        if Checkpoints(self.folder / "checkpoints", keep=1).there():
            command.append("--resume")
        elif self.begun is not None:
            command.append(f"--resume-from={self.begun}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("ab") as log, subprocess.Popen(command, stdout=log, stderr=log) as child:
            CHILDREN.append(child)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)}\nfailed; see {self.folder / 'log.txt'}")
        print(f"done: {self.folder}", flush=True)


CHILDREN: list[subprocess.Popen[bytes]] = []


def stop(*_: object) -> None:
    """The answer to SIGTERM."""
    raise SystemExit("stopped; the same command goes on")


class Evidence:
    """All runs of one study below one folder."""

    def __init__(self, folder: Path, jobs: int = 1, scale: float = 1.0, samples: int | None = None) -> None:
        self.folder, self.jobs, self.scale, self.samples = folder, jobs, scale, samples

    def job(self, recipe: str, folder: Path, rate: float | None, seed: int, noise: int) -> Job:
        """A run of `recipe`; `rate` is that of its first stage, and the others keep their ratio to it."""
        settings = [f"seed={seed}", f"stages.evaluate.seed={noise}", "stages.evaluate.pictures=0"]
        if self.samples is not None:
            settings.append(f"stages.evaluate.samples={self.samples}")
        forwards = 0
        loaded = load_recipe(recipe)
        guided = loaded.backbone.guidance.classifier_free_scale(loaded.backbone.bases()[0]) != 1.0
        trained = [stage for stage in loaded.stages if isinstance(stage, TrainingStageConfig)]
        for stage in trained:
            steps = max(1, round(stage.steps * self.scale))
            settings.append(f"stages.{stage.name}.steps={steps}")
            if rate is not None:
                scaled = rate * stage.optimizer.lr / trained[0].optimizer.lr
                settings.append(f"stages.{stage.name}.optimizer.lr={scaled:.2e}")
            # Student, target and teacher, guided; the probe reads two more, or three.
            data = any(loss.needs_data_probe for loss in stage.losses)
            per_sample = (4 + data if stage.probe else 2) + (2 if guided else 1)
            forwards += steps * loaded.training.batch_size * per_sample
        if recipe != TEACHER:
            settings.append(f"stages.evaluate.reference_samples={self.teacher(noise) / 'evaluate/latents.safetensors'}")
        return Job(recipe, folder, tuple(settings), forwards)

    def teacher(self, noise: int) -> Path:
        """The folder of the teacher's own evaluation on this noise, where the others find its samples."""
        return self.folder / "teacher" / f"noise{noise}"

    def teachers(self) -> list[Job]:
        return [self.job(TEACHER, self.teacher(noise), None, 0, noise) for noise in (0, TUNING_SEED)]

    def tuning(self, method: Method, rate: float) -> Job:
        return self._trained("tuning", method, rate, TUNING_SEED, TUNING_SEED)

    def finals(self, method: Method, rate: float, seeds: Sequence[int]) -> list[Job]:
        return [self._trained("final", method, rate, seed, 0) for seed in seeds]

    def _trained(self, kind: str, method: Method, rate: float, seed: int, noise: int) -> Job:
        folder = self.folder / kind / _short(method.recipe) / f"{rate:.1e}" / f"seed{seed}"
        return self.job(method.recipe, folder, rate, seed, noise)

    def execute(self, jobs: Sequence[Job]) -> None:
        """What is not done of `jobs`, several at a time."""
        jobs = _distinct(jobs)
        open_jobs = [job for job in jobs if job.metrics is None]
        self.state_cost(open_jobs, f"of {len(jobs)} to do")
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(Job.execute, job) for job in open_jobs]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                # What is under way saves itself; what has not begun never does.
                pool.shutdown(wait=False, cancel_futures=True)
                for child in CHILDREN:
                    if child.poll() is None:
                        child.terminate()
                raise

    def state_cost(self, jobs: Sequence[Job], what: str) -> None:
        rate = self.seconds_per_forward()
        seconds = sum(OVERHEAD + job.forwards * rate for job in jobs)
        print(
            f"{len(jobs)} runs {what}: about {seconds / 60:.0f} min of one core, "
            f"{seconds / 60 / self.jobs:.0f} min with {self.jobs} at a time",
            flush=True,
        )

    def seconds_per_forward(self) -> float:
        """As measured in the runs that are done."""
        costs = [json.loads(file.read_text(encoding="utf-8")).values() for file in self.folder.rglob(COST)]
        timed = [sum(s["seconds"] for s in cost) / sum(s["forwards"] for s in cost) for cost in costs if cost]
        return statistics.median(timed) if timed else SECONDS_PER_FORWARD

    def tune(
        self, methods: Sequence[Method], rates: Sequence[float], extensions: int
    ) -> tuple[dict[Method, float], dict[str, list[float]]]:
        """The best rate of each method, and the rates that its recipe was tried with.

        A recipe's grid is extended until the best rates of all its methods lie inside, at most `extensions` times.
        """
        grids = {method.recipe: sorted(rates) for method in methods}
        for remaining in range(extensions, -1, -1):
            self.execute([self.tuning(method, rate) for method in methods for rate in grids[method.recipe]])
            best = {method: min(grids[method.recipe], key=partial(self.score, method)) for method in methods}
            wider = {r: _widened(grid, [best[m] for m in methods if m.recipe == r]) for r, grid in grids.items()}
            if wider == grids or not remaining:
                break
            grids = wider
        return best, grids

    def score(self, method: Method, rate: float) -> float:
        return _score(method, self.tuning(method, rate))

    def tuning_table(self, best: Mapping[Method, float], grids: Mapping[str, Sequence[float]]) -> str:
        """What every run of the tuning scored, by method and rate; the best in bold."""
        tried = sorted({rate for grid in grids.values() for rate in grid})
        rows = []
        for method, chosen in best.items():
            scores = {rate: f"{self.score(method, rate):.0f}" for rate in grids[method.recipe]}
            scores[chosen] = f"**{scores[chosen]}**"
            rows.append([method.title, *(scores.get(rate, "") for rate in tried)])
        return markdown(["method", *(f"{rate:.1e}" for rate in tried)], rows)


def _widened(grid: list[float], best: Collection[float]) -> list[float]:
    """With one more rate beyond each edge that is among the best."""
    lower = [float(f"{grid[0] / FACTOR:.1e}")] if grid[0] in best else []
    higher = [float(f"{grid[-1] * FACTOR:.1e}")] if grid[-1] in best else []
    return [*lower, *grid, *higher]


def _score(method: Method, job: Job) -> float:
    """What rates are tuned by, of a finished run."""
    assert job.metrics is not None
    steps, metric = TUNED_BY
    return job.metrics[method.candidate(steps)][metric]


def _distinct(jobs: Iterable[Job]) -> list[Job]:
    """Each run once: methods that differ in their sampling share their training."""
    return list({job.folder: job for job in jobs}.values())


def _short(recipe: str) -> str:
    return recipe.rpartition("/")[2]


def ablations() -> list[Method]:
    return [Method(name.replace("_", " "), f"ablations/digits_{name}") for name in ABLATIONS]


def tabulated(jobs: Sequence[Job], base: Job) -> Table:
    """Means, intervals and differences to the method of `base` with as many steps, however the steps are taken."""
    records = read_records([job.folder for job in _distinct(jobs)])
    grouped = methods(records)
    # By its folder: a recipe that was trained at several rates is several methods.
    [against] = [name for name, alike in grouped.items() if base.folder in [record.folder for record in alike]]
    return tabulate(records, against=against, resamples=RESAMPLES, counterpart=lambda name: name.partition(",")[0])


class Results:
    """What tables and plots show: for each method the lines of the runs at its own rate.

    Args:
        table: of all runs.
        jobs: one finished run of each method.
    """

    def __init__(self, table: Table, jobs: Mapping[Method, Job]) -> None:
        self.methods = list(jobs)
        self._table = table
        ran = {run["folder"]: run["method"] for run in table.runs}
        lines = {(line.method, line.candidate): line for line in table.lines}
        self._lines = {
            (method, steps): lines[key]
            for method, job in jobs.items()
            for steps in STEPS
            if (key := (ran[str(job.folder)], method.candidate(steps))) in lines
        }

    @cached_property
    def reference(self) -> Mapping[str, Estimate]:
        """The teacher in all its steps."""
        return next(line.values for line in self._table.lines if line.candidate == REFERENCE)

    @cached_property
    def real(self) -> Mapping[str, float]:
        """Real videos in place of samples."""
        return real_videos(evaluation(DCM.recipe).samples)

    def __call__(self, method: Method, steps: str) -> Line | None:
        return self._lines.get((method, steps))

    def by_steps(self, kind: str, differences: bool = False) -> str:
        """One row for each method, one column for each number of steps."""
        rows = []
        for method in self.methods:
            lines = [self(method, steps) for steps in STEPS]
            values = [(line.differences if differences else line.values) if line else {} for line in lines]
            rows.append([method.title, *(str(value.get(kind, "")) for value in values)])
        return markdown(["method", *STEPS], [row for row in rows if any(row[1:])])

    def by_metric(self, steps: str) -> str:
        """One row for each method, one column for each metric, as means."""
        lines = {method.title: line for method in self.methods if (line := self(method, steps))}
        kinds = list(dict.fromkeys(kind for line in lines.values() for kind in line.values))
        head = ["method", *(kind.replace("_", " ") for kind in kinds)]
        rows = [[n, *(f"{line.values[kind].mean:.3g}" for kind in kinds)] for n, line in lines.items()]
        return markdown(head, rows)

    def markdown(self) -> str:
        parts = []
        for kind, title in {**TITLES, **MORE}.items():
            own = f"{self.reference[kind]} for the teacher at 50 steps, {self.real[kind]:.3g} for the training videos."
            parts += [f"## {title}", *([own] if kind not in PAIRED else []), self.by_steps(kind)]
            parts += [f"Difference to {DCM.title} with as many steps:", self.by_steps(kind, differences=True)]
        parts += ["## All metrics, 4 steps", self.by_metric("4 steps")]
        return "\n\n".join(parts)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _controls(jobs: Mapping[Method, Job]) -> dict[Method, Job]:
    """Those with stand-ins, of the runs that have trained their own semantic expert."""
    own = {method: job for method, job in jobs.items() if job.begun is None}
    return {Method(m.title + control, m.recipe, control): job for m, job in own.items() for control in CONTROLS}


def every_run(table: Table, folder: Path) -> str:
    """Each run with its training and its Fréchet distance at 4 steps."""
    lines = {(line.method, line.candidate): line for line in table.lines}
    rows = []
    for run in table.runs:
        seeds = [other["seed"] for other in table.runs if other["method"] == run["method"]]
        scored = lines[run["method"], "4 steps"].values["frechet"].seeds[seeds.index(run["seed"])]
        costs = [f"{run[what]:.0f}" for what in ("steps", "forwards", "seconds")]
        rows.append([str(Path(run["folder"]).relative_to(folder)), *costs, f"{scored:.0f}"])
    return markdown(["run", "steps", "forwards", "seconds of training", "FD, 4 steps"], rows)


def write(folder: Path, name: str, table: Table, parts: Sequence[str]) -> None:
    """`parts` and all of `table` as Markdown, and the table as JSON."""
    parts = [*parts, "## Every run", every_run(table, folder)]
    (folder / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(as_json(table, folder), encoding="utf-8")
    print(f"{folder / name}.md")


def as_json(table: Table, folder: Path) -> str:
    """A table, with six digits of every number and runs named below the folder."""
    runs = [{**run, "folder": str(Path(run["folder"]).relative_to(folder))} for run in table.runs]
    return json.dumps(_rounded({**table.plain(), "runs": runs}))


def _rounded(value: Any) -> Any:
    """Plain data with six digits of every number."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def plot_steps(results: Results, file: Path) -> None:
    """Fréchet distance against network evaluations: DCM and those it is compared with first of all."""
    lines: dict[str, dict[int, Estimate]] = {}
    for method in PLOTTED:
        cost = 2 if method in TEACHERS else 1  # the guided teacher evaluates its network twice
        shown = {cost * STEPS[steps]: line.values["frechet"] for steps in STEPS if (line := results(method, steps))}
        lines |= {method.title: shown} if shown else {}
    references = {"real videos": results.real["frechet"], "teacher, 50 steps": results.reference["frechet"].mean}
    charts.curves(file, lines, references, "Fréchet distance to real videos")


def evaluation(recipe: str) -> EvaluateConfig:
    """A recipe's evaluation."""
    [config] = [stage for stage in load_recipe(recipe).stages if isinstance(stage, EvaluateConfig)]
    return config


def real_videos(samples: int) -> dict[str, float]:
    """What so many of the task's own videos score, through the codec, as samples and reference at once."""
    loaded = load_recipe(DCM.recipe)
    backbone, data = loaded.backbone.build(), loaded.data
    assert data is not None
    dataset = data.build(backbone)
    latents, cond = collate([dataset[number * len(dataset) // samples] for number in range(samples)])
    videos = backbone.decode(latents)
    inputs = MetricInputs(videos, latents, videos, latents, cond, backbone.fps)
    return {metric.kind: metric.build()(inputs) for metric in evaluation(DCM.recipe).metrics}


def by_more_steps(jobs: Mapping[Method, Sequence[Job]]) -> str:
    """What more steps change in what the same runs sample in fewer."""
    rows = []
    for method, runs in jobs.items():
        records = read_records([job.folder for job in runs])
        taken = [steps for steps in STEPS if method.candidate(steps) in records[0].rows]
        fewer = {method.candidate(more): method.candidate(less) for less, more in pairwise(taken)}
        [against] = methods(records)
        table = tabulate(
            records, against=against, metrics=list(TITLES), resamples=RESAMPLES, counterpart=partial(_looked_up, fewer)
        )
        changes = {line.candidate: line.differences for line in table.lines}
        for less, more in pairwise(taken):
            change = changes[method.candidate(more)]
            rows.append([method.title, f"{STEPS[less]} → {STEPS[more]}", *(str(change[kind]) for kind in TITLES)])
    return markdown(["method", "steps", *TITLES.values()], rows)


def to_the_teacher(jobs: Mapping[Method, Sequence[Job]]) -> str:
    """What the runs' samples have more or less than the teacher's in all its steps, of what real videos score too."""
    kinds = {"frechet": TITLES["frechet"], **{kind: title for kind, title in MORE.items() if kind not in PAIRED}}
    rows = []
    for method, runs in jobs.items():
        records = read_records([job.folder for job in runs])
        [against] = methods(records)
        table = tabulate(
            records, against=against, metrics=list(kinds), resamples=RESAMPLES, counterpart=lambda _: REFERENCE
        )
        lines = {line.candidate: line.differences for line in table.lines}
        for steps in STEPS:
            if (differences := lines.get(method.candidate(steps))) is not None:
                rows.append([method.title, str(STEPS[steps]), *(str(differences[kind]) for kind in kinds)])
    return markdown(["method", "steps", *kinds.values()], rows)


def _looked_up(names: Mapping[str, str], name: str) -> str:
    return names.get(name, name)


def plot_differences(results: Results, file: Path) -> None:
    """What each ablation changes at 4 steps, as a forest plot."""
    charts.forest(
        file,
        {
            title: {
                method.title: line.differences[kind]
                for method in results.methods
                if (line := results(method, "4 steps")) and kind in line.differences
            }
            for kind, title in TITLES.items()
        },
    )


def run_baselines(evidence: Evidence, seeds: Sequence[int], rates: Sequence[float], extensions: int) -> None:
    """Tunes, trains and tabulates DCM and its baselines."""
    folder = evidence.folder
    plan = evidence.teachers() + [evidence.tuning(method, rate) for method in METHODS for rate in rates]
    plan += [job for method in METHODS for job in evidence.finals(method, rates[0], seeds)]
    evidence.state_cost(_distinct(plan), "in all, with what is done already, if no grid is extended")
    evidence.execute(evidence.teachers())
    tuned, grids = evidence.tune(METHODS, rates, extensions)
    (folder / "rates.json").write_text(
        json.dumps({method.title: rate for method, rate in tuned.items()}, indent=1), encoding="utf-8"
    )
    # Seed by seed: should it be stopped, all methods have as many.
    finals = [job for seed in seeds for method, rate in tuned.items() for job in evidence.finals(method, rate, [seed])]
    evidence.execute(finals)
    [teacher, _] = evidence.teachers()
    one_each = {method: evidence.finals(method, rate, seeds)[0] for method, rate in tuned.items()}
    table = tabulated([teacher, *finals], one_each[DCM])
    shown = dict.fromkeys(TEACHERS, teacher) | one_each
    results = Results(table, shown | _controls({m: one_each[m] for m in (DCM, ONE_PHASE) if m in one_each}))
    by_method = {method: evidence.finals(method, rate, seeds) for method, rate in tuned.items()}
    parts = [
        results.markdown(),
        "## Difference to the teacher at 50 steps",
        to_the_teacher(
            {method: runs for method, runs in by_method.items() if method.recipe in (DCM.recipe, ONE_PHASE.recipe)}
        ),
        "## What more steps change, of the same runs",
        by_more_steps(by_method),
    ]
    write(folder, "evidence", table, [*parts, "## Tuning", evidence.tuning_table(tuned, grids)])
    plot_steps(results, folder / "evidence.png")


def tuned_rates(folder: Path) -> dict[str, float]:
    """The rates that `run_baselines` has found, by a method's title."""
    file = folder / "rates.json"
    if not file.is_file():
        raise SystemExit(f"{file} is missing: run evidence.py first, without --ablations; it finds the rates")
    rates: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return rates


def run_ablations(evidence: Evidence, seeds: Sequence[int]) -> None:
    """Trains and tabulates the ablations at the rate that was found for DCM.

    Those that change nothing before DCM's first stage ends begin there.
    """
    folder = evidence.folder
    rate = tuned_rates(folder)[DCM.title]
    finals = evidence.finals(DCM, rate, seeds)
    evidence.execute(finals)
    # Seed by seed, as above.
    jobs = {
        (method, seed): evidence.finals(method, rate, [seed])[0].branching(base)
        for seed, base in zip(seeds, finals, strict=True)
        for method in ablations()
    }
    evidence.execute(list(jobs.values()))
    table = tabulated([*finals, *jobs.values()], finals[0])
    one_each = {DCM: finals[0]} | {method: jobs[method, seeds[0]] for method in ablations()}
    results = Results(table, one_each | _controls(one_each))
    write(folder, "ablations", table, [results.markdown()])
    plot_differences(Results(table, one_each | _controls({DCM: finals[0]})), folder / "ablations.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablations", action="store_true", help="DCM's ablations in place of the baselines")
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps, 400 samples, two seeds, two rates")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    plotting.require()
    signal.signal(signal.SIGTERM, stop)

    output = args.output.with_name(f"{args.output.name}-quick") if args.quick else args.output
    evidence = Evidence(output.resolve(), args.jobs, **(QUICK if args.quick else {}))
    seeds = SEEDS[:2] if args.quick else SEEDS
    if args.ablations:
        run_ablations(evidence, seeds)
    else:
        run_baselines(evidence, seeds, *((QUICK_RATES, 0) if args.quick else (RATES, EXTENSIONS)))


if __name__ == "__main__":
    main()
