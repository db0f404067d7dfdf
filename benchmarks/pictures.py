"""Draws the pictures of the documentation that no recipe makes: `python benchmarks/pictures.py` writes them to docs/.

idea.png: its frames are of one path of the digits teacher: the sample on its way, and what the teacher makes of it.
chord.png: computed, not measured: a perfect student sampled inside its phases, and at their edges.
"""

from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

from moedistill import Draws, jump, load_recipe
from moedistill.flow.chords import power_at, sampled_power
from moedistill.runs.build import build_mixture

DOCS = Path(__file__).resolve().parents[1] / "docs"
GREY, SEMANTIC, DETAIL, INK = "#7d828b", "#c2571a", "#1f6f8b", "#22262b"


@torch.no_grad()
def teacher_path(prompt: str, seed: int, points: list[int]) -> dict[int, tuple[float, Tensor, Tensor]]:
    """At some points of the teacher's 50 steps: sigma, the sample and its clean estimate, as videos `[C, T, H, W]`."""
    recipe = load_recipe("dcm_digits")
    mixture = build_mixture(recipe)
    backbone, trajectory = mixture.backbone, mixture.trajectory
    cond = backbone.encode([prompt])
    x = Draws(seed, "picture", 0, [0]).normal("noise", backbone.latent_shape(None))
    found = {}
    for point in range(trajectory.num_steps, -1, -1):
        # No step starts at p_0: from p_1 the last one goes on to 0.
        sigma = trajectory.sigma(point) if point else 0.0
        below = trajectory.sigma(point - 1) if point > 1 else 0.0
        velocity = mixture.guided(x, torch.tensor([sigma]), cond, mixture.guidance) if point else torch.zeros_like(x)
        if point in points:
            found[point] = (sigma, backbone.decode(x)[0], backbone.decode(jump(x, velocity, sigma, 0.0))[0])
        x = jump(x, velocity, sigma, below)
    return found


def hop(axes: Axes, left: float, right: float, height: float, colour: str, width: float, lift: float) -> None:
    """A step from one point to the next, as a bow."""
    axes.add_patch(
        FancyArrowPatch(
            (left, height), (right, height), connectionstyle=f"arc3,rad={-lift}", arrowstyle="-|>",
            mutation_scale=4 + 5 * width, linewidth=width, color=colour, shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def draw_idea(path: Path) -> None:
    """From noise to a video: many steps of one teacher, few of two experts."""
    points, boundary, frame = [50, 40, 30, 15, 0], 30, 3  # as recipes/dcm_digits.yaml samples, and the end
    width, height, left, right, bottom, top = 8.3, 4.0, -1.9, 11.1, -0.05, 6.45
    side, aspect = 1.22, (width / (right - left)) / (height / (top - bottom))

    def place(point: int) -> float:
        return 10.0 * (50 - point) / 50

    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.axis("off")

    # Whose range is whose.
    edge = place(boundary)
    for start, end, colour in ((0.0, edge, SEMANTIC), (edge, 10.0, DETAIL)):
        axes.add_patch(Rectangle((start, 0.1), end - start, 1.9, color=colour, alpha=0.10, linewidth=0))
    axes.plot([edge, edge], [0.1, 6.0], color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
    for point, name in ((50, "noise"), (boundary, "boundary"), (0, "video")):
        axes.text(place(point), 6.03, name, ha="center", va="bottom", fontsize=11, color=INK)

    # The sample on its way, and what can be seen in it.
    for point, (sigma, sample, estimate) in teacher_path("8 right", 5, points).items():
        middle = place(point)
        for row, video in ((4.62, sample), (3.28, estimate)):
            box = (middle - side / 2, middle + side / 2, row, row + side * aspect)
            axes.imshow(video[0, frame].numpy(), cmap="gray", vmin=0, vmax=1, extent=box, aspect="auto", zorder=3)
        axes.text(
            middle, 3.17, f"σ {sigma:.2g}", ha="center", va="top", fontsize=9, color=INK, zorder=3,
            bbox={"color": "white", "pad": 0.8},
        )  # fmt: skip
    for row, name in ((4.62, "sample"), (3.28, "teacher's\nestimate")):
        axes.text(-0.8, row + side * aspect / 2, name, ha="right", va="center", fontsize=9.5, color=INK)

    # The teacher's steps, and the mixture's.
    for point in range(50, 0, -1):
        hop(axes, place(point), place(point - 1), 2.28, GREY, 0.45, 0.55)
    axes.text(-0.25, 2.33, "teacher\n50 steps", ha="right", va="center", fontsize=9.5, color=GREY, linespacing=1.2)
    for start_point, end_point in pairwise(points):
        colour = SEMANTIC if start_point > boundary else DETAIL
        hop(axes, place(start_point), place(end_point), 1.2, colour, 2.0, 0.22)
    axes.text(-0.25, 1.22, "mixture\n4 steps", ha="right", va="center", fontsize=9.5, color=INK, linespacing=1.2)
    for start, end, colour, name, task in (
        (0.0, edge, SEMANTIC, "semantic expert", "layout and motion"),
        (edge, 10.0, DETAIL, "detail expert", "texture"),
    ):
        middle = (start + end) / 2
        axes.text(middle, 0.8, name, ha="center", va="center", fontsize=11, color=colour, fontweight="bold")
        axes.text(middle, 0.38, task, ha="center", va="center", fontsize=9.5, color=colour)
    axes.set_xlim(left, right)  # last, because imshow moves them
    axes.set_ylim(bottom, top)
    figure.savefig(path, metadata={"Software": None})


def draw_chord(path: Path) -> None:
    """The deviation of samples on their way, and what it is at each step, on the list of recipes/dcm_digits.yaml."""
    recipe = load_recipe("dcm_digits")
    trajectory = recipe.trajectory.build()
    points, boundary = [50, 40, 30, 15, 0], 30
    sigmas = [trajectory.sigma(point) if point else 0.0 for point in points]

    def powers(edges: list[float]) -> list[float]:
        return sampled_power(sigmas, lambda sigma: max(edge for edge in edges if edge < sigma))

    inside, at_edges = powers([trajectory.sigma(boundary), 0.0]), powers(sigmas[1:])
    figure = Figure(figsize=(8.3, 3.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    fine = torch.linspace(0, 1, 201).tolist()
    left.plot(fine, [power_at(sigma) ** 0.5 for sigma in fine], color=GREY, linewidth=4, alpha=0.4, label="right")
    for values, colour, name in ((inside, SEMANTIC, "stops inside phases"), (at_edges, DETAIL, "stops as edges")):
        left.plot(sigmas, [value**0.5 for value in values], "o-", color=colour, linewidth=1.6, label=name)
        shares = [value / power_at(sigma) for value, sigma in zip(values, sigmas, strict=True)]
        right.plot(range(len(sigmas)), shares, "o-", color=colour, linewidth=1.6)
    left.axvline(trajectory.sigma(boundary), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    left.invert_xaxis()
    left.set_xlabel("σ")
    left.set_ylabel("deviation of x")
    left.legend(frameon=False, fontsize=9)
    right.set_xticks(range(len(sigmas)), [f"{sigma:.2g}" for sigma in sigmas])
    right.set_xlabel("σ after each step")
    right.set_ylabel("variance / right variance")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    for name, draw in (("idea.png", draw_idea), ("chord.png", draw_chord)):
        draw(DOCS / name)
        print(DOCS / name)
