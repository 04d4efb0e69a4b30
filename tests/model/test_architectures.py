"""Every architecture against transformers: logits in fp32 and bf16, and the weights out again."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import all_logits, random_sequences, save_model
from ranks import run_ranks

NAMES = ["deepseek_v2", "deepseek_v3", "deepseek_v3_plain_q", "llama", "qwen2", "qwen3", "qwen3_moe"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("architectures")
    ids = random_sequences([160])[0]  # past the unscaled positions of the YaRN and Llama-3 models
    expected = {}
    for name in NAMES:
        model = save_model(name, root / name)
        expected[name] = all_logits(model, [ids])[0]
        np.save(root / name / "ids.npy", ids)
    run_ranks("architectures.py", str(root), ranks=1)
    return {name: (expected[name], dict(np.load(root / name / "found.npz"))) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(results, name):
    expected, found = results[name]
    np.testing.assert_allclose(found["logits_fp32"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_logits_are_near(results, name):
    """bf16 keeps 8 bits: rounding of activations over a few layers stays within a few percent of the spread. A router
    near a tie may pick another expert, so the typical token is held, not the worst."""
    expected, found = results[name]
    error = np.abs(found["logits_bf16"] - expected).max(axis=1)
    assert np.median(error) < 0.05 * expected.std() * 3
    assert np.median(error) > 0, "identical: the model did not run in bf16"


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_out_under_the_same_names(results, name):
    found = results[name][1]
    assert found["names_equal"]
    assert found["bf16_export_equal"]
