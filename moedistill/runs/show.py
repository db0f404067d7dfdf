"""A look at a stored set: its distributions, and a few samples as videos, by the model's VAE alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from moedistill.components.plugins import Plugins
from moedistill.data.latents import Store, find_index, open_store
from moedistill.data.show import Overview, distributions, look, spread_over
from moedistill.errors import Problem, RecipeError, shorten, user_errors
from moedistill.media import contact_sheet, write_mp4
from moedistill.model.backbone import BackboneConfig
from moedistill.model.latent_video import LatentVideoConfig
from moedistill.recipe.building import Builder
from moedistill.recipe.yaml_tree import from_data
from moedistill.runtime.devices import find_device
from moedistill.runtime.writing import make_folder, make_numbered, new_file, refuse_used

SHEET = "show.png"
FRAME_HEIGHT, SHEET_FRAMES = 96, 4


@dataclass
class Shown:
    """What there is to see of a set.

    Attributes:
        lines: for people.
        output: the folder with the videos and the contact sheet; None if nothing was decoded.
    """

    lines: list[str] = field(default_factory=list)
    output: Path | None = None


def show_set(
    path: str | Path,
    plugins: Plugins,
    *,
    backbone: BackboneConfig | None = None,
    num: int = 8,
    output: str | Path | None = None,
    device: str | None = None,
) -> Shown:
    """Looks at the set at `path`, and decodes `num` of its samples into the folder `output`.

    Where they cannot be decoded, as without the VAE's weights, the lines say why.

    Args:
        backbone: whose latents they are; that of the set's own `made_for` if not given.
        output: new or empty; `show`, `show-2` … beside the index if not given.
        device: where to decode; the accelerator, if there is one, if not given.

    Raises:
        UserError: there is no set, or nothing can be written to `output`.
    """
    with user_errors("data"):
        store = open_store(path)
    if output is not None:
        refuse_used(Path(output))
    where = find_device(device)
    found, shown = look(store), Shown([f"{path}: {len(store)} samples, {store.layout} layout"])
    reason = ""
    if backbone is None and "backbone" in store.made_for:
        try:
            backbone = _read_backbone(store.made_for["backbone"], plugins)
        except RecipeError as error:
            reason = (
                f"the backbone that the set was made for cannot be read: {error.problems[0].message}; give --recipe"
            )
    compression = None
    if isinstance(backbone, LatentVideoConfig):
        compression = (backbone.temporal_compression, backbone.spatial_compression)
    shown.lines += distributions(found, compression)
    if found.broken:
        shown.lines.append(f"{found.broken} samples cannot be read; `moedistill data check {path}` names them")
    chosen = spread_over(found.shapes, num)
    shown.lines += [f"  sample {i}: {shorten(found.captions.get(i, '(no caption)').strip(), 80)}" for i in chosen]
    if not chosen or store.text_only:
        return shown
    if backbone is None:
        reason = reason or "the set does not say what it was made for; give --recipe to see its samples"
    elif not (reason := _misfit(backbone, found, chosen)):
        try:
            videos, fps = _decode(store, chosen, backbone, where)
        except ValueError as error:  # such as weights that are not on this machine
            reason = str(error).splitlines()[0]
        else:
            shown.output = _write(path, output, videos, fps, found)
    shown.lines.append(f"nothing is decoded: {reason}" if shown.output is None else str(shown.output))
    return shown


def _read_backbone(plain: Any, plugins: Plugins) -> BackboneConfig:
    """The config of plain data; RecipeError where it is none."""
    problems: list[Problem] = []
    root = from_data({"backbone": plain}, problems)
    builder = Builder(plugins.components, root)
    config = builder.component("backbone", root.plain()["backbone"], ("backbone",))
    problems += builder.problems.values()
    if problems:
        raise RecipeError(problems, "backbone")
    assert isinstance(config, BackboneConfig)
    return config


def _misfit(config: BackboneConfig, found: Overview, chosen: Sequence[int]) -> str:
    """Why the latents are not the model's; nothing, if they may be."""
    try:
        layout = config.layout()
    except ValueError as error:
        return str(error).splitlines()[0]
    problems = ((i, problem) for i in chosen for problem in (layout.latent_problems(found.shapes[i]) if layout else ()))
    return next((f"sample {i} {problem}; give the --recipe of its model" for i, problem in problems), "")


@torch.no_grad()
def _decode(
    store: Store, chosen: Sequence[int], config: BackboneConfig, device: torch.device
) -> tuple[dict[int, Tensor], float]:
    """Videos `[C, T, H, W]` in [0, 1] by sample, and their frames per second; ValueError where that cannot be."""
    backbone = config.skeleton()  # of the model, only what decodes is loaded
    backbone.placed = device
    videos = {}
    with backbone.encoding_videos():
        for i in chosen:
            latents, _ = backbone.prepare(store.read(i)[0].float()[None].to(device), {})
            videos[i] = backbone.decode(latents)[0].cpu()
    return videos, backbone.fps


def _write(
    path: str | Path, output: str | Path | None, videos: Mapping[int, Tensor], fps: float, found: Overview
) -> Path:
    """A file for each video, and the contact sheet; gives the folder."""
    if output is None:
        folder = make_numbered(find_index(path).parent / "show")
    else:
        make_folder(folder := Path(output))
    for i, video in videos.items():
        with new_file(folder / f"{i:06}.mp4") as new:
            write_mp4(new, video, fps=fps)
    small = _thumbnails(list(videos.values()))
    enlarged = max(1, FRAME_HEIGHT // small.shape[3])
    letters = SHEET_FRAMES * small.shape[4] * enlarged // 9  # of about 9 pixels each
    columns = [shorten(f"{i}: {found.captions.get(i, '')}", max(12, letters)) for i in videos]
    with new_file(folder / SHEET) as new:
        contact_sheet(new, {"": small}, columns, size=FRAME_HEIGHT)
    return folder


def _thumbnails(videos: Sequence[Tensor]) -> Tensor:
    """Small copies of videos of any sizes as one `[N, C, T, H, W]` of a few frames; edges fill up what is smaller."""
    small = []
    for video in videos:
        frames = video[:, torch.linspace(0, video.shape[1] - 1, 2 * SHEET_FRAMES).round().long()]
        height, width = min(FRAME_HEIGHT, video.shape[2]), video.shape[3] * min(FRAME_HEIGHT, video.shape[2])
        small.append(interpolate(frames, size=(height, max(1, round(width / video.shape[2]))), mode="area"))
    height, width = max(each.shape[2] for each in small), max(each.shape[3] for each in small)
    return torch.stack([pad(each, (0, width - each.shape[3], 0, height - each.shape[2])) for each in small])
