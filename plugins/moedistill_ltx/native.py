"""Names of LTX-Video's own code for what LTXVideoTransformer3DModel holds."""

from moedistill import NativeNames

KEPT = (
    "caption_projection.linear_1", "caption_projection.linear_2",
    *(f"transformer_blocks.*.attn{n}.{linear}" for n in (1, 2) for linear in ("to_q", "to_k", "to_v", "to_out.0")),
    "transformer_blocks.*.ff.net.0.proj", "transformer_blocks.*.ff.net.2",
    "transformer_blocks.*.scale_shift_table", "scale_shift_table", "proj_out",
)  # fmt: skip

NAMES = NativeNames(
    {
        "patchify_proj": "proj_in",
        "adaln_single.emb.timestep_embedder.linear_1": "time_embed.emb.timestep_embedder.linear_1",
        "adaln_single.emb.timestep_embedder.linear_2": "time_embed.emb.timestep_embedder.linear_2",
        "adaln_single.linear": "time_embed.linear",
        **{
            f"transformer_blocks.*.attn{n}.{x}_norm": f"transformer_blocks.*.attn{n}.norm_{x}"
            for n in (1, 2)
            for x in "qk"
        },
        **{path: path for path in KEPT},
    }
)
