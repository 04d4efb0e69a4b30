"""Small transformers models with weights far from their initial values, and what they compute: the tests' oracle.

Built in the test process, never in a worker: the CPU platform's patches would reach into transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

VOCAB = 101
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def make_model(name: str):
    """A seeded fp32 model; deepseek_v3_plain_q has neither query LoRA nor YaRN."""
    import transformers as hf

    torch.manual_seed(0)
    deepseek = {
        **SMALL, "hidden_size": 64, "num_hidden_layers": 4, "num_key_value_heads": 4, "q_lora_rank": 48,
        "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24, "n_routed_experts": 8,
        "num_experts_per_tok": 4, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "rope_parameters": YARN,
    }  # fmt: skip
    del deepseek["head_dim"]
    made = {
        "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**deepseek)),
        "deepseek_v3_plain_q": lambda: hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(**(deepseek | {"q_lora_rank": None, "rope_parameters": PLAIN}))
        ),
        "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(
            hf.DeepseekV2Config(
                **{name: value for name, value in deepseek.items() if name not in ("n_group", "topk_group")}
                | {"q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 1.0}
            )
        ),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, rope_parameters=LLAMA3, tie_word_embeddings=True)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, rope_parameters=PLAIN)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, rope_parameters=PLAIN)),
        "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **SMALL,
                rope_parameters=PLAIN,
                num_experts=8,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                norm_topk_prob=True,
            )
        ),
    }
    model = made[name]().float().eval()
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in tensor_name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            elif "e_score_correction_bias" in tensor_name:
                tensor.copy_(torch.randn_like(tensor) * 0.05)
            elif tensor_name.endswith("bias"):
                tensor.copy_(torch.randn_like(tensor) * 0.1)
            elif tensor.ndim == 2:
                tensor.mul_(3.0)
    return model


def save_model(name: str, folder: Path, *, mtp_layers: int = 0) -> object:
    """Save `make_model(name)` and return it. `mtp_layers` adds DeepSeek MTP layers to config.json and weights."""
    from safetensors.torch import load_file, save_file

    model = make_model(name)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if mtp_layers:
        weights = load_file(folder / "model.safetensors")
        last, hidden = config["num_hidden_layers"] - 1, config["hidden_size"]
        for layer in range(last + 1, last + 1 + mtp_layers):
            for key in [key for key in weights if key.startswith(f"model.layers.{last}.")]:
                noise = torch.randn_like(weights[key]) * 0.02
                weights[key.replace(f".{last}.", f".{layer}.", 1)] = weights[key] + noise
            prefix = f"model.layers.{layer}"
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                weights[f"{prefix}.{norm}.weight"] = 1 + torch.randn(hidden) * 0.1
            weights[f"{prefix}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden) * 0.06
            weights[f"{prefix}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
            weights[f"{prefix}.shared_head.head.weight"] = weights["lm_head.weight"].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if config["model_type"] == "deepseek_v3":  # transformers writes neither the router's form nor the layers it has not
        config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": mtp_layers}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def random_sequences(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, size=length).astype(np.int32) for length in lengths]


def all_logits(model, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """fp32 logits [L, V] of each sequence, one at a time."""
    with torch.no_grad():
        return [model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float().numpy() for ids in sequences]


def write_tokenizer(folder: Path) -> None:
    """vLLM reads one although only ids are exchanged: 101 words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)
