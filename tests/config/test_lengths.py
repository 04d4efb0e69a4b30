"""Positions of a model against a stage's longest sequence. 2 x 32,768 = 65,536 by hand."""

from __future__ import annotations

import pytest

from megatron_r1.config.lengths import length_faults, yarn_rows
from megatron_r1.config.shape import shape_from_config

QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 128, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32_768,
}  # fmt: skip
YARN = {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32_768}}


def shape(**change: object):
    return shape_from_config(QWEN | change, "config.json")


@pytest.mark.parametrize("served", [True, False])
def test_the_longest_sequence_has_positions(served):
    assert length_faults("data.max_tokens", 32_768, shape(), served=served) == []
    (fault,) = length_faults("data.max_tokens", 32_769, shape(), served=served)
    assert fault == "data.max_tokens is 32769; the model has max_position_embeddings = 32768"
    assert length_faults("data.max_tokens", 32_769, None, served=served) == []


def test_a_scaling_that_config_json_does_not_make_use_of_is_named():
    """Qwen's cards give the scaling and leave max_position_embeddings; vLLM refuses that too."""
    (fault,) = length_faults("rollout.max_model_len", 65_536, shape(**YARN), served=True)
    assert fault.endswith("= 32768: raise that in config.json to the 65536 that its YaRN scaling reaches")
    assert yarn_rows(shape(**YARN)) == 65_536 and yarn_rows(shape()) == 0


def test_vllms_table_of_a_scaling_is_not_passed():
    """Beyond it vLLM reads past its table; the trainer, as transformers, makes angles as it needs them."""
    longer = shape(**YARN, max_position_embeddings=131_072)
    assert length_faults("rollout.max_model_len", 65_536, longer, served=True) == []
    assert length_faults("data.max_tokens", 65_537, longer, served=False) == []
    (fault,) = length_faults("rollout.max_model_len", 65_537, longer, served=True)
    assert "reaches 65536 positions" in fault and "use at most 65536, or raise factor" in fault
