"""Tiny random models of the families that people bring, as their config classes make them."""

from typing import Any

import tiny
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
}
DELTA: dict[str, Any] = {  # linear attention by the gated delta rule
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TWO_KINDS = ["linear_attention", "full_attention"]

# model_type -> what its config has beside the usual shape
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3": {
        "text_config": {**tiny.SHAPE, "head_dim": 8, "sliding_window": 8},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        },
        "mm_tokens_per_image": 1, "boi_token_index": 1, "eoi_token_index": 2,
        "image_token_index": 3,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "mistral": {"head_dim": 8},
    "ministral3": {"head_dim": 8},
    "phi3": {"partial_rotary_factor": 0.75},  # as Phi-4-mini
    "granite": {},
    "gpt_oss": {
        "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": {
        **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
        "num_experts_per_tok": 0, "shared_intermediate_size": 48,
        "position_embedding_type": "rope",
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8, "head_dim": 8,
    },
    "qwen3_next": {
        **DELTA, **EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16,
        "layer_types": TWO_KINDS,
    },
    "qwen3_5_text": {**DELTA, "head_dim": 8, "layer_types": TWO_KINDS},
    "olmo_hybrid": {**DELTA, "layer_types": TWO_KINDS},
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 4},
    "minimax": {
        "layer_types": TWO_KINDS, "num_local_experts": 4, "num_experts_per_tok": 2,
        "head_dim": 8, "block_size": 4,
    },
    "recurrent_gemma": {"attention_window_size": 8, "lru_width": 32, "head_dim": 8,
                        "block_types": ["recurrent", "attention"], "conv1d_width": 4},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 0.5, "v_dim_factor": 1.0, "chunk_size": 4,
              "chunkwise_kernel": "chunkwise--native_autograd",
              "sequence_kernel": "native_sequence__native",
              "step_kernel": "native", "mode": "inference", "return_last_states": True},
}  # fmt: skip
BEFORE_5 = int(transformers.__version__.partition(".")[0]) < 5
# transformers 4 keeps a state of recurrent_gemma from one pass to the next, and makes no xlstm
BROKEN = {"recurrent_gemma", "xlstm"} if BEFORE_5 else set()
HERE = [name for name in FAMILIES if name in CONFIG_MAPPING_NAMES and name not in BROKEN]


def config(family: str, **changes: Any) -> PretrainedConfig:
    shape = {**tiny.SHAPE, "pad_token_id": 0, "tie_word_embeddings": False}
    return AutoConfig.for_model(family, **{**shape, **FAMILIES[family], **changes})


def model(family: str, *, seed: int = 0, **changes: Any):
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32)
    return made.eval()
