"""`moedistill export`: the experts of a run in the formats of other tools, each in a folder that is there whole or not.

Beside the files of a format lie its model card (README.md) and `moedistill.json`: router, steps, provenance, sums.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moedistill.components.plugins import Plugins
from moedistill.errors import UserError, user_errors
from moedistill.exporters.card import model_card
from moedistill.exporters.options import ExportOptions, Format, Verdict, WrittenFile
from moedistill.exporters.source import Source, open_source
from moedistill.model.ema import WhichWeights
from moedistill.recipe.keys import Recipe
from moedistill.runtime.integrity import sum_of
from moedistill.runtime.weight_files import whole_folder
from moedistill.runtime.writing import refuse_used

RECORD = "moedistill.json"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written in one format.

    Attributes:
        kind: the format.
        folder: where.
        files: with paths in it; weights, and what the format has beside them.
        verdicts: on the files, read as those do who load them.
    """

    kind: str
    folder: Path
    files: Sequence[WrittenFile]
    verdicts: Sequence[Verdict] = ()

    def lines(self) -> list[str]:
        """For people: the folder, and each file of weights."""
        said = [str(self.folder)]
        for file in self.files:
            cost = f", its dtype costs {file.error:.1e} of the weights' size" if file.error is not None else ""
            said += [f"  {file.path}: {file.form} {file.expert}{cost}"] if file.form else []
            said += [f"    {group}: {100 * error:.1f} % of the change left out" for group, error in file.cut.items()]
        return [*said, *(f"  {verdict.line()}" for verdict in self.verdicts)]


def export(
    run: str | Path,
    formats: Sequence[Format],
    output: str | Path | None = None,
    options: ExportOptions | None = None,
    *,
    weights: WhichWeights = "trained",
    recipe: Recipe | None = None,
    plugins: Plugins | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> list[Exported]:
    """Writes what a run's sampling uses in one or several formats.

    Args:
        run: a run's folder, a checkpoint, or an export's folder.
        formats: what to write; all of them are looked at before the first is written.
        output: a new or empty folder: of the only format, or with one for each in it; if not given, RUN/export with one
            for each in it.
        options: dtype, form, rank, and whether the files are read again.
        weights: the experts' `trained` weights or their `ema`.
        recipe: of the run, where it is at hand: it is then not read again.
        say: told of each format, when it is written.

    Raises:
        UserError: the run cannot be read, a format cannot hold it, a folder is in use, or what was written is not read
            as what was trained: the format is then not there.
    """
    source, options = open_source(run, weights=weights, recipe=recipe, plugins=plugins), options or ExportOptions()
    for each in formats:
        if (reason := each.applies(source)) is not None:
            raise UserError(f"{run} cannot be exported to {each.kind}: {reason}")
    places = {each.kind: _place(source, output, each.kind, alone=len(formats) == 1) for each in formats}
    for place in places.values():
        refuse_used(place)
    exported = []
    for each in formats:
        with whole_folder(places[each.kind]) as folder, user_errors(f"export to {each.kind}"):
            files = each.write(source, folder, options)
            verdicts = _verified(each, source, folder, files) if options.verify else []
            card = model_card(source, each.usage(source, files, options), files, options, each.kind)
            (folder / "README.md").write_text(card, encoding="utf-8")
            record = _record(source, folder, files, verdicts, options, each.kind)
            (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        exported.append(Exported(kind=each.kind, folder=places[each.kind], files=files, verdicts=verdicts))
        say("\n".join(exported[-1].lines()))
    return exported


def _verified(each: Format, source: Source, folder: Path, files: Sequence[WrittenFile]) -> list[Verdict]:
    """Verdicts without faults.

    Raises:
        ValueError: one has some.
    """
    verdicts = list(each.verify(source, folder, files))
    if wrong := [verdict.line() for verdict in verdicts if verdict.faults]:
        raise ValueError(f"what was written is not what was trained, and was removed: {wrong[0]}")
    return verdicts


def _place(source: Source, output: str | Path | None, kind: str, *, alone: bool) -> Path:
    if output is None:
        home = source.place if source.is_export else source.place / "export"
        return home / kind
    return Path(output) if alone else Path(output) / kind


def _record(
    source: Source,
    folder: Path,
    files: Sequence[WrittenFile],
    verdicts: Sequence[Verdict],
    options: ExportOptions,
    kind: str,
) -> dict[str, Any]:
    """What `moedistill.json` says."""
    boundaries = [source.boundary(after) for after in range(len(source.experts) - 1)]
    return {
        "format": kind,
        "dtype": str(options.dtype).removeprefix("torch."),
        "experts": {name: {"kind": each.kind, "over": each.over} for name, each in source.experts.items()},
        "router": source.router.to_dict() if source.router else None,
        "trajectory": source.trajectory.points.tolist(),
        "sigmas": source.sigmas,
        "eta": source.eta,
        "steps": [step._asdict() for step in source.steps],
        "boundaries": boundaries,
        "provenance": dict(source.provenance),
        "recipe": source.recipe.resolved(),
        "verified": [verdict.line() for verdict in verdicts],
        "files": {file.path: _entry(file, folder) for file in files},
    }


def _entry(file: WrittenFile, folder: Path) -> Mapping[str, Any]:
    path = folder / file.path
    facts: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sum_of(path)}
    told = {"expert": file.expert, "form": file.form, "error": file.error, "cut": dict(file.cut)}
    return facts | {name: value for name, value in told.items() if value}
