"""Which layers two trained experts need for themselves: how far their weights have moved apart, by kind of layer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moedistill.model.backbone import Backbone
from moedistill.model.mixture import Mixture


@dataclass
class LayerKind:
    """All layers whose paths differ in numbers only, such as `blocks.*.attn.to_q`.

    W is the teacher's weight, A and B what two experts have changed in it; norms are over all layers of the kind.

    Attributes:
        name: the path, `*` for a number.
        parameters: how many weights.
        disagreement: |A - B| / (|A| + |B|): 0, both experts change the same; 1, the opposite, or one of them nothing;
            about 0.7 for unrelated changes of one size. None if neither has moved. It depends on no layer's size.
        difference: |A - B| / |W|; None where W is 0. With one teacher A - B is the difference of the experts' weights.
        change_upper, change_lower: |A| / |W| and |B| / |W|.
        cosine: between A and B: 1, both experts want the same; 0 or below, they pull apart. None if one has not moved.
        groups: the backbone's groups of `lora_targets` that these layers belong to.
        time_dependent: the backbone's time-dependent module that they lie in, if any.
    """

    name: str
    parameters: int
    disagreement: float | None
    difference: float | None
    change_upper: float | None
    change_lower: float | None
    cosine: float | None
    groups: list[str]
    time_dependent: str | None


class _Sums:
    """Running inner products of W, A and B."""

    def __init__(self) -> None:
        self.parameters = 0
        self.inner = torch.zeros(4, dtype=torch.float64)  # W·W, A·A, B·B, A·B

    def add(self, weight: Tensor, upper: Tensor, lower: Tensor) -> None:
        pairs = ((weight, weight), (upper, upper), (lower, lower), (upper, lower))
        self.inner += torch.tensor([(a.double() * b.double()).sum().item() for a, b in pairs], dtype=torch.float64)
        self.parameters += weight.numel()

    def measures(self) -> dict[str, float | None]:
        w, a, b, ab = self.inner.tolist()
        apart = max(a + b - 2 * ab, 0.0) ** 0.5
        return {
            "disagreement": min(apart / (a**0.5 + b**0.5), 1.0) if a + b else None,
            "difference": apart / w**0.5 if w else None,
            "change_upper": (a / w) ** 0.5 if w else None,
            "change_lower": (b / w) ** 0.5 if w else None,
            "cosine": ab / (a * b) ** 0.5 if a * b else None,
        }


@dataclass
class LayerDifferences:
    """Where two experts have moved apart.

    AdamW moves every weight by about the learning rate in its first steps, so after few steps `difference` says above
    all how small a layer's weights are; `disagreement` and `cosine` do not depend on that.

    Attributes:
        steps: what each expert was trained for.
        kinds: ranked by `disagreement`, largest first.
        whole: the disagreement in the network as a whole.
        groups, modules: that in each group of `lora_targets`, and in each time-dependent module.
    """

    steps: int
    kinds: list[LayerKind]
    whole: float | None
    groups: dict[str, float | None]
    modules: dict[str, float | None]


def kind_of(parameter: str) -> str:
    """`blocks.*.attn.to_q` for `blocks.3.attn.to_q.weight`: the module's path without its numbers."""
    module = parameter.rpartition(".")[0] or parameter
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


@torch.no_grad()
def compare_experts(mixture: Mixture, upper: str, lower: str, steps: int) -> LayerDifferences:
    """`LayerDifferences` of two full experts; each is compared with its own teacher first."""
    backbone = mixture.backbone
    kinds: dict[str, _Sums] = {}
    marks: dict[str, tuple[list[str], str | None]] = {}
    groups = {name: _Sums() for name in backbone.lora_targets}
    modules = {path: _Sums() for path in backbone.time_dependent}
    whole = _Sums()
    teachers = [_weights_of_parent(mixture, expert) for expert in (upper, lower)]
    for name, first in mixture.experts[upper].parameters.items():
        weight = teachers[0][name].float()
        changes = (weight, first.float() - weight, mixture.experts[lower].parameters[name] - teachers[1][name].float())
        mark = marks_of(backbone, name)
        marks.setdefault(kind_of(name), mark)
        for sums in (whole, kinds.setdefault(kind_of(name), _Sums()), *(groups[group] for group in mark[0])):
            sums.add(*changes)
        if mark[1] is not None:
            modules[mark[1]].add(*changes)
    rows = [
        LayerKind(
            name=name,
            parameters=sums.parameters,
            groups=marks[name][0],
            time_dependent=marks[name][1],
            **sums.measures(),
        )
        for name, sums in kinds.items()
    ]
    return LayerDifferences(
        steps=steps,
        kinds=sorted(rows, key=lambda row: -(row.disagreement or 0.0)),
        whole=whole.measures()["disagreement"],
        groups={name: sums.measures()["disagreement"] for name, sums in groups.items()},
        # A module without weights, such as a bare normalisation, has nothing to compare.
        modules={path: sums.measures()["disagreement"] for path, sums in modules.items() if sums.parameters},
    )


def marks_of(backbone: Backbone, parameter: str) -> tuple[list[str], str | None]:
    """The groups of `lora_targets` that a parameter's module belongs to, and the time-dependent module it lies in."""
    module = parameter.rpartition(".")[0]
    groups = [group for group, pattern in backbone.lora_targets.items() if re.fullmatch(pattern, module)]
    inside = [path for path in backbone.time_dependent if f"{module}.".startswith(f"{path}.")]
    return groups, inside[0] if inside else None


def _weights_of_parent(mixture: Mixture, expert: str) -> Mapping[str, Tensor]:
    parent = mixture.experts[expert].parent
    assert parent is not None
    return parent.shared.weights
