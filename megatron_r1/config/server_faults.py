"""Faults of how vLLM servers split a model over their GPUs.

The laws are vLLM's (0.32 and 0.33), which finds them when a server loads: validate_fp8_block_shape and
validate_fp8_block_shape_moe of its fp8_utils.py for FP8 (for experts some kernels take smaller blocks; not relied on).
"""

from __future__ import annotations

from megatron_r1.config.architectures import ARCHITECTURES
from megatron_r1.config.engines import ENGINES, engine_faults
from megatron_r1.config.schema import RolloutConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.config.vllm_args import argument_faults

MOST_GPUS = 128
"""Sizes up to this are tried for remedies."""


def server_faults(rollout: RolloutConfig, shape: ModelShape | None, *, fp8_block: int | None = None) -> list[str]:
    """Of servers of a model of this shape. `fp8_block`: side of its blocks, where its weights are FP8. Of an engine of
    the user's own nothing is known but its name."""
    faults = engine_faults(rollout)
    if rollout.engine not in ENGINES:
        return faults
    faults += argument_faults(rollout)
    if rollout.kv_cache_dtype != "auto" and rollout.device == "cpu":
        faults.append(f"rollout.kv_cache_dtype is {rollout.kv_cache_dtype}; vLLM has it on GPUs only: use auto")
    if shape is None or rollout.tensor_parallel < 1:
        return faults
    faults += _expert_faults(rollout, shape) + served_otherwise(shape)
    if not faults and not splits(shape, rollout.tensor_parallel, expert_parallel=rollout.expert_parallel):
        sizes = _sizes(shape, rollout.expert_parallel)
        faults.append(
            f"rollout.tensor_parallel is {rollout.tensor_parallel}; it must divide attention heads, feed-forward and "
            f"expert sizes: use {', '.join(map(str, sizes))}"
        )
    if fp8_block is not None and rollout.device == "cuda":
        faults += _fp8_faults(rollout, shape, fp8_block)
    return faults


def served_otherwise(shape: ModelShape) -> list[str]:
    """What vLLM computes otherwise than transformers (and the trainer): it would sample from another model."""
    found = [
        *_betas_at_zero(shape),
        *_own_head_dim(shape),
        *(_latent_attention_otherwise(shape) if shape.mla is not None else ()),
    ]
    return [
        f"model.path: its config.json has {what}; vLLM computes that otherwise than transformers does for "
        f"{shape.architecture}, so samples would come from another model: remove it, or train without servers"
        for what in found
    ]


def _betas_at_zero(shape: ModelShape) -> list[str]:
    """transformers takes 0 for YaRN's default; vLLM divides by it."""
    return [f"{beta} 0 in the rope scaling" for beta in ("beta_fast", "beta_slow") if shape.rope.factors.get(beta) == 0]


def _own_head_dim(shape: ModelShape) -> list[str]:
    """vLLM's Qwen2, for one, does not read head_dim."""
    usual = shape.hidden_size // shape.num_heads
    if ARCHITECTURES[shape.architecture].serves_head_dim or shape.mla is not None or shape.head_dim == usual:
        return []
    return [f"head_dim {shape.head_dim} beside hidden_size / num_attention_heads = {usual}"]


def _latent_attention_otherwise(shape: ModelShape) -> list[str]:
    """Of scaled ropes vLLM has DeepSeek's YaRN alone with latent attention, and the latents' norms take
    rms_norm_eps."""
    found = []
    if shape.norm_eps > 2e-5:  # Moonlight's 1e-5 moves logits by 8e-5 only
        found.append(f"rms_norm_eps = {shape.norm_eps}")
    rope, factors = shape.rope, shape.rope.factors
    if rope.kind not in ("default", "yarn"):
        found.append(f"rope type {rope.kind}")
    elif rope.kind == "yarn":
        others = {
            "attention_factor": "attention_factor" in factors,
            "truncate false": not factors.get("truncate", True),
        }
        found += [f"{what} in the rope scaling" for what, there in others.items() if there]
        given = [factors.get(key) for key in ("mscale", "mscale_all_dim")]
        # transformers takes 1 and 0 unless both are given and not 0.
        if not all(given) and (given[0] not in (None, 1.0) or given[1]):
            found.append("mscale without mscale_all_dim in the rope scaling, or the other way round")
    return found


def _expert_faults(rollout: RolloutConfig, shape: ModelShape) -> list[str]:
    if not rollout.expert_parallel:
        return []
    if shape.moe is None:
        return [f"rollout.expert_parallel is True; {shape.architecture} has no experts: leave it out"]
    if rollout.device == "cpu":
        return [
            "rollout.expert_parallel is True on rollout.device cpu; vLLM's CPU kernel does not look which experts a "
            "worker has and crashes: leave it out"
        ]
    experts, tensor = shape.moe.num_experts, rollout.tensor_parallel
    if tensor == 1:
        return [
            "rollout.expert_parallel is True with rollout.tensor_parallel 1; experts are spread over its GPUs: use 2"
        ]
    if experts % tensor:
        return [
            f"rollout.expert_parallel is True with rollout.tensor_parallel {tensor}; each GPU holds whole experts, and "
            f"{tensor} does not divide their number {experts}: use a divisor"
        ]
    return []


def _fp8_faults(rollout: RolloutConfig, shape: ModelShape, block: int) -> list[str]:
    """vLLM keeps a scale for each block on one GPU, so every part that a GPU has must be whole blocks."""
    tensor, experts = rollout.tensor_parallel, rollout.expert_parallel
    wrong = broken_blocks(shape, tensor, block, expert_parallel=experts)
    if not wrong:
        return []
    sizes = _sizes(shape, experts)
    good = [size for size in sizes if not broken_blocks(shape, size, block, expert_parallel=experts and size > 1)]
    remedy = f"use rollout.tensor_parallel {', '.join(map(str, good))}" if good else "use rollouts in bf16"
    if not experts and tensor > 1 and not broken_blocks(shape, tensor, block, expert_parallel=True):
        remedy += ", or --rollout.expert-parallel"
    parts = ", ".join(f"{size} of {what}" for what, size in wrong.items())
    return [
        f"rollout.tensor_parallel is {tensor}; in FP8 each GPU's part of a weight must be whole blocks of {block}, and "
        f"it has {parts}: {remedy}"
    ]


def broken_blocks(shape: ModelShape, tensor: int, block: int, *, expert_parallel: bool) -> dict[str, int]:
    """What a GPU has of each weight that FP8's blocks do not divide, by the weight's name."""
    return {
        what: size for what, size in fp8_parts(shape, tensor, expert_parallel=expert_parallel).items() if size % block
    }


def fp8_parts(shape: ModelShape, tensor: int, *, expert_parallel: bool) -> dict[str, int]:
    """Rows or columns on one GPU of every linear layer whose blocks vLLM checks: those that are split, and, also on one
    GPU, all but the last of those that it merges (gate with up, q_a with kv_a, q with k and v)."""
    moe, mla = shape.moe, shape.mla
    found: dict[str, int] = {}
    if moe is None or moe.dense_layers:
        found["the feed-forward size"] = shape.ffn_size // tensor
    if moe is not None:
        found["the experts'"] = moe.expert_ffn_size // (1 if expert_parallel else tensor)
        if moe.num_shared_experts:
            found["the shared experts'"] = moe.num_shared_experts * moe.expert_ffn_size // tensor
    if mla is None:
        heads, groups = shape.num_heads // tensor, max(1, shape.num_kv_heads // tensor)
        found |= {"the queries": heads * shape.head_dim, "the keys": groups * shape.head_dim}
        return found
    if mla.q_lora_rank is not None:
        found["q_lora_rank"] = mla.q_lora_rank
    if tensor > 1:
        heads = shape.num_heads // tensor
        found["the queries"] = heads * (mla.qk_nope_dim + mla.qk_rope_dim)
        found["the keys and values"] = heads * (mla.qk_nope_dim + mla.v_dim)
        found["the attention's output"] = heads * mla.v_dim
    return found


def splits(shape: ModelShape, tensor: int, *, expert_parallel: bool) -> bool:
    """Whether vLLM can split the model over so many GPUs at all."""
    groups, moe = shape.num_kv_heads, shape.moe
    parts = [shape.num_heads, shape.ffn_size]
    if moe is not None:
        parts.append(moe.num_shared_experts * moe.expert_ffn_size)
        parts.append(moe.num_experts if expert_parallel else moe.expert_ffn_size)
    return not any(part % tensor for part in parts) and not (groups % tensor and tensor % groups)


def _sizes(shape: ModelShape, expert_parallel: bool) -> list[int]:
    tried = range(1, MOST_GPUS + 1)
    return [size for size in tried if splits(shape, size, expert_parallel=expert_parallel and size > 1)]
