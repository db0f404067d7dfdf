"""Clips become a set of latents for a recipe's model: by command, or before a run whose data are videos."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moedistill.data.encode import SKIPPED, Encoded, Encoding, default_folder, is_current, refuse_others, sample_bytes
from moedistill.data.make_pieces import make_pieces
from moedistill.data.progress import Say, silent
from moedistill.data.videos import VideosConfig
from moedistill.data.windows import SetPlan, plan_set
from moedistill.errors import UserError, user_errors
from moedistill.model.latent_video import LatentVideoBackbone
from moedistill.recipe.building import to_plain
from moedistill.recipe.keys import Recipe
from moedistill.runs.launch import end_with_launcher, launch, tell_launcher
from moedistill.runs.memory import memory_errors
from moedistill.runtime.devices import cpu_threads, find_device
from moedistill.runtime.lock import claimed, in_turn
from moedistill.runtime.signals import Interruption

ShareOut = Callable[[Path], int]
"""Starts processes that each do `encode_share` of the set in a folder, and gives their exit code."""


@dataclass(frozen=True)
class EncodeCommand:
    """How `moedistill data encode` is started in several processes.

    Attributes:
        recipe: a file or a name, as given.
        settings: what `--set` was given.
        device: if one was named.
        plugins: files.
    """

    recipe: str
    settings: Sequence[str]
    device: str | None
    plugins: Sequence[str]

    def in_processes(self, processes: int | None, recipe: Recipe) -> ShareOut | None:
        """What starts so many; None where that is this one."""
        if processes is None or processes == 1:
            return None
        given = [part for setting in self.settings for part in ("--set", setting)]
        given += ["--device", self.device] if self.device is not None else []
        given += [part for file in self.plugins for part in ("-p", file)]

        def start(folder: Path) -> int:
            # The clips are planned already: they are named for people who look at the list of processes.
            arguments = ["data", "encode", "--recipe", self.recipe, *given, "--", "clips", str(folder)]
            return launch(arguments, processes, self.device, recipe.training.timeout, "the same command")

        return start


def encode_set(
    recipe: Recipe,
    data: VideosConfig,
    folder: Path,
    *,
    device: str | None = None,
    say: Say,
    share_out: ShareOut | None = None,
    dry_run: bool = False,
) -> Encoded | None:
    """Encodes clips for a recipe's model to a set in `folder`; what is there of it already is kept.

    Args:
        data: the clips, and how they become samples.
        say: is told what the set will have, and how far it is.
        share_out: null for this process alone.
        dry_run: only says what the set would have; gives None.

    Raises:
        UserError: no clip can be used, something is missing, or the folder holds something else.
        SystemExit: of a process that was started.
    """
    kept = "" if dry_run else "stopped; what is encoded is kept, and the same command goes on from there"
    with Interruption(lambda: kept), _encoding(recipe, device) as backbone:
        return _encode(recipe, data, backbone, folder, say, share_out, dry_run=dry_run)


def encode_share(recipe: Recipe, folder: Path, *, device: str | None, say: Say) -> None:
    """What one of several processes does, that `encode_set` has started."""
    end_with_launcher()
    tell_launcher("what is encoded is kept: the same command goes on")
    process, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device is None or device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}" if find_device(device).type == "cuda" else None
    with _encoding(recipe, device) as backbone:
        make_pieces(backbone, folder, say if process == 0 else silent, process, processes)


def with_encoded_videos(recipe: Recipe, device: str | None, say: Say, share_out: ShareOut | None = None) -> Recipe:
    """The recipe with a set of latents in place of videos, which are encoded if they are not yet.

    Of several processes the first one encodes, and the others wait for it.
    """
    data = recipe.data
    if not isinstance(data, VideosConfig) or data.path is None:
        return recipe
    with user_errors("data"):
        data.look_ahead()
    with _encoding(recipe, device) as backbone:
        folder = Path(data.cache).expanduser() if data.cache is not None else default_folder(data, backbone)
        with in_turn(folder.with_name(f".{folder.name}.turn")):
            if not is_current(data, backbone, folder):
                say(f"data: {data.path} is encoded to {folder}")
                _encode(recipe, data, backbone, folder, say, share_out)
    return replace(recipe, data=data.encoded(folder))


@contextmanager
def _encoding(recipe: Recipe, device: str | None) -> Iterator[LatentVideoBackbone]:
    """The recipe's backbone, without weights of its networks, to encode with in the block."""
    with user_errors("backbone"):
        backbone = recipe.backbone.skeleton()
    if not isinstance(backbone, LatentVideoBackbone):
        raise UserError(
            f"backbone {recipe.backbone.kind} encodes no videos: it is none of a video's size and rate "
            "(LatentVideoBackbone); make its latents elsewhere, and store them with moedistill.write_latents"
        )
    backbone.placed = place = find_device(device)
    # On a CPU with one thread, if nothing else is asked for: what rounding depends on is their number, too.
    threads = recipe.training.num_threads or (1 if place.type == "cpu" else None)
    smaller = "try a smaller backbone.video, shorter lengths, or a device with more"
    with cpu_threads(threads), user_errors("data encode"), memory_errors(lambda: "data encode", lambda _: smaller):
        yield backbone


def _encode(
    recipe: Recipe,
    data: VideosConfig,
    backbone: LatentVideoBackbone,
    folder: Path,
    say: Say,
    share_out: ShareOut | None,
    *,
    dry_run: bool = False,
) -> Encoded | None:
    def planned() -> SetPlan:
        plan = plan_set(data, backbone.config, backbone.fps, without=[folder], say=say)
        for line in plan.table(partial(sample_bytes, backbone)):
            say(line)
        return plan

    def shared() -> None:
        if share_out is not None and (code := share_out(folder)):
            raise SystemExit(code)

    refuse_others(folder)
    if dry_run:
        planned().check()
        return None
    backbone.revisions()  # raises where the model is not there, before the clips are looked at
    with claimed(folder):  # also while they are looked at: what has taken hours is not in vain in the end
        encoding = Encoding(planned(), data, backbone, folder, {"backbone": to_plain(recipe.backbone)})
        if lost := encoding.replaced():
            say(f"  {folder} holds a set, of which {lost} samples are not among these: the new set takes its place")
        done = encoding.run(say, shared if share_out is not None else None)
    say(
        f"{folder}: samples: {done.samples}; pieces encoded now: {done.made}, kept: {done.kept}; "
        f"clips skipped: {len(done.skipped)}, see {folder / SKIPPED}"
    )
    return done
