"""DCM against its baselines and ablations on the digits task: tuned rates, several seeds, one table.

    python benchmarks/evidence.py                 baselines and DCM
    python benchmarks/evidence.py --ablations     DCM with one thing changed, at DCM's rate
    python benchmarks/evidence.py --quick         a quarter of the steps, two seeds, two rates; no grid is extended

It may be stopped at any time: called again, it goes on where it was and skips what is done. The cost is stated first.

Rules. DCM and its baselines spend the same number of network forwards in training; ablations do, where what they leave
out can be made up for in steps. Each method has its learning rate tuned on the same grid, by the Fréchet distance at 4
steps, with a training seed and evaluation noise of their own. A grid whose best rate lies at its edge is extended
there. Then every method is trained once for each seed, and all are evaluated on the same noise.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moedistill import load_recipe, plotting
from moedistill.checkpoint import Checkpoints
from moedistill.recipe import shipped_recipes
from moedistill.report import Table, read_records, tabulate
from moedistill.stages.base import TrainingStageConfig
from moedistill.train import comparable

TEACHER = "baselines/digits_few_step_teacher"
DCM = "evidence_digits"
BASELINES = (
    "baselines/digits_lcm",
    "baselines/digits_pcm",
    "baselines/digits_two_phase",
    "baselines/digits_progressive",
)
SEEDS = (0, 1, 2)
RATES = (3e-5, 1e-4, 3e-4)
FACTOR = 10**0.5
EXTENSIONS = 3
TUNING_SEED = 1000
"""Of training and of the evaluation's noise, so that neither is part of the result."""
TUNED_BY = ("4 steps", "frechet")
STEPS = {"1 step": 1, "2 steps": 2, "4 steps": 4, "8 steps": 8}
"""Candidates that every evaluation has."""
RESAMPLES = 200
"""Of the evaluation's samples, for intervals."""
SECONDS_PER_FORWARD = 1.2e-3
"""On one core, backward passes included: the estimate until a run has been timed."""
OVERHEAD = 30.0
"""Seconds of a run that are not training: start and evaluation."""


@dataclass(frozen=True)
class Job:
    """One run of a recipe."""

    recipe: str
    folder: Path
    settings: tuple[str, ...]
    forwards: int

    @property
    def metrics(self) -> dict[str, dict[str, float]] | None:
        """What its evaluation said; None if it is not done."""
        file = self.folder / "result.json"
        results = json.loads(file.read_text()) if file.is_file() else {}
        metrics: dict[str, dict[str, float]] | None = results.get("evaluate")
        if metrics is not None and comparable(load_recipe(self.folder / "recipe.yaml").resolved()) != self._wanted():
            raise SystemExit(
                f"{self.folder} is of another recipe or other settings: move it away, or use another --output"
            )
        return metrics

    def _wanted(self) -> dict[str, Any]:
        return comparable(load_recipe(self.recipe, self.settings).resolved())

    def execute(self) -> None:
        command = [sys.executable, "-m", "moedistill", "run", self.recipe, "--output", str(self.folder)]
        command += [f"--set={setting}" for setting in self.settings]
        if Checkpoints(self.folder / "checkpoints", keep=1).all():
            command.append("--resume")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a") as log, subprocess.Popen(command, stdout=log, stderr=log) as child:
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

    def __init__(self, folder: Path, scale: float, jobs: int) -> None:
        self.folder, self.scale, self.jobs = folder, scale, jobs

    def job(self, recipe: str, folder: Path, rate: float | None, seed: int, noise: int, scale: float = 1.0) -> Job:
        """A run of `recipe` with `scale` of its steps."""
        settings = [f"seed={seed}", f"stages.evaluate.seed={noise}", "stages.evaluate.pictures=0"]
        forwards = 0
        loaded = load_recipe(recipe)
        guided = loaded.backbone.guidance.classifier_free_scale(loaded.backbone.bases()[0]) != 1.0
        for stage in loaded.stages:
            if isinstance(stage, TrainingStageConfig):
                steps = max(1, round(stage.steps * self.scale * scale))
                settings.append(f"stages.{stage.name}.steps={steps}")
                if rate is not None:
                    settings.append(f"stages.{stage.name}.optimizer.lr={rate:.2e}")
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

    def tuning(self, recipe: str, rate: float) -> Job:
        return self.job(recipe, self.folder / "tuning" / _short(recipe) / f"{rate:.1e}", rate, TUNING_SEED, TUNING_SEED)

    def finals(self, recipe: str, rate: float, seeds: Sequence[int]) -> list[Job]:
        return [self.job(recipe, self.folder / "final" / _short(recipe) / f"seed{s}", rate, s, 0) for s in seeds]

    def smaller(self, recipe: str, rate: float, seed: int, budget: float) -> Job:
        """The run with this share of its steps."""
        return self.job(recipe, self.folder / "budgets" / f"{budget:g}" / _short(recipe), rate, seed, 0, budget)

    def execute(self, jobs: Sequence[Job]) -> None:
        """What is not done of `jobs`, several at a time."""
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
        costs = [json.loads(file.read_text()).values() for file in self.folder.rglob("cost.json")]
        timed = [sum(s["seconds"] for s in cost) / sum(s["forwards"] for s in cost) for cost in costs if cost]
        return statistics.median(timed) if timed else SECONDS_PER_FORWARD

    def tune(self, recipes: Sequence[str], rates: Sequence[float], extensions: int) -> dict[str, float]:
        """The best rate of each recipe; grids are extended until it lies inside, at most `extensions` times."""
        grids = {recipe: sorted(rates) for recipe in recipes}
        for remaining in range(extensions, -1, -1):
            self.execute([self.tuning(recipe, rate) for recipe, grid in grids.items() for rate in grid])
            best = {recipe: min(grid, key=lambda rate: self.score(recipe, rate)) for recipe, grid in grids.items()}
            wider = dict(self._widened(grids, best))
            if not wider or not remaining:
                break
            grids.update(wider)
        return best

    @staticmethod
    def _widened(grids: dict[str, list[float]], best: dict[str, float]) -> Iterator[tuple[str, list[float]]]:
        for recipe, grid in grids.items():
            if best[recipe] == grid[0]:
                yield recipe, [float(f"{grid[0] / FACTOR:.1e}"), *grid]
            elif best[recipe] == grid[-1]:
                yield recipe, [*grid, float(f"{grid[-1] * FACTOR:.1e}")]

    def score(self, recipe: str, rate: float) -> float:
        metrics = self.tuning(recipe, rate).metrics
        assert metrics is not None
        candidate, metric = TUNED_BY
        return metrics[candidate][metric]


def _short(recipe: str) -> str:
    return recipe.rpartition("/")[2]


def ablations() -> list[str]:
    """The shipped ablations on digits."""
    return [name for name in shipped_recipes() if name.startswith("ablations/digits_")]


def write(folder: Path, name: str, runs: Sequence[Path], against: str) -> None:
    """The table of `runs` as Markdown and JSON, and its plot."""
    table = tabulate(read_records(runs), against=against, resamples=RESAMPLES)
    (folder / f"{name}.md").write_text(table.markdown() + "\n")
    (folder / f"{name}.json").write_text(json.dumps(table.plain(), indent=1))
    plot_steps(table, folder / f"{name}.png")
    print(f"{folder / name}.md")


def plot_steps(table: Table, file: Path) -> None:
    """Quality against sampling steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, kind, title in zip(
        figure.subplots(1, 2),
        ("frechet", "paired_distance"),
        ("Fréchet distance to real videos", "distance to the teacher's 50 steps"),
        strict=True,
    ):
        for method in dict.fromkeys(line.method for line in table.lines):
            shown = [line for line in table.lines if line.method == method and line.candidate in STEPS]
            values = [line.values[kind] for line in shown]
            spread = [[v.mean - v.low for v in values], [v.high - v.mean for v in values]]
            axes.errorbar(
                [STEPS[line.candidate] for line in shown], [v.mean for v in values], spread,
                marker="o", capsize=3, label=method, linestyle="--" if method == _short(TEACHER) else "-",
            )  # fmt: skip
        axes.set(xlabel="sampling steps", ylabel=title, xscale="log", yscale="log")
        axes.set_xticks(list(STEPS.values()), [str(steps) for steps in STEPS.values()])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


def plot_compute(curves: dict[str, dict[float, float]], file: Path) -> None:
    """Fréchet distance at 4 steps against network forwards spent in training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", label=method)
    axes.set(xlabel="network forwards in training", ylabel="Fréchet distance, 4 steps", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def run_baselines(
    evidence: Evidence, seeds: Sequence[int], rates: Sequence[float], extensions: int, budgets: Sequence[float]
) -> None:
    """Tunes, trains and tabulates DCM and its baselines; then the same with smaller budgets, one seed each."""
    folder = evidence.folder
    recipes = [DCM, *BASELINES]
    plan = evidence.teachers() + [evidence.tuning(recipe, rate) for recipe in recipes for rate in rates]
    plan += [job for recipe in recipes for job in evidence.finals(recipe, rates[0], seeds)]
    plan += [evidence.smaller(recipe, rates[0], seeds[0], budget) for recipe in recipes for budget in budgets]
    evidence.state_cost(plan, "in all, with what is done already, without extensions of grids")
    evidence.execute(evidence.teachers())
    tuned = evidence.tune(recipes, rates, extensions)
    (folder / "rates.json").write_text(json.dumps(tuned, indent=1))
    # Seed by seed: should it be stopped, all methods have as many.
    finals = [job for seed in seeds for recipe, rate in tuned.items() for job in evidence.finals(recipe, rate, [seed])]
    evidence.execute(finals)
    write(folder, "evidence", [evidence.teacher(0), *(folder / "final" / _short(recipe) for recipe in recipes)], DCM)

    smaller = {
        (recipe, budget): evidence.smaller(recipe, rate, seeds[0], budget)
        for recipe, rate in tuned.items()
        for budget in budgets
    }
    evidence.execute(list(smaller.values()))
    curves: dict[str, dict[float, float]] = {}
    for recipe, rate in tuned.items():
        jobs = [smaller[recipe, budget] for budget in budgets] + evidence.finals(recipe, rate, seeds[:1])
        candidate, metric = TUNED_BY
        curves[_short(recipe)] = {job.forwards: (job.metrics or {})[candidate][metric] for job in jobs}
    plot_compute(curves, folder / "compute.png")
    (folder / "compute.json").write_text(json.dumps(curves, indent=1))


def run_ablations(evidence: Evidence, seeds: Sequence[int]) -> None:
    """Trains and tabulates every ablation at the rate that was found for DCM."""
    folder = evidence.folder
    if not (folder / "rates.json").is_file():
        raise SystemExit(f"{folder / 'rates.json'} is missing: run without --ablations first, it finds the rate")
    rate = json.loads((folder / "rates.json").read_text())[DCM]
    names = ablations()
    evidence.execute([job for name in names for job in evidence.finals(name, rate, seeds)])
    write(folder, "ablations", [folder / "final" / _short(name) for name in [DCM, *names]], DCM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablations", action="store_true", help="DCM's ablations in place of the baselines")
    parser.add_argument("--quick", action="store_true", help="a quarter of the steps, two seeds, two rates of the grid")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    plotting.require()
    signal.signal(signal.SIGTERM, stop)

    output = args.output.with_name(f"{args.output.name}-quick") if args.quick else args.output
    evidence = Evidence(output.resolve(), 0.25 if args.quick else 1.0, args.jobs)
    seeds = SEEDS[:2] if args.quick else SEEDS
    if args.ablations:
        run_ablations(evidence, seeds)
    else:
        rates, extensions, budgets = (RATES[1:], 0, ()) if args.quick else (RATES, EXTENSIONS, (0.25, 0.5))
        run_baselines(evidence, seeds, rates, extensions, budgets)


if __name__ == "__main__":
    main()
