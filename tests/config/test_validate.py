"""Every rule of validate, each broken alone, and several broken at once."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import refusals

from megatron_r1.config import DataConfig, ModelConfig
from megatron_r1.config.packages import has_module
from megatron_r1.config.pipeline import PipelineConfig, stages_of
from megatron_r1.config.shape import load_shape
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.chain import check_all
from megatron_r1.recipes import RECIPES
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.faults import validate

MOE = {
    "model_type": "deepseek_v3",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 30,
    "n_group": 4,
    "topk_group": 2,
}
DENSE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}


def with_fields(config, fields):
    """`config` with the values at dotted paths replaced: {"steps": 0}."""
    for path, value in fields.items():
        head, _, rest = path.partition(".")
        inner = with_fields(getattr(config, head), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: inner})
    return config


@pytest.fixture
def sound(tmp_path):
    """config(model, **fields): a sound run of a MoE (or a dense) model, with dotted fields replaced."""

    def make(fields=None, model=MOE):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(model))
        config = GRPOConfig(
            name="test",
            run_dir=tmp_path / "run",
            model=ModelConfig(path=folder),
            data=DataConfig(tasks=("chain_sum",)),
        )
        config = with_fields(
            config,
            {
                "train.tokens_per_microbatch": 768,
                "rollout.max_model_len": 256,
                "rollout.sampling.max_new_tokens": 128,
            },
        )
        return with_fields(config, fields or {})

    return make


faults_of = functools.partial(refusals.faults_of, validate)


@pytest.mark.parametrize("model", [MOE, DENSE], ids=["moe", "dense"])
def test_a_sound_configuration_gives_the_shape(sound, model):
    assert validate(sound(model=model)).architecture == model["model_type"]


@pytest.mark.parametrize(
    "fields",
    [
        {"parallel.world_size": 4, "parallel.expert": 4},
        {"parallel.world_size": 2, "parallel.tensor": 2, "parallel.expert": 2, "parallel.sequence": True},
        {
            "parallel.world_size": 2,
            "parallel.tensor": 2,
            "parallel.expert_tensor": 2,
            "parallel.sequence": True,
        },
        {
            "parallel.world_size": 4,
            "parallel.pipeline_parallel": 2,
            "parallel.virtual_pipeline": 2,
            "parallel.expert": 2,
        },
        {"parallel.world_size": 2, "parallel.context": 2},
        {"parallel.world_size": 3, "parallel.pipeline_parallel": 3, "parallel.pipeline_layout": "Ett|t|tL"},
        {"rollout.device": "cpu", "rollout.sync": "gloo"},
        {"rollout.sync": "ipc"},
        {"rollout.sampling.top_k": -1},
        {"rollout.routes": "compare"},
        {"rollout.routes": "replay", "rollout.device": "cpu", "rollout.sync": "gloo"},
        {"minibatches": 32},
        {"sync_every": 4, "checkpoint_every": 8},
        {"sync_every": 16, "checkpoint_every": 0},
        {"algorithm.correction.weight": "token", "algorithm.kl.refresh_steps": 0, "algorithm.kl.coef": 0.0},
        {"algorithm.correction.ratio_against": "rollout"},
        {"checkpoint_every": 10, "keep_best_checkpoint": True, "eval_every": 5, "data.validation": 8},
        {"checkpoint_every": 0, "optimizer.distributed": False},
        {"deadlines.train": 0},
    ],
    ids=lambda fields: " ".join(f"{key}={value}" for key, value in fields.items()),
)
def test_sound_variants_pass(sound, fields):
    """The laws do not refuse what the trainer can do."""
    assert faults_of(sound(fields)) == []


ALONE = [
    ({"checkpoint_every": -1}, ["checkpoint_every is -1", "at least 0"]),
    ({"keep_checkpoints": 0}, ["keep_checkpoints is 0", "at least 1"]),
    ({"keep_best_checkpoint": True}, ["keep_best_checkpoint", "eval_every"]),
    (
        {
            "keep_best_checkpoint": True,
            "checkpoint_every": 5,
            "eval_every": 2,
            "data.validation": 8,
        },
        ["checkpoint_every is 5", "a multiple of eval_every = 2"],
    ),
    ({"optimizer.distributed": False}, ["checkpoint_every is 5", "distributed optimizer", "--checkpoint-every 0"]),
    ({"deadlines.sync": -1.0}, ["deadlines.sync is -1", "at least 0"]),
    ({"rollout.draft_tokens": 1}, ["rollout.draft_tokens is 1", "num_nextn_predict_layers"]),
    (
        {"rollout.device": "cpu", "rollout.sync": "gloo", "rollout.fp8_folder": Path("/no/such")},
        ["rollout.fp8_folder is /no/such", "no FP8 products on CPUs"],
    ),
    ({"rollout.fp8_folder": Path("/no/such")}, ["rollout.fp8_folder", "/no/such"]),
    ({"parallel.tensor": 0}, ["parallel.tensor is 0", "at least 1"]),
    ({"parallel.world_size": -2}, ["parallel.world_size is -2", "at least 1"]),
    ({"parallel.world_size": 2, "parallel.expert": 4}, ["parallel.expert is 4", "divide world_size 2"]),
    ({"parallel.virtual_pipeline": 2}, ["parallel.virtual_pipeline is 2", "needs parallel.pipeline_parallel > 1"]),
    (
        {
            "parallel.world_size": 4,
            "parallel.tensor": 4,
            "parallel.sequence": True,
            "parallel.expert": 4,
        },
        ["parallel.tensor is 4", "number of attention heads 6", "1, 2, 3, 6"],
    ),
    ({"parallel.world_size": 3, "parallel.pipeline_parallel": 3}, ["number of layers 4", "parallel.pipeline_layout"]),
    (
        {"parallel.world_size": 2, "parallel.pipeline_parallel": 2, "parallel.pipeline_layout": "Ett|tL"},
        ["'Ett|tL'", "it has 3 decoder layers (t), the model has 4"],
    ),
    (
        {"parallel.world_size": 3, "parallel.pipeline_parallel": 3, "parallel.pipeline_layout": "Ett|ttL"},
        ["2 stages; pipeline_parallel * virtual_pipeline is 3"],
    ),
    (
        {"parallel.world_size": 2, "parallel.pipeline_parallel": 2, "parallel.pipeline_layout": "Ett|ttx"},
        ["E, t, m, L", "not ['x']"],
    ),
    (
        {"parallel.world_size": 3, "parallel.expert": 3},
        ["parallel.expert is 3", "number of experts 8", "1, 2, 4, 8"],
    ),
    (
        {"parallel.world_size": 4, "parallel.expert_tensor": 4},
        ["parallel.expert_tensor is 4", "expert feed-forward size 30"],
    ),
    (
        {"parallel.world_size": 2, "parallel.tensor": 2, "parallel.expert": 2},
        ["parallel.sequence is False", "--parallel.sequence"],
    ),
    (
        {"parallel.world_size": 2, "parallel.tensor": 2, "parallel.sequence": True},
        ["parallel.expert_tensor is 1", "would not sum", "use expert_tensor = tensor"],
    ),
    (
        {
            "parallel.world_size": 2,
            "parallel.tensor": 2,
            "parallel.expert_tensor": 2,
            "parallel.sequence": True,
            "train.tokens_per_microbatch": 769,
        },
        ["train.tokens_per_microbatch is 769", "multiple of 2"],
    ),
    (
        {"parallel.world_size": 2, "parallel.context": 2, "train.tokens_per_microbatch": 770},
        ["train.tokens_per_microbatch is 770", "multiple of 4", "2 * context"],
    ),
    (
        {"train.tokens_per_microbatch": 255},
        ["train.tokens_per_microbatch is 255", "longest sequence", "rollout.max_model_len = 256"],
    ),
    ({"train.threads_per_rank": 0}, ["train.threads_per_rank", "at least 1"]),
    ({"train.logprob_chunk_tokens": 0}, ["train.logprob_chunk_tokens", "at least 1"]),
    ({"optimizer.min_lr": 1.0}, ["optimizer.min_lr is 1.0", "between 0 and lr = 3e-06"]),
    ({"optimizer.min_lr": -1e-6}, ["optimizer.min_lr is -1e-06"]),
    ({"model.train_mtp": True}, ["model.train_mtp is True", "num_nextn_predict_layers"]),
    ({"rollout.device": "cpu"}, ["rollout.sync is nccl", "use gloo or ipc"]),
    ({"rollout.sync": "gloo"}, ["rollout.sync is gloo", "nccl", "ipc"]),
    ({"rollout.num_engines": 0}, ["rollout.num_engines is 0", "at least 1"]),
    ({"rollout.max_model_len": 513}, ["rollout.max_model_len is 513", "max_position_embeddings = 512"]),
    (
        {"rollout.sampling.max_new_tokens": 256},
        ["rollout.sampling.max_new_tokens is 256", "no room for a prompt", "rollout.max_model_len = 256"],
    ),
    ({"rollout.sampling.temperature": 0.0}, ["rollout.sampling.temperature is 0.0", "use 1.0"]),
    ({"rollout.sampling.top_p": 0.9}, ["rollout.sampling.top_p and top_k", "whole vocabulary"]),
    ({"rollout.sampling.top_k": 50}, ["rollout.sampling.top_p and top_k", "whole vocabulary"]),
    ({"steps": 0}, ["steps is 0", "at least 1"]),
    ({"group_size": 1}, ["group_size is 1", "at least 2"]),
    ({"minibatches": 33}, ["minibatches is 33", "1", "prompts_per_step = 32"]),
    ({"minibatches": 0}, ["minibatches is 0", "at least 1"]),
    ({"algorithm.clip.low": 0.0}, ["algorithm.clip.low is 0.0", "above 0 and at most 1"]),
    ({"algorithm.clip.low": 1.5}, ["algorithm.clip.low is 1.5", "above 0 and at most 1"]),
    ({"algorithm.clip.dual": 1.0}, ["algorithm.clip.dual is 1.0", "above 1"]),
    ({"algorithm.deviation_floor": -1.0}, ["algorithm.deviation_floor is -1.0"]),
    ({"algorithm.clip.high": 0.0}, ["algorithm.clip.high is 0.0", "above 0"]),
    ({"algorithm.kl.coef": -0.1}, ["algorithm.kl.coef is -0.1", "at least 0"]),
    (
        {"algorithm.correction.weight": "token", "algorithm.correction.high": 0.9},
        ["algorithm.correction.high is 0.9", "at least 1"],
    ),
    (
        {
            "algorithm.correction.weight": "token",
            "algorithm.correction.beyond": "mask",
            "algorithm.correction.low": 1.1,
        },
        ["algorithm.correction.low is 1.1", "between 0 and 1"],
    ),
    (
        {"algorithm.correction.ratio_against": "rollout", "algorithm.correction.weight": "sequence"},
        ["algorithm.correction.weight is sequence", "use weight none, or ratio_against trainer"],
    ),
    ({"sync_every": 0}, ["sync_every is 0", "at least 1"]),
    ({"sync_every": 4}, ["checkpoint_every is 5; ", "must be a multiple of sync_every = 4: use 8"]),
    (
        {"sync_every": 5, "eval_every": 12, "data.validation": 8},
        ["eval_every is 12; ", "must be a multiple of sync_every = 5: use 15"],
    ),
    ({"mismatch_bound": -1.0}, ["mismatch_bound is -1.0"]),
    ({"algorithm.kl.refresh_steps": -1}, ["algorithm.kl.refresh_steps is -1"]),
    ({"rewards.num_workers": 0}, ["rewards.num_workers", "at least 1"]),
    ({"rewards.timeout_seconds": 0.0}, ["rewards.timeout_seconds is 0.0", "above 0"]),
    ({"data.tasks": ()}, ["data.tasks and data.files", "give one of them"]),
    ({"algorithm.kl.coef": float("nan")}, ["algorithm.kl.coef is nan"]),
    ({"mismatch_bound": float("inf")}, ["mismatch_bound is inf"]),
    (
        {"target_accuracy": 1.5, "eval_every": 1, "data.validation": 5},
        ["target_accuracy is 1.5", "between 0 and 1"],
    ),
    ({"eval_every": 1, "data.validation": 0}, ["eval_every is 1", "data.validation > 0"]),
    ({"save_every": -1}, ["save_every is -1", "at least 0"]),
    ({"max_skipped_steps": -1}, ["max_skipped_steps is -1"]),
    ({"rewards.accuracy_weight": 0.0, "rewards.format_weight": 0.0}, ["all 0"]),
    ({"rewards.language_weight": -1.0}, ["rewards.language_weight is -1.0"]),
    ({"data.thinking": "off"}, ["data.thinking is off", "format_weight 0"]),
    ({"rewards.language": "Engl"}, ["rewards.language is 'Engl'", "en or zh"]),
    ({"rewards.format_weight": -1.0}, ["rewards.format_weight is -1.0"]),
    ({"rollout.sampling.max_new_tokens": 0}, ["rollout.sampling.max_new_tokens is 0", "at least 1"]),
    ({"rollout.sampling.temperature": float("nan")}, ["rollout.sampling.temperature is nan"]),
    ({"rollout.devices": ("0", "1")}, ["rollout.devices has 2 entries", "rollout.num_engines = 1"]),
    ({"rollout.tensor_parallel": 0}, ["rollout.tensor_parallel is 0"]),
    ({"rollout.start_timeout_seconds": -1.0}, ["rollout.start_timeout_seconds is -1.0", "at least 0"]),
    ({"rollout.stall_seconds": -1.0}, ["rollout.stall_seconds is -1.0", "at least 0"]),
    ({"rollout.weights_gb_per_second": 0.0}, ["rollout.weights_gb_per_second is 0.0", "above 0"]),
    (
        {"train.collective_timeout_seconds": 17_999.0},  # 4 h + 1 h are 18,000
        ["train.collective_timeout_seconds is 17999", "deadlines.rollout + reward is 18000"],
    ),
    (
        {"rollout.start_timeout_seconds": 7300.0, "deadlines.sync": 0.0},
        ["deadlines.start is 7200", "7300 s to start (rollout.start_timeout_seconds)", "raise deadlines.start"],
    ),
    (
        {"deadlines.sync": 400.0},
        ["deadlines.sync is 400", "1200 s (900 s for a dead server's start, then 300 s + 0 GB", "to 1200 or more"],
    ),
    ({"rollout.kv_cache_gib": float("inf")}, ["rollout.kv_cache_gib is inf"]),
    ({"train.collective_timeout_seconds": -1.0}, ["train.collective_timeout_seconds is -1.0"]),
    ({"seed": -1}, ["seed is -1", "at least 0"]),
    ({"data.seed": -1}, ["data.seed is -1"]),
    ({"data.task_size": 0}, ["data.task_size is 0", "at least 1"]),
    ({"optimizer.lr": float("inf")}, ["optimizer.lr is inf", "at least 0"]),
    ({"data.tasks": ("chain_sums",)}, ["'chain_sums' is no reasoning-gym dataset", "did you mean chain_sum"]),
    ({"data.tasks": ("n_queens:n=4",)}, ["n_queens", "runs the answer as Python code", "choose another dataset"]),
    ({"data.holdout": 0}, ["data.holdout is 0", "at least 1"]),
]


@pytest.mark.parametrize(
    ("fields", "words"), ALONE, ids=[" ".join(f"{k}={v}" for k, v in case[0].items())[:70] for case in ALONE]
)
def test_a_broken_rule_is_named_with_value_and_law(sound, fields, words):
    faults = faults_of(sound(fields))
    assert [fault for fault in faults if all(word in fault for word in words)], faults
    assert len({fault.split()[0] for fault in faults}) == 1, "one field's fault must not be put on another"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"parallel.world_size": 2, "parallel.expert": 2},
            ["parallel.expert is 2", "llama has no experts: use 1"],
        ),
        ({"rollout.routes": "replay"}, ["rollout.routes is replay", "has no experts: use off"]),
        (
            {"parallel.world_size": 3, "parallel.tensor": 3},
            ["parallel.tensor is 3", "number of key-value heads 2", "1, 2"],
        ),
    ],
)
def test_rules_of_dense_models(sound, fields, words):
    (fault,) = faults_of(sound(fields, model=DENSE))
    assert all(word in fault for word in words)


def test_the_feed_forward_size_must_split(sound):
    faults = faults_of(sound({"parallel.world_size": 2, "parallel.tensor": 2}, model=DENSE | {"intermediate_size": 97}))
    assert len(faults) == 1 and "feed-forward size 97" in faults[0]


@pytest.mark.skipif(has_module("transformer_engine"), reason="Transformer Engine is installed: fp8 is allowed")
def test_fp8_without_transformer_engine_is_refused(sound):
    (fault,) = faults_of(sound({"train.dtype": "fp8"}))
    assert "Transformer Engine is not installed" in fault and "--train.dtype bf16" in fault


HALF = {"optimizer.moments": "bf16", "rollout.device": "cuda", "rollout.sync": "ipc"}


@pytest.mark.skipif(has_module("transformer_engine"), reason="Transformer Engine is installed: they are allowed")
def test_moments_in_bf16_without_transformer_engine_are_refused(sound):
    (fault,) = faults_of(sound(HALF))
    assert "optimizer.moments is bf16" in fault and "make install-gpu" in fault and "--optimizer.moments fp32" in fault


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, None),
        ({"rollout.device": "cpu"}, ["optimizer.moments is bf16", "on GPUs", "--optimizer.moments fp32"]),
        ({"optimizer.distributed": False}, ["distributed optimizer only", "--optimizer.distributed"]),
        ({"train.dtype": "fp32"}, ["train.dtype fp32", "--train.dtype bf16"]),
        ({"train.dtype": "fp8"}, None),
    ],
)
def test_what_moments_in_bf16_need(sound, monkeypatch, fields, words):
    """Where Transformer Engine is installed."""
    monkeypatch.setattr("megatron_r1.config.trainer_faults.has_module", lambda _: True)
    faults = faults_of(sound(HALF | {"checkpoint_every": 0} | fields))
    assert len(faults) == (words is not None), faults
    assert all(word in faults[0] for word in words or ())


def test_files_must_exist_and_exclude_tasks(sound, tmp_path):
    here = tmp_path / "problems.jsonl"
    here.write_text("")
    assert faults_of(sound({"data.tasks": (), "data.files": (here,)})) == []
    (both,) = faults_of(sound({"data.files": (here,)}))
    assert "give one of them" in both
    (absent,) = faults_of(sound({"data.tasks": (), "data.files": (tmp_path / "absent.jsonl", here)}))
    assert "absent.jsonl does not exist" in absent


def test_many_faults_are_reported_together(sound):
    config = sound({"group_size": 1, "data.holdout": 0, "rollout.num_engines": 0, "optimizer.min_lr": 1.0})
    with pytest.raises(ConfigError) as caught:
        validate(config)
    message = str(caught.value)
    assert message.startswith("the configuration has 4 faults:")
    for field in ("group_size", "data.holdout", "rollout.num_engines", "optimizer.min_lr"):
        assert f"\n  - {field} is " in message


def test_an_unreadable_model_does_not_hide_the_other_faults(sound):
    faults = faults_of(sound({"model.path": Path("/no/such/model"), "group_size": 1}))
    assert len(faults) == 2
    assert "/no/such/model" in faults[0] and "group_size" in faults[1]


def test_one_fault_is_counted_as_one(sound):
    with pytest.raises(ConfigError, match="the configuration has 1 fault:"):
        validate(sound({"group_size": 1}))


def test_a_full_run_folder_is_refused_unless_archived(sound):
    config = sound()
    config.run_dir.mkdir()
    assert faults_of(config) == []  # an empty folder is free
    (config.run_dir / "run.json").write_text("{}")
    (fault,) = faults_of(config)
    assert "is not empty" in fault and "--if-exists archive" in fault
    assert faults_of(dataclasses.replace(config, if_exists="archive")) == []


def test_only_a_runs_folder_is_moved_aside(sound, tmp_path):
    config = sound({"if_exists": "archive"})
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").write_text("")
    (fault,) = faults_of(config)
    assert "not a run's folder" in fault
    (config.run_dir / "thesis.tex").unlink()
    (config.run_dir / ".lock").write_text("")  # all that is there of a run that was killed as it began
    assert faults_of(config) == []


def test_a_folder_in_which_a_run_goes_on_is_not_touched(sound):
    import fcntl

    config = sound({"if_exists": "archive"})
    config.run_dir.mkdir()
    (config.run_dir / "run.json").write_text("{}")
    with open(config.run_dir / ".lock", "w") as lock:
        lock.write("4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        (fault,) = faults_of(config)
        assert "a run is going on" in fault and "process 4711" in fault
    assert faults_of(config) == []


def test_a_run_folder_that_holds_the_runs_own_input_is_not_moved(sound):
    config = sound({"if_exists": "archive"})
    config.run_dir.mkdir()
    (config.run_dir / "run.json").write_text("{}")
    config.model.path.rename(config.run_dir / "model")
    config = with_fields(config, {"model.path": config.run_dir / "model"})
    (fault,) = faults_of(config)
    assert fault.startswith("model.path") and "would be moved aside" in fault


def test_the_working_directory_is_no_run_folder(sound, monkeypatch):
    config = sound({"if_exists": "archive"})
    (config.run_dir / "below").mkdir(parents=True)
    (config.run_dir / "run.json").write_text("{}")
    monkeypatch.chdir(config.run_dir / "below")
    for given in (config.run_dir, Path("..")):
        (fault,) = faults_of(dataclasses.replace(config, run_dir=given))
        assert "that you are in, or above it" in fault


@pytest.mark.parametrize("if_exists", ["refuse", "archive"])
def test_a_run_folder_that_is_a_file_is_refused(sound, if_exists):
    config = sound({"if_exists": if_exists})
    config.run_dir.write_text("")
    (fault,) = faults_of(config)
    assert fault.startswith("run_dir:") and "is a file" in fault


@pytest.mark.parametrize("name", [name for name in RECIPES if isinstance(RECIPES[name](), GRPOConfig)])
def test_recipes_lack_nothing_but_their_model_and_data(name, tmp_path):
    config = dataclasses.replace(RECIPES[name](), run_dir=tmp_path)
    assert all("does not exist" in fault for fault in faults_of(config))


@pytest.mark.parametrize("name", [name for name in RECIPES if isinstance(RECIPES[name](), PipelineConfig)])
def test_pipelines_lack_nothing_but_their_models_and_data(name):
    stages = stages_of(RECIPES[name]())
    try:
        check_all(RECIPES[name](), stages, list(stages))
    except ConfigError as error:
        assert all("does not exist" in fault for fault in error.faults)


def test_the_error_survives_being_sent_to_another_process():
    import pickle

    error = pickle.loads(pickle.dumps(ConfigError(["one", "two"])))
    assert error.faults == ["one", "two"] and str(error) == str(ConfigError(["one", "two"]))


def test_fp8_rollouts_start_from_an_fp8_folder_of_the_same_model(sound, tmp_path):
    folder = tmp_path / "fp8"
    folder.mkdir()
    quantised = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [2, 2],
    }  # 128 would not divide its 30 columns

    def write(fields):
        (folder / "config.json").write_text(json.dumps(MOE | fields))

    config = sound({"rollout.fp8_folder": folder})
    write({"quantization_config": quantised})
    assert faults_of(config) == []
    write({})
    (fault,) = faults_of(config)
    assert "is not FP8" in fault and "--precision fp8" in fault
    write({"quantization_config": quantised, "vocab_size": 101})
    (fault,) = faults_of(config)
    assert "holds another model than model.path" in fault
    write(
        {"quantization_config": quantised, "num_nextn_predict_layers": 1}
    )  # the published one, beside a re-saved base
    assert faults_of(config) == []


def test_ranks_that_cannot_tell_sampling_from_grading_wait_for_both(sound):
    deadlines = with_fields(sound(), {"deadlines.rollout": 100.0, "deadlines.reward": 10.0}).deadlines
    assert deadlines.by_phase(0)["rollout"] == 100.0 and deadlines.by_phase(1)["rollout"] == 110.0
    assert deadlines.by_phase(1)["checkpoint"] == deadlines.save
    unbounded = with_fields(sound(), {"deadlines.rollout": 100.0, "deadlines.evaluate": 0.0}).deadlines
    assert unbounded.by_phase(1)["evaluate"] == 0.0


def write_weights(folder: Path, names: list[str], *, index: bool) -> None:
    """An index of these names; or a file that ends after its header."""
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "a")}))
        return
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("index", [True, False])
def test_mtp_layers_of_which_some_are_missing_are_missed_before_the_start(sound, index):
    """A layer that is not there was trained from random numbers."""
    names = ["model.layers.3.self_attn.o_proj.weight", "model.layers.4.eh_proj.weight", "model.norm.weight"]
    config = sound(model=MOE | {"num_nextn_predict_layers": 2})
    assert faults_of(config) == [], "a folder without weights is somebody else's to refuse"
    write_weights(config.model.path, names, index=index)
    (fault,) = faults_of(config)
    assert fault.startswith("model.path: config.json has num_nextn_predict_layers = 2")
    assert "no weights of model.layers.5 " in fault and "set num_nextn_predict_layers to 1" in fault
    assert faults_of(with_fields(config, {"model.initialise": "random"})) == []
    assert faults_of(sound(model=MOE | {"num_nextn_predict_layers": 1})) == [], "as the sentence says"


def test_a_model_that_was_saved_without_its_mtp_layers_goes_without(sound):
    """As transformers saves DeepSeek-V3: config.json still counts the layer."""
    config = sound(model=MOE | {"num_nextn_predict_layers": 1})
    write_weights(config.model.path, ["model.layers.3.self_attn.o_proj.weight", "model.norm.weight"], index=False)
    assert load_shape(config.model.path).num_mtp_layers == 0
    assert faults_of(config) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_left_to_loading(sound, content):
    config = sound(model=MOE | {"num_nextn_predict_layers": 1})
    (config.model.path / "model.safetensors.index.json").write_text(content)
    assert faults_of(config) == []
