"""Tiny random models of every causal LM in transformers, saved as a user's own would be."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from harness.policy import tiny_tokenizer

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LIMIT = 20e6  # parameters of a "tiny" model
V = 104  # a little more than the characters of the tokenizer
OF_SIZE = {  # value -> the names that configurations have for it
    V: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions",
    64: "intermediate_size ffn_dim dff n_inner ffn_hidden_size mlp_hidden_size",
    32: "hidden_size n_embd d_model dim word_embed_proj_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim query_pre_attn_scalar linear_key_head_dim"
    " linear_value_head_dim",
    4: "num_attention_heads n_head n_heads num_experts n_routed_experts num_local_experts moe_num_experts"
    " sliding_window rotary_dim",
    2: "num_hidden_layers n_layer n_layers num_layers num_key_value_heads num_experts_per_tok moe_k"
    " linear_num_key_heads linear_num_value_heads",
    1: "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace moe_layer_start_index"
    " eos_token_id",
    0: "pad_token_id hidden_size_per_layer_input",
    0.1: "attention_dropout hidden_dropout dropout resid_pdrop",
    None: "bos_token_id",
}
SIZES = {name: value for value, names in OF_SIZE.items() for name in names.split()}
MIXED = ["linear_attention", "full_attention"]
SLIDING = ["sliding_attention", "full_attention"]
OWN = {  # what SIZES does not say
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "minimax"), dict(layer_types=MIXED)),
    **dict.fromkeys(("gemma3_text", "cohere2"), dict(layer_types=SLIDING)),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8),
    "jamba": dict(attn_layer_offset=1),
    "bamba": dict(attn_layer_indices=[1], mamba_n_heads=8),
    "nemotron_h": dict(hybrid_override_pattern="M*", mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], num_local_experts=0, mamba_n_heads=8,
                             position_embedding_type="rope"),
    "falcon_h1": dict(mamba_n_heads=8),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "falcon": dict(alibi=True),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=4),
    "gemma4_text": dict(num_hidden_layers=4, num_kv_shared_layers=2, hidden_size_per_layer_input=8, global_head_dim=16,
                        layer_types=SLIDING * 2),
    "gemma3n_text": dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=SLIDING * 2),
    "kimi_linear": dict(linear_head_dim=8, linear_num_heads=4, num_experts_per_token=2, layer_types=MIXED),
    "zaya": dict(num_experts_per_tok=1),
    "diffllama": dict(attention_dropout=0.0),
}  # fmt: skip
COMPOSITE = ("gemma3", "gemma3n", "gemma4", "qwen3_5", "qwen3_5_moe", "llama4")  # their text model is trained
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, depth=1, num_heads=2,
              out_hidden_size=32)  # fmt: skip


def tiny_model(kind: str, **changes) -> torch.nn.Module:
    """A random model of this type with weights large enough for its distributions to differ. Raises what building it
    raised last."""
    torch.manual_seed(0)
    default = AutoConfig.for_model(kind).to_dict()
    own = OWN.get(kind, {}) | changes
    known = {key: value for key, value in SIZES.items() if key in default and key not in own}
    if kind in COMPOSITE:
        parts = dict(text_config=tiny_model(f"{kind}_text").config.to_dict(), vision_config=VISION, audio_config=None)
        known, own = {}, {key: value for key, value in parts.items() if key in default}
    for drop in ((), ("head_dim",), ("num_key_value_heads",), ("head_dim", "num_key_value_heads"), ("layer_types",)):
        try:
            config = AutoConfig.for_model(kind, **{k: v for k, v in (known | own).items() if k not in drop})
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > LIMIT:
                raise ValueError(f"{size / 1e6:.0f}M parameters")
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                model(input_ids=torch.tensor([[1, 2, 3, 4, 5, 5]]))
            break
        except Exception as error:
            failure = error
    else:
        raise failure
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.1)
    return model


def save_tiny(kind: str, folder: Path, **changes) -> str:
    """The folder with such a model and a tokenizer of characters."""
    tiny_model(kind, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (Path(folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return str(folder)
