"""Faults of an evaluation's configuration, reported together before anything starts."""

import functools
from pathlib import Path

import pytest
import refusals

from megatron_r1.__main__ import main
from megatron_r1.config.schema import DataConfig, RewardConfig, RolloutConfig, RunningServerConfig, SamplingConfig
from megatron_r1.stages.evaluate.config import EvaluateConfig, validate_evaluation

MODEL = Path(__file__).parents[2] / "megatron_r1" / "recipes" / "tiny_v3"
ROLLOUT = RolloutConfig(max_model_len=128, sampling=SamplingConfig(temperature=0.6, top_p=0.95, max_new_tokens=64))


def sound(tmp_path, **fields):
    data = DataConfig(tasks=("gcd",))
    given = {"model": MODEL, "run_dir": tmp_path / "out", "data": data, "rollout": ROLLOUT} | fields
    return EvaluateConfig(**given)


faults_of = functools.partial(refusals.faults_of, validate_evaluation)


def test_a_sound_configuration_has_no_faults(tmp_path):
    assert faults_of(sound(tmp_path)) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": Path("/no/such/model")}, "/no/such/model"),
        ({"data": DataConfig()}, "give one of them"),
        ({"data": DataConfig(tasks=("n_queens",))}, "runs the answer as Python code"),
        ({"data": DataConfig(files=(Path("/no/such.jsonl"),))}, "/no/such.jsonl does not exist"),
        ({"server": RunningServerConfig(url="http://me:secret@h/v1", model="m")}, "server.url holds a password"),
        ({"rewards": RewardConfig(language="jp")}, "rewards.language is 'jp'"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"samples": 4, "pass_k": (1, 8)}, "each must be 1 to samples = 4"),
        ({"samples": 4, "consensus_k": 5}, "consensus_k is 5"),
        (
            {"rollout": RolloutConfig(max_model_len=64, sampling=SamplingConfig(max_new_tokens=64))},
            "no room for a prompt",
        ),
        ({"rollout": RolloutConfig(max_model_len=4096, sampling=SamplingConfig(max_new_tokens=64))}, "max_position"),
        ({"rollout": RolloutConfig(weights_gb_per_second=0.0)}, "rollout.weights_gb_per_second is 0.0"),
        ({"rollout": RolloutConfig(vllm_args=("dtype=half",))}, "set rollout.dtype"),
        ({"rollout": RolloutConfig(tensor_parallel=7)}, "rollout.tensor_parallel is 7; it must divide"),
        (
            {"rollout": RolloutConfig(max_model_len=128, sampling=SamplingConfig(temperature=0, max_new_tokens=64))},
            "they are all the same: use 1",
        ),
    ],
)
def test_a_fault_is_named(tmp_path, fields, said):
    faults = faults_of(sound(tmp_path, **fields))
    assert any(said in fault for fault in faults), faults


def test_results_are_not_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    (fault,) = faults_of(sound(tmp_path))
    assert "is not empty" in fault


def test_the_command_reports_all_faults_with_status_2(tmp_path, capsys):
    words = ["evaluate", "--model", "/no/such/model", "--run-dir", str(tmp_path / "out"), "--samples", "0"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "the configuration has" in said and "/no/such/model" in said and "samples is 0" in said
    assert not (tmp_path / "out").exists()
