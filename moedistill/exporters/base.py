"""A format that other tools load: the contract of its exporter, and what it is told."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from moedistill.components.fields import Config
from moedistill.exporters.source import ExpertSource, Source

Form = Literal["lora", "merged"]
"""How an expert leaves: as a low-rank change of the network that it stands on, or as the weights of a plain network."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What was asked for.

    Args:
        form: of every expert; None for that of its kind: an adapter leaves as LoRA, a full expert merged.
        svd: the rank to which a full expert's change is cut, which then leaves as LoRA; None for none.
        dtype: of the tensors in the files.
    """

    form: Form | None = None
    svd: int | None = None
    dtype: torch.dtype = torch.bfloat16

    def form_of(self, expert: ExpertSource) -> Form:
        """How this expert leaves; a teacher as it is leaves merged, if at all.

        Raises:
            ValueError: it cannot leave as it was asked for.
        """
        if expert.kind == "full" and self.form == "lora" and self.svd is None:
            raise ValueError(
                f"expert {expert.name!r} has all weights of its own, which no LoRA carries; leave --lora out, so that "
                "it is merged, or give --svd RANK for what of it a LoRA of that rank carries"
            )
        if expert.kind == "teacher":
            return "merged"
        if self.form is not None:
            return self.form
        return "lora" if expert.kind == "adapter" or self.svd is not None else "merged"


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A file that was written.

    Args:
        path: within the folder of its format.
        expert: whose weights it holds; None for what goes with them.
        form: of the expert in it.
        error: of weights, what their dtype costs: the root mean square of the rounding over that of the values.
    """

    path: str
    expert: str | None = None
    form: Form | None = None
    error: float | None = None


@dataclass(kw_only=True)
class ExporterConfig(Config, ABC):
    """A format: what a plugin registers as an `exporter`. Its fields are keys of the recipe."""

    @abstractmethod
    def applies(self, source: Source) -> str | None:
        """Why this format cannot hold the source, as the end of a sentence; None if it can."""

    @abstractmethod
    def write(self, source: Source, folder: Path, options: ExportOptions) -> Sequence[WrittenFile]:
        """Writes the files to `folder`, which is there and empty.

        At any time it holds no more than one expert and one file of it in memory.

        Raises:
            ValueError: an expert cannot leave in the form that was asked for.
            WriteError: the disk refuses.
        """


def file_stem(source: Source, expert: str) -> str:
    """What the file of an expert is called, without its ending: by its noise, or, of more than two, by its name."""
    names = list(source.experts)
    ending = ("high_noise", "low_noise")[names.index(expert)] if len(names) == 2 else expert
    return f"{source.recipe.name}_{ending}"
