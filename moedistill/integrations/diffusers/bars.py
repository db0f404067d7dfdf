"""diffusers' bars, which do not know the switch that those of transformers and of the Hub follow, and its log."""

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


@contextmanager
def errors_alone() -> Iterator[None]:
    """For the block nothing but errors in diffusers' log."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
