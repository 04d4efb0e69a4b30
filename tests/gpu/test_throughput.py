"""On a GPU: a whole GRPO step of a Qwen2.5-1.5B beside its bare parts: vLLM alone, Megatron's step alone."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
SMALL = ("--shape", "tiny_qwen2", "--prompts", 4, "--group-size", 4, "--new-tokens", 24, "--repeats", 1)
WHOLE = ("--shape", "qwen2_5_math_1_5b", "--prompts", 32, "--group-size", 8, "--new-tokens", 1024, "--repeats", 3)


def test_a_step_of_1_5_billion_parameters(vllm, device, tool):
    words = SMALL if device == "cpu" else WHOLE
    result = tool("Throughput of a GRPO step", "benchmark_throughput", "--device", device, *words)
    assert result["tokens_per_second"] > 0
    if device == "cuda":
        assert result["rollout_of_bare_vllm"] > 0.8  # what our collection adds to vLLM is small
        assert result["train_of_bare_forward_backward"] > 0.7
