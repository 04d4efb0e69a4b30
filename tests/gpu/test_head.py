"""On a GPU: logprobs over DeepSeek-V3's vocabulary need a chunk's memory, and are those of plain PyTorch."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SMALL = ("--tokens", 512, "--vocabulary", 4000, "--hidden", 128, "--chunk-tokens", 64)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_fused_head_is_right_and_needs_less_memory(device, tool, dtype):
    # In fp32 fewer tokens: plain PyTorch holds five times their logits.
    words = SMALL if device == "cpu" else (("--tokens", 4096) if dtype == "fp32" else ())
    result = tool(f"Head and loss in {dtype}", "benchmark_head", "--device", device, "--dtype", dtype, *words)
    apart, (exact, rough) = result["apart"], ((1e-3, 1e-3) if dtype == "fp32" else (1e-3, 2e-2))
    if apart is not None:  # plain PyTorch may run out of memory: that is what the fused head is for
        assert apart["logprob"] < exact and apart["entropy"] < exact
        assert apart["hidden gradient"] < rough and apart["weight gradient"] < rough
    if device == "cuda":
        assert result["ours"]["peak_gib"] is not None
        plain = result["plain"]["peak_gib"]
        assert plain is None or result["ours"]["peak_gib"] < 0.5 * plain
