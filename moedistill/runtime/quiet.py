"""Commands speak for themselves: bars and warnings of the libraries below them are off, unless somebody asks for them.

For commands alone: where moedistill is imported, whose output it is decides its importer.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SWITCHES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "ACCELERATE_LOG_LEVEL": "ERROR",
}
"""The libraries' own, read when they are imported; a value that is there already stays."""

LIBRARIES = r"(accelerate|diffusers|huggingface_hub|peft|safetensors|transformers)(\.|$)"
FUSED = "Mismatch dtype between input and weight"
"""Of torch: a norm in bfloat16 whose weights a model keeps in float32, as published, is not one kernel."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Turns off what the libraries print beside results; warnings that come from other code, such as a plugin, stay.

    With `-W` or `PYTHONWARNINGS` all warnings are as those say.
    """
    set_here = {name: value for name, value in SWITCHES.items() if name not in os.environ}
    os.environ.update(set_here)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=LIBRARIES)
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=r"torch(\.|$)")
            warnings.filterwarnings("ignore", FUSED, UserWarning, module=r"torch(\.|$)")
        try:
            yield
        finally:
            for name in set_here:
                os.environ.pop(name, None)
