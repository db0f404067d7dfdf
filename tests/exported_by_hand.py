"""Files of changes and weights, written by hand as their consumers want them; and what was trained, in them."""

import json

import torch
from safetensors.torch import save_file
from saved_pipelines import make_pipeline

from moedistill.exporters.reading.native import BY_CLASS
from moedistill.exporters.source import Pair

RANK = 3


class Trained:
    """An adapter on a tiny network, as an `ExpertSource` gives it: attention and all linears that depend on time."""

    kind, over, base = "adapter", None, "transformer"

    def __init__(self, family, adapted=r"attn", copied=("time",), seed=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = make_pipeline(family).transformer
            self.weights = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
            linears = [path for path, each in self.network.named_modules() if isinstance(each, torch.nn.Linear)]
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
            self.pairs, self.copies = {}, {}
            for path in linears:
                rows, columns = self.shapes[f"{path}.weight"]
                if any(part in path for part in copied) or path == "proj_out":
                    for name in (f"{path}.weight", f"{path}.bias"):
                        self.copies[name] = self.weights[name] + 0.1 * torch.randn(self.shapes[name])
                elif adapted in path:
                    self.pairs[path] = Pair(torch.randn(RANK, columns), 0.1 * torch.randn(rows, RANK))

    def original(self, name):
        return self.weights[name]

    def tensor(self, name):
        path = name.removesuffix(".weight")
        if name in self.copies:
            return self.copies[name]
        if name != path and path in self.pairs:
            return self.weights[name] + self.pairs[path].b @ self.pairs[path].a
        return self.weights[name]

    def merged(self):
        yield from ((name, self.tensor(name)) for name in self.shapes)

    def native(self):
        return BY_CLASS[type(self.network).__name__](self.shapes)


def full(family):
    """The same with all weights of its own."""
    trained = Trained(family)
    trained.kind = "full"
    return trained


def delta_pair(trained, name):
    """A copied linear's change as a pair of which one is the identity."""
    delta = trained.copies[name] - trained.weights[name]
    rows, columns = delta.shape
    return Pair(torch.eye(columns), delta) if columns <= rows else Pair(delta, torch.eye(rows))


def all_pairs(trained):
    """Pairs by path, those of copied linears too; and the change of each one's bias."""
    copied = [name.removesuffix(".weight") for name in trained.copies if name.endswith(".weight")]
    pairs = {**trained.pairs, **{path: delta_pair(trained, f"{path}.weight") for path in copied}}
    biases = {
        path: trained.copies[f"{path}.bias"] - trained.weights[f"{path}.bias"]
        if path in copied
        else torch.zeros(len(pairs[path].b))
        for path in pairs
    }
    return pairs, biases


def diffusers_lora(trained):
    """Tensors and header of a LoRA in diffusers' names."""
    pairs, biases = all_pairs(trained)
    tensors = {}
    for path, (a, b) in pairs.items():
        tensors |= {f"transformer.{path}.lora_A.weight": a, f"transformer.{path}.lora_B.weight": b}
        tensors[f"transformer.{path}.lora_B.bias"] = biases[path]
    ranks = {f"^{path}": len(a) for path, (a, _) in pairs.items() if len(a) != RANK}
    said = {
        "r": RANK, "lora_alpha": RANK, "rank_pattern": ranks, "alpha_pattern": ranks, "lora_bias": True,
        "target_modules": list(pairs),
    }  # fmt: skip
    header = {f"transformer.{name}": value for name, value in said.items()}
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(header)}


def wan_names(trained):
    """By diffusers' paths of Wan's linears the makers'."""
    native = trained.native()
    one = torch.zeros(1)
    return {
        next(iter(native.parts(name, one))).removesuffix(".weight"): name.removesuffix(".weight")
        for name in native.names
        if name.endswith(".weight")
    }


def wan_lora(trained):
    """Tensors and header of a LoRA in Wan's own names, with an alpha where all consumers take one."""
    _, header = diffusers_lora(trained)
    pairs, biases = all_pairs(trained)
    names, tensors = wan_names(trained), {}
    for path, (a, b) in pairs.items():
        own = f"diffusion_model.{names[path]}"
        tensors |= {f"{own}.lora_down.weight": a, f"{own}.lora_up.weight": b, f"{own}.diff_b": biases[path]}
        if path in trained.pairs:
            tensors[f"{own}.alpha"] = torch.tensor(float(len(a)))
    return tensors, header


def native_weights(trained):
    """All weights by the makers' names, of a network that has no fused ones."""
    native, weights = trained.native(), dict(trained.merged())
    one = torch.zeros(1)
    return {name: weights[next(iter(native.parts(name, one)))] for name in native.names}


def write(path, tensors, header=None, dtype=torch.float32):
    """A file of these tensors, single numbers but for in float32."""
    stored = {name: (each if each.ndim == 0 else each.to(dtype)).contiguous() for name, each in tensors.items()}
    save_file(stored, path, header or {"format": "pt"})
    return path
