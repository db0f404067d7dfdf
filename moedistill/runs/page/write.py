"""Writes the page: one file without references, which opens from the disk and loads nothing.

All text of a run is escaped, and the page forbids whatever is not in it (its Content-Security-Policy): no prompt or
recipe can make it run or load anything.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from string import Template

from moedistill.components.plugins import Plugins
from moedistill.errors import UserError, shorten
from moedistill.model.backbone import TEACHER
from moedistill.recipe.sampling import sampling_sigmas, trajectory_of
from moedistill.runs.page.charts import noise_chart, training_chart
from moedistill.runs.page.found import FoundRun, VideoSet, find
from moedistill.runs.page.videos import SMALLER, Embedded, embed
from moedistill.runs.planning.count import GIB
from moedistill.runs.planning.plan import Planner, StagePlan
from moedistill.runs.tables import ONE_SEED, Line, read_records, tabulate
from moedistill.runtime.checkpoint import write_text
from moedistill.runtime.writing import make_folder
from moedistill.stages.evaluate import ROWS

PAGE = "report.html"
"""In a run's folder, at its end."""

LIMIT = 20_000_000
"""Bytes of a page."""

MOST_TEXT = 200_000
"""Characters of a recipe that are shown."""

NOT_PLANNED = "`moedistill report RUN --html FILE` makes one"

Plans = dict[str, list[StagePlan] | str]
"""By the name of a run what was planned of its stages, or why nothing was."""


def write_page(
    folders: Sequence[str | Path], file: Path, plugins: Plugins, *, planned: bool = True, resamples: int = 200
) -> None:
    """Writes the page of the runs in `folders` and below them.

    Args:
        planned: compare with what `moedistill plan` says, which takes some seconds for each stage.
        resamples: bootstrap draws of the metrics' intervals.

    Raises:
        UserError: there is no run, or its recipe cannot be read.
        ValueError: a file of a run is damaged.
        WriteError: the disk is full, or refuses otherwise.
    """
    runs = find(folders, plugins)
    make_folder(file.parent)
    planner = Planner()
    plans: Plans = {run.name: _plan(run, planner) if planned else NOT_PLANNED for run in runs}
    beside, over_time = _beside(runs), _over_time(runs)
    parts = {
        "What was run": _what(runs, file),
        "Side by side": "",
        "How training went": _charts(runs),
        "Previews over time": "",
        "Metrics": _metrics(runs, plugins, resamples),
        "Steps of sampling": _each(runs, _steps),
        "Time and memory": _each(runs, partial(_cost, plans=plans)),
        "Files": _each(runs, partial(_exported, page=file)),
        "Recipe": _each(runs, _recipe),
    }
    title = ", ".join(run.name for run in runs)
    room = max(0, LIMIT - len("".join(parts.values()).encode()))
    while True:  # the videos get the room that all else leaves, of which captions take some, too
        embedded = embed([*beside, *over_time], room)
        parts["Side by side"] = _players(beside, embedded, "No stage evaluated, sampled or previewed videos.")
        parts["Previews over time"] = _players(over_time, embedded, "No stage made previews; a stage's `preview` does.")
        page = _page(title, _body(title, runs, parts, embedded), embedded)
        over = len(page.encode()) - LIMIT
        if over <= 0 or room == 0:
            break
        room = max(0, room - over)
    write_text(file, page)


def _page(title: str, body: str, embedded: Embedded) -> str:
    own = files("moedistill.runs.page")
    template, style, script = (
        own.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    videos = {
        key: {"uri": uri, "frames": embedded.timing[key][0], "fps": embedded.timing[key][1]}
        for key, uri in embedded.uris.items()
    }
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(template).substitute(
        title=escape(shorten(title, 200)), style=style, body=body, script=script, script_hash=f"sha256-{digest}",
        videos=json.dumps(videos),
    )  # fmt: skip


def _body(title: str, runs: Sequence[FoundRun], parts: dict[str, str], embedded: Embedded) -> str:
    places = {name: name.lower().replace(" ", "-") for name in parts}
    links = "".join(f'<a href="#{place}">{escape(name)}</a>' for name, place in places.items())
    notes = []
    if any(run.listed.smoke for run in runs):
        notes.append("A miniature (--smoke): small numbers in place of the recipe's own. They say nothing of quality.")
    if embedded.smaller:
        notes.append(f"Videos are smaller here than they are ({SMALLER} pixels high), to keep the page small.")
    if embedded.left_out:
        notes.append(f"Videos left out, for want of room or as they cannot be read: {embedded.left_out}.")
    head = f"<header><h1>{escape(shorten(title, 300))}</h1><nav aria-label='Parts'>{links}</nav></header>"
    sections = [
        f'<section id="{places[name]}"><h2>{escape(name)}</h2>{content}</section>' for name, content in parts.items()
    ]
    return "\n".join([head, *(f'<p class="note">{escape(note)}</p>' for note in notes), *sections])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table of plain text; columns from `numbers` on, if it is given, are of numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ['class="number"' if numbers and k >= numbers else "" for k in range(len(row))]
        return "".join(f"<{tag} {kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def _say(text: str) -> str:
    return f'<p class="faint">{escape(text)}</p>'


def _each(runs: Sequence[FoundRun], part: Callable[[FoundRun], str]) -> str:
    """A part of every run, under its name where there are several."""
    if len(runs) == 1:
        return part(runs[0])
    return "".join(f"<h3>{escape(run.name)}</h3>{part(run)}" for run in runs)


# -- what was run -----------------------------------------------------------------------------------------------------


def _what(runs: Sequence[FoundRun], file: Path) -> str:
    parts = []
    for run in runs:
        recipe, total = run.recipe, _total(run)
        if len(runs) > 1:
            parts.append(f"<h3>{escape(run.name)}</h3>")
        if recipe.description:
            parts.append(f"<p>{escape(recipe.description)}</p>")
        facts = {
            "state": run.listed.state,
            "model": ", ".join(filter(None, [recipe.backbone.kind, recipe.resolved()["backbone"].get("pretrained")])),
            "experts": ", ".join(f"{name} ({expert.kind})" for name, expert in recipe.experts.items()) or "none",
            "training": f"{total['steps']:,.0f} steps in {_duration(total['seconds'])}",
            "network evaluations": f"{total['forwards']:,.0f}",
            "seed": str(recipe.seed),
            "ran on": run.environment.get("processes"),
            "begun": run.environment.get("begun"),
            "folder": os.path.relpath(run.folder, file.parent) if run.folder != file.parent else run.folder.name,
            "versions": ", ".join(f"{k} {v}" for k, v in (run.environment.get("versions") or {}).items()),
        }
        shown = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value
        )
        parts.append(f'<dl class="facts">{shown}</dl>')
    return "".join(parts)


def _total(run: FoundRun) -> dict[str, float]:
    return {what: run.listed.cost.get(what, 0.0) for what in ("steps", "forwards", "seconds")}


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.3g} s"


# -- videos -----------------------------------------------------------------------------------------------------------


def _beside(runs: Sequence[FoundRun]) -> list[VideoSet]:
    """What each run evaluated, or else the last previews of its training, and what it sampled.

    Of several runs, sets with the same captions and noise become one.
    """
    merged: dict[tuple[str, int, tuple[str, ...]], VideoSet] = {}
    for run in runs:
        for one in [*(run.evaluated or _last_previews(run)), *run.sampled]:
            key = one.title, one.seed, tuple(one.captions)
            before = merged[key].columns if key in merged else {}
            prefix = f"{run.name}: " if len(runs) > 1 else ""
            columns = {f"{prefix}{label}": each for label, each in one.columns.items()}
            merged[key] = replace(one, columns={**before, **columns})
    return list(merged.values())


def _last_previews(run: FoundRun) -> list[VideoSet]:
    """Of the last stage that made some: the teacher's, and the experts' at its end."""
    if not run.previews:
        return []
    last = run.previews[-1]
    *_, newest = last.columns
    columns = {label: each for label, each in last.columns.items() if not label.startswith("step ")}
    return [replace(last, columns={**columns, f"experts, {newest}": last.columns[newest]})]


def _over_time(runs: Sequence[FoundRun]) -> list[VideoSet]:
    """The previews of every stage."""
    prefixes = {run.name: f"{run.name}: " if len(runs) > 1 else "" for run in runs}
    return [replace(one, title=f"{prefixes[run.name]}{one.title}") for run in runs for one in run.previews]


def _players(sets: Sequence[VideoSet], embedded: Embedded, otherwise: str) -> str:
    players = [_player(one, embedded) for one in sets]
    return "".join(players) or _say(otherwise)


def _player(videos: VideoSet, embedded: Embedded) -> str:
    """Its videos get their data from the page's script, by keys: one file may be in several players."""
    columns = {label: [embedded.keys.get(file) for file in each] for label, each in videos.columns.items()}
    rows = [row for row in range(len(videos.captions)) if any(each[row] for each in columns.values())]
    figures = "".join(
        f"<figure><video muted playsinline preload='auto' aria-label='{escape(label)}' "
        f"data-keys='{json.dumps([each[row] for row in rows])}'></video>"
        f"<figcaption>{escape(label)}</figcaption></figure>"
        for label, each in columns.items()
        if any(each)
    )
    if not rows:
        return f"<h3>{escape(videos.title)}</h3>{_say('Its videos are left out.')}"
    options = "".join(
        f'<option value="{number}">{escape(shorten(videos.captions[row], 300))}</option>'
        for number, row in enumerate(rows)
    )
    speeds = "".join(
        f'<option value="{speed}"{" selected" if speed == 1 else ""}>{speed}×</option>' for speed in (0.25, 0.5, 1, 2)
    )
    return (
        f"<h3>{escape(videos.title)}</h3>"
        f'<div class="player"><label class="choose">Sample <select data-caption>{options}</select></label>'
        f'<div class="row">{figures}</div><div class="controls">'
        '<button type="button" data-do="play">Play</button>'
        '<button type="button" data-do="back" aria-label="one frame back">◀</button>'
        '<button type="button" data-do="on" aria-label="one frame on">▶</button>'
        '<input type="range" min="0" max="0" step="1" value="0" aria-label="frame">'
        f'<output></output><select data-speed aria-label="speed">{speeds}</select></div></div>'
    )


# -- curves and numbers -----------------------------------------------------------------------------------------------


def _charts(runs: Sequence[FoundRun]) -> str:
    if not any(run.metrics for run in runs):
        return _say("Nothing was trained.")
    try:
        parts = [f'<div class="wide">{training_chart(runs)}</div>']
        parts.append("<h3>By noise level</h3>")
        noise = noise_chart(runs)
    except UserError as error:  # no matplotlib
        return _say(f"No plots: {error}.") + _last_numbers(runs)
    if noise is None:
        return "".join([*parts, _say("Nothing was noted by noise level.")])
    explained = (
        "Of single samples, by where their jump starts: the root mean square of prediction − target, and the norm of "
        "the gradient that a sample's own loss brings to its predicted velocity. Dashed: where one expert follows "
        "another."
    )
    return "".join([*parts, _say(explained), f'<div class="wide">{noise}</div>'])


def _last_numbers(runs: Sequence[FoundRun]) -> str:
    """Of each stage, the numbers that it logged first and last."""
    rows = [
        [run.name, stage, name, f"{line.values[0]:.4g}", f"{line.values[-1]:.4g}"]
        for run in runs
        for (stage, name), line in run.metrics.items()
    ]
    return _table(["run", "stage", "number", "first", "last"], rows, 3)


def _metrics(runs: Sequence[FoundRun], plugins: Plugins, resamples: int) -> str:
    """One table of all runs, or one of each where chance would be compared."""
    evaluated = [run for run in runs if any(run.folder.glob(f"*/{ROWS}"))]
    if not evaluated:
        return _say("No stage has evaluated anything.")
    try:
        return _table_of(evaluated, plugins, resamples)
    except UserError as error:
        if len(evaluated) == 1:
            return _say(f"No table: {error}.")
    note = _say("Each by itself: they were not evaluated on the same samples and noise.")
    return note + _each(evaluated, lambda run: _metrics([run], plugins, resamples))


def _table_of(runs: Sequence[FoundRun], plugins: Plugins, resamples: int) -> str:
    table = tabulate(read_records([run.folder for run in runs], plugins), resamples=resamples)
    kinds = list(dict.fromkeys(kind for line in table.lines for kind in line.values))
    several = len({line.method for line in table.lines}) > 1

    def row(line: Line) -> list[str]:
        model = f"{line.method}: {line.candidate}" if several else line.candidate
        marks = {kind: ONE_SEED[0] if value.samples_only else "" for kind, value in line.values.items()}
        return [model, *(f"{line.values[kind]}{marks[kind]}" if kind in line.values else "" for kind in kinds)]

    notes = ["The mean over training seeds, and its 95 % interval.", *table.notes]
    if any(value.samples_only for line in table.lines for value in line.values.values()):
        notes.append(ONE_SEED)
    head = ["model", *(kind.replace("_", " ") for kind in kinds)]
    return _table(head, [row(line) for line in table.lines], 1) + "".join(map(_say, notes))


def _steps(run: FoundRun) -> str:
    recipe = run.recipe
    if recipe.sample is None:
        return _say("The recipe does not say how to sample.")
    sigmas, trajectory = sampling_sigmas(recipe), trajectory_of(recipe)
    router = recipe.router.build(trajectory) if recipe.router is not None else None
    times = trajectory.timestep(sigmas).tolist()
    rows = [
        [str(k), f"{above:.4f}", f"{below:.4f}", f"{times[k - 1]:.1f}", router.expert_at(above) if router else TEACHER]
        for k, (above, below) in enumerate(pairwise(sigmas.tolist()), 1)
    ]
    eta = recipe.sample.eta
    note = _say(f"The share {eta:g} of the noise is drawn anew after each step.") if eta else ""
    return _table(["step", "σ from", "σ to", "timestep", "served by"], rows) + note


def _plan(run: FoundRun, planner: Planner) -> list[StagePlan] | str:
    """What was planned of the stages, on the number of processes that it ran on; or why nothing is."""
    try:
        return planner.stages(run.recipe, run.processes)
    except Exception as error:  # whatever a model's skeleton may raise: the page has more to say
        return f"cannot be planned: {shorten(str(error) or type(error).__name__, 200)}"


def _cost(run: FoundRun, plans: Plans) -> str:
    """Of each stage that trained, what was planned and what was measured."""
    plan = plans[run.name]
    stages = {} if isinstance(plan, str) else {stage.name: stage for stage in plan}
    rows = []
    for name, cost in run.cost.items():
        steps, seconds = cost.get("steps", 0), cost.get("seconds", 0.0)
        if not steps:
            continue
        peak, planned = run.memory.get((name, "memory")), stages.get(name)
        row = [name, f"{steps:,.0f}", _duration(seconds), f"{seconds / steps:.3g}", f"{cost['forwards']:,.0f}"]
        row += [f"{max(peak.values):.2f}" if peak else "–"]
        if planned is not None:
            each = run.processes * steps
            row += [
                f"{planned.evaluations * each:,.0f}",
                f"{planned.peak / GIB:.2f}",
                f"{planned.flops * each / 1e12:.3g}",
            ]
        rows.append(row)
    head = ["stage", "steps", "time", "s a step", "evaluations", "peak GiB"]
    head += ["planned evaluations", "planned peak GiB", "planned TFLOP"] if stages else []
    notes = [] if stages else [f"No plan: {plan}."]
    if stages and run.environment.get("device") == "cpu":
        notes.append("The peak of a CPU is that of the whole process, with its libraries; a plan is of a GPU.")
    return (_table(head, rows, 1) if rows else _say("No stage has trained to its end.")) + "".join(map(_say, notes))


def _exported(run: FoundRun, page: Path) -> str:
    rows = [
        [os.path.relpath(file, page.parent), f"{file.stat().st_size:,}"]
        for each in run.exported.values()
        for file in each
    ]
    if not rows:
        return _say("Nothing was exported.")
    return _table(["file", "bytes"], rows, 1)


def _recipe(run: FoundRun) -> str:
    text = (run.folder / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    return f"<details><summary>recipe.yaml, with all its keys</summary><pre>{escape(text[:MOST_TEXT])}</pre></details>"
