"""Checkpoint tensor names: transformers' spelling (the one specs use) to GGUF's. Torch-free.

Source   gguf-py `tensor_mapping.py` and the name table of github.com/ggml-org/llama.cpp, src/llama-arch.cpp
"""

import re

_TOP_LEVEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(name: str, *, sandwich_norms: bool) -> str:
    """Return GGUF's name of a tensor.

    `sandwich_norms`: the model (Gemma 2, Gemma 3) norms both before and after each block, so that
    `post_attention_layernorm` is not the feed-forward's own norm.
    """
    stem, _, kind = name.rpartition(".")
    match = _LAYER_NAME.fullmatch(stem)
    if match is None:
        return f"{_TOP_LEVEL[stem]}.{kind}"
    part = match[2]
    short = "post_attention_norm" if sandwich_norms and part == "post_attention_layernorm" else _IN_LAYER[part]
    return f"blk.{match[1]}.{short}.{kind}"
