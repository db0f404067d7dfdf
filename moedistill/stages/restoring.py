"""Whether a saved training state is of what a stage trains: another would be taken over in part, or end in a crash."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moedistill.losses.optim import moments_of
from moedistill.runtime.integrity import misfit

GROUP = ("params", "lr", "initial_lr", "betas", "eps", "weight_decay")
SCHEDULE = ("base_lrs", "last_epoch", "_step_count", "_last_lr")


def misfit_of_state(state: Any, trained: Mapping[str, Any], scaler: Any) -> str | None:
    """In what the `state` of a `Training` is not of its `trained`: names, types, dtypes, shapes; None if it is."""
    form = {
        "trained": {name: {"optimizer": {"state": ..., "param_groups": ...}, "scheduler": ...} for name in trained},
        "critics": {name: each.bare.state_dict() for name, each in trained.items() if each.bare is not None},
        "scaler": scaler.state_dict() if scaler is not None else ...,
    }
    if fault := misfit(state, form):
        return fault
    parts = (_misfit(state["trained"][name], each, f"trained.{name}") for name, each in trained.items())
    return next(filter(None, parts), None)


def _misfit(saved: Mapping[str, Any], trainable: Any, where: str) -> str | None:
    moments, groups = saved["optimizer"]["state"], saved["optimizer"]["param_groups"]
    own_groups = trainable.optimizer.state_dict()["param_groups"]
    own_moments = {
        number: {"step": torch.tensor(0.0), **moments_of(trainable.optimizer, parameter)}
        for number, parameter in enumerate(trainable.parameters.values())
        if not isinstance(moments, Mapping) or number in moments  # what no gradient has reached has none
    }
    pairs = [
        ("optimizer.state", moments, own_moments),
        ("optimizer.param_groups", groups, [...] * len(own_groups)),
        ("scheduler", *_shared(saved["scheduler"], trainable.scheduler.state_dict(), SCHEDULE)),
    ]
    if isinstance(groups, Sequence):
        shared = (_shared(group, own, GROUP) for group, own in zip(groups, own_groups, strict=False))
        pairs += [("optimizer.param_groups", *both) for both in shared]
    return next(filter(None, (misfit(theirs, own, f"{where}.{path}") for path, theirs, own in pairs)), None)


def _shared(saved: Any, own: Mapping[str, Any], needed: Sequence[str]) -> tuple[Any, Any]:
    """Two states less the keys that only one of them sets and that are not `needed`: versions of torch add some."""
    if not isinstance(saved, Mapping):
        return saved, own
    kept = [key for key in own if key in needed or (saved.get(key) is not None and own[key] is not None)]
    return {key: saved[key] for key in kept if key in saved}, {key: own[key] for key in kept}
