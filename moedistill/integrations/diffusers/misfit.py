"""Why the tensors in a folder are not those of a class: what libraries report when they load, put into words."""

import re
from collections.abc import Sequence
from pathlib import Path

from moedistill.errors import shorten

NAMED = 3
"""How many tensors or blocks a message names."""

LEFT_OVER = {
    r"\.(scale_weight|scale_input|weight_scale(_2)?|input_scale)$|^scaled_fp8$": "this is a scaled fp8 file, whose "
    "weights mean nothing without their scales; get them in bfloat16 or float32",
    r"\.(absmax|quant_map|nested_absmax|SCB|qweight|qzeros)$|\.quant_state": "this is a quantised file; get the "
    "weights in bfloat16 or float32",
    r"(^|\.)(lora_[AB]|lora_up|lora_down|base_layer)\.": "a LoRA is wrapped around the weights; merge it (fuse_lora, "
    "then unload_lora_weights), and save the model again",
}
"""By a pattern of names that are left over: what that shows, and the way out."""


def misfit(cls: type, folder: Path, missing: Sequence[str], left_over: Sequence[str]) -> str:
    """What is wrong with the tensors in `folder`, the likely cause, and the way out: one line.

    Args:
        cls: which class they were loaded for.
        missing: tensors of the class that are not there, sorted.
        left_over: tensors that the class does not have, sorted.
    """
    kinds = {"missing": missing, "left over": left_over}
    counted = " and ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names)
    return f"its tensors are not those of {cls.__name__}: {counted}; {_cause(cls, folder, missing, left_over)}"


def _cause(cls: type, folder: Path, missing: Sequence[str], left_over: Sequence[str]) -> str:
    for pattern, cause in LEFT_OVER.items():
        if any(re.search(pattern, name) for name in left_over):
            return cause
    if prefix := _prefix(missing, left_over):
        return f"all names begin with {prefix!r}; save the weights of the bare network"
    if not (missing and left_over) and (blocks := _whole_blocks([*missing, *left_over])):
        there = "missing" if missing else "more than config.json says"
        return f"{_some(blocks)} is {there}, so the depth is another; let {folder / 'config.json'} be the weights' own"
    if len(missing) > NAMED and len(left_over) > NAMED:
        made = f"{cls.__name__}.from_single_file(FILE).save_pretrained(FOLDER)"
        return f"the names are not diffusers'; where they are the original code's, {made} converts them"
    return f"what {folder} holds is incomplete, or of another model: get it again"


def _prefix(missing: Sequence[str], left_over: Sequence[str]) -> str:
    """What all names that are left over begin with, where they would fit without it; else nothing."""
    found = [name.removesuffix(missing[0]) for name in left_over if missing and name.endswith(f".{missing[0]}")]
    return next((prefix for prefix in found if {prefix + name for name in missing} <= set(left_over)), "")


def _whole_blocks(names: Sequence[str]) -> list[str]:
    """The numbered blocks that the tensors make up; none where one is of no block, or alone of its block."""
    found = [re.match(r".+?\.\d+(?=\.)", name) for name in names]
    blocks = list(dict.fromkeys(match[0] for match in found if match))
    return blocks if all(found) and len(names) > len(blocks) else []


def _some(names: Sequence[str]) -> str:
    return ", ".join(shorten(name, 80) for name in names[:NAMED]) + (", …" if len(names) > NAMED else "")
