"""A small convolutional network that reads digit and direction off a video; its features carry the Fréchet distance.

Its weights ship with the plugin (`classifier.safetensors`). They were trained on the `classifier` split only, so it has
seen neither the generative model's training styles nor the real videos that the Fréchet distance compares with.
`python -m moedistill_digits.build_assets` makes them.
"""

import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from moedistill_digits.codec import Codec
from moedistill_digits.data import (
    CANVAS,
    DIGIT_SIZE,
    DIGITS,
    DIRECTIONS,
    FRAMES,
    LAST,
    STARTS,
    STEP,
    load_styles,
    render,
)

CLASSIFIER_FILE = Path(__file__).with_name("classifier.safetensors")
APPEARANCE = 48
MOTION = 16


class DigitsClassifier(nn.Module):
    """Appearance (what is seen, wherever it is) tells the digit; motion (where something is, when) the direction."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 40, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.appearance = nn.Conv2d(40, APPEARANCE, 3)
        self.motion = nn.Linear(FRAMES * (CANVAS // 4) ** 2, MOTION)
        self.digit = nn.Linear(APPEARANCE, DIGITS)
        self.direction = nn.Linear(MOTION, len(DIRECTIONS))

    def appearance_features(self, maps: Tensor) -> Tensor:
        """Features `[N, 48]` of trunk maps `[N, T, 40, 6, 6]`: the strongest response in each frame, averaged."""
        return self.appearance(maps.flatten(0, 1)).amax((2, 3)).relu().unflatten(0, maps.shape[:2]).mean(1)

    def motion_features(self, maps: Tensor) -> Tensor:
        """Features `[N, 16]` of trunk maps `[N, 8, 40, 6, 6]`."""
        return self.motion(maps.mean(2).flatten(1)).relu()

    def maps(self, videos: Tensor) -> Tensor:
        """Trunk maps `[N, T, 40, 6, 6]` of videos `[N, 1, T, 24, 24]`, frame by frame."""
        frames = videos.transpose(1, 2)
        return self.trunk(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def features(self, videos: Tensor) -> Tensor:
        """The 64 penultimate features `[N, 64]` of videos `[N, 1, 8, 24, 24]`."""
        maps = self.maps(videos)
        return torch.cat([self.appearance_features(maps), self.motion_features(maps)], dim=1)

    def forward(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the digit `[N, 10]` and of the direction `[N, 4]` of videos `[N, 1, 8, 24, 24]`."""
        appearance, motion = self.features(videos).split([APPEARANCE, MOTION], dim=1)
        return self.digit(appearance), self.direction(motion)

    @staticmethod
    @cache
    def load() -> "DigitsClassifier":
        """The shipped classifier."""
        classifier = DigitsClassifier()
        classifier.load_state_dict(load_file(CLASSIFIER_FILE))
        return classifier.eval().requires_grad_(False)


def train_classifier(
    codec: Codec, digit_steps: int = 2000, direction_steps: int = 300, seed: int = 0
) -> DigitsClassifier:
    """Trains the classifier on the `classifier` split: the digit on single frames, then the direction on videos.

    The styles are few (about 700), so they are slightly rotated, sheared, scaled and shifted at random. The same seed,
    machine and number of threads give the same weights, bit for bit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitsClassifier()
        styles, digits = load_styles("classifier")
        _train_digit(classifier, codec, styles, digits, digit_steps)
        _train_direction(classifier, codec, styles, direction_steps)
    return classifier.eval()


def _train_digit(
    classifier: DigitsClassifier, codec: Codec, styles: Tensor, digits: Tensor, steps: int, batch: int = 128
) -> None:
    optimizer, schedule = _optimizer(classifier, steps)
    for _ in range(steps):
        index = torch.randint(len(styles), (batch,))
        frames = _degrade(_place(_warp(styles[index])), codec)
        features = F.dropout(classifier.appearance_features(classifier.maps(frames)), 0.3)
        loss = F.cross_entropy(classifier.digit(features), digits[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _train_direction(classifier: DigitsClassifier, codec: Codec, styles: Tensor, steps: int, batch: int = 4) -> None:
    """Trains the direction alone, on the digit's trunk; each step sees `batch` styles on each of the 12 paths."""
    head = nn.ModuleList([classifier.motion, classifier.direction])
    optimizer, schedule = _optimizer(head, steps)
    directions = torch.arange(len(DIRECTIONS)).repeat_interleave(STARTS * batch)
    for _ in range(steps):
        videos = []
        for direction in range(len(DIRECTIONS)):
            for start in range(STARTS):
                videos.append(render(styles[torch.randint(len(styles), (batch,))], direction, start))
        with torch.no_grad():
            maps = classifier.maps(_degrade(torch.cat(videos), codec))
        loss = F.cross_entropy(classifier.direction(classifier.motion_features(maps)), directions, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _optimizer(module: nn.Module, steps: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=1e-2, foreach=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    return optimizer, schedule


def _warp(styles: Tensor) -> Tensor:
    """Styles `[N, 12, 12]`, each rotated, sheared, scaled and shifted a little at random."""
    n = len(styles)
    angle = math.radians(12.0) * _uniform(n)
    scale = 1.0 + 0.1 * _uniform(n)
    shear = 0.15 * _uniform(n)
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin() + shear, 0.1 * _uniform(n)], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), 0.1 * _uniform(n)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), [n, 1, DIGIT_SIZE, DIGIT_SIZE], align_corners=False)
    return F.grid_sample(styles[:, None], grid, align_corners=False)[:, 0]


def _place(styles: Tensor) -> Tensor:
    """Videos of one frame `[N, 1, 1, 24, 24]`: each style at a random place of the lattice."""
    frames = styles.new_zeros(len(styles), 1, 1, CANVAS, CANVAS)
    places = STEP * torch.randint(LAST + 1, (len(styles), 2))
    for frame, style, (row, column) in zip(frames, styles, places.tolist(), strict=True):
        frame[0, 0, row : row + DIGIT_SIZE, column : column + DIGIT_SIZE] = style
    return frames


def _degrade(videos: Tensor, codec: Codec) -> Tensor:
    """What generated videos may suffer: the codec (every second one), a change of brightness, noise."""
    videos = videos.clone()
    videos[::2] = codec.decode(codec.encode(videos[::2]))
    shape = (len(videos), 1, 1, 1, 1)
    brightness = 0.85 + 0.25 * torch.rand(shape)
    return videos * brightness + 0.1 * torch.rand(shape) * torch.randn_like(videos)


def _uniform(n: int) -> Tensor:
    """`[n]` numbers uniform in [-1, 1]."""
    return 2.0 * torch.rand(n) - 1.0
