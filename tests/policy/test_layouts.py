"""One DeepSeek-V3 under every layout: logits and gradients against transformers, and against each other."""

from __future__ import annotations

import numpy as np
import pytest
from grpo_oracle import hf_gradients, oracle_values
from oracles import random_sequences, save_model
from ranks import Results, run_launches

pytestmark = pytest.mark.timeout(1200)
RANKS = {1: ["one"], 2: ["tp2", "ep2", "pp2", "vpp2", "cp2", "tp2ep2"], 4: ["tp2pp2ep2"]}
LAYOUTS = [name for names in RANKS.values() for name in names]
LENGTHS = [64, 37, 52, 20, 44, 12, 30, 8]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """What every layout computed, and as "oracle" the folder's oracle values."""
    folder = tmp_path_factory.mktemp("layouts")
    model = save_model("deepseek_v3", folder, mtp_layers=1)
    sequences = random_sequences(LENGTHS)
    oracle = oracle_values(model, sequences, folder)
    launches = {ranks: [str(folder), ",".join(names)] for ranks, names in RANKS.items()}
    failures = run_launches("layouts.py", launches, timeout_seconds=800)
    results = Results(folder, RANKS, failures)
    results["oracle"] = oracle
    return results


def test_no_rank_fails(results):
    assert not results.failures


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_logits_equal_transformers(results, layout):
    for i, expected in enumerate(results["oracle"]["logits"]):
        np.testing.assert_allclose(results[layout][f"logits_{i}"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unpacked_logits_equal_transformers(results, layout):
    np.testing.assert_allclose(results[layout]["unpacked_logits"], results["oracle"]["logits"][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_equal_transformers(results, layout):
    for i, expected in enumerate(results["oracle"]["logprobs"]):
        np.testing.assert_allclose(results[layout][f"logprobs_{i}"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grpo_gradients_equal_transformers_autograd(results, layout):
    """Relative to each tensor's largest gradient; every parameter of the decoder has one."""
    expected = hf_gradients(results["oracle"]["gradients"])
    computed = {key.split(":")[1]: value for key, value in results[layout].items() if key.startswith("gradient:")}
    assert set(expected) <= set(computed)
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(computed[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_gradients_agree_with_one_rank(results, layout):
    one = {key: value for key, value in results["one"].items() if key.startswith("gradient:")}
    for key, gradient in one.items():
        scale = max(np.abs(gradient).max(), 1e-12)
        np.testing.assert_allclose(results[layout][key] / scale, gradient / scale, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exported_weights_are_the_folders_bit_for_bit(results, layout):
    assert results[layout]["export_difference"] == 0.0
