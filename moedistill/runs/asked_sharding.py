"""What the settings of accelerate's launcher ask for of sharding: taken over, or refused with the reason."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from moedistill.errors import UserError

OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed, which takes one model and steps it with the backward pass, while a student "
    "and its critics step by themselves here",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM, which has models of its own",
}
AXES = ("dp_replicate", "dp_shard", "tp", "cp", "sp")


@dataclass(frozen=True)
class AskedSharding:
    """What a launcher asks for.

    Attributes:
        sharded: networks cut among processes, as by `training.sharding: fsdp2`.
        replicas: groups of processes that each hold the whole (HSDP).
    """

    sharded: bool = False
    replicas: int = 1


def asked_sharding(environment: Mapping[str, str]) -> AskedSharding:
    """Reads what accelerate's launcher has set.

    Raises:
        UserError: it asks for what is not done here, or by another engine.
    """

    def says(name: str, usual: str = "false") -> str:
        return environment.get(name, usual).lower()

    for name, engine in OTHER_ENGINES.items():
        if says(name) == "true":
            raise UserError(f"the launcher asks for {engine}; use plain processes, or FSDP2 (fsdp_version: 2)")
    sizes = dict.fromkeys(AXES, 1)
    if says("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        sizes = {axis: int(says(f"PARALLELISM_CONFIG_{axis.upper()}_SIZE", "1")) for axis in AXES}
    if other := [f"{axis}_size {sizes[axis]}" for axis in ("tp", "cp", "sp") if sizes[axis] > 1]:
        raise UserError(f"the launcher asks for {' and '.join(other)}; there are dp_replicate and dp_shard here, alone")
    fsdp = says("ACCELERATE_USE_FSDP") == "true"
    if fsdp and (unfit := list(_unfit(environment))):
        raise UserError(f"the launcher asks for FSDP with {'; and '.join(unfit)}")
    return AskedSharding(fsdp or sizes["dp_shard"] > 1, sizes["dp_replicate"])


def _unfit(environment: Mapping[str, str]) -> Iterator[str]:
    version, precision = environment.get("FSDP_VERSION", "1"), environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if version != "2":
        yield f"fsdp_version {version}, which makes one parameter of many, and one dtype; set fsdp_version: 2"
    if precision != "no":
        yield (
            f"mixed_precision {precision}, a param_dtype policy: it would round the float32 weights that are trained; "
            "set mixed_precision: no, as backbone.dtype says what networks compute in"
        )
    for name, instead in (
        ("FSDP_OFFLOAD_PARAMS", "set it to false: parameters stay on the GPUs"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "set it to false, and training.gradient_checkpointing: true in the recipe"),
    ):
        if environment.get(name, "false").lower() == "true":
            yield f"{name.lower()}; {instead}"


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Hides in the block what `asked_sharding` reads: networks are cut here, and not by accelerate."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
