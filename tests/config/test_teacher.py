"""A teacher is a vLLM server of a model beside the policy: what cannot be served, or read, is refused before."""

import dataclasses
import json
from pathlib import Path

import pytest
from refusals import faults_of

from megatron_r1.algorithms import OnPolicyDistill
from megatron_r1.algorithms.teacher import Teacher
from megatron_r1.config import DataConfig, ModelConfig, RolloutConfig, TrainConfig
from megatron_r1.config.schema import SamplingConfig
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.faults import validate

STUDENT = {
    "model_type": "qwen2", "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}  # fmt: skip
LATENT = STUDENT | {
    "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 98}}, "added_tokens": [{"id": 99, "content": "<end>"}]}
"""A hundred tokens by their ids: fewer than the student's rows, as in Qwen's folders."""


@pytest.fixture
def distilled(tmp_path):
    """faults(teacher's config.json, **of its Teacher): of a sound run with that teacher."""
    (tmp_path / "student").mkdir()
    (tmp_path / "teacher").mkdir()

    def write(folder: Path, config: dict) -> Path:
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        return folder

    def faults(teacher: dict, rollout: dict | None = None, **fields) -> list[str]:
        asked = RolloutConfig(max_model_len=256, sampling=SamplingConfig(max_new_tokens=64))
        config = GRPOConfig(
            name="x",
            run_dir=tmp_path / "x",
            model=ModelConfig(path=write(tmp_path / "student", STUDENT)),
            data=DataConfig(tasks=("chain_sum",)),
            train=TrainConfig(tokens_per_microbatch=512),
            rollout=dataclasses.replace(asked, **(rollout or {})),
            algorithm=OnPolicyDistill(teacher=Teacher(model=write(tmp_path / "teacher", teacher), **fields)),
        )
        return faults_of(validate, config)

    return faults


@pytest.mark.parametrize("teacher", [STUDENT, LATENT, STUDENT | {"vocab_size": 100}, STUDENT | {"vocab_size": 200}])
def test_a_sound_teacher_passes(distilled, teacher):
    """Its rows may be fewer than the student's, if all tokens have one."""
    assert distilled(teacher) == []


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (STUDENT | {"vocab_size": 99}, "an embedding of 99 rows (config.json, vocab_size), and the policy may write"),
        (STUDENT | {"max_position_embeddings": 128}, "max_position_embeddings = 128"),
        (STUDENT | {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; it must be above 0"),
        (STUDENT | {"head_dim": 32}, "head_dim 32 beside hidden_size / num_attention_heads = 16; vLLM computes that"),
        (LATENT | {"rms_norm_eps": 1e-3}, "rms_norm_eps = 0.001; vLLM computes that otherwise"),
        (LATENT | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type linear; vLLM computes that"),
        (
            STUDENT | {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1},
            "is a reward model; this stage needs one that writes text",
        ),
    ],
)
def test_a_teacher_that_cannot_be_served_or_read_is_refused(distilled, teacher, words):
    (fault,) = distilled(teacher)
    assert words in fault and "teacher" in fault.split(":")[0] + fault.split(":")[1]


def test_a_teachers_servers_split_it(distilled):
    (fault,) = distilled(STUDENT, tensor_parallel=3)
    assert fault.startswith("algorithm.teacher.tensor_parallel is 3; it must divide")
    (fault,) = distilled(STUDENT, tensor_parallel=0)
    assert fault == "algorithm.teacher.tensor_parallel is 0; it must be at least 1"


def test_an_fp8_teacher_needs_a_gpu(distilled):
    fp8 = STUDENT | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    assert distilled(fp8) == []
    (fault,) = distilled(fp8, {"device": "cpu", "sync": "gloo"})
    assert "is FP8, of which vLLM has no products on CPUs" in fault
