"""Our rules about servers against vLLM itself: its check of FP8 blocks, and its parser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_r1.config import RolloutConfig, load_shape
from megatron_r1.config.server_faults import broken_blocks
from megatron_r1.engines.vllm.check_arguments import parser_faults

V3 = load_shape(Path(__file__).parents[2] / "planning" / "deepseek_v3.json")


def layers(tensor: int) -> list[tuple[int, int, int, list[int], int]]:
    """DeepSeek-V3's linear layers as deepseek_v2.py builds them: inputs, outputs, inputs and outputs by part on one
    GPU, GPUs that share it."""
    return [
        (7168, 1536 + 576, 7168, [1536, 576], 1),  # fused_qkv_a_proj, on every GPU
        (1536, 128 * 192, 1536, [128 * 192 // tensor], tensor),  # q_b_proj
        (512, 128 * 256, 512, [128 * 256 // tensor], tensor),  # kv_b_proj
        (128 * 128, 7168, 128 * 128 // tensor, [7168], tensor),  # o_proj
        (7168, 2 * 18_432, 7168, [18_432 // tensor] * 2, tensor),  # gate_up_proj
        (18_432, 7168, 18_432 // tensor, [7168], tensor),  # down_proj
        (7168, 2 * 2048, 7168, [2048 // tensor] * 2, tensor),  # of the shared expert
        (2048, 7168, 2048 // tensor, [7168], tensor),
    ]


@pytest.mark.parametrize("tensor", [1, 2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("experts", [False, True])
def test_vllm_refuses_the_same_blocks(tensor, experts, monkeypatch):
    import vllm.distributed
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_world_size", lambda: tensor)
    monkeypatch.setattr(fp8_utils, "get_tensor_model_parallel_world_size", lambda: tensor, raising=False)
    refused = False
    for inputs, outputs, part, parts, gpus in layers(tensor):
        layer = torch.nn.Module()
        layer.tp_size = gpus  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType] - as vLLM's layers have it
        try:
            fp8_utils.validate_fp8_block_shape(layer, inputs, outputs, part, parts, [128, 128])
        except ValueError:
            refused = True
    try:
        fp8_utils.validate_fp8_block_shape_moe(2048 if experts else 2048 // tensor, [128, 128])
    except ValueError:
        refused = True
    assert refused == bool(broken_blocks(V3, tensor, 128, expert_parallel=experts)) == (tensor > 16)


@pytest.mark.slow  # imports vLLM in processes of their own
def test_vllms_parser_is_asked():
    assert parser_faults(RolloutConfig(vllm_args=("max-num-batched-tokens=4096", "kv-cache-metrics"))) == []
    (fault,) = parser_faults(RolloutConfig(vllm_args=("no-such-flag=3",)))
    assert fault.startswith("rollout.vllm_args is no-such-flag=3; vLLM does not take it:")
    assert "unrecognized arguments: --no-such-flag" in fault
