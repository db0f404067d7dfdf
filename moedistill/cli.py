"""The command line. Everything of weight is imported by the command that needs it: `--help` is instant."""

import codecs
import errno
import io
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moedistill import __version__
from moedistill.errors import Interrupted, LostProcess, Problem, RecipeError, SaidElsewhere, UserError, shorten, suggest
from moedistill.runtime.quiet import quiet_libraries
from moedistill.runtime.signals import Interruption

if TYPE_CHECKING:
    from moedistill.components.plugins import Plugins

KINDS = ("backbone", "trajectory", "router", "expert", "dataset", "loss", "stage", "metric", "exporter", "recipe")


def _in_utf8(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Arguments as UTF-8, which a locale of another encoding leaves as raw bytes."""
    return tuple(value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for value in values)


def _one_in_utf8(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return None if value is None else _in_utf8(context, parameter, (value,))[0]


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", callback=_in_utf8,
    help="Change a value, e.g. stages.detail.steps=10. A list's item goes by its name, kind or number. Repeatable.",
)  # fmt: skip
plugin_option = click.option(
    "-p", "--plugin", "plugin_files", multiple=True, metavar="FILE", type=click.Path(exists=True, dir_okay=False),
    help="Load a plugin from a Python file. It is run: only name files that you trust. Repeatable.",
)  # fmt: skip
processes_option = click.option(
    "--num-processes", type=click.IntRange(min=1), metavar="N", help="Processes on this machine, one on each GPU."
)
device_option = click.option("--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1 …")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moedistill")
def cli() -> None:
    """Distil a video diffusion model into a few-step mixture of timestep experts.

    Example: moedistill run dcm_digits --smoke
    """


@cli.command()
@click.argument("recipe")
@set_option
@click.option("--smoke", is_flag=True, help="The same run in miniature: seconds, on a CPU.")
@click.option("--force", is_flag=True, help="Begin even where a GPU's memory cannot hold what must be in it.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint.")
@click.option("--resume-from", metavar="PATH", help="Go on from this run or checkpoint; with --output, elsewhere.")
@click.option("--output", metavar="DIR", help="The run's folder, new or empty; runs/NAME/TIME if not given.")
@click.option("--seed", type=int, metavar="N", help="The same as --set seed=N.")
@processes_option
@device_option
@plugin_option
def run(
    recipe: str,
    overrides: tuple[str, ...],
    smoke: bool,
    force: bool,
    resume: bool,
    resume_from: str | None,
    output: str | None,
    seed: int | None,
    num_processes: int | None,
    device: str | None,
    plugin_files: tuple[str, ...],
) -> int:
    """Run all stages of RECIPE, a file or the name of a shipped recipe.

    \b
    Example:
      moedistill run dcm_digits
      moedistill run dcm_digits --smoke --set stages.detail.optimizer.lr=1e-5
      moedistill run my_recipe.yaml --output runs/mine --resume
      moedistill run other_detail.yaml --resume-from runs/mine/checkpoints/00_semantic_00001000 --output runs/other
    """
    if resume and resume_from is not None:
        raise click.UsageError("give --resume or --resume-from, not both")
    if num_processes is not None and "WORLD_SIZE" in os.environ:
        raise click.UsageError("a launcher has started this process already: leave --num-processes out")
    from moedistill.recipe.loading import load_recipe

    plugins, settings = _plugins(plugin_files), tuple(_with_seed(overrides, seed))
    loaded = load_recipe(recipe, settings, plugins)
    from moedistill.runs.commands import RunCommand
    from moedistill.runs.launch import end_with_launcher, launch, launched_here

    where: dict[str, Any] = {"output": output, "resume": resume, "resume_from": resume_from}
    processes = num_processes or launched_here()
    command = RunCommand(smoke, device, tuple(plugins.files), recipe, settings, processes)
    if num_processes is not None and num_processes > 1:
        from moedistill.runs.encode import EncodeCommand, with_encoded_videos

        if not smoke:
            encoders = EncodeCommand(recipe, settings, device, tuple(plugins.files)).in_processes(num_processes, loaded)
            with_encoded_videos(loaded, device, click.echo, encoders)
        arguments = replace(command, processes=None).arguments(**where)
        arguments += ["--force"] * force
        return launch(arguments, num_processes, device, loaded.training.timeout, command.as_given(**where))
    end_with_launcher()
    from moedistill.runs.loop import run as run_recipe
    from moedistill.runs.processes import leaving

    with leaving():
        where |= {"force": True} if force else {}
        run_recipe(loaded, **where, smoke=smoke, device=device, plugins=plugins, command=command)
    return 0


@cli.command()
@click.argument("recipe")
@set_option
@plugin_option
def validate(recipe: str, overrides: tuple[str, ...], plugin_files: tuple[str, ...]) -> None:
    """Check RECIPE: all problems that can be seen without loading weights, at once.

    Data and prompts that are not on this machine are noted; the recipe is valid all the same.

    \b
    Example:
      moedistill validate my_recipe.yaml --set sample.points=[50,38]
    """
    from moedistill.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides, _plugins(plugin_files))
    click.echo(f"{recipe}: valid")
    for note in [*loaded.notes(), *(f"not to be run as it is: {what}" for what in loaded.missing())]:
        click.echo(f"  {note}")


@cli.command()
@click.argument("recipe")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Processes, one on each GPU.")
@click.option(
    "--gpu-memory", type=click.FloatRange(min=0, min_open=True), default=80.0, show_default=True, metavar="GIB",
    help="Memory of each GPU.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, in bytes, and nothing else.")
@set_option
@plugin_option
def plan(
    recipe: str,
    gpus: int | None,
    gpu_memory: float,
    as_json: bool,
    overrides: tuple[str, ...],
    plugin_files: tuple[str, ...],
) -> None:
    """Say what RECIPE takes of memory and computes, and what would make it fit; without weights, data and a GPU.

    Each training stage's own step is tried with tensors that have no numbers. The answer is an answer either way: the
    exit code is 0 whether it fits or not.

    \b
    Example:
      moedistill plan dcm_wan_1_3b
      moedistill plan dcm_hunyuan --gpus 6 --set training.sharding=fsdp2
      moedistill plan my_recipe.yaml --gpu-memory 24 --json
    """
    import json

    from moedistill.recipe.loading import load_recipe

    plugins = _plugins(plugin_files)
    loaded = load_recipe(recipe, overrides, plugins)
    from moedistill.runs.planning.remedies import plan_with_remedies
    from moedistill.runs.planning.table import lines

    made = plan_with_remedies(loaded, recipe, overrides, plugins, gpus=gpus, gpu_memory=gpu_memory)
    click.echo(json.dumps(made.plain(), indent=1) if as_json else "\n".join(lines(made)))


@cli.command()
@click.argument("recipe")
@set_option
@plugin_option
def show(recipe: str, overrides: tuple[str, ...], plugin_files: tuple[str, ...]) -> None:
    """Print RECIPE as resolved: with what it extends and all defaults filled in.

    \b
    Example:
      moedistill show dcm_digits > mine.yaml
    """
    from moedistill.recipe.loading import load_recipe

    click.echo(load_recipe(recipe, overrides, _plugins(plugin_files)).to_yaml(), nl=False)


@cli.command(name="list")
@click.argument("kind", required=False)
@click.argument("name", required=False)
@plugin_option
def list_(kind: str | None, name: str | None, plugin_files: tuple[str, ...]) -> None:
    """List what there is, and broken plugins; or explain NAME: what it is, and what each of its keys means.

    KIND is one of backbone, trajectory, router, expert, dataset, loss, stage, metric, exporter, recipe; else all.

    \b
    Example:
      moedistill list
      moedistill list loss
      moedistill list loss gan
      moedistill list recipe dcm_digits
    """
    if kind is not None and kind not in KINDS:
        raise click.BadParameter(f"{kind!r} is no kind of component; {suggest(kind, KINDS)}", param_hint="KIND")
    from moedistill.components.plugins import load_plugins

    plugins = load_plugins(plugin_files)
    if name is not None and kind is not None:
        lines = _about_recipe(plugins, name) if kind == "recipe" else _about_component(plugins, kind, name)
        click.echo("\n".join(lines))
        return
    for each in KINDS if kind is None else (kind,):
        rows = _recipes() if each == "recipe" else _entries(plugins, each)
        click.echo(f"{each}:" if rows else f"{each}: none")
        widths = [max((len(row[k]) for row in rows), default=0) for k in range(2)]
        for row in rows:
            click.echo(f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip())
    if plugins.broken:
        click.echo("broken plugins:")
        for plugin, reason in sorted(plugins.broken.items()):
            click.echo(f"  {plugin}: {shorten(reason, 300)}")


def _entries(plugins: "Plugins", registry: str) -> list[tuple[str, str, str]]:
    return [(entry.name, entry.plugin, entry.description) for entry in plugins.components.entries(registry)]


def _about_component(plugins: "Plugins", kind: str, name: str) -> list[str]:
    from moedistill.errors import user_errors
    from moedistill.recipe.explaining import explain

    with user_errors("list"):
        cls = plugins.components.get(kind, name)
    [entry] = [entry for entry in plugins.components.entries(kind) if entry.name == name]
    return [f"{kind} {name}, of plugin {entry.plugin}", "", *explain(cls, entry.description)]


def _about_recipe(plugins: "Plugins", name: str) -> list[str]:
    from moedistill.recipe.explaining import outline
    from moedistill.recipe.loading import find_recipe, load_recipe

    return [f"recipe {name}, {find_recipe(name)}", "", *outline(load_recipe(name, (), plugins).resolved())]


def _recipes() -> list[tuple[str, str, str]]:
    from moedistill.recipe.loading import shipped_recipes
    from moedistill.recipe.yaml_tree import read_file

    rows = []
    for name, path in shipped_recipes().items():
        description = read_file(path, []).value.get("description")
        rows.append((name, "", str(description.value) if description is not None else ""))
    return rows


@cli.command()
@plugin_option
def schema(plugin_files: tuple[str, ...]) -> None:
    """Print the JSON Schema of recipes with all installed components, for editors.

    \b
    Example:
      moedistill schema > recipe.schema.json
    """
    import json

    from moedistill.recipe.json_schema import json_schema

    click.echo(json.dumps(json_schema(_plugins(plugin_files)), indent=2, ensure_ascii=False))


@cli.command()
@click.argument("recipe")
@click.argument("dest", type=click.Path())
@click.option("--force", is_flag=True, help="Overwrite DEST.")
def cp(recipe: str, dest: str, force: bool) -> None:
    """Copy RECIPE to DEST, a file or a folder, to change it there. What it extends is written out.

    A DEST that ends in / is a folder, and is made if it is not there.

    \b
    Example:
      moedistill cp dcm_digits mine.yaml
      moedistill cp dcm_digits mine/
    """
    from moedistill.recipe.loading import find_recipe

    source = find_recipe(recipe)
    target = Path(dest) / source.name if dest.endswith(("/", os.sep)) or os.path.isdir(dest) else Path(dest)
    if os.path.exists(target) and not force:
        raise UserError(f"{target} exists; choose another name, or add --force to overwrite it")
    _write(target, _copy_text(source))
    click.echo(f"{source} → {target}")


def _write(path: Path, text: str) -> None:
    from moedistill.runtime.writing import new_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _copy_text(source: Path) -> str:
    """The file as it is, with its comments; or, where it extends another, both merged."""
    from moedistill.recipe.loading import read_recipe
    from moedistill.recipe.yaml_tree import dump_yaml, read_file

    problems: list[Problem] = []
    extends = read_file(source, problems).value.get("extends")
    merged = read_recipe(source, (), problems) if extends is not None else None
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)), str(source))
    if merged is None or extends is None:
        return source.read_text(encoding="utf-8")
    return f"# {source.name} merged with what it extends, {extends.value}\n{dump_yaml(merged.plain())}"


class _Sigmas(click.ParamType):
    """Comma-separated noise levels."""

    name = "sigmas"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} must be numbers with commas between them, such as 1,0.9,0.77,0.4", param, ctx)


@cli.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--prompt", "prompts", multiple=True, callback=_in_utf8, help="What to sample, in the backbone's words. Repeatable."
)
@click.option("--prompts", "prompt_files", multiple=True, metavar="FILE", help="A file with a prompt per line.")
@click.option("--num", type=click.IntRange(min=1), default=1, metavar="N", help="Videos of each prompt.")
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Seed of the initial noise.")
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="So many steps, over the trained phases.")
@click.option(
    "--sigmas", type=_Sigmas(), metavar="LIST", help='Noise levels, not the recipe\'s, e.g. "1,0.9,0.77,0.4".'
)
@click.option(
    "--eta", type=click.FloatRange(0, 1), metavar="X", help="Share of noise drawn anew after each step; the recipe's."
)
@click.option("--height", type=click.IntRange(min=1), metavar="N", help="In pixels; the recipe's if not given.")
@click.option("--width", type=click.IntRange(min=1), metavar="N", help="In pixels; the recipe's if not given.")
@click.option("--frames", type=click.IntRange(min=1), metavar="N", help="How many; the recipe's if not given.")
@click.option("--fps", type=click.FloatRange(min=0, min_open=True), metavar="X", help="Frames per second of the files.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A new or empty folder; RUN/samples, or RUN/samples-2 …",
)
@click.option("--ema", is_flag=True, help="With the averaged weights, not the last ones.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Where to compute: cpu, cuda …")
@plugin_option
def sample(
    run: Path,
    prompts: tuple[str, ...],
    prompt_files: tuple[str, ...],
    num: int,
    seed: int,
    steps: int | None,
    sigmas: list[float] | None,
    eta: float | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    fps: float | None,
    output: Path | None,
    ema: bool,
    device: str,
    plugin_files: tuple[str, ...],
) -> None:
    """Sample from RUN: a run's folder, a checkpoint, or an export.

    Writes a video (mp4) of each prompt, and samples.png, .webp and .json: the first few to look at, and how all of them
    were made. Without a prompt the model samples what it does for an empty one.

    \b
    Example:
      moedistill sample runs/dcm_digits/20250131-120000 --prompt "3 right" --num 4
      moedistill sample runs/dcm_wan_1_3b/20250131-120000 --prompts prompts.txt --frames 49 --device cuda
    """
    if steps is not None and sigmas is not None:
        raise click.UsageError("give --steps or --sigmas, not both")
    from moedistill.data.prompts import read_prompts
    from moedistill.errors import user_errors
    from moedistill.runs.sample import sample_run

    with user_errors("--prompts"):
        asked = [*prompts, *(prompt for file in prompt_files for prompt in read_prompts(file))]
    result = sample_run(
        run, prompts=asked or ("",), num=num, seed=seed, steps=steps, sigmas=sigmas, eta=eta, output=output,
        device=device, weights="ema" if ema else "trained", fps=fps, keep=False, plugins=_plugins(plugin_files),
        video={"height": height, "width": width, "num_frames": frames},
    )  # fmt: skip
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(str(result.output))


@cli.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--format", "formats", multiple=True, default=("diffusers",), show_default=True, metavar="NAME",
    help="What to write: see moedistill list exporter. Repeatable.",
)  # fmt: skip
@click.option("--lora", "form", flag_value="lora", help="Every expert as a LoRA.")
@click.option("--merge", "form", flag_value="merged", help="Every expert as the weights of a plain network.")
@click.option("--svd", type=click.IntRange(min=1), metavar="RANK", help="A full expert as a LoRA, cut to this rank.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True,
    help="Of the weights in the files.",
)  # fmt: skip
@click.option("--copy", is_flag=True, help="Copy a pipeline's other components, not link them.")
@click.option("--ema", is_flag=True, help="The averaged weights, not the last ones.")
@click.option(
    "--no-verify", "verify", is_flag=True, default=True, flag_value=False, help="Do not read the files again."
)
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR",
    help="A new or empty folder, of several formats with one for each in it; RUN/export/NAME if not given.",
)  # fmt: skip
@plugin_option
def export(
    run: Path,
    formats: tuple[str, ...],
    form: str | None,
    svd: int | None,
    dtype: str,
    copy: bool,
    ema: bool,
    verify: bool,
    output: Path | None,
    plugin_files: tuple[str, ...],
) -> None:
    """Write the experts of RUN, a run's folder, a checkpoint or an export, in files that other tools load.

    Unless told otherwise an adapter leaves as LoRA, and an expert with all weights of its own merged. Only the base
    model's network is read. Beside the files lie a model card with the code that runs them, and moedistill.json.
    Then each file is read again as those do who load it, and compared with what was trained.

    \b
    Example:
      moedistill export runs/dcm_wan_1_3b/20250131-120000 --merge --output few_step_wan
      moedistill export runs/dcm_wan_1_3b/20250131-120000 --format diffusers --dtype float16
    """
    if svd is not None and form == "merged":
        raise click.UsageError("--svd is of LoRA files: leave --merge out")
    import torch

    from moedistill.errors import user_errors
    from moedistill.exporters.export import export as write
    from moedistill.exporters.options import ExportOptions, chosen_formats

    plugins = _plugins(plugin_files)
    with user_errors("--format"):
        chosen = chosen_formats(plugins.components, formats, copy=copy)
    options = ExportOptions(form=form, svd=svd, dtype=getattr(torch, dtype), verify=verify)  # type: ignore[arg-type]
    weights = "ema" if ema else "trained"
    write(run, chosen, output, options, weights=weights, plugins=plugins, say=click.echo)  # type: ignore[arg-type]


@cli.command()
@click.argument("folders", nargs=-1, required=True, metavar="RUN…")
@click.option("--table", is_flag=True, help="A table of all metrics with 95 % intervals, as Markdown.")
@click.option("--against", metavar="METHOD", help="With --table: paired differences to this method, too.")
@click.option("--metric", "metrics", multiple=True, metavar="KIND", help="With --table: this one only. Repeatable.")
@click.option("--resamples", type=click.IntRange(min=10), default=200, show_default=True, help="Bootstrap draws.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the table as JSON.")
@plugin_option
def report(
    folders: tuple[str, ...],
    table: bool,
    against: str | None,
    metrics: tuple[str, ...],
    resamples: int,
    json_file: Path | None,
    plugin_files: tuple[str, ...],
) -> None:
    """List runs, or compare them in a table; each RUN is a run's folder, or one that holds runs.

    Runs of one recipe that differ in their seed only are one method; of two runs of one seed the newer one counts.
    Without --table every run is listed with its cost and how far it came, also miniatures and unfinished ones; the
    table is of those that have evaluated, on equal noise.

    \b
    Example:
      moedistill report runs/dcm_digits
      moedistill report runs/dcm_digits --table --metric frechet --json table.json
      moedistill report runs/mine runs/theirs --table --against my_recipe
    """
    if not table and json_file is None and (against is not None or metrics):
        raise click.UsageError("--against and --metric are of the table: add --table or --json")
    import json

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    plugins = _plugins(plugin_files)
    if not table and json_file is None:
        from moedistill.runs.listing import list_runs, packed

        for parts in list_runs(folders, plugins):
            click.echo("\n".join(packed(parts, width)))
        return
    from moedistill.runs.tables import read_records, tabulate

    result = tabulate(read_records(folders, plugins), against=against, metrics=metrics or None, resamples=resamples)
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    if table:
        click.echo(result.markdown(width))
    if json_file is not None:
        _write(json_file, json.dumps(result.plain(), indent=1))
        click.echo(str(json_file), err=table)


@cli.command()
@click.argument("recipe")
@set_option
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="How many.")
@click.option(
    "--steps", type=click.IntRange(min=0), default=50, show_default=True, metavar="N",
    help="Training steps of the student, and of each of two experts; 0 trains nothing.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Paths at once; the recipe's micro-batch.")
@click.option(
    "--ranges", type=click.IntRange(min=1), default=8, show_default=True, metavar="N",
    help="Noise ranges whose gradients are compared: two copies of the weights in main memory for each.",
)  # fmt: skip
@click.option("--experts", type=click.IntRange(min=2), metavar="N", help="How many to part; the recipe's number, or 2.")
@click.option("--student-steps", type=click.IntRange(min=1), metavar="N", help="Sampling steps; the recipe's, or 4.")
@click.option("--smoke", is_flag=True, help="On a random miniature, with a few samples and steps: seconds, on a CPU.")
@click.option("--seed", type=int, metavar="N", help="The same as --set seed=N.")
@click.option("--output", metavar="DIR", help="A new or empty folder; runs/NAME-analysis/TIME if not given.")
@device_option
@plugin_option
def analyze(recipe: str, overrides: tuple[str, ...], plugin_files: tuple[str, ...], **options: Any) -> None:
    """Look into RECIPE's model: where to part the experts, where to sample, which layers to adapt, and why.

    Follows the teacher from noise to data, measures losses and gradients of a student, trains two experts briefly, and
    writes the numbers (analysis.json), plots, and a recipe that follows from them (suggestion.yaml).

    The suggestion is a hypothesis to test by training, not a result. On digits its boundary lost: a Fréchet distance of
    166 against 129 with the recipe's own, at 4 steps, one seed (docs/results/2026-11-22.md).

    \b
    Example:
      moedistill analyze dcm_digits
      moedistill analyze recipes/dcm_wan_1_3b.yaml --smoke
      moedistill analyze my_recipe.yaml --samples 16 --steps 0 --experts 3
    """
    from moedistill.analysis.study import analyze as run_analysis

    run_analysis(recipe, overrides=overrides, plugins=_plugins(plugin_files), **options)


@cli.group()
def data() -> None:
    """Look at data, and make them.

    \b
    Example:
      moedistill data check data/my_set --recipe my_recipe.yaml
      moedistill data generate prompts.txt data/own --recipe my_recipe.yaml
    """


class _Numbers(click.ParamType):
    """Comma-separated whole numbers above 0."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        parts = value.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} must be whole numbers with commas between them, such as 17,33,81", param, ctx)
        return [int(part) for part in parts]


@data.command()
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--recipe", required=True, metavar="RECIPE", help="Whose model the set is for, and which size of videos.")
@set_option
@click.option("--dry-run", is_flag=True, help="Say what the set would have and what is left out; encode nothing.")
@click.option("--fps", type=click.FloatRange(min=0, min_open=True), metavar="X", help="Frames per second; the model's.")
@click.option("--lengths", type=_Numbers(), metavar="LIST", help="Frames that samples may have; those of the recipe.")
@click.option(
    "--windows", type=click.IntRange(min=1), metavar="N", help="Samples of one clip, at most; 1 if not given."
)
@click.option("--stride", type=click.IntRange(min=1), metavar="N", help="Frames between windows' beginnings.")
@click.option(
    "--crop", type=click.Choice(["center", "top", "bottom", "left", "right"]), help="Which part stays; the center."
)
@click.option("--upscale", is_flag=True, default=None, help="Enlarge clips that are too small, not leave them out.")
@click.option(
    "--caption", metavar="TEXT", callback=_one_in_utf8, help="Of clips that have none; else they are left out."
)
@click.option("--path-column", metavar="NAME", help="Of a list: where the files are.")
@click.option("--caption-column", metavar="NAME", help="Of a list: where the captions are.")
@processes_option
@device_option
@plugin_option
def encode(
    source: str,
    dest: Path,
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    fps: float | None,
    num_processes: int | None,
    device: str | None,
    plugin_files: tuple[str, ...],
    **options: Any,
) -> int:
    """Make a training set in DEST of the clips and captions in SOURCE: latents and text embeddings of RECIPE's model.

    SOURCE is a folder of clips and pictures with captions in .txt files beside them, a list of them (.jsonl, .csv,
    .json), or prompts (.txt, one a line), which make a set without videos. What is encoded is kept: after a kill, the
    same command goes on. DEST/skipped.jsonl says of each clip that is left out why. The exit code is 2 if none is left.

    \b
    Example:
      moedistill data encode my_clips my_set --recipe dcm_wan_1_3b --dry-run
      moedistill data encode clips.jsonl my_set --recipe dcm_wan_1_3b --lengths 33,81 --num-processes 4
    """
    from moedistill.data.videos import VideosConfig
    from moedistill.recipe.loading import load_recipe

    settings = (*overrides, *([] if fps is None else [f"backbone.fps={fps}"]))
    loaded = load_recipe(recipe, settings, _plugins(plugin_files))
    from moedistill.runs.encode import EncodeCommand, encode_set, encode_share
    from moedistill.runs.launch import launched_here

    if launched_here() is not None:
        encode_share(loaded, dest, device=device, say=click.echo)
        return 0
    own = loaded.data if isinstance(loaded.data, VideosConfig) else VideosConfig(path=None)
    given = {name: value for name, value in options.items() if value is not None}
    encode_set(
        loaded, own.replace(path=source, **given), dest, device=device, say=click.echo, dry_run=dry_run,
        share_out=EncodeCommand(recipe, settings, device, plugin_files).in_processes(num_processes, loaded),
    )  # fmt: skip
    return 0


@data.command()
@click.argument("path")
@click.option("--recipe", metavar="RECIPE", help="Say what does not fit this recipe, too.")
@set_option
@plugin_option
def check(path: str, recipe: str | None, overrides: tuple[str, ...], plugin_files: tuple[str, ...]) -> None:
    """Read all of the preprocessed set at PATH: what is in it, what is broken. No model is loaded.

    PATH is a videos2caption.json, an index.json of our own layout, or a folder with one of them. The exit code is 2 if
    the set cannot be used as it is.

    \b
    Example:
      moedistill data check data/my_set
      moedistill data check data/my_set --recipe my_recipe.yaml --set training.batch_size=4
    """
    if recipe is None and overrides:
        raise click.UsageError("--set changes a recipe; give one with --recipe")
    from moedistill.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides, _plugins(plugin_files)) if recipe is not None else None
    from moedistill.runs.check import check_set

    report = check_set(path, loaded)
    for line in report.lines():
        click.echo(line)
    if not report.fits:
        click.get_current_context().exit(2)


@data.command()
@click.argument("prompts")
@click.argument("dest")
@click.option("--recipe", required=True, metavar="RECIPE", help="Whose teacher, guidance and trajectory.")
@set_option
@click.option("--num", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Of each prompt.")
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Evenly over the trajectory; all of its steps.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Of the noise.")
@click.option(
    "--num-processes", type=click.IntRange(min=1), metavar="N", help="Processes on this machine, one on each GPU."
)
@device_option
@plugin_option
def generate(
    prompts: str,
    dest: str,
    recipe: str,
    overrides: tuple[str, ...],
    num: int,
    steps: int | None,
    seed: int,
    num_processes: int | None,
    device: str | None,
    plugin_files: tuple[str, ...],
) -> int:
    """Make the set DEST of what the teacher of RECIPE makes of PROMPTS, a file with one a line, or a set.

    Its latents and their prompts, to be distilled on. Whatever stops it, the same command goes on with what is missing;
    with more prompts at the end it makes those alone. The number of processes changes nothing.

    \b
    Example:
      moedistill data generate prompts.txt data/own --recipe dcm_wan_1_3b
      moedistill data generate prompts.txt data/own --recipe my_recipe.yaml --num 4 --num-processes 8
    """
    from moedistill.runs.launch import end_with_launcher, launched_here

    workers = launched_here()
    if workers is None and "WORLD_SIZE" in os.environ:
        raise click.UsageError("start it without a launcher, with --num-processes")
    from moedistill.data.prompts import read_prompts
    from moedistill.errors import user_errors
    from moedistill.recipe.loading import load_recipe
    from moedistill.runs.generate import Generation

    plugins = _plugins(plugin_files)
    loaded = load_recipe(recipe, overrides, plugins)
    with user_errors("PROMPTS"):
        asked = read_prompts(prompts)
    work = Generation(loaded, asked, Path(dest), num=num, seed=seed, steps=steps)
    if workers is not None:
        end_with_launcher()
        work.sample_share(device, workers)
        return 0
    again = ["data", "generate", prompts, dest, "--recipe", recipe, "--num", str(num), "--seed", str(seed)]
    again += [part for setting in overrides for part in ("--set", setting)]
    again += [] if steps is None else ["--steps", str(steps)]
    again += [] if device is None else ["--device", device]
    again += [part for file in plugins.files for part in ("-p", str(file))]
    code = work.run(device, num_processes or 1, again)
    if code == 0:
        click.echo(dest)
    return code


@data.command(name="show")
@click.argument("path")
@click.option("--recipe", metavar="RECIPE", help="Whose model the latents are; what the set was made for if not given.")
@set_option
@click.option("--num", type=click.IntRange(min=0), default=8, show_default=True, metavar="N", help="Samples to decode.")
@click.option("--output", metavar="DIR", help="A new or empty folder; the set's own, show, if not given.")
@device_option
@plugin_option
def show_data(
    path: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    num: int,
    output: str | None,
    device: str | None,
    plugin_files: tuple[str, ...],
) -> None:
    """Show what is in the set at PATH: lengths, sizes, captions, and a few samples as videos and a contact sheet.

    Of the model the VAE alone is loaded. Without it, or where it is not known, the videos are left out.

    \b
    Example:
      moedistill data show data/my_set
      moedistill data show data/my_set --recipe my_recipe.yaml --num 16 --device cuda
    """
    if recipe is None and overrides:
        raise click.UsageError("--set changes a recipe; give one with --recipe")
    from moedistill.recipe.loading import load_recipe
    from moedistill.runs.show import show_set

    plugins = _plugins(plugin_files)
    backbone = load_recipe(recipe, overrides, plugins).backbone if recipe is not None else None
    shown = show_set(path, plugins, backbone=backbone, num=num, output=output, device=device)
    for line in shown.lines:
        click.echo(line)


@cli.command()
@click.argument("kind")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--recipe", metavar="RECIPE", help="Whose experts the weights are; DEST is then an export.")
@set_option
@plugin_option
def convert(
    kind: str,
    source: Path,
    dest: Path,
    recipe: str | None,
    overrides: tuple[str, ...],
    plugin_files: tuple[str, ...],
) -> None:
    """Make of SOURCE, weights that others publish, the new folder DEST.

    With --recipe they are of experts that were distilled elsewhere, and DEST is an export of RECIPE, which says what
    the files do not: trajectory, boundaries, steps. `sample`, `evaluate`, `apply`, `export` and experts.X.init read it.
    KIND is then

    \b
      dcm        a file in DCM's released layout, with both experts
      loras      a folder with a LoRA file for high and one for low noise; or one file, for one expert
      diffusers  a folder with transformer and transformer_2, both whole
      comfyui    whole networks under their makers' names: a folder with high and low, or one file

    Without it they are a model's files as its makers publish them, KIND is the backbone's, such as open_sora, and DEST
    is for `backbone.pretrained`. A recipe that names the published folder does this itself at its first use.

    \b
    Example:
      moedistill convert dcm DCM/wan1.3b released --recipe dcm_wan_1_3b_published
      moedistill convert loras Wan2.2-Lightning/T2V released --recipe my_recipe.yaml
      moedistill convert open_sora Open-Sora-v2 models/open_sora
    """
    from moedistill.errors import user_errors
    from moedistill.model.backbone import BackboneConfig

    if recipe is not None:
        from moedistill.recipe.loading import load_recipe

        loaded = load_recipe(recipe, overrides, _plugins(plugin_files))
        from moedistill.importing.write import import_weights

        experts = import_weights(kind, source, dest, loaded)
        click.echo(f"{dest}: an export with {' and '.join(experts)}; sample it, or give it as experts.X.init")
        return
    if overrides:
        raise click.UsageError("--set changes a recipe; give one with --recipe")
    from moedistill.importing.write import IMPORTERS

    if kind in IMPORTERS:
        raise click.UsageError(f"{kind} is of experts: give the recipe that they fit with --recipe")
    with user_errors("convert"):
        cls = _plugins(plugin_files).components.get("backbone", kind)
        assert issubclass(cls, BackboneConfig)
        cls.convert(source, dest)
    click.echo(f"{dest}: give it as backbone.pretrained")


@cli.command()
@click.argument("name")
@click.option("--pretrained", metavar="PLACE", help="Check these weights, a folder or Hub id; else a random miniature.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the backbone. Repeatable."
)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Where to compute: cpu, cuda …")
@plugin_option
def check_backbone(
    name: str, pretrained: str | None, overrides: tuple[str, ...], device: str, plugin_files: tuple[str, ...]
) -> None:
    """Check numerically that the backbone NAME is right: ✔, ✘ or – (not checked) and a figure for each rule.

    Exits with 0 if nothing is wrong, 1 if something is, 2 if it cannot be built.

    \b
    Example:
      moedistill check-backbone digits
      moedistill check-backbone my_model -p my_model.py --set width=32
    """
    import time

    from moedistill.runtime.devices import find_device
    from moedistill.testing.checks import CHECKS
    from moedistill.testing.running import read_config, run_checks
    from moedistill.testing.subject import Subject

    settings = {} if pretrained is None else {"pretrained": pretrained}
    config = read_config(name, settings, overrides, _plugins(plugin_files))
    start = time.monotonic()
    try:
        subject = Subject(config, real=pretrained is not None, device=find_device(device))
        subject.backbone()
    except Exception as error:
        why = str(error) if isinstance(error, (UserError, ValueError)) else f"{type(error).__name__}: {error}"
        raise UserError(f"backbone {name} cannot be built: {why}") from error
    click.echo(f"{name}, {'with its weights' if subject.real else 'a random miniature'}:")
    width = max(len(check.title) for check in CHECKS)
    counts = {"✔": 0, "✘": 0, "–": 0}
    for row in run_checks(subject):
        counts[row.mark] += 1
        click.echo(f"  {row.mark} {row.check.title:{width}}  {row.figure}")
    click.echo(f"{counts['✔']} ✔, {counts['✘']} ✘, {counts['–']} not checked, in {time.monotonic() - start:.0f} s")
    if counts["✘"]:
        raise SystemExit(1)


@cli.command()
@click.argument("name")
@click.argument("dest", type=click.Path(path_type=Path))
@plugin_option
def new_backbone(name: str, dest: Path, plugin_files: tuple[str, ...]) -> None:
    """Write a plugin for a backbone NAME of your own to the folder DEST: it works, on a toy network, and has tests.

    \b
    Example:
      moedistill new-backbone my_model my_model_plugin
    """
    from moedistill.testing.new_backbone.write import write_plugin

    taken = [entry.name for entry in _plugins(plugin_files).components.entries("backbone")]
    for file in write_plugin(name, dest, taken):
        click.echo(str(file))
    click.echo(f"next: {dest / 'README.md'}")


def _plugins(files: Sequence[str]) -> "Plugins":
    """All plugins. A broken installed one is the business of `moedistill list`; one that was asked for is an error."""
    from moedistill.components.plugins import load_plugins

    plugins = load_plugins(files)
    broken = [f"{name}: {reason}" for name, reason in plugins.broken.items() if name in plugins.files]
    if broken:
        raise UserError("cannot load the plugin " + "\n".join(shorten(line, 500) for line in broken))
    return plugins


def _with_seed(overrides: Sequence[str], seed: int | None) -> list[str]:
    return [*overrides, *([] if seed is None else [f"seed={seed}"])]


def _speak_utf8() -> None:
    """Output to files and pipes is UTF-8 in every locale; what a terminal of another encoding lacks is escaped.

    A locale that knows ASCII alone is taken for one that nobody has set.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            own = stream.isatty() and codecs.lookup(stream.encoding).name != "ascii"
            stream.reconfigure(encoding=stream.encoding if own else "utf-8", errors="backslashreplace")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0 done, 2 the user's mistake, 128 + signal interrupted, 1 anything else.

    A process of several exits with 3 where another one is lost.
    """
    _speak_utf8()
    with Interruption():
        code = _exit_code(args)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            # At once: threads of torch.distributed that run while Python ends, as others still talk to this process,
            # are ended by an abort. All that has files to close has closed them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)


SAYING = 1.0
"""Seconds after which another process has said what is wrong; a launcher ends it when the first one ends."""


def _further_process() -> bool:
    """Whether this is not the first of a run's processes on this machine, which all say the same."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("LOCAL_RANK", "0") != "0"


def _exit_code(args: Sequence[str] | None) -> int:
    code: int | None
    try:
        # Without standalone mode click returns the exit code of --help and raises all else.
        with quiet_libraries():
            code = cli.main(args=args, prog_name="moedistill", standalone_mode=False)
    except click.Abort:
        click.echo("interrupted", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except Interrupted as error:
        if not _further_process():  # all are stopped at once
            click.echo(str(error), err=True)
        code = error.exit_code
    except UserError as error:
        if isinstance(error, LostProcess) and "MOEDISTILL_PLACE" in os.environ:
            pass  # our launcher knows more
        elif isinstance(error, SaidElsewhere) or (isinstance(error, RecipeError) and _further_process()):
            with suppress(Interrupted):
                time.sleep(SAYING)
        else:
            click.echo(f"error: {error}", err=True)
        code = getattr(error, "exit_code", 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        click.echo(f"error: cannot write: {error}; make room there, or choose another place", err=True)
        code = 2
    return code or 0


if __name__ == "__main__":
    main()
