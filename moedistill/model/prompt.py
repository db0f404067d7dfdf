"""What a model is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """What a video shall show.

    Args:
        text: in words that the backbone understands.
        image: a picture's file that the video begins with, for backbones that take one.
    """

    text: str
    image: Path | None = None

    def __str__(self) -> str:
        return self.text if self.image is None else f"{self.text} ({self.image})"


def as_prompts(prompts: Sequence[str | Prompt]) -> list[Prompt]:
    """The same with bare text as prompts of it."""
    return [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
