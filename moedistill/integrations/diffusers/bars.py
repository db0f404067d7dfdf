"""diffusers' bars, which do not know the switch that those of transformers and of the Hub follow."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bars_as_switched() -> Iterator[None]:
    """For the block no bars of diffusers' where `HF_HUB_DISABLE_PROGRESS_BARS` turns the others off."""
    from diffusers.utils import logging
    from huggingface_hub.utils import are_progress_bars_disabled

    off = are_progress_bars_disabled() and logging.is_progress_bar_enabled()
    if off:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if off:
            logging.enable_progress_bar()
