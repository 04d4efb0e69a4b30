"""The rules of reward model training and of reward models in RL; a reward model's folder is no other stage's model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from refusals import faults_of

from megatron_r1.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from megatron_r1.config.schema import PreferenceConfig, RewardConfig, RolloutConfig, SamplingConfig
from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.config.shape import shape_from_config
from megatron_r1.errors import ConfigError
from megatron_r1.stages.evaluate.config import EvaluateConfig, validate_evaluation
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.faults import validate
from megatron_r1.stages.rejection.config import RejectionConfig, validate_rejection
from megatron_r1.stages.reward_model.config import PairDataConfig, RewardModelConfig, validate_reward_model
from megatron_r1.stages.sft.config import SFTConfig, validate_sft

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}
JUDGE = {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1}


def folder(path: Path, *, tokenizer: str = "{}", **changes) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MODEL | changes))
    (path / "tokenizer.json").write_text(tokenizer)
    return path


@pytest.fixture
def base(tmp_path) -> Path:
    return folder(tmp_path / "base")


@pytest.fixture
def judge(tmp_path) -> Path:
    return folder(tmp_path / "judge", **JUDGE)


# ---- what is a reward model's folder


@pytest.mark.parametrize(
    ("fields", "has_head"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, False),
        ({"architectures": None}, False),
        (JUDGE, True),
        # transformers' own spelling
        ({"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, True),
    ],
)
def test_a_classifier_with_one_label_is_a_reward_model(fields, has_head):
    assert shape_from_config(MODEL | fields).reward_head is has_head


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"num_labels": 3}, 3),
        ({"id2label": {"0": "bad", "1": "good", "2": "fine"}}, 3),
        ({"id2label": 7}, 2),
        ({}, 2),
    ],
)
def test_a_classifier_with_other_labels_is_refused(fields, labels):
    with pytest.raises(ConfigError, match=f"num_labels is {labels}; a reward model has one"):
        shape_from_config(MODEL | {"architectures": ["Qwen2ForSequenceClassification"]} | fields)


# ---- training one


@pytest.fixture
def training(base, tmp_path) -> RewardModelConfig:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("")
    return RewardModelConfig(
        name="helpful",
        run_dir=tmp_path / "run",
        model=ModelConfig(path=base),
        data=PairDataConfig(files=(pairs,), max_tokens=511),
        train=TrainConfig(tokens_per_microbatch=512),
    )


def test_a_sound_configuration_gives_the_shape_of_what_is_started_from(training):
    shape = validate_reward_model(training)
    assert shape.architecture == "qwen2" and not shape.reward_head


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("data", {"max_tokens": 600}, ["data.max_tokens is 600", "max_position_embeddings = 512"]),
        ("data", {"max_tokens": 512}, ["one row must hold the longest sequence, data.max_tokens + 1 = 513"]),
        ("data", {"max_tokens": 1}, ["data.max_tokens is 1", "at least 2"]),
        ("data", {"batch_pairs": 0}, ["data.batch_pairs is 0", "at least 1"]),
        ("data", {"epochs": 0}, ["data.epochs is 0", "at least 1"]),
        ("data", {"validation": 0}, ["data.validation is 0", "at least 1"]),
        ("data", {"files": ()}, ["data.files is empty"]),
        ("data", {"files": (Path("/absent.jsonl"),)}, ["/absent.jsonl does not exist"]),
        ("data", {"seed": -1}, ["data.seed is -1"]),
        ("model", {"train_mtp": True}, ["model.train_mtp is True"]),
        ("model", {"router_bias_update_rate": -1.0}, ["model.router_bias_update_rate is -1.0"]),
        ("parallel", {"expert": 2, "world_size": 2}, ["parallel.expert is 2", "qwen2 has no experts"]),
        ("optimizer", {"min_lr": 1.0}, ["optimizer.min_lr is 1.0"]),
    ],
)
def test_a_broken_rule_of_training_is_named(training, section, change, words):
    changed = dataclasses.replace(getattr(training, section), **change)
    faults = faults_of(validate_reward_model, dataclasses.replace(training, **{section: changed}))
    assert any(all(word in fault for word in words) for fault in faults), faults


# ---- no other stage starts from one


def test_no_stage_that_needs_text_takes_a_reward_model(judge, training, tmp_path):
    """SFT, GRPO, sampling, evaluation, and training another reward model."""
    (tmp_path / "sft.jsonl").write_text("{}")
    model = ModelConfig(path=judge)
    stages = [
        (validate_reward_model, dataclasses.replace(training, model=model)),
        (
            validate_sft,
            SFTConfig(
                name="x", run_dir=tmp_path / "x", model=model, data=SFTDataConfig(files=(tmp_path / "sft.jsonl",))
            ),
        ),
        (validate, GRPOConfig(name="x", run_dir=tmp_path / "x", model=model, data=DataConfig(tasks=("chain_sum",)))),
        (validate_evaluation, EvaluateConfig(name="x", run_dir=tmp_path / "x", model=judge)),
        (validate_rejection, RejectionConfig(name="x", run_dir=tmp_path / "x", model=judge)),
    ]
    for check, config in stages:
        faults = faults_of(check, config)
        assert any(f"{judge} is a reward model; this stage needs one that writes text" in f for f in faults), faults


def test_weights_of_a_reward_model_are_not_a_language_models(base, judge, tmp_path):
    model = ModelConfig(path=base, load_from=judge)
    config = GRPOConfig(name="x", run_dir=tmp_path / "x", model=model, data=DataConfig(tasks=("chain_sum",)))
    assert any(fault.startswith("model.load_from: ") for fault in faults_of(validate, config))


# ---- reward models in RL


@pytest.fixture
def make_run(base, judge, tmp_path):
    """run(preferences, **rewards): an RL run with reward models; a preference is a dict of changes."""

    def make(*preferences: dict, **rewards) -> GRPOConfig:
        sound = PreferenceConfig(name="helpful", model=judge, domains=("general",))
        return GRPOConfig(
            name="x",
            run_dir=tmp_path / "x",
            model=ModelConfig(path=base),
            data=DataConfig(tasks=("chain_sum",)),
            optimizer=OptimizerConfig(),
            train=TrainConfig(tokens_per_microbatch=512),
            rollout=RolloutConfig(max_model_len=512, sampling=SamplingConfig(max_new_tokens=128)),
            rewards=RewardConfig(
                preferences=tuple(dataclasses.replace(sound, **change) for change in preferences), **rewards
            ),
        )

    return make


def test_sound_reward_models_pass(make_run):
    assert faults_of(validate, make_run({})) == []
    assert faults_of(validate, make_run({}, {"name": "harmless", "weight": 0.0, "domains": ("safety",)})) == []


def test_reward_models_alone_are_a_reward(make_run):
    none = {"accuracy_weight": 0.0, "format_weight": 0.0}
    assert faults_of(validate, make_run({}, **none)) == []
    (fault,) = faults_of(validate, make_run({"weight": 0.0}, **none))
    assert "all 0, and no reward model has a weight" in fault


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": ""}, "name is ''"),
        ({"name": "accuracy"}, "name is 'accuracy'; it must be a name"),
        ({"name": "../x"}, "name is '../x'"),
        ({"domains": ()}, "domains is empty"),
        ({"weight": -1.0}, "weight is -1.0; it must be at least 0"),
        ({"weight": float("nan")}, "weight is nan; it must be at least 0"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0; it must be at least 1"),
        ({"model": Path("/absent")}, "/absent has no tokenizer.json"),
    ],
)
def test_a_broken_rule_of_reward_models_is_named(make_run, change, words):
    (fault,) = faults_of(validate, make_run({}, {"name": "second"} | change))
    assert fault.startswith("rewards.preferences[1]") and words in fault


def test_two_reward_models_have_two_names(make_run):
    (fault,) = faults_of(validate, make_run({}, {}))
    assert "rewards.preferences[1].name is 'helpful'" in fault


def test_what_cannot_be_a_reward_model_is_refused(make_run, base, tmp_path):
    (fault,) = faults_of(validate, make_run({"model": base}))
    assert f"{base} has no reward head" in fault
    other = folder(tmp_path / "other", tokenizer="[]", **JUDGE)
    (fault,) = faults_of(validate, make_run({"model": other}))
    assert "another tokenizer than model.path" in fault
    short = folder(tmp_path / "short", **JUDGE, max_position_embeddings=256)
    (fault,) = faults_of(validate, make_run({"model": short}))
    assert "max_position_embeddings = 256" in fault and "rollout.max_model_len = 512" in fault
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    scaled = folder(tmp_path / "scaled", **JUDGE, rope_scaling=yarn)
    (fault,) = faults_of(validate, make_run({"model": scaled}))
    assert "rollout.max_model_len = 512" in fault and "reaches 256 positions" in fault
    broken = folder(tmp_path / "broken", **JUDGE | {"num_labels": 2})
    (fault,) = faults_of(validate, make_run({"model": broken}))
    assert "num_labels is 2" in fault
