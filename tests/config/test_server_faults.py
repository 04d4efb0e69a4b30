"""What vLLM refuses when a server loads is refused before: blocks of FP8, experts, arguments given twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_r1.__main__ import parse
from megatron_r1.config import RolloutConfig, load_shape
from megatron_r1.config.server_faults import fp8_parts, served_otherwise, server_faults
from megatron_r1.config.shape import shape_from_config
from megatron_r1.config.vllm_args import REFUSED, argument_name
from megatron_r1.stages.grpo.config import GRPOConfig

V3 = load_shape(Path(__file__).parent.parent / "planning" / "deepseek_v3.json")
QWEN = dataclasses.replace(  # Qwen2.5-14B's sizes
    V3,
    architecture="qwen2",
    mla=None,
    moe=None,
    hidden_size=5120,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=13_824,
)


def rollout(**fields) -> RolloutConfig:
    return RolloutConfig(**{"tensor_parallel": 16, **fields})


def test_fp8_at_32_gpus_is_refused_with_its_columns_and_the_sizes_that_work():
    (fault,) = server_faults(rollout(tensor_parallel=32), V3, fp8_block=128)
    # 18,432 / 32, and 2,048 / 32 of experts and shared experts
    assert "rollout.tensor_parallel is 32" in fault and "whole blocks of 128" in fault
    assert "576 of the feed-forward size, 64 of the experts', 64 of the shared experts'" in fault
    assert fault.endswith("use rollout.tensor_parallel 1, 2, 4, 8, 16") and "\n" not in fault
    (apart,) = server_faults(rollout(tensor_parallel=32, expert_parallel=True), V3, fp8_block=128)
    assert "576 of the feed-forward size, 64 of the shared experts'" in apart and "of the experts'" not in apart


@pytest.mark.parametrize("tensor", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("experts", [False, True])
def test_fp8_up_to_16_gpus_is_taken(tensor, experts):
    assert (
        server_faults(rollout(tensor_parallel=tensor, expert_parallel=experts and tensor > 1), V3, fp8_block=128) == []
    )
    assert server_faults(rollout(tensor_parallel=32, expert_parallel=True), V3) == []  # bf16 has no blocks


def test_whole_experts_mend_what_parts_of_experts_break():
    assert V3.moe is not None
    narrow = dataclasses.replace(V3, moe=dataclasses.replace(V3.moe, expert_ffn_size=1024, num_shared_experts=2))
    (fault,) = server_faults(rollout(), narrow, fp8_block=128)  # 1,024 / 16; shared: 2,048 / 16
    assert "it has 64 of the experts': use rollout.tensor_parallel 1, 2, 4, 8, or --rollout.expert-parallel" in fault
    assert server_faults(rollout(expert_parallel=True), narrow, fp8_block=128) == []


def test_the_parts_of_a_gpu_by_hand():
    assert fp8_parts(V3, 16, expert_parallel=False) == {
        "the feed-forward size": 1152,
        "the experts'": 128,
        "the shared experts'": 128,
        "q_lora_rank": 1536,
        "the queries": 8 * 192,
        "the keys and values": 8 * 256,
        "the attention's output": 8 * 128,
    }
    # 5 heads and one group of keys each; 13,824 / 8
    assert fp8_parts(QWEN, 8, expert_parallel=False) == {
        "the feed-forward size": 1728, "the queries": 640, "the keys": 128
    }  # fmt: skip
    (fault,) = server_faults(rollout(tensor_parallel=8), QWEN, fp8_block=128)
    assert "1728 of the feed-forward size" in fault and fault.endswith("use rollout.tensor_parallel 1, 2, 4")


@pytest.mark.parametrize(
    ("fields", "shape", "says"),
    [
        ({"expert_parallel": True}, QWEN, "rollout.expert_parallel is True; qwen2 has no experts"),
        ({"expert_parallel": True, "tensor_parallel": 1}, V3, "rollout.tensor_parallel 1; experts are spread"),
        ({"expert_parallel": True, "tensor_parallel": 24}, V3, "24 does not divide their number 256"),
        ({"expert_parallel": True, "device": "cpu"}, V3, "vLLM's CPU kernel does not look"),
        ({"tensor_parallel": 3}, V3, "rollout.tensor_parallel is 3; it must divide attention heads"),
        ({"kv_cache_dtype": "fp8", "device": "cpu"}, V3, "rollout.kv_cache_dtype is fp8; vLLM has it on GPUs only"),
    ],
)
def test_other_splits_that_vllm_refuses(fields, shape, says):
    (fault,) = server_faults(rollout(**fields), shape)
    assert says in fault


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("tensor-parallel-size=4", "set rollout.tensor_parallel"),
        ("tensor_parallel_size=4", "set rollout.tensor_parallel"),
        ("tensor-par=4", "tensor-parallel-size may not"),
        ("speculative-config.method=mtp", "set rollout.draft_tokens"),
        ("data-parallel-size=4", "weights go to one engine a server"),
        ("enable-expert-parallel", "set rollout.expert_parallel"),
        ("kv-cache-dtype=fp8", "set rollout.kv_cache_dtype"),
        ("disable-log-stats", "counters of tokens"),
        ("enable-eplb", "where it no longer is"),
        ("enable-return-routed-experts", "set rollout.routes"),
        ("cpu-offload-gb=20", "kept in host memory"),
        ("hf-overrides={}", "change that"),
        ("config=all.yaml", "a file could set any other"),
        ("--max-num-batched-tokens=4096", "without dashes before it"),
        ("-tp=4", "without dashes before it"),
        ("4096", "NAME=VALUE or NAME"),
    ],
)
def test_arguments_that_are_ours_are_refused_with_the_field(word, says):
    (fault,) = server_faults(rollout(vllm_args=(word,)), V3)
    assert fault.startswith("rollout.vllm_args has ") and says in fault


def test_other_arguments_are_taken_and_reach_the_command_line():
    words = ("max-num-batched-tokens=16384", "decode-context-parallel-size=4", "scheduling-policy=fcfs")
    assert server_faults(rollout(vllm_args=words), V3) == []
    (fault,) = server_faults(rollout(vllm_args=words, device="cpu"), V3)
    assert "max-num-batched-tokens may not" in fault
    given = parse(["grpo_671b", "--rollout.vllm-args", *words])
    assert isinstance(given, GRPOConfig) and given.rollout.vllm_args == words


def test_every_argument_that_a_server_is_given_is_on_the_list(tmp_path):
    from megatron_r1.engines.vllm.command import NodeSpan, server_command

    (tmp_path / "config.json").write_text((Path(__file__).parent.parent / "planning" / "deepseek_v3.json").read_text())
    config = rollout(expert_parallel=True, kv_cache_dtype="fp8", draft_tokens=1, enforce_eager=True, routes="replay")
    span = NodeSpan(nodes=2, node=1, address="10.0.0.5", port=29600)
    given: set[str] = set()
    for reward in (False, True):
        line = server_command(config, model_path=tmp_path, host="h", port=1, seed=0, reward_model=reward, span=span)
        given |= {argument_name(word[2:]) for word in line[4:] if word.startswith("--")}
    assert {"enable-expert-parallel", "kv-cache-dtype", "nnodes"} <= given
    assert given <= set(REFUSED)
    more = server_command(
        dataclasses.replace(config, vllm_args=("kv-cache-metrics",)), model_path=tmp_path, host="h", port=1, seed=0
    )
    assert more[-1] == "--kv-cache-metrics"


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
PUBLISHED_YARN = YARN | {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps = 0.001"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type linear"),
        ({"rope_scaling": YARN | {"attention_factor": 1.5}}, "attention_factor"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate"),
        ({"rope_scaling": YARN | {"mscale": 0.7}}, "mscale without"),
        ({"rope_scaling": YARN | {"mscale_all_dim": 0.7}}, "mscale without"),
        ({"rope_scaling": YARN | {"mscale": 0, "mscale_all_dim": 1.0}}, "mscale without"),
        ({"rope_scaling": YARN | {"beta_slow": 0}}, "beta_slow 0"),
        ({"rope_scaling": YARN}, ""),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, ""),
        ({"rope_scaling": YARN | {"truncate": True}}, ""),
        ({"rope_scaling": PUBLISHED_YARN}, ""),
        ({"rms_norm_eps": 1e-5}, ""),
    ],
)
def test_what_vllm_computes_otherwise_is_not_served(change, says):
    fields = json.loads((Path(__file__).parent.parent / "planning" / "deepseek_v3.json").read_text())
    shape = shape_from_config(fields | change)
    faults = served_otherwise(shape)
    assert (faults != []) == bool(says) and says in "".join(faults)
    assert [fault for fault in server_faults(rollout(), shape) if "another model" in fault] == faults


def test_what_vllms_qwen2_does_not_read_is_not_served():
    """Its head_dim (QWEN's is the usual one, 5,120 / 40), and YaRN's betas of 0, by which vLLM divides."""
    assert served_otherwise(QWEN) == []
    (fault,) = served_otherwise(dataclasses.replace(QWEN, head_dim=64))
    assert "head_dim 64 beside hidden_size / num_attention_heads = 128" in fault
    factors = {"factor": 4.0, "original_max_position_embeddings": 32.0, "beta_fast": 0.0}
    rope = dataclasses.replace(QWEN.rope, kind="yarn", factors=factors)
    (fault,) = served_otherwise(dataclasses.replace(QWEN, rope=rope))
    assert "beta_fast 0" in fault


def test_vllm_is_told_what_it_reads_otherwise(tmp_path):
    from megatron_r1.engines.vllm.command import model_overrides, server_command

    fields = json.loads((Path(__file__).parent.parent / "planning" / "deepseek_v3.json").read_text())
    router = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}

    def told(config: dict) -> dict:
        (tmp_path / "config.json").write_text(json.dumps(config))
        line = server_command(rollout(), model_path=tmp_path, host="h", port=1, seed=0)
        found = json.loads(line[line.index("--hf-overrides") + 1]) if "--hf-overrides" in line else {}
        assert found == model_overrides(tmp_path)
        return found

    bare = {name: value for name, value in fields.items() if name not in router}
    assert told(fields | router) == {}
    assert told(bare) == router
    assert told(fields | router | {"n_group": None}) == {"n_group": 1, "topk_group": 1}
    assert told({"model_type": "llama", "hidden_act": "swish"}) == {"hidden_act": "silu"}
    bare_v2 = {name: value for name, value in bare.items() if name not in ("n_group", "topk_group")}
    v2 = bare_v2 | {"model_type": "deepseek_v2", "hidden_size": 7168, "routed_scaling_factor": 1.0}
    assert told(v2 | {"norm_topk_prob": False}) == {"n_group": 1, "topk_group": 1}
    grouped = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "norm_topk_prob": False}
    assert told(v2 | grouped) == {}
