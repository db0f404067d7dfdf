"""A diffusers scheduler that holds a list of sampling steps."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from moedistill.flow.process import from_vp, jump, to_vp, velocity_from_vp


class FewStepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Plain Euler steps along a fixed list of noise levels, whatever number of steps a pipeline asks for.

    No scheduler of diffusers keeps such a list: FlowMatchEulerDiscreteScheduler shifts the sigmas that it is given and
    forgets them at the next call, and some pipelines pass none on.

    Args:
        sigmas: `[n + 1]`, descending, the last one 0, in flow coordinates (see `moedistill.flow`).
        timesteps: `[n]`, the model's native time of each step, which may be fractional.
        num_train_timesteps: of the model.
        prediction_type: `flow_prediction`: the network gives the velocity; `v_prediction`: the v of a
            variance-preserving process, whose samples the pipeline then holds.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        sigmas: tuple[float, ...] = (1.0, 0.0),
        timesteps: tuple[float, ...] = (1000.0,),
        num_train_timesteps: int = 1000,
        prediction_type: str = "flow_prediction",
    ) -> None:
        if len(sigmas) != len(timesteps) + 1:
            raise ValueError(f"{len(sigmas)} sigmas need {len(sigmas) - 1} timesteps, not {len(timesteps)}")
        if prediction_type not in ("flow_prediction", "v_prediction"):
            raise ValueError(f"prediction_type {prediction_type!r} is unknown: use flow_prediction or v_prediction")
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32)
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32)
        self._is_v_prediction = prediction_type == "v_prediction"
        self._num_train_timesteps = num_train_timesteps
        # Noise is noise in flow coordinates, whatever the first noise level is.
        self.init_noise_sigma = to_vp(torch.ones(()), sigmas[0]).item() if self._is_v_prediction else 1.0
        self.step_index = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: float | None = None,
    ) -> None:
        """Goes to the first step. The arguments are those that pipelines pass; the steps are those of the config."""
        self.timesteps = self.timesteps.to(device)
        self.num_inference_steps = len(self.timesteps)
        self.step_index = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Goes to a step."""
        self.step_index = begin_index

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
        """One Euler step from the current noise level to the next; `timestep` is not looked at."""
        sigma, following = self.sigmas[self.step_index].item(), self.sigmas[self.step_index + 1].item()
        x, velocity = sample.float(), model_output.float()
        if self._is_v_prediction:
            velocity = velocity_from_vp(x, velocity, sigma)
            x = to_vp(jump(from_vp(x, sigma), velocity, sigma, following), following)
        else:
            x = jump(x, velocity, sigma, following)
        self.step_index += 1
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def __len__(self) -> int:
        return self._num_train_timesteps
