"""Names of Wan's own code for what WanTransformer3DModel holds; ComfyUI and LightX2V have them too."""

from moedistill import NativeNames

ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
IMAGE_ATTENTION = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
"""Of networks that make videos from images."""

NAMES = NativeNames(
    {
        "patch_embedding": "patch_embedding",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        **{f"blocks.*.self_attn.{native}": f"blocks.*.attn1.{here}" for native, here in ATTENTION.items()},
        **{
            f"blocks.*.cross_attn.{native}": f"blocks.*.attn2.{here}"
            for native, here in {**ATTENTION, **IMAGE_ATTENTION}.items()
        },
        # Both number the norms in the order in which they were written down, which differs.
        "blocks.*.norm3": "blocks.*.norm2",
        "blocks.*.norm2": "blocks.*.norm3",
        "blocks.*.ffn.0": "blocks.*.ffn.net.0.proj",
        "blocks.*.ffn.2": "blocks.*.ffn.net.2",
        "blocks.*.modulation": "blocks.*.scale_shift_table",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    }
)
