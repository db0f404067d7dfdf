"""What an exporter is told, and what it tells of the files that it has written."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch

from moedistill.components.registry import Components
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
        verify: read the files again, as those do who load them.
    """

    form: Form | None = None
    svd: int | None = None
    dtype: torch.dtype = torch.bfloat16
    verify: bool = True

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
        cut: of a LoRA that a full expert was cut to, by group of layers: the norm of what is left out over that of the
            whole change.
    """

    path: str
    expert: str | None = None
    form: Form | None = None
    error: float | None = None
    cut: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What became of a file, read as a consumer reads it.

    Attributes:
        file: its path, or that of the folder that is read as one.
        reader: who reads it so.
        said: what was found right.
        faults: what was not, in words.
    """

    file: str
    reader: str
    said: str
    faults: Sequence[str]

    def line(self) -> str:
        """For people."""
        return f"{self.file}, read as {self.reader} does: {'; '.join(self.faults) or self.said}"


class Format(Protocol):
    """What writes a format; `ExporterConfig` says what its methods do."""

    kind: ClassVar[str]

    def applies(self, source: Source) -> str | None: ...

    def write(self, source: Source, folder: Path, options: ExportOptions) -> Sequence[WrittenFile]: ...

    def verify(self, source: Source, folder: Path, files: Sequence[WrittenFile]) -> Iterable[Verdict]: ...

    def usage(self, source: Source, files: Sequence[WrittenFile], options: ExportOptions) -> str: ...


def ending(source: Source, expert: str) -> str:
    """What tells the files of an expert from others': its noise, or, of more than two, its name."""
    names = list(source.experts)
    return ("high_noise", "low_noise")[names.index(expert)] if len(names) == 2 else expert


def file_stem(source: Source, expert: str) -> str:
    """What the file of an expert is called, without its suffix."""
    return f"{source.recipe.name}_{ending(source, expert)}"


def chosen_formats(components: Components, names: Sequence[str], *, copy: bool = False) -> list[Format]:
    """The exporters of these names, each once, with the defaults of their keys.

    Args:
        copy: components are copied, by those that link them.

    Raises:
        ValueError: there is none of a name.
    """
    formats: list[Format] = []
    for name in dict.fromkeys(names):
        cls = components.get("exporter", name)
        settings = {"components": "copy"} if copy and "components" in {field.name for field in fields(cls)} else {}
        made = cls(**settings)
        object.__setattr__(made, "kind", name)
        formats.append(made)
    return formats
