"""Commands speak for themselves: bars and warnings of the libraries below them are off, unless somebody asks for them.

For commands alone: where moedistill is imported, whose output it is decides its importer.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SWITCHES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "ACCELERATE_LOG_LEVEL": "ERROR",
}
"""The libraries' own, read when they are imported; a value that is there already stays."""

LOGGERS = ("torchao", "torch.utils._pytree")
"""Of torchao, when it is imported: kernels for other machines that it does not find, and names that torch will drop."""

LIBRARIES = r"(accelerate|diffusers|huggingface_hub|peft|safetensors|transformers)(\.|$)"
FUSED = "Mismatch dtype between input and weight"
"""Of torch: a norm in bfloat16 whose weights a model keeps in float32, as published, is not one kernel."""

STRIDES = "Grad strides do not match bucket view strides"
"""Of torch's DDP, about speed: convolutions of 1×1 have gradients of several equal layouts."""

VIEWS = "FSDP2-wrapped module .* returned a view tensor"
"""Of torch's FSDP2, about what would be wrong if somebody wrote into a block's output: nobody does."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Turns off what the libraries print beside results; warnings that come from other code, such as a plugin, stay.

    With `-W` or `PYTHONWARNINGS` all warnings are as those say.
    """
    form = warnings.formatwarning
    set_here = {name: value for name, value in SWITCHES.items() if name not in os.environ}
    os.environ.update(set_here)
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=LIBRARIES)
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=r"torch(\.|$)")
            for text in (FUSED, STRIDES, VIEWS):
                warnings.filterwarnings("ignore", text, UserWarning, module=r"torch(\.|$)")
            warnings.formatwarning = _in_one_line(form)
        try:
            yield
        finally:
            warnings.formatwarning = form
            for name in set_here:
                os.environ.pop(name, None)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _in_one_line(form: Callable[..., str]) -> Callable[..., str]:
    """Writes what moedistill says to its users as a line, without the place in the code; the rest as `form` does it."""

    def written(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> str:
        ours = any(part.startswith("moedistill") for part in Path(filename).parent.parts)
        if category is UserWarning and ours:
            return f"warning: {message}\n"
        return form(message, category, filename, *where, **more)

    return written
