"""Faults of a rejection sampling stage, reported together before anything starts."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import refusals

from megatron_r1.config.judge import JudgeConfig
from megatron_r1.config.schema import DataConfig, RewardConfig, RolloutConfig, SamplingConfig
from megatron_r1.stages.rejection.config import (
    DedupConfig,
    FilterConfig,
    MixSource,
    RejectionConfig,
    validate_rejection,
)

MODEL = Path(__file__).parents[2] / "megatron_r1" / "recipes" / "tiny_v3"
ROLLOUT = RolloutConfig(max_model_len=128, sampling=SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=64))
NOWHERE = Path("/no/such.jsonl")


def sound(tmp_path, **fields):
    given = {
        "model": MODEL, "run_dir": tmp_path / "run", "data": DataConfig(tasks=("gcd",)), "num_problems": 10,
        "rollout": ROLLOUT,
    } | fields  # fmt: skip
    return RejectionConfig(**given)


faults_of = functools.partial(refusals.faults_of, validate_rejection)


def test_a_sound_configuration_has_no_faults(tmp_path):
    judge = JudgeConfig(url="http://host:8000/v1", model="judge")
    assert faults_of(sound(tmp_path)) == []
    assert faults_of(sound(tmp_path, judge=judge)) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": Path("/no/such/model")}, "/no/such/model"),
        ({"data": DataConfig()}, "give one of them"),
        ({"data": DataConfig(tasks=("n_queens",))}, "runs the answer as Python code"),
        ({"data": DataConfig(files=(NOWHERE,))}, "data.files: /no/such.jsonl does not exist"),
        ({"decontaminate": (NOWHERE,)}, "decontaminate: /no/such.jsonl does not exist"),
        ({"mix": (MixSource(file=NOWHERE, weight=1.0),)}, "mix: /no/such.jsonl does not exist"),
        ({"mix": (MixSource(file=MODEL / "config.json", weight=0.0),)}, "mix[0].weight is 0.0"),
        ({"weight": 0.0}, "weight is 0.0; it must be above 0"),
        ({"num_problems": 0}, "tasks have no end"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"keep_per_problem": 0}, "keep_per_problem is 0; it must be at least 1"),
        ({"decontaminate_ngram": 1}, "decontaminate_ngram is 1"),
        ({"filters": FilterConfig(min_language=1.5)}, "filters.min_language is 1.5; it must be a share"),
        ({"filters": FilterConfig(max_paragraph_characters=-1)}, "max_paragraph_characters is -1"),
        ({"data": DataConfig(files=(Path("x"),), thinking="off")}, "only samples with a thought are kept"),
        ({"rewards": RewardConfig(language="klingon")}, "rewards.language is 'klingon'"),
        ({"dedup": DedupConfig(threshold=2.0)}, "dedup.threshold is 2.0"),
        ({"dedup": DedupConfig(ngram=40)}, "expected ngram <= min_words"),
        ({"judge": JudgeConfig(url="host:8000", model="m")}, "judge.url is 'host:8000'"),
        ({"judge": JudgeConfig(url="http://h/v1/chat/completions", model="m")}, "it is the API's root"),
        ({"judge": JudgeConfig(url="http://me:secret@h/v1", model="m")}, "judge.url holds a password"),
        ({"judge": JudgeConfig(url="http://h/v1", model="")}, "judge.model is empty"),
        ({"judge": JudgeConfig(url="http://h/v1", model="m", token_file=NOWHERE)}, "judge.token_file"),
        ({"judge": JudgeConfig(url="http://h/v1", model="m", timeout_seconds=0)}, "judge.timeout_seconds is 0"),
        ({"judge": JudgeConfig(url="http://h/v1", model="m", max_failed=2)}, "judge.max_failed is 2"),
        ({"rollout": RolloutConfig(devices=("0", "1"))}, "rollout.devices has 2 entries"),
        (
            {"rollout": RolloutConfig(max_model_len=64, sampling=SamplingConfig(max_new_tokens=64))},
            "no room for a prompt",
        ),
        ({"rollout": RolloutConfig(max_model_len=4096, sampling=SamplingConfig(max_new_tokens=64))}, "max_position"),
        (
            {"rollout": RolloutConfig(max_model_len=128, sampling=SamplingConfig(temperature=0, max_new_tokens=64))},
            "they are all the same: use 1",
        ),
    ],
)
def test_a_fault_is_named(tmp_path, fields, said):
    faults = faults_of(sound(tmp_path, **fields))
    assert any(said in fault for fault in faults), faults


def test_all_faults_come_together(tmp_path):
    assert len(faults_of(sound(tmp_path, samples=0, keep_per_problem=0, weight=-1.0))) == 3


def test_an_earlier_run_is_not_written_over(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (fault,) = faults_of(sound(tmp_path))
    assert "not empty" in fault
    assert faults_of(sound(tmp_path, if_exists="archive")) == []


def test_it_needs_no_torch():
    code = "import sys, megatron_r1.stages.rejection.config; print([m for m in ('torch', 'rensa') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
