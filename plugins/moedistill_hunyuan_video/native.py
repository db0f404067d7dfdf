"""Names of HunyuanVideo's own code for what HunyuanVideoTransformer3DModel holds."""

from moedistill import NativeNames

EMBEDDERS = {
    "time_in.mlp": "time_text_embed.timestep_embedder",
    "guidance_in.mlp": "time_text_embed.guidance_embedder",
    "txt_in.t_embedder.mlp": "context_embedder.time_text_embed.timestep_embedder",
}
"""Of a number: two linears with an activation between them, which the makers count too."""

REFINER, REFINER_HERE = "txt_in.individual_token_refiner.blocks.*", "context_embedder.token_refiner.refiner_blocks.*"
DOUBLE, DOUBLE_HERE = "double_blocks.*", "transformer_blocks.*"
SINGLE, SINGLE_HERE = "single_blocks.*", "single_transformer_blocks.*"

NAMES = NativeNames(
    {
        "img_in.proj": "x_embedder.proj",
        **{f"{native}.0": f"{here}.linear_1" for native, here in EMBEDDERS.items()},
        **{f"{native}.2": f"{here}.linear_2" for native, here in EMBEDDERS.items()},
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
        "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
        "txt_in.input_embedder": "context_embedder.proj_in",
        f"{REFINER}.norm1": f"{REFINER_HERE}.norm1",
        f"{REFINER}.norm2": f"{REFINER_HERE}.norm2",
        f"{REFINER}.self_attn_qkv": tuple(f"{REFINER_HERE}.attn.to_{each}" for each in "qkv"),
        f"{REFINER}.self_attn_proj": f"{REFINER_HERE}.attn.to_out.0",
        f"{REFINER}.mlp.fc1": f"{REFINER_HERE}.ff.net.0.proj",
        f"{REFINER}.mlp.fc2": f"{REFINER_HERE}.ff.net.2",
        f"{REFINER}.adaLN_modulation.1": f"{REFINER_HERE}.norm_out.linear",
        f"{DOUBLE}.img_mod.linear": f"{DOUBLE_HERE}.norm1.linear",
        f"{DOUBLE}.img_attn_qkv": tuple(f"{DOUBLE_HERE}.attn.to_{each}" for each in "qkv"),
        f"{DOUBLE}.img_attn_q_norm": f"{DOUBLE_HERE}.attn.norm_q",
        f"{DOUBLE}.img_attn_k_norm": f"{DOUBLE_HERE}.attn.norm_k",
        f"{DOUBLE}.img_attn_proj": f"{DOUBLE_HERE}.attn.to_out.0",
        f"{DOUBLE}.img_mlp.fc1": f"{DOUBLE_HERE}.ff.net.0.proj",
        f"{DOUBLE}.img_mlp.fc2": f"{DOUBLE_HERE}.ff.net.2",
        f"{DOUBLE}.txt_mod.linear": f"{DOUBLE_HERE}.norm1_context.linear",
        f"{DOUBLE}.txt_attn_qkv": tuple(f"{DOUBLE_HERE}.attn.add_{each}_proj" for each in "qkv"),
        f"{DOUBLE}.txt_attn_q_norm": f"{DOUBLE_HERE}.attn.norm_added_q",
        f"{DOUBLE}.txt_attn_k_norm": f"{DOUBLE_HERE}.attn.norm_added_k",
        f"{DOUBLE}.txt_attn_proj": f"{DOUBLE_HERE}.attn.to_add_out",
        f"{DOUBLE}.txt_mlp.fc1": f"{DOUBLE_HERE}.ff_context.net.0.proj",
        f"{DOUBLE}.txt_mlp.fc2": f"{DOUBLE_HERE}.ff_context.net.2",
        f"{SINGLE}.linear1": (*(f"{SINGLE_HERE}.attn.to_{each}" for each in "qkv"), f"{SINGLE_HERE}.proj_mlp"),
        f"{SINGLE}.linear2": f"{SINGLE_HERE}.proj_out",
        f"{SINGLE}.q_norm": f"{SINGLE_HERE}.attn.norm_q",
        f"{SINGLE}.k_norm": f"{SINGLE_HERE}.attn.norm_k",
        f"{SINGLE}.modulation.linear": f"{SINGLE_HERE}.norm.linear",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    # The makers' gives shift and scale, the one here scale and shift.
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
)

IN_COMFYUI = {
    f"{native}.{number}": f"{native.removesuffix('.mlp')}.{layer}_layer"
    for native in EMBEDDERS
    for number, layer in ((0, "in"), (2, "out"))
} | {
    "txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer",
    "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
}
"""What ComfyUI renames when it loads whole weights, and knows in a LoRA by its new name alone."""
