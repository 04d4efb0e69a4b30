"""A run that only samples, or only trains: what is refused before anything starts."""

import dataclasses
from pathlib import Path

import pytest
from refusals import faults_of

from megatron_r1.algorithms import GRPO, OnPolicyDistill
from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.teacher import Teacher
from megatron_r1.config.schema import SamplingConfig
from megatron_r1.config.shape import load_shape
from megatron_r1.pipeline.folder import is_finished, prepare_folder
from megatron_r1.recipes import RECIPES
from megatron_r1.rollout.recording import RecordedStep, Recording
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.faults import header_of, validate
from megatron_r1.stages.grpo.stage import needs
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup


@pytest.fixture
def config(tmp_path) -> GRPOConfig:
    return dataclasses.replace(RECIPES["tiny"](), run_dir=tmp_path / "run")


@pytest.fixture
def recording(config, tmp_path) -> Path:
    """The folder of a run of the same model with one step."""
    found = Recording(tmp_path / "sampled")
    found.begin(header_of(config, load_shape(config.model.path)))
    write_step(found, 0, weight_version=0)
    return tmp_path / "sampled"


def write_step(recording: Recording, step: int, *, weight_version: int) -> None:
    import numpy as np

    completion = Completion(
        token_ids=np.array([5], np.int32),
        logprobs=np.zeros(1, np.float32),
        finish_reason="stop",
        weight_version=weight_version,
    )
    group = RolloutGroup(
        problem=Problem(id="a", domain="math", messages=()),
        prompt_ids=np.array([1], np.int32),
        completions=(completion,),
        rewards=(Reward(total=1.0, parts={}),),
    )
    recording.write(step, RecordedStep(groups=[group], kept=[True]))


def faults(config: GRPOConfig, **changes) -> list[str]:
    return faults_of(validate, dataclasses.replace(config, **changes))


def test_training_on_a_recording_asks_for_no_server_and_no_data(config, recording):
    data = dataclasses.replace(config.data, tasks=(), files=(Path("/not/there.jsonl"),))
    assert faults(config, train_only=recording, data=data) == []
    asked = needs(dataclasses.replace(config, train_only=recording))
    assert asked.rollout is None and asked.trainer is not None and asked.beside == ()
    files = dataclasses.replace(config.data, files=(Path("/not/there.jsonl"),))
    asked = needs(dataclasses.replace(config, train_only=recording, data=files))
    assert asked.files == () and not asked.tasks


def test_only_sampling_asks_for_no_trainer(config):
    asked = needs(dataclasses.replace(config, rollout_only=True))
    assert asked.trainer is None and asked.rollout is not None


def test_random_weights_cannot_be_sampled_from(config):
    assert config.model.initialise == "random"
    (fault,) = faults(config, rollout_only=True)
    assert fault.startswith("rollout_only is True and model.initialise random")


def test_servers_start_from_the_models_own_weights(config, tmp_path):
    """A run that trains sends them those of load_from before it samples; one that only samples sends nothing."""
    model = dataclasses.replace(config.model, initialise="weights", load_from=tmp_path / "other")
    found = [fault for fault in faults(config, rollout_only=True, model=model) if fault.startswith("rollout_only")]
    assert len(found) == 1 and "nothing sends them others: give the weights as model.path" in found[0]
    assert not any(fault.startswith("rollout_only") for fault in faults(config, model=model))


def test_nothing_is_kept_where_nothing_is_sampled(config, recording):
    (fault,) = faults(config, train_only=recording, keep_rollouts=True)
    assert "leave keep_rollouts out" in fault


def test_a_run_does_one_of_them(config, recording):
    model = dataclasses.replace(config.model, initialise="weights")
    found = faults(config, rollout_only=True, train_only=recording, model=model)
    assert "rollout_only is True and train_only is given; a run does one of them" in found


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "recorded" / "recording.json").unlink(), "recording.json is not there"),
        (lambda folder: (folder / "recorded" / "step_00000000.jsonl").unlink(), "it has no whole step"),
        (
            lambda folder: Recording(folder).begin(
                dataclasses.replace(Recording(folder).header(), tokenizer="other", num_layers=61)
            ),
            "tokens of another tokenizer",
        ),
    ],
    ids=["no recording", "no step", "another model"],
)
def test_a_folder_that_cannot_be_trained_on(config, recording, spoil, said):
    spoil(recording)
    found = faults(config, train_only=recording)
    assert found and all(fault.startswith(f"train_only: {recording} cannot be trained on: ") for fault in found)
    assert said in " ".join(found)


def test_a_teacher_that_was_not_asked_cannot_be_learned_from(config, recording):
    """Its missing logprobs would be taken for 0, a teacher that is certain of every token."""
    algorithm = OnPolicyDistill(teacher=Teacher(model=config.model.path))
    (fault,) = faults(config, train_only=recording, algorithm=algorithm)
    assert "came without a teacher's logprobs" in fault
    asked = load_shape(config.model.path)
    Recording(recording).begin(header_of(dataclasses.replace(config, algorithm=algorithm), asked))
    assert faults(config, train_only=recording, algorithm=algorithm) == []
    other = OnPolicyDistill(teacher=Teacher(model=recording / "gone"))
    (fault,) = faults(config, train_only=recording, algorithm=other)
    assert f"logprobs of the teacher {config.model.path}; algorithm.teacher.model is {recording / 'gone'}" in fault


def test_a_teacher_is_not_learned_from_on_samples_of_an_older_policy(config, recording):
    """As sync_every above 1 is refused: the loss is for samples of the policy that is trained."""
    config = dataclasses.replace(config, algorithm=OnPolicyDistill(teacher=Teacher(model=config.model.path)), steps=2)
    found = Recording(recording)
    found.begin(header_of(config, load_shape(config.model.path)))
    write_step(found, 1, weight_version=1)
    assert faults(config, train_only=recording) == []
    write_step(found, 1, weight_version=0)  # as rollout_only does
    (fault,) = faults(config, train_only=recording)
    assert "train_only: its rollouts are of older weights" in fault and "keep_rollouts" in fault
    assert faults(config, train_only=recording, steps=1) == []


def test_stale_recorded_rollouts_have_a_weight_to_bound_without_asking(config, recording):
    config = dataclasses.replace(config, algorithm=GRPO(correction=Correction(beyond="mask", high=5.0)), steps=2)
    assert any("no token has a weight" in fault for fault in faults(config, train_only=recording))
    write_step(Recording(recording), 1, weight_version=0)
    assert faults(config, train_only=recording) == []


def test_longer_texts_than_a_row_holds_are_refused_before_they_are_met(config, recording):
    rollout = dataclasses.replace(config.rollout, max_model_len=100, sampling=SamplingConfig(max_new_tokens=32))
    (fault,) = faults(config, train_only=recording, rollout=rollout)
    assert "they may have 128 tokens; rollout.max_model_len is 100: raise it" in fault


def test_a_recording_that_was_cut_is_refused(config, recording):
    file = recording / "recorded" / "step_00000000.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    (fault,) = faults(config, train_only=recording)
    assert "step_00000000.jsonl is cut" in fault


def test_experts_that_were_not_recorded_cannot_be_replayed(config, recording):
    (fault,) = faults(config, train_only=recording, rollout=dataclasses.replace(config.rollout, routes="replay"))
    assert "came without experts" in fault


def test_what_the_recorded_run_writes_beside_its_rollouts_does_not_begin_a_training_run_anew(config, recording):
    training = dataclasses.replace(config, train_only=recording, if_exists="resume")
    prepare_folder(training).lock.close()
    (training.run_dir / "summary.json").write_text("{}")
    (recording / "report.html").write_text("drawn anew")
    assert is_finished(training)
    (recording / "recorded" / "step_00000001.jsonl").write_text("another step")
    assert not is_finished(training)
