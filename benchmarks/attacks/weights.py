"""Models' folders that are not whole, or not what they seem: weights in shards, and configs of network and VAE.

Weights that are not all of the network's, or more than it has, must be refused before training. A hostile config may be
refused, or be harmless; nothing of it may end a command in a traceback.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from . import data
from .case import Fault, Part, Result, lines, sound
from .warm import run_command

INDEX = "diffusion_pytorch_model.safetensors.index.json"
REFUSE, LATE, TRAIN, EITHER = data.REFUSE, data.LATE, data.TRAIN, data.EITHER


def _recipe() -> dict[str, Any]:
    recipe = data.recipe("wan")
    recipe["backbone"] |= {"pretrained": "model", "dtype": "float32"}
    return recipe


@cache
def _whole(folder: Path) -> Path:
    """A tiny Wan as a folder with its transformer in shards, a set of samples, and the run that it gives."""
    place = folder / "reference-weights"
    if (place / "run").exists() and lines(place / "run"):
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "recipe.yaml").write_text(json.dumps(_recipe()), encoding="utf-8")

    def make() -> None:
        import torch
        from diffusers import AutoencoderKLWan, WanTransformer3DModel

        torch.manual_seed(0)
        network: Any = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, ffn_dim=64, freq_dim=32, text_dim=24
        )
        network.save_pretrained(place / "model" / "transformer", max_shard_size="60KB")
        vae: Any = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        vae.save_pretrained(place / "model" / "vae")
        (place / "set").mkdir()
        samples = [data.sample("wan", i) for i in range(data.SAMPLES)]
        negative = data.sample("wan", 9)
        del negative["latents"]
        data.write_own(place / "set", samples, negative)

    made = run_command(folder=place, main=make)
    outcome = run_command("run", "recipe.yaml", "--device", "cpu", "--output", "run", folder=place)
    if made.code or outcome.code or not (place / "model" / "transformer" / INDEX).is_file():
        raise RuntimeError(f"a whole model's folder is not trained:\n{made.output}{outcome.output}")
    return place


# -- of the shards ----------------------------------------------------------------------------------------------------

Spoil = Callable[[Path], object]
"""Gets the transformer's folder."""


def _index(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        changed = change(index)
        (folder / INDEX).write_text(json.dumps(index if changed is None else changed), encoding="utf-8")

    return spoil


def _map(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def do(index: dict[str, Any]) -> None:
        change(index["weight_map"])

    return _index(do)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _shard(change: Callable[[dict[str, Any]], object], *, number: int = 0) -> Spoil:
    """Another tensor in a shard, the index as it was."""

    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = _shards(folder)[number]
        held = load_file(file)
        change(held)
        save_file(held, file, metadata={"format": "pt"})

    return spoil


def _added(name: str, *, listed: bool) -> Spoil:
    def spoil(folder: Path) -> None:
        import torch

        _shard(lambda held: held.update({name: torch.ones(1)}))(folder)
        if listed:
            _map(lambda names: names.update({name: _shards(folder)[0].name}))(folder)

    return spoil


def _first(held: dict[str, Any]) -> str:
    return min(held)


def _swapped(folder: Path) -> None:
    """The names of two shards change places: the index says nothing true."""
    one, other, *_ = _shards(folder)
    for a, b in ((one, folder / "x"), (other, one), (folder / "x", other)):
        a.rename(b)


def _one_file(folder: Path) -> None:
    """All in one file besides, as after a second download: the index's shards are still there."""
    from safetensors.torch import load_file, save_file

    held = {name: tensor for shard in _shards(folder) for name, tensor in load_file(shard).items()}
    save_file(held, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


SHARDS: Sequence[tuple[str, str, Spoil]] = (
    ("nothing", TRAIN, lambda folder: None),
    ("a tensor in the index that no shard has", REFUSE,
     _map(lambda names: names.update({"blocks.0.no_such.weight": min(names.values())}))),
    ("a scale in a shard that the index does not have", REFUSE,
     _added("blocks.0.attn1.to_q.scale_weight", listed=False)),
    ("a scale in a shard and in the index", REFUSE, _added("blocks.0.attn1.to_q.scale_weight", listed=True)),
    ("a LoRA in a shard that the index does not have", REFUSE,
     _added("blocks.0.attn1.to_q.lora_A.weight", listed=False)),
    ("a tensor that is in the index and not in its shard", REFUSE, _shard(lambda held: held.pop(_first(held)))),
    ("a tensor that is in its shard and not in the index", EITHER, _map(lambda names: names.pop(min(names)))),
    ("a tensor that the index puts into another shard", EITHER,
     _map(lambda names: names.update({min(names): max(names.values())}))),
    ("a tensor of another shape", REFUSE, _shard(lambda held: held.update({_first(held): held[_first(held)][None]}))),
    ("a tensor of int32", REFUSE, _shard(lambda held: held.update({_first(held): held[_first(held)].int()}))),
    ("a tensor with NaN", LATE, _shard(lambda held: held.update({_first(held): held[_first(held)] * float("nan")}))),
    ("a missing shard", REFUSE, lambda folder: _shards(folder)[-1].unlink()),
    ("an empty shard", REFUSE, lambda folder: _shards(folder)[-1].write_bytes(b"")),
    ("a cut shard", REFUSE, lambda folder: _shards(folder)[0].write_bytes(_shards(folder)[0].read_bytes()[:-9])),
    ("shards that have changed places", EITHER, _swapped),
    ("one file beside the shards", EITHER, _one_file),
    ("no index", REFUSE, lambda folder: (folder / INDEX).unlink()),
    ("an index of null", REFUSE, lambda folder: (folder / INDEX).write_text("null", encoding="utf-8")),
    ("an index that is a list", REFUSE, _index(lambda index: [index])),
    ("an index that is no JSON", REFUSE, lambda folder: (folder / INDEX).write_bytes(b"\xff{")),
    ("an index without a map", REFUSE, _index(lambda index: {"metadata": {}})),
    ("an empty map", REFUSE, _index(lambda index: {**index, "weight_map": {}})),
    ("a map of null", REFUSE, _index(lambda index: {**index, "weight_map": None})),
    ("a map that is a list", REFUSE, _index(lambda index: {**index, "weight_map": list(index["weight_map"])})),
    ("a map to numbers", REFUSE,
     _index(lambda index: {**index, "weight_map": dict.fromkeys(index["weight_map"], 7)})),
    ("a map to a path outside", REFUSE,
     _map(lambda names: names.update({min(names): "../../set/00000000.safetensors"}))),
    ("metadata of null", EITHER, _index(lambda index: {**index, "metadata": None})),
)  # fmt: skip

# -- of the configs ---------------------------------------------------------------------------------------------------

VALUES: Sequence[Any] = (None, "x", "", 0, -1, 0.5, [], {}, [None], ["x"] * 16, [0.0] * 16, [0.0] * 3, 10**9, True)
NETWORK = (
    "patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim",
    "ffn_dim", "num_layers", "qk_norm", "eps", "image_dim", "rope_max_seq_len", "pos_embed_seq_len", "_class_name",
    "quantization_config", "added_kv_proj_dim", "cross_attn_norm",
)  # fmt: skip
VAE = (
    "latents_mean", "latents_std", "z_dim", "base_dim", "dim_mult", "num_res_blocks", "scale_factor_temporal",
    "scale_factor_spatial", "_class_name", "scaling_factor", "attn_scales",
)  # fmt: skip
WHOLE: Sequence[bytes] = (b"null", b"[]", b"7", b'"x"', b"{}", b"", b"\xff\xfe", b"[" * 100_000, b'{"z_dim": NaN}')


def _config(number: int, moves: Random, model: Path) -> str:
    """Another value in a config, or another config; says what."""
    place, keys = (("vae", VAE), ("transformer", NETWORK))[number % 2]
    file = model / place / "config.json"
    if moves.random() < 0.15:
        content = moves.choice(WHOLE)
        file.write_bytes(content)
        return f"{place}/config.json of {content[:20]!r}"
    key = keys[number // 2 % len(keys)]
    value = moves.choice(VALUES)
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    return f"{place}/config.json with {key} {value!r}"


# -- the cases --------------------------------------------------------------------------------------------------------


def _attack(number: int, moves: Random, folder: Path) -> Result:
    whole = _whole(folder.parent)
    for name in ("model", "set"):
        shutil.copytree(whole / name, folder / name)
    shutil.copy(whole / "recipe.yaml", folder)
    expected = EITHER
    if number < len(SHARDS):
        what, expected, spoil = SHARDS[number]
        spoiled = run_command(folder=folder, main=lambda: spoil(folder / "model" / "transformer"))
        if spoiled.code != 0:
            raise RuntimeError(spoiled.output)
    else:
        what = _config(number - len(SHARDS), moves, folder / "model")
    check = sound(run_command("data", "check", "set", "--recipe", "recipe.yaml", folder=folder, seconds=30), what)
    run = sound(
        run_command("run", "recipe.yaml", "--device", "cpu", "--output", "run", folder=folder, seconds=60), what
    )
    if check.refused and not run.refused:
        raise Fault("wrong", f"{what}: `data check` refuses what the run trains on: {check.refusal()[:300]}")
    if expected in (REFUSE, LATE) and not run.refused:
        raise Fault("wrong", f"{what}: trained on without a word")
    if expected == TRAIN and run.refused:
        raise Fault("lost", f"{what}: refused, though nothing is wrong: {run.refusal()[:300]}")
    if expected == LATE and "optimizer.lr" in run.refusal():
        raise Fault("lost", f"{what}: the learning rate is blamed: {run.refusal()[:300]}")
    if run.refused and expected != LATE and lines(folder / "run"):
        raise Fault("lost", f"{what}: refused only after training had begun: {run.refusal()[:300]}")
    if not run.refused and number < len(SHARDS) and _losses(folder) != _losses(whole):
        raise Fault("wrong", f"{what}: trained on other weights without a word")
    return Result("refused" if run.refused else "right")


def _losses(folder: Path) -> list[Any]:
    return [line.get("loss") for line in lines(folder / "run")]


PART = Part("weights", "models' folders", len(SHARDS) + 2 * len(NETWORK) + 24, 120, _attack)
