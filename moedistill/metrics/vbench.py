"""VBench (Huang et al., 2024, arXiv 2311.17982) on the samples, run by VBench's own command."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
from annotated_types import MinLen
from torch import Tensor

from moedistill.components.fields import NonEmptyStr
from moedistill.media import write_mp4
from moedistill.metrics.base import Metric, MetricConfig, MetricInputs
from moedistill.runtime.writing import disk_errors

Dimension = Literal[
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
]
"""What VBench can say of any video, whatever it was asked for."""


@dataclass(kw_only=True)
class VBenchConfig(MetricConfig):
    """Mean of some of VBench's dimensions, as they are: not its weighted total score.

    VBench pins versions far older than moedistill's, so it lives in an environment of its own and is called as a
    program: `python -m venv vbench && vbench/bin/pip install vbench`. It downloads its networks when it first runs, and
    needs a GPU.

    Args:
        dimensions: what to measure, of what VBench offers for arbitrary videos; each is a column of the rows.
        command: VBench's program: its name on the PATH, or its path.
    """

    dimensions: Annotated[list[Dimension], MinLen(1)]
    command: NonEmptyStr = "vbench"

    def __post_init__(self) -> None:
        if len(set(self.dimensions)) != len(self.dimensions):
            raise ValueError(f"dimensions: each once, not {', '.join(self.dimensions)}")

    def build(self) -> "VBench":
        return VBench(self)

    def look_ahead(self) -> None:
        if shutil.which(self.command) is None:
            raise ValueError(
                f"metric vbench: there is no program {self.command!r}. Install VBench in an environment of its own, "
                "because it needs old versions of other packages: python -m venv vbench && vbench/bin/pip install "
                "vbench; then give command: vbench/bin/vbench"
            )


class VBench(Metric):
    """See `VBenchConfig`. Rows are `[N, dimensions]`, imaging_quality in [0, 1] as in VBench's own average."""

    def __init__(self, config: VBenchConfig) -> None:
        self.config = config

    def rows(self, inputs: MetricInputs) -> Tensor:
        with TemporaryDirectory(prefix="moedistill-vbench-") as place:
            folder = Path(place) / "videos"
            with disk_errors(folder):
                folder.mkdir()
                for number, video in enumerate(inputs.videos):
                    write_mp4(folder / f"{number:06d}.mp4", video, fps=inputs.fps)
            columns = [
                self._column(run_vbench(self.config.command, dimension, folder, Path(place) / dimension), dimension)
                for dimension in self.config.dimensions
            ]
        numbers = range(len(inputs.videos))
        for dimension, column in zip(self.config.dimensions, columns, strict=True):
            if sorted(column) != list(numbers):
                raise ValueError(f"metric vbench: {len(column)} results of {dimension} for {len(numbers)} videos")
        return torch.tensor([[column[number] for column in columns] for number in numbers], dtype=torch.float64)

    @staticmethod
    def _column(results: Sequence[dict[str, Any]], dimension: str) -> dict[int, float]:
        """The score of each video, by its number."""
        scale = 0.01 if dimension == "imaging_quality" else 1.0
        return {int(Path(one["video_path"]).stem): scale * float(one["video_results"]) for one in results}


def run_vbench(command: str, dimension: str, videos: Path, output: Path) -> list[dict[str, Any]]:
    """Runs VBench on a folder of videos: for each its `video_path` and `video_results`.

    Raises:
        ValueError: it left no results; with the end of what it said.
    """
    program = shutil.which(command) or command
    arguments = ["evaluate", "--mode", "custom_input", "--dimension", dimension]
    arguments += ["--videos_path", str(videos), "--output_path", str(output)]
    # It starts "python" itself, and must find that of its own environment.
    path = os.pathsep.join([str(Path(program).absolute().parent), os.environ.get("PATH", "")])
    try:
        done = subprocess.run(
            [program, *arguments], env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        raise ValueError(f"metric vbench: {command} cannot be started: {error}") from error
    # Its exit code is 0 whatever happens.
    files = sorted(output.glob("*_eval_results.json")) if output.is_dir() else []
    if not files:
        said = done.stdout.decode(errors="replace").strip()[-1000:] or "nothing"
        raise ValueError(f"metric vbench: {command} left no results of {dimension}; it said: {said}")
    _, results = json.loads(files[-1].read_text(encoding="utf-8"))[dimension]
    return list(results)
