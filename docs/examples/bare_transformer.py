"""The router and the sampler with bare diffusers transformers: no student, no recipe, no trainer."""

import torch
from diffusers import HunyuanVideoTransformer3DModel

from moedistill import TimestepRouter, Trajectory, sample

# Put your own experts and text here; these are tiny, with random weights.
size = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 2}
size |= {"num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6)}
experts = {name: HunyuanVideoTransformer3DModel(**size) for name in ("semantic", "detail")}
text = {"encoder_hidden_states": torch.randn(1, 12, 24), "encoder_attention_mask": torch.ones(1, 12, dtype=torch.bool)}
text |= {"pooled_projections": torch.randn(1, 16), "guidance": torch.tensor([6000.0]), "return_dict": False}
noise = torch.randn(1, 16, 5, 8, 8)

# This is all:
trajectory = Trajectory.flow_matching(num_steps=50, shift=17.0)
router = TimestepRouter.from_points(trajectory, ["semantic", "detail"], [38])
sigmas = torch.cat([trajectory.points[[50, 44, 38, 19]], torch.zeros(1)])
velocity = {name: lambda x, t, network=network: network(x, t, **text)[0] for name, network in experts.items()}
latents = sample(lambda x, sigma, expert: velocity[expert](x, 1000 * sigma), noise, sigmas, router=router)
