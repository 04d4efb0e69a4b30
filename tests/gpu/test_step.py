"""On a GPU: a GRPO step of a small DeepSeek-V3 gives the CPU's numbers, in fp32 and in bf16.

The CPU's are held to transformers by tests/policy/test_layouts.py. Tolerances: fp32 sums in another order; bf16 was
measured on the CPU (mean logprob 5.6e-3 off, gradient 1.3 %), and gets a few times that.
"""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def test_a_grpo_step_gives_the_cpus_numbers(device, tool):
    base, fp32, bf16 = tool("A GRPO step beside the CPU's", "compare_devices", "--device", device)
    assert base["logprob_max"] == 0 and base["gradient"] == 0
    assert fp32["logprob_max"] < 2e-3 and fp32["gradient"] < 2e-3
    assert fp32["loss"] == pytest.approx(base["loss"], rel=1e-3)
    assert bf16["logprob_mean"] < 0.02 and bf16["gradient"] < 0.06
    assert bf16["loss"] == pytest.approx(base["loss"], rel=0.03)
    assert bf16["grad_norm"] == pytest.approx(base["grad_norm"], rel=0.03)
