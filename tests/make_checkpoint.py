"""Make a synthetic DeepSeek-V3-shaped Hugging Face folder of a given size, for scale tests and benchmarks.

    python tests/make_checkpoint.py DST --gb 4 --shards 8 --fp8

Real names (dense first layer, shared experts, router bias, an MTP layer with its copies of embedding and head), random
numbers. With --fp8 the linear weights are e4m3 with 128 x 128 block scales, and no dimension of the attention divides
by 128, so that ragged edges occur.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_r1.config.shape import shape_from_config
from megatron_r1.weights.fp8 import FP8, SCALE_SUFFIX, scale_shape
from megatron_r1.weights.table import build_table

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 32003,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 2816,
    "moe_intermediate_size": 704,
    "q_lora_rank": 336,
    "kv_lora_rank": 240,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 64,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TINY = {
    "vocab_size": 1003,
    "hidden_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 352,
    "moe_intermediate_size": 96,
    "q_lora_rank": 144,
    "kv_lora_rank": 176,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
}
"""For folders of less than a gigabyte: two layers, MTP and vocabulary are 8 MB."""

QUANTISATION = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip


def make_checkpoint(folder: Path, *, num_bytes: float, num_shards: int, fp8: bool, seed: int = 0) -> int:
    """Returns the number of tensor bytes, `num_bytes` or what one more layer makes it, 8 MB at least."""
    config = CONFIG | (TINY if num_bytes < 1e9 else {}) | {"num_hidden_layers": 2}
    while _total_bytes(shape_from_config(config), fp8) < num_bytes:
        config["num_hidden_layers"] += 1
    config |= {"quantization_config": QUANTISATION} if fp8 else {}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    plan = list(_plan(shape_from_config(config), fp8))
    total = sum(size for _, _, _, size in plan)
    torch.manual_seed(seed)
    count = 1 << (24 if num_bytes >= 1e9 else 20)
    noise = {torch.bfloat16: torch.randn(count).mul_(0.02).bfloat16(), FP8: torch.randn(count).mul_(60).to(FP8)}
    weight_map: dict[str, str] = {}
    kept: dict[str, torch.Tensor] = {}
    shard: dict[str, torch.Tensor] = {}
    number, held = 1, 0
    for name, dtype, shape, size in plan:
        file = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        base = next((key for key in ("embed_tokens", "lm_head", "shared_head.head") if key in name), None)
        if base is not None:
            base = "lm_head" if base == "shared_head.head" else base
            tensor = kept.setdefault(base, _noise(noise, dtype, shape)).clone()
        else:
            tensor = _noise(noise, dtype, shape)
        shard[name], weight_map[name] = tensor, file
        held += size
        if held >= total * number / num_shards:
            save_file(shard, folder / file, metadata={"format": "pt"})
            shard, number = {}, number + 1
    assert not shard
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _plan(shape, fp8: bool):
    for entry in build_table(shape):
        names = zip(
            (*entry.hf, *entry.aliases), entry.hf_shapes + entry.hf_shapes[:1] * len(entry.aliases), strict=True
        )
        for name, full in names:
            dtype = torch.float32 if entry.float32 else FP8 if fp8 and entry.fp8 else torch.bfloat16
            yield name, dtype, full, math.prod(full) * dtype.itemsize
            if dtype == FP8:
                scales = scale_shape(full[0], full[1], 128)
                yield name + SCALE_SUFFIX, torch.float32, scales, math.prod(scales) * 4


def _total_bytes(shape, fp8: bool) -> int:
    return sum(size for _, _, _, size in _plan(shape, fp8))


def _noise(noise: dict[torch.dtype, torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.float32:
        return torch.rand(shape) * 1e-3 + 1e-4
    source, count = noise[dtype], math.prod(shape)
    start = int(torch.randint(len(source), (1,)))
    bits = source.view(torch.uint8 if dtype == FP8 else torch.int16)
    repeats = -(-(start + count) // len(source))
    return bits.repeat(repeats)[start : start + count].clone().view(dtype).view(shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--fp8", action="store_true")
    options = parser.parse_args()
    made = make_checkpoint(options.folder, num_bytes=options.gb * 1e9, num_shards=options.shards, fp8=options.fp8)
    print(f"{options.folder}: {made / 1e9:.2f} GB in {options.shards} files")
