"""A diffusers scheduler that holds a list of sampling steps."""

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from moedistill.flow.process import add_noise, from_vp, jump, listed, to_vp, velocity_from_vp, whole

UNASKED = 50
"""The number of steps that a pipeline gives where its caller asks for none."""

CLOSE = 1e-3
"""How far a sigma that is written down by hand may lie from the step that it means."""


class FewStepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Plain Euler steps along a fixed list of noise levels, whatever number of steps a pipeline asks for.

    No scheduler of diffusers keeps such a list: FlowMatchEulerDiscreteScheduler shifts the sigmas that it is given and
    forgets them at the next call, and some pipelines pass none on.

    A pipeline that was saved with it is loaded like any other, after `from moedistill import FewStepScheduler`:
    diffusers imports no module because a folder names it, and says which one is missing.

    Args:
        sigmas: `[n + 1]`, descending, the last one 0, in flow coordinates (see `moedistill.flow`).
        timesteps: `[n]`, the model's native time of each step, which may be fractional.
        num_train_timesteps: of the model.
        prediction_type: `flow_prediction`: the network gives the velocity; `v_prediction`: the v of a
            variance-preserving process, whose samples the pipeline then holds.

    Attributes:
        step_index: the step that is next, from 0; None before the first.
        begin_index: the step to begin with, where `set_begin_index` has said so; else the time of the first step says.
        batch: of how many samples the next step is, where that is known.
        has_warned: that other steps were asked for is said once, unless this is set.

    Raises:
        ValueError: no such list.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        sigmas: Sequence[float],
        timesteps: Sequence[float],
        num_train_timesteps: int = 1000,
        prediction_type: str = "flow_prediction",
    ) -> None:
        levels, times = _numbers("sigmas", sigmas), _numbers("timesteps", timesteps)
        _check_steps(levels, times)
        num_train_timesteps = whole("num_train_timesteps", num_train_timesteps)
        if prediction_type not in ("flow_prediction", "v_prediction"):
            raise ValueError(f"prediction_type {prediction_type!r} is unknown: use flow_prediction or v_prediction")
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self.timesteps = torch.tensor(times, dtype=torch.float32)
        self._times: list[float] = self.timesteps.tolist()
        self._is_v_prediction = prediction_type == "v_prediction"
        self._num_train_timesteps = num_train_timesteps
        # Noise is noise in flow coordinates, whatever the first noise level is.
        self.init_noise_sigma = to_vp(torch.ones(()), levels[0]).item() if self._is_v_prediction else 1.0
        self.num_inference_steps: int | None = None
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self.batch: int | None = None
        self.has_warned = False

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """See `ConfigMixin.from_config`; ValueError for the config of another scheduler, which has no such steps."""
        given = {**(config if isinstance(config, Mapping) else {}), **kwargs}
        if isinstance(config, Mapping) and not {"sigmas", "timesteps"} <= set(given):
            raise ValueError(
                f"the config of {given.get('_class_name', 'a scheduler')} names no sigmas and timesteps, of which a "
                "FewStepScheduler is made; moedistill.apply puts one with an expert's own steps into a pipeline"
            )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # -- which step it is ---------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: float | None = None,
    ) -> None:
        """Goes back before the first step. The arguments are those that pipelines pass; the steps are the config's.

        Args:
            num_inference_steps: any; of a number that someone must have asked for it says once that it is not followed.
            sigmas: those of the config. Pipelines of their own accord give numpy arrays from 1 down, mostly even ones
                (Mochi's are not), which are nothing but a number of steps.
            timesteps: those of the config.
            mu: a pipeline's own shift, which is not looked at.

        Raises:
            ValueError: other sigmas or times are asked for, or no whole number of steps.
        """
        own = len(self._times)
        if num_inference_steps is not None:
            whole("num_inference_steps", num_inference_steps)
        if sigmas is not None:
            num_inference_steps = self._check_sigmas(sigmas)
        if timesteps is not None:
            asked = _numbers("timesteps", timesteps)
            if not _close(asked, self._times, CLOSE * self._num_train_timesteps):
                raise ValueError(self._refusal("timesteps", asked, self._times))
        if num_inference_steps not in (None, own, UNASKED):
            self._warn(f"{num_inference_steps} steps are asked for", f"steps={num_inference_steps}")
        self.timesteps = self.timesteps.to(device)
        self.num_inference_steps = own
        self.step_index = self.begin_index = self.batch = None

    def _check_sigmas(self, sigmas: Any) -> int | None:
        """The number of steps that sigmas stand for, None for the steps of the config; ValueError for other ones."""
        asked, own = _numbers("sigmas", sigmas), self.sigmas.tolist()
        if _close(asked, own, CLOSE) or _close(asked, own[:-1], CLOSE):
            return None
        made = isinstance(sigmas, np.ndarray) and _descend(asked) and asked[0] == 1.0 and asked[-1] > 0.0
        if not made:
            raise ValueError(self._refusal("sigmas", asked, own[:-1]))
        if not _close(asked, np.linspace(1.0, 1.0 / len(asked), len(asked)).tolist(), 1e-6):
            self._warn(f"sigmas {_listed(asked)} are given", "sigmas=[…]")
        return len(asked)

    def _warn(self, what: str, argument: str) -> None:
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"{what}, but the experts take their own {len(self._times)} steps, sigmas "
                f"{_listed(self.sigmas.tolist()[:-1])}; others are chosen with moedistill.apply(pipeline, source, "
                f"{argument})",
                stacklevel=3,
            )

    def _refusal(self, name: str, asked: Sequence[float], own: Sequence[float]) -> str:
        return (
            f"{name} {_listed(asked)} are not those of the experts, {_listed(own)}; leave them out, or choose other "
            "steps with moedistill.apply(pipeline, source, sigmas=[…])"
        )

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says with which step, from 0, to begin; ValueError if there is none such."""
        index = whole("begin_index", begin_index, 0)
        if index >= len(self._times):
            raise ValueError(f"begin_index {index} is no step: there are 0 to {len(self._times) - 1}")
        self.begin_index = index

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The step of a native time, from 0; ValueError if no step is at that time.

        The time may be rounded as pipelines round it, to bfloat16, float16 or an integer.
        """
        times = self._times if schedule_timesteps is None else schedule_timesteps.tolist()
        time = _one_time(timestep)
        found = _meant(time, times)
        if not found:
            raise ValueError(f"no step is at timestep {time:g}: they are at {_listed(times)}")
        return found[0]

    def enter(self, timestep: Any) -> int:
        """The step that is next, from 0, which now has begun, if `timestep` is its time as in `index_for_timestep`.

        Raises:
            ValueError: it is another step's time, or no step is left.
        """
        time, count = _one_time(timestep), len(self._times)
        if self.step_index is None:
            self.step_index = self.index_for_timestep(time) if self.begin_index is None else self.begin_index
        if self.step_index >= count:
            raise ValueError(
                f"timestep {time:g} is asked for, but all {count} steps are done; set_timesteps begins anew"
            )
        if self.step_index not in _meant(time, self._times):
            raise ValueError(
                f"timestep {time:g} is asked for, but the next step is {self.step_index + 1} of {count}, at "
                f"{self._times[self.step_index]:g}; take scheduler.timesteps in their order, after set_timesteps"
            )
        return self.step_index

    # -- what a step does ---------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One Euler step from the noise level of `timestep` to the next.

        Raises:
            ValueError: another step is next, or the shapes do not fit.
        """
        index = self.enter(timestep)
        if self.batch not in (None, len(sample)):
            raise ValueError(
                f"an expert was called for a batch of {self.batch}, and the step is of {len(sample)}: another pipeline "
                "guides it a second time; use the one that moedistill.apply was called with"
            )
        sigma, following = self.sigmas[index].item(), self.sigmas[index + 1].item()
        x, velocity = sample.float(), model_output.float()
        if self._is_v_prediction:
            velocity = velocity_from_vp(x, velocity, sigma)
            x = to_vp(jump(from_vp(x, sigma), velocity, sigma, following), following)
        else:
            x = jump(x, velocity, sigma, following)
        self.step_index = index + 1
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Clean samples as a pipeline holds them at the times of steps: one time, or one for each sample.

        Raises:
            ValueError: no step is at such a time, or the shapes do not fit.
        """
        times = torch.as_tensor(timesteps).flatten()
        levels = self.sigmas[[self.index_for_timestep(time) for time in times]].to(original_samples.device)
        sigma = levels[0].item() if len(levels) == 1 else levels
        x = add_noise(original_samples, noise, sigma)
        return to_vp(x, sigma) if self._is_v_prediction else x

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """`add_noise`, as flow schedulers call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self._num_train_timesteps


def _check_steps(levels: Sequence[float], times: Sequence[float]) -> None:
    if len(levels) < 2 or not _descend(levels) or levels[0] > 1.0 or levels[-1] != 0.0:
        raise ValueError(f"sigmas {_listed(levels)} must be two or more, descend strictly from at most 1, and end at 0")
    if len(times) != len(levels) - 1:
        raise ValueError(f"{len(levels)} sigmas need {len(levels) - 1} timesteps, not {len(times)}")
    if len(set(times)) < len(times) or not all(map(math.isfinite, times)):
        raise ValueError(f"timesteps {_listed(times)} must be finite and differ: a step is known by its time")


def _numbers(name: str, values: Any) -> list[float]:
    """Plain numbers of a list, an array or a tensor; ValueError for anything else."""
    numbers = listed(name, values)
    if not all(isinstance(value, Real) and not isinstance(value, bool) for value in numbers):
        raise ValueError(f"{name} {values!r} must be a list of numbers")
    return [float(value) for value in numbers]


def _one_time(timestep: Any) -> float:
    """The one time of a number, or of a tensor that may hold it for each sample."""
    try:
        [time] = set(torch.as_tensor(timestep).flatten().tolist())
        return float(time)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"timestep {timestep!r} must be one number, one of scheduler.timesteps") from error


def _meant(time: float, times: Sequence[float]) -> list[int]:
    """The steps, at `times`, that a time may mean: those at it, or, if none is, those whose times are rounded to it."""
    exact = [index for index, own in enumerate(times) if _equal(time, own)]
    return exact or [index for index, own in enumerate(times) if any(_equal(time, one) for one in _roundings(own))]


def _equal(time: float, own: float) -> bool:
    return math.isclose(time, own, rel_tol=1e-6, abs_tol=1e-6)


def _roundings(time: float) -> list[float]:
    value = torch.tensor(time)
    rounded = (value.to(dtype).item() for dtype in (torch.bfloat16, torch.float16))
    return [float(math.trunc(time)), float(round(time)), *rounded]


def _descend(values: Sequence[float]) -> bool:
    """Written so that NaN does not."""
    return bool(values) and not math.isnan(values[0]) and all(above > below for above, below in pairwise(values))


def _close(values: Sequence[float], wanted: Sequence[float], within: float) -> bool:
    pairs = zip(values, wanted, strict=False)
    return len(values) == len(wanted) and all(abs(value - own) <= within for value, own in pairs)


def _listed(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.6g}" for value in values[:8])
    return f"[{shown}, …]" if len(values) > 8 else f"[{shown}]"
