"""Hostile data files: `data check` and the run itself must say the same, and no code in a file is ever run.

A set that `data check` passes must train, and one that the run refuses must be refused by `data check`.
"""

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from .case import Fault, Part, Result, sound
from .warm import run_command

REFUSE, LATE, TRAIN, EITHER = "refuse", "late", "train", "either"
"""What has to become of a set. `LATE`: it is refused for its numbers, which the run may see as it reads them. `EITHER`:
both are right, but it must be the same for the check and the run."""

SHAPES = {"wan": (16, 3, 4, 6), "hunyuan_video": (16, 3, 4, 6), "digits": (12, 8, 4, 4)}
SAMPLES = 3


def recipe(backbone: str, batch_size: int = 1, samples: int = SAMPLES) -> dict[str, Any]:
    more = {"width": 16, "num_layers": 2, "num_heads": 2} if backbone == "digits" else {}
    return {
        "name": "hostile",
        "backbone": {"kind": backbone, "pretrained": None, **more},
        "trajectory": {"kind": "flow_matching", "num_steps": 8, "shift": 5.0},
        "router": {"kind": "timestep", "experts": ["semantic"]},
        "experts": {"semantic": {"kind": "lora", "rank": 2, "targets": "attention"}},
        "data": {"kind": "latents", "path": "set"},
        "training": {
            "batch_size": batch_size, "monitor": None, "num_threads": 1, "log_every": 1, "checkpoint_every": None,
        },
        "stages": [
            # Every sample is drawn once.
            {"name": "semantic", "kind": "consistency", "expert": "semantic", "steps": -(-samples // batch_size),
             "losses": [{"kind": "huber"}]},
        ],
    }  # fmt: skip


def sample(backbone: str, i: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(i)
    latents = torch.randn(SHAPES[backbone], generator=generator)
    if backbone == "digits":
        return {"latents": latents, "digit": torch.tensor(i), "direction": torch.tensor(i)}
    text = torch.randn(11, 24, generator=generator)  # of HunyuanVideo the first row is the pooled text
    if backbone == "wan":
        text[7:] = 0
        return {"latents": latents, "prompt_embeds": text}
    return {"latents": latents, "prompt_embeds": text, "prompt_attention_mask": torch.arange(10) < 6}


# -- what is done to the tensors of one sample ------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor]], object]


def _latents(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda sample: sample.update(latents=change(sample["latents"]))


def _text(change: Callable[[Tensor], Tensor]) -> Change:
    def do(sample: dict[str, Tensor]) -> None:
        name = "prompt_embeds" if "prompt_embeds" in sample else "digit"
        sample[name] = change(sample[name])

    return do


def _with(value: float) -> Callable[[Tensor], Tensor]:
    """The tensor with `value` at one place."""

    def do(tensor: Tensor) -> Tensor:
        tensor = tensor.float().clone()
        tensor.view(-1)[-1] = value
        return tensor

    return do


def _out(name: str) -> Change:
    return lambda sample: sample.pop(name, None)


TENSORS: Sequence[tuple[str, str, Change]] = (
    ("nothing", TRAIN, lambda sample: None),
    ("latents of bfloat16", TRAIN, _latents(lambda x: x.bfloat16())),
    ("latents of float16", TRAIN, _latents(lambda x: x.half())),
    ("latents of float64", EITHER, _latents(lambda x: x.double())),
    ("text of bfloat16", EITHER, _text(lambda x: x.bfloat16())),
    ("latents of another size", TRAIN, _latents(lambda x: x[..., : x.shape[-1] - 2].contiguous())),
    ("latents with a batch dimension", EITHER, _latents(lambda x: x[None])),
    ("latents of float8", REFUSE, _latents(lambda x: x.to(torch.float8_e4m3fn))),
    ("text of float8", REFUSE, _text(lambda x: x.to(torch.float8_e5m2))),
    ("latents of int64", REFUSE, _latents(lambda x: x.long())),
    ("latents of bool", REFUSE, _latents(lambda x: x > 0)),
    ("complex latents", REFUSE, _latents(lambda x: x.to(torch.complex64))),
    ("NaN in latents", LATE, _latents(_with(float("nan")))),
    ("inf in latents", LATE, _latents(_with(float("-inf")))),
    ("NaN in text", LATE, _text(_with(float("nan")))),
    ("latents of zeros", LATE, _latents(torch.zeros_like)),
    ("latents × 1000 + 50", EITHER, _latents(lambda x: 1000 * x + 50)),
    ("enormous latents", EITHER, _latents(lambda x: 1e30 * x)),
    ("no frames", REFUSE, _latents(lambda x: x[:, :0])),
    ("no height", REFUSE, _latents(lambda x: x[:, :, :0])),
    ("three dimensions", REFUSE, _latents(lambda x: x[:, 0])),
    ("six dimensions", REFUSE, _latents(lambda x: x[None, None])),
    ("a number", REFUSE, _latents(lambda x: x.sum())),
    ("other channels", REFUSE, _latents(lambda x: x[:5])),
    ("a width that no patch fits", REFUSE, _latents(lambda x: x[..., :3].contiguous())),
    ("latents that are transposed", REFUSE, _latents(lambda x: x.transpose(0, 1).contiguous())),
    ("no text", EITHER, lambda sample: [sample.pop(name) for name in list(sample) if name != "latents"]),
    ("text of another width", REFUSE, _text(lambda x: x[..., :5] if x.ndim else x.expand(3).clone())),
    ("text with a batch dimension", REFUSE, _text(lambda x: x[None])),
    ("text without a token", EITHER, _text(lambda x: x[:0] if x.ndim else x.expand(0))),
    ("text longer than any", EITHER, _text(lambda x: x.repeat(300, 1) if x.ndim else x)),
    ("text shorter", EITHER, _text(lambda x: x[:4].clone() if x.ndim else x)),
    ("no mask", EITHER, _out("prompt_attention_mask")),
    ("a mask of nothing", EITHER, lambda sample: "prompt_attention_mask" in sample
     and sample.update(prompt_attention_mask=torch.zeros(10, dtype=torch.bool))),
    ("a mask that is too short", EITHER, lambda sample: "prompt_attention_mask" in sample
     and sample.update(prompt_attention_mask=sample["prompt_attention_mask"][:4].clone())),
    ("a mask of floats", EITHER, lambda sample: "prompt_attention_mask" in sample
     and sample.update(prompt_attention_mask=sample["prompt_attention_mask"] * 0.5)),
    ("a mask of NaN", EITHER, lambda sample: "prompt_attention_mask" in sample
     and sample.update(prompt_attention_mask=torch.full((10,), float("nan")))),
    ("a tensor more", EITHER, lambda sample: sample.update(more=torch.ones(3))),
    ("a tensor with a name of 5000 letters", EITHER, lambda sample: sample.update({"x" * 5000: torch.ones(3)})),
    ("a tensor with a name of control characters", EITHER, lambda sample: sample.update({"\x1b[31m\n": torch.ones(3)})),
)  # fmt: skip

# -- what is done to a whole set --------------------------------------------------------------------------------------

FEW, MANY = 8, 12
"""Of so many samples a run looks at the numbers before it starts; and a set of more."""
Samples = list[dict[str, Tensor]]


def _last(change: Change) -> Callable[[Samples], object]:
    return lambda samples: change(samples[-1])


def _all(change: Change) -> Callable[[Samples], object]:
    return lambda samples: [change(sample) for sample in samples]


def _mask(values: Callable[[Tensor], Tensor]) -> Change:
    return lambda sample: sample.update(prompt_attention_mask=values(sample["prompt_attention_mask"]))


def _additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -10_000.0)


def _without_text(samples: Samples) -> None:
    samples[1] = {"latents": samples[1]["latents"]}


SETS: Sequence[tuple[str, str, str, int, Callable[[Samples], object]]] = (
    ("masks padded on the left", REFUSE, "hunyuan_video", 1, _all(_mask(lambda mask: mask.flip(0)))),
    ("a last mask padded on the left", REFUSE, "hunyuan_video", 1, _last(_mask(lambda mask: mask.flip(0)))),
    ("additive masks", REFUSE, "hunyuan_video", 1, _all(_mask(_additive))),
    ("masks of 2s", REFUSE, "hunyuan_video", 1, _all(_mask(lambda mask: 2 * mask.long()))),
    ("a last mask of 2s", REFUSE, "hunyuan_video", 1, _last(_mask(lambda mask: 2 * mask.long()))),
    ("masks of 1s and 0s", TRAIN, "hunyuan_video", 1, _all(_mask(lambda mask: mask.long()))),
    ("a mask with a hole", REFUSE, "hunyuan_video", 1, _last(_mask(lambda mask: mask & (torch.arange(10) != 2)))),
    ("a last mask of nothing", EITHER, "hunyuan_video", 2, _last(_mask(torch.zeros_like))),
    ("a last text of int64", REFUSE, "wan", 1, _last(_text(lambda x: x.long()))),
    ("a last text of int64, batched", REFUSE, "hunyuan_video", 2, _last(_text(lambda x: x.long()))),
    ("a last digit of float32", EITHER, "digits", 2, _last(_text(lambda x: x.float()))),
    ("a last text without a dimension", REFUSE, "wan", 1, _last(_text(lambda x: x.sum()))),
    ("a last text without a dimension, batched", REFUSE, "hunyuan_video", 2, _last(_text(lambda x: x.sum()))),
    ("a last text of bfloat16, batched", EITHER, "wan", 2, _last(_text(lambda x: x.bfloat16()))),
    ("captions beside stored text", EITHER, "wan", 1, _without_text),
    ("captions beside stored text, batched", EITHER, "wan", 2, _without_text),
    ("captions beside stored text, batched", EITHER, "hunyuan_video", 2, _without_text),
    ("captions beside stored digits, batched", EITHER, "digits", 2, _without_text),
    ("NaN in the last latents", LATE, "wan", 1, _last(_latents(_with(float("nan"))))),
    ("last latents of zeros", LATE, "hunyuan_video", 1, _last(_latents(torch.zeros_like))),
)  # fmt: skip
"""What, what has to become of it, the backbone, the batch size, and the change."""

NEGATIVES: Sequence[tuple[str, str, str, Change]] = (
    ("a negative prompt", TRAIN, "hunyuan_video", lambda sample: None),
    ("a negative prompt with an empty mask", EITHER, "hunyuan_video", _mask(torch.zeros_like)),
    ("a negative prompt padded on the left", REFUSE, "hunyuan_video", _mask(lambda mask: mask.flip(0))),
    ("a negative prompt with a mask of 2s", REFUSE, "hunyuan_video", _mask(lambda mask: 2 * mask.long())),
    ("a negative prompt without a mask", EITHER, "hunyuan_video", _out("prompt_attention_mask")),
    ("a negative prompt of int64", REFUSE, "wan", _text(lambda x: x.long())),
    ("a negative prompt without a dimension", REFUSE, "wan", _text(lambda x: x.sum())),
    ("a negative prompt with NaN", LATE, "wan", _text(_with(float("nan")))),
    ("a negative prompt of another length", EITHER, "wan", _text(lambda x: x[:4].clone())),
    ("a negative prompt of another width", REFUSE, "wan", _text(lambda x: x[:, :5].clone())),
)  # fmt: skip
"""Stored with the set, and used: half of the text is dropped for it."""

# -- how they are written ---------------------------------------------------------------------------------------------


def _published(folder: Path, samples: Sequence[dict[str, Tensor]]) -> None:
    entries = []
    for i, sample in enumerate(samples):
        entry = {"caption": f"{i} right"}
        for name, place, key in (
            ("latents", "latent", "latent_path"),
            ("prompt_embeds", "prompt_embed", "prompt_embed_path"),
            ("prompt_attention_mask", "prompt_attention_mask", "prompt_attention_mask"),
        ):
            if name in sample:
                (folder / place).mkdir(parents=True, exist_ok=True)
                torch.save(sample[name], folder / place / f"{i}.pt")
                entry[key] = f"{i}.pt"
        entries.append(entry)
    (folder / "videos2caption.json").write_text(json.dumps(entries), encoding="utf-8")


def write_own(folder: Path, samples: Sequence[dict[str, Tensor]], negative: dict[str, Tensor] | None = None) -> None:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    entries = []
    for i, sample in enumerate(samples):
        save_file({name: value.contiguous() for name, value in sample.items()}, folder / f"{i:08}.safetensors")
        shape = list(sample["latents"].shape)
        entries.append({"file": f"{i:08}.safetensors", "shape": shape, "caption": f"{i} right"})
    if negative is not None:
        save_file({name: value.contiguous() for name, value in negative.items()}, folder / "negative.safetensors")
    name = None if negative is None else "negative.safetensors"
    index = {"format": "moedistill-latents", "version": 1, "samples": entries, "negative": name}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


# -- what is done to the files ----------------------------------------------------------------------------------------

Spoil = Callable[[Path, Path], object]
"""Gets the set's folder and the file of the second sample's latents."""


class _Code:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def _bytes(data: bytes) -> Spoil:
    return lambda folder, file: file.write_bytes(data)


def _saved(value: Callable[[], Any]) -> Spoil:
    def spoil(folder: Path, file: Path) -> None:
        _as_pt(file, value())

    return spoil


def _as_pt(file: Path, value: Any) -> None:
    """A .pt file, also where a safetensors file is expected."""
    torch.save(value, file)


def _pickled(folder: Path, file: Path) -> None:
    file.write_bytes(pickle.dumps(_Code()))


def _pickled_in_zip(folder: Path, file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Code()))
        archive.writestr("archive/version", "3\n")


def _fifo(folder: Path, file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _to(target: str) -> Spoil:
    def spoil(folder: Path, file: Path) -> None:
        file.unlink()
        file.symlink_to(target)

    return spoil


def _directory(folder: Path, file: Path) -> None:
    file.unlink()
    file.mkdir()


def _cut(folder: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _claims(folder: Path, file: Path) -> None:
    """A header that claims more than there is."""
    header = {"latents": {"dtype": "F32", "shape": [16, 10**6, 10**3, 10**2], "data_offsets": [0, 64 * 10**12]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


def _index(change: Callable[[Any], Any]) -> Spoil:
    def spoil(folder: Path, file: Path) -> None:
        index = next(folder.glob("*.json"))
        changed = change(json.loads(index.read_text(encoding="utf-8")))
        if isinstance(changed, bytes):
            index.write_bytes(changed)
        else:
            index.write_text(json.dumps(changed), encoding="utf-8")

    return spoil


def _entry(**changes: Any) -> Callable[[Any], Any]:
    """The second entry with other values for its file (`file` stands for the key of both layouts) and other keys."""

    def change(index: Any) -> Any:
        entries = index if isinstance(index, list) else index["samples"]
        for name, value in changes.items():
            entries[1]["latent_path" if name == "file" and isinstance(index, list) else name] = value
        return index

    return change


def _with_samples(samples: list[Any]) -> Callable[[Any], Any]:
    return lambda index: samples if isinstance(index, list) else {**index, "samples": samples}


def _own_key(**keys: Any) -> Callable[[Any], Any]:
    """Other keys of an index in our own layout; the published one has none."""
    return lambda index: index if isinstance(index, list) else {**index, **keys}


def _fifo_as_index(folder: Path, file: Path) -> None:
    index = next(folder.glob("*.json"))
    index.unlink()
    os.mkfifo(index)


def _index_to(target: str) -> Spoil:
    def spoil(folder: Path, file: Path) -> None:
        index = next(folder.glob("*.json"))
        index.unlink()
        index.symlink_to(target)

    return spoil


def _escape(folder: Path, file: Path) -> None:
    """A name that leads out of the set, to a whole file."""
    shutil.copy(file, folder.parent / f"outside{file.suffix}")
    depth = "../.." if file.suffix == ".pt" else ".."
    _index(_entry(file=f"{depth}/outside{file.suffix}"))(folder, file)


FILES: Sequence[tuple[str, str, Spoil]] = (
    ("an empty file", REFUSE, _bytes(b"")),
    ("a cut file", REFUSE, _cut),
    ("a text file", REFUSE, _bytes(b"latents")),
    ("a pickle with code", REFUSE, _pickled),
    ("a pickle with code in an archive", REFUSE, _pickled_in_zip),
    ("a FIFO", REFUSE, _fifo),
    ("/dev/zero", REFUSE, _to("/dev/zero")),
    ("a link to itself", REFUSE, lambda folder, file: _to(file.name)(folder, file)),
    ("a folder", REFUSE, _directory),
    ("a missing file", REFUSE, lambda folder, file: file.unlink()),
    ("a header that claims 64 TB", REFUSE, _claims),
    ("a header of 4 EB", REFUSE, _bytes(struct.pack("<Q", 2**62) + b"{}")),
    ("a tensor of 1 KB that claims 768 GB", REFUSE, _saved(lambda: torch.zeros(1).expand(16, 300_000, 200, 200))),
    ("a sparse tensor", REFUSE, _saved(lambda: torch.eye(4).to_sparse())),
    ("a meta tensor", REFUSE, _saved(lambda: torch.empty(16, 3, 4, 6, device="meta"))),
    ("a quantised tensor", REFUSE, _saved(lambda: torch.quantize_per_tensor(torch.ones(4, 4), 1.0, 0, torch.qint8))),
    ("a dictionary", REFUSE, _saved(lambda: {"latents": torch.ones(16, 3, 4, 6)})),
    ("a path out of the set", EITHER, _escape),
    ("a name of 5000 letters", REFUSE, _index(_entry(file="x" * 5000))),
    ("a name with a zero byte", REFUSE, _index(_entry(file="a\0b"))),
    ("a name that is a number", REFUSE, _index(_entry(file=7))),
    ("an absolute name", REFUSE, _index(_entry(file="/etc/passwd"))),
    ("a caption that is a list", REFUSE, _index(_entry(caption=["x"]))),
    ("a caption with half a character", EITHER, _index(_entry(caption="\ud800"))),
    ("another shape in the index", EITHER, _index(_entry(shape=[16, 3, 4, 8]))),
    ("a shape of text in the index", EITHER, _index(_entry(shape="x"))),
    ("an enormous shape in the index", EITHER, _index(_entry(shape=[2**62, 2**62, 2**62, 2**62]))),
    ("no samples", REFUSE, _index(_with_samples([]))),
    ("a null sample", REFUSE, _index(_with_samples([None]))),
    ("a version of the future", EITHER, _index(_own_key(version=9))),
    ("a negative prompt that is missing", EITHER, _index(_own_key(negative="no_such.safetensors"))),
    ("an index that is no JSON", REFUSE, _index(lambda index: b"{")),
    ("an index of brackets", REFUSE, _index(lambda index: b"[" * 100_000)),
    ("an index of another encoding", REFUSE, _index(lambda index: b"\xff\xfe[")),
    ("an index that is a FIFO", REFUSE, _fifo_as_index),
    ("an index that is /dev/zero", REFUSE, _index_to("/dev/zero")),
)  # fmt: skip

# -- the cases --------------------------------------------------------------------------------------------------------

KINDS = (("wan", _published), ("wan", write_own), ("hunyuan_video", _published), ("digits", write_own))


def _attack(number: int, moves: Random, folder: Path) -> Result:
    """Attacks in turn, on backbones and layouts in turn; the later rounds have the other backbones."""
    if number >= 2 * ROUND:
        return _whole_set(number - 2 * ROUND, moves, folder)
    attacks = (*TENSORS, *FILES)
    what, expected, change = attacks[number % len(attacks)]
    backbone, write = KINDS[(number + number // len(attacks)) % len(KINDS)]
    title = f"{what} ({backbone}, {_layout(write)} layout)"
    (folder / "recipe.yaml").write_text(json.dumps(recipe(backbone)), encoding="utf-8")

    def make() -> None:
        samples = [sample(backbone, i) for i in range(SAMPLES)]
        if number % len(attacks) < len(TENSORS):
            change(samples[1])  # type: ignore[call-arg, arg-type]
        (folder / "set").mkdir()
        write(folder / "set", samples)

    # In a child: this process computes nothing.
    made = run_command(folder=folder, main=make)
    if made.code != 0:
        if write is write_own and number % len(attacks) < len(TENSORS):
            return Result("refused", counts=("sets that safetensors does not write",))
        raise RuntimeError(made.output)
    if number % len(attacks) >= len(TENSORS):
        second = folder / "set" / ("latent/1.pt" if write is _published else "00000001.safetensors")
        spoil: Any = change
        spoiled = run_command(folder=folder, main=lambda: spoil(folder / "set", second))
        if spoiled.code != 0:
            raise RuntimeError(spoiled.output)
    return _checked_and_run(folder, title, expected)


def _whole_set(number: int, moves: Random, folder: Path) -> Result:
    if number < len(SETS):
        what, expected, backbone, batch_size, change = SETS[number]
        write = moves.choice([each for kind, each in KINDS if kind == backbone])
        if "captions" in what:
            write = write_own  # in the published layout every sample has its text
    else:
        what, expected, backbone, spoil = NEGATIVES[number - len(SETS)]
        write, batch_size = write_own, 2
    tree = recipe(backbone, batch_size, MANY)

    def make() -> None:
        samples = [sample(backbone, i % 10) for i in range(MANY)]
        (folder / "set").mkdir()
        if number < len(SETS):
            change(samples)
            write(folder / "set", samples)
        else:
            negative = sample(backbone, 99)
            del negative["latents"]
            spoil(negative)
            write_own(folder / "set", samples, negative)

    if number >= len(SETS):
        tree["data"]["text_dropout"] = 0.5
    (folder / "recipe.yaml").write_text(json.dumps(tree), encoding="utf-8")
    made = run_command(folder=folder, main=make)
    if made.code != 0:
        raise RuntimeError(made.output)
    return _checked_and_run(folder, f"{what} ({backbone}, {_layout(write)} layout, batch size {batch_size})", expected)


def _layout(write: Any) -> str:
    return "published" if write is _published else "own"


def _checked_and_run(folder: Path, title: str, expected: str) -> Result:
    check = sound(run_command("data", "check", "set", "--recipe", "recipe.yaml", folder=folder, seconds=30), title)
    run = sound(
        run_command("run", "recipe.yaml", "--device", "cpu", "--output", "run", folder=folder, seconds=60), title
    )
    if (folder / "ran").exists():
        raise Fault("wrong", f"{title}: the code in the file was run")
    if check.refused != run.refused:
        says = "refuses" if check.refused else "passes"
        does = "refuses" if run.refused else "trains on"
        raise Fault(
            "wrong",
            f"{title}: `data check` {says} what the run {does}: {(check if check.refused else run).refusal()[-300:]}",
        )
    if expected in (REFUSE, LATE) and not run.refused:
        raise Fault("wrong", f"{title}: trained on without a word")
    if expected == TRAIN and run.refused:
        raise Fault("lost", f"{title}: refused, though nothing is wrong: {run.refusal()[:300]}")
    if run.refused and expected != LATE and (folder / "run" / "metrics.jsonl").exists():
        raise Fault("lost", f"{title}: refused only after training had begun")
    shutil.rmtree(folder / "set", ignore_errors=True)
    return Result("refused" if run.refused else "right")


ROUND = len(TENSORS) + len(FILES)
PART = Part("data", "hostile data files", 2 * ROUND + len(SETS) + len(NEGATIVES), 240, _attack)
