"""What an analysis gives: numbers, as `analysis.json` holds them."""

from dataclasses import dataclass, field
from pathlib import Path

from moedistill.analysis.layers import LayerDifferences
from moedistill.analysis.suggest import Decision, ExpertNeeds
from moedistill.analysis.training import StudentCurves
from moedistill.analysis.undecided import Undecided


@dataclass
class TeacherCurves:
    """Along the teacher's N-step path, by the point where a step starts, p_1 … p_N; rms over samples and elements.

    Attributes:
        sigma: of the points.
        relative_change: |x_{i-1} - x_i| / |x_i|: how much a step changes the sample.
        clean_change: |x0_{i-1} - x0_i|: how much it changes the clean estimate x0 = x - σ·v: what is being decided.
        decision_rate: the same per e-fold of σ/(1-σ).
        remaining: |x0_i - x_end|: how far the clean estimate is from the sample that it ends as.
        curvature: |v_i - v_{i-1}| / (p_i - p_{i-1}) = |dv/dσ|. Of the last step, to 0, neither is known: they are 0.
    """

    sigma: list[float]
    relative_change: list[float]
    clean_change: list[float]
    decision_rate: list[float]
    remaining: list[float]
    curvature: list[float]


@dataclass
class SamplingPoints:
    """A list of sampling points and the teacher's error with it, on the half of the samples it was not chosen with.

    Attributes:
        points, sigma: descending; 0 follows.
        model_error: by the model of `suggest_points`.
        end_error: measured: rms distance at sigma 0 to the teacher's N steps.
    """

    points: list[int]
    sigma: list[float]
    model_error: float
    end_error: float


@dataclass
class Analysis:
    """What was measured, and what it suggests. `analysis.json` is this object.

    Attributes:
        recipe: the recipe's name.
        smoke: whether the model was a random miniature: the numbers mean nothing then.
        samples, seed: what the teacher's paths were drawn with.
        teacher: along the path.
        decisions: where the clean estimate is decided, the largest first.
        student: a single student before and after training; empty where the data have no latents.
        layers: two experts' weights; None if nothing was trained.
        boundaries: suggested points, descending, where the experts part: the teacher's own, or half-way through what it
            decides. Students' gradients have no say in it; `student[-1].across` has their cosine at each boundary.
        boundary_sigmas: their sigmas.
        own_boundaries: where the recipe's own experts part, as points.
        undecided: which share of the variance is undecided where; None for a single sample.
        sampling: `suggested`, `even`, and the recipe's `own` points if it has as many.
        error_by_steps: by number of steps: the model's error of the best points, and of even ones. Like `sampling`, the
            best of one half of the samples and the error of the other; with one sample, both of that one.
        needs: what an adapter should change; None if nothing was trained.
        output: the folder with analysis.json, the plots and suggestion.yaml.
    """

    recipe: str
    smoke: bool
    samples: int
    seed: int
    teacher: TeacherCurves
    decisions: list[Decision]
    boundaries: list[int]
    boundary_sigmas: list[float]
    sampling: dict[str, SamplingPoints]
    error_by_steps: dict[int, tuple[float, float]]
    student: list[StudentCurves] = field(default_factory=list)
    layers: LayerDifferences | None = None
    needs: ExpertNeeds | None = None
    own_boundaries: list[int] = field(default_factory=list)
    undecided: Undecided | None = None
    output: Path = Path()

    def remaining_share(self, point: int) -> float:
        """How far the clean estimate at a point is from the sample that it ends as; 1 is where the path begins."""
        return self.teacher.remaining[point - 1] / (self.teacher.remaining[-1] or 1.0)
