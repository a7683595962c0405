"""The Llama family: llama 1, 2, 3, 3.1, 3.2 and everything that states model_type llama."""

from __future__ import annotations

from jinfer.models.weight_map import WeightMap, fuse_qkv, plain, split_heads_in, stack_pair

WEIGHTS = WeightMap(
    top={
        "embedding": plain("model.embed_tokens.weight"),
        "norm.weight": plain("model.norm.weight"),
        "head": plain("lm_head.weight"),
    },
    layer_prefix="model.layers.{}.",
    layer={
        "attention_norm.weight": plain("input_layernorm.weight"),
        "attention.qkv.weight": fuse_qkv("self_attn.{}_proj.weight"),
        "attention.qkv.bias": fuse_qkv("self_attn.{}_proj.bias"),
        "attention.out.weight": split_heads_in("self_attn.o_proj.weight"),
        "attention.out.bias": plain("self_attn.o_proj.bias"),
        "mlp_norm.weight": plain("post_attention_layernorm.weight"),
        "mlp.gate_up.weight": stack_pair("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.gate_up.bias": stack_pair("mlp.gate_proj.bias", "mlp.up_proj.bias"),
        "mlp.down.weight": plain("mlp.down_proj.weight"),
        "mlp.down.bias": plain("mlp.down_proj.bias"),
    },
    # Buffers that old checkpoints carry and no model reads.
    ignored_suffixes=("rotary_emb.inv_freq",),
)
