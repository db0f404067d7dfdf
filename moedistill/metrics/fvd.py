"""Fréchet video distance (Unterthiner et al., 2018, arXiv 1812.01717) with a feature network that the user brings."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor

from moedistill.components.fields import NonEmptyStr, PositiveInt
from moedistill.metrics.base import Metric, MetricConfig, MetricInputs
from moedistill.metrics.statistics import frechet_distance
from moedistill.runtime.devices import find_device

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
FEATURES = "features"
"""The name of the tensor in a file of features."""

_REAL: dict[Hashable, Tensor] = {}
"""Features of real videos by what they depend on: a report has one metric for each of many runs."""


@dataclass(kw_only=True)
class FVDConfig(MetricConfig):
    """Fréchet distance between video features of the samples and of real videos.

    Videos are cut to their first frames, resized to a square without regard to their proportions, and given to the
    network as `[B, 3, frames, size, size]` in [-1, 1]. Numbers are comparable only between runs of the same network,
    frames, size and real videos, and of the same number of samples.

    Args:
        detector: a TorchScript file that makes `[B, D]` features of videos; usually I3D trained on Kinetics-400
            (`i3d_torchscript.pt` of StyleGAN-V, which is asked for its features instead of its classes).
        real: a folder of videos, or a safetensors file whose tensor `features` `[M, D]` the same network has made.
        frames: how many of a video's frames count; all must have as many. I3D wants at least 10.
        size: height and width of what the network sees.
        batch_size: videos at a time.
    """

    detector: NonEmptyStr
    real: NonEmptyStr
    frames: PositiveInt = 16
    size: Annotated[int, Gt(0), Le(10_000)] = 224
    batch_size: PositiveInt = 8

    def build(self) -> "FVD":
        return FVD(self)

    def look_ahead(self) -> None:
        if not Path(self.detector).is_file():
            raise ValueError(
                f"metric fvd: detector {self.detector} does not exist; it is a TorchScript file of a video network "
                "such as I3D, which does not come with moedistill: download one and give its path"
            )
        real = Path(self.real)
        if real.is_dir():
            found = _videos(real)
            if len(found) < 2:
                raise ValueError(
                    f"metric fvd: real {self.real} holds {len(found)} videos ({', '.join(VIDEOS)}); give at least 2"
                )
        elif real.is_file():
            _stored_features(real)
        else:
            raise ValueError(
                f"metric fvd: real {self.real} does not exist; give a folder of real videos, or a safetensors file of "
                f"their features as {FEATURES!r}"
            )


class FVD(Metric):
    """See `FVDConfig`."""

    def __init__(self, config: FVDConfig) -> None:
        self.config = config

    def rows(self, inputs: MetricInputs) -> Tensor:
        return torch.cat([self._features(batch) for batch in inputs.videos.split(self.config.batch_size)])

    def value(self, rows: Tensor) -> float:
        return frechet_distance(rows, self._real)

    @cached_property
    def _real(self) -> Tensor:
        """Features of the real videos, float64 `[M, D]`; made once for all metrics of these settings and files."""
        config = self.config
        files = [(path, _written(Path(path))) for path in (config.detector, config.real)]
        key = (*files, config.frames, config.size)
        if key not in _REAL:
            _REAL[key] = self._features_of_real()
        return _REAL[key]

    def _features_of_real(self) -> Tensor:
        real = Path(self.config.real)
        if real.is_file():
            return _stored_features(real)
        # One by one: they may be of many sizes.
        return torch.cat([self._features(_read(path, self.config.frames)[None]) for path in _videos(real)])

    @cached_property
    def _detector(self) -> Any:
        try:
            return torch.jit.load(self.config.detector, map_location=find_device(None)).eval()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"metric fvd: {self.config.detector} is no TorchScript file: {reason}") from error

    @torch.no_grad()
    def _features(self, videos: Tensor) -> Tensor:
        """float64 `[B, D]`, on the CPU, of videos `[B, 1 or 3, T, H, W]` in [0, 1]."""
        config = self.config
        if videos.shape[2] < config.frames:
            raise ValueError(
                f"metric fvd: a video has {videos.shape[2]} frames, fewer than frames: {config.frames}; lower it"
            )
        videos = videos[:, :, : config.frames].float().expand(-1, 3, -1, -1, -1)
        size = (config.frames, config.size, config.size)
        seen = 2.0 * F.interpolate(videos, size, mode="trilinear", align_corners=False) - 1.0
        detector = self._detector
        # StyleGAN-V's file takes these; a plain network takes videos only.
        wishes = {"rescale": False, "resize": False, "return_features": True}
        known = {argument.name for argument in detector.forward.schema.arguments}
        features = detector(seen.to(find_device(None)), **{name: v for name, v in wishes.items() if name in known})
        if features.shape[:-1] != videos.shape[:1]:
            raise ValueError(
                f"metric fvd: the detector makes {list(features.shape)} of {len(videos)} videos; it must be "
                f"[{len(videos)}, D], one row of features for each"
            )
        return features.double().cpu()


def _written(path: Path) -> int | None:
    """When a file, or the list of a folder's files, was last changed; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def _videos(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS)


def _read(path: Path, frames: int) -> Tensor:
    """The first frames of a video, float32 `[3, T, H, W]` in [0, 1]."""
    from itertools import islice

    import av

    with av.open(str(path)) as container:
        decoded = islice(container.decode(video=0), frames)
        pixels = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in decoded])
    return pixels.permute(3, 0, 1, 2) / 255.0


def _stored_features(file: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"metric fvd: real {file} is neither a folder nor a safetensors file: {error}") from error
    features = tensors.get(FEATURES)
    if features is None or features.ndim != 2 or len(features) < 2:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
        raise ValueError(f"metric fvd: real {file} holds {found}; it must hold {FEATURES!r} [M, D] of M ≥ 2 videos")
    return features.double()
