"""A format that other tools load: the contract of its exporter."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moedistill.components.fields import Config
from moedistill.exporters.export import Exported, export
from moedistill.exporters.options import ExportOptions as ExportOptions
from moedistill.exporters.options import Verdict as Verdict
from moedistill.exporters.options import WrittenFile as WrittenFile
from moedistill.exporters.options import file_stem as file_stem
from moedistill.exporters.source import Source
from moedistill.recipe.keys import Recipe


@dataclass(kw_only=True)
class ExporterConfig(Config, ABC):
    """A format: what a plugin registers as an `exporter`. Its fields are keys of the recipe."""

    def suits(self, recipe: Recipe) -> str | None:
        """What `applies` can say of a recipe alone, before anything is trained."""
        return None

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

    def verify(self, source: Source, folder: Path, files: Sequence[WrittenFile]) -> Iterable[Verdict]:
        """Reads the files that `write` gave as their consumers do, tensor by tensor; what there is to say of each.

        An export of which a verdict has faults is taken back.
        """
        return ()

    def usage(self, source: Source, files: Sequence[WrittenFile], options: ExportOptions) -> str:
        """How the files are used, in Markdown, for the model card beside them."""
        return ""

    def export(
        self,
        run: str | Path,
        output: str | Path | None = None,
        options: ExportOptions | None = None,
        *,
        recipe: Recipe | None = None,
        say: Callable[[str], object] = lambda _: None,
    ) -> Exported:
        """Writes this format alone; see `moedistill.exporters.export.export`."""
        return export(run, [self], output, options, recipe=recipe, say=say)[0]
