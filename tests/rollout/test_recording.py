"""Whole rollouts on disk: they come back exactly, and those of another model are refused by name."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.errors import DataError
from megatron_r1.rollout.recording import Header, RecordedStep, Recording
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup

HEADER = Header(
    tokenizer="ab12",
    architecture="deepseek_v3",
    num_layers=4,
    hidden_size=64,
    vocab_size=101,
    num_experts=8,
    experts_per_token=2,
    temperature=1.0,
    max_model_len=128,
    routes=True,
    teacher="/models/teacher",
    sparse_layers=(1, 2, 3),
)


def group(seed: int, rewards: list[Reward], *, routes: bool = True, teacher: bool = False) -> RolloutGroup:
    rng = np.random.default_rng(seed)
    problem = Problem(
        id=f"p{seed}",
        domain="math",
        messages=({"role": "user", "content": "1 ≠ 2?"},),
        answer="yes",
        language="en",
        metadata={"tests": [1, {"x": None}]},
    )
    completions = tuple(
        Completion(
            token_ids=rng.integers(0, 101, 5).astype(np.int32),
            logprobs=rng.normal(size=5).astype(np.float32),
            finish_reason="stop",
            weight_version=3,
            text="sí",
            routes=rng.integers(0, 8, (7, 3, 2)).astype(np.uint8) if routes else None,
            teacher_logprobs=rng.normal(size=5).astype(np.float32) if teacher else None,
        )
        for _ in rewards
    )
    return RolloutGroup(
        problem=problem, prompt_ids=np.array([7, 8, 9], np.int32), completions=completions, rewards=tuple(rewards)
    )


def same(one: RolloutGroup, other: RolloutGroup) -> None:
    assert one.problem == other.problem
    np.testing.assert_array_equal(one.prompt_ids, other.prompt_ids)
    for mine, theirs in zip(one.completions, other.completions, strict=True):
        for name in ("token_ids", "logprobs", "routes", "teacher_logprobs"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
        assert (mine.finish_reason, mine.weight_version, mine.text) == ("stop", 3, "sí")
    for mine, theirs in zip(one.rewards, other.rewards, strict=True):
        assert repr(mine) == repr(theirs), "NaN and infinity too"


def test_a_step_comes_back_exactly(tmp_path):
    recording = Recording(tmp_path)
    recording.begin(HEADER)
    rewards = [Reward(total=0.1 + 0.2, parts={"accuracy": 1.0}), Reward(total=math.nan, parts={"helpful": -math.inf})]
    groups = [group(0, rewards), group(1, rewards, routes=False, teacher=True)]
    recording.write(0, RecordedStep(groups=groups, kept=[True, False], rounds=2))
    found = Recording(tmp_path).read(0)
    assert (list(found.kept), found.rounds) == ([True, False], 2)
    for one, other in zip(found.groups, groups, strict=True):
        same(one, other)
    assert Recording(tmp_path).header() == HEADER


def test_steps_are_counted_up_to_the_first_gap(tmp_path):
    recording = Recording(tmp_path)
    recording.begin(HEADER)
    assert recording.num_steps() == 0
    step = RecordedStep(groups=[group(0, [Reward(total=1.0, parts={})])], kept=[True])
    for number in (0, 1, 3):
        recording.write(number, step)
    (recording.folder / "step_00000002.partial").write_text("half a step")
    assert recording.num_steps() == 2
    recording.write(1, step)
    assert recording.num_steps() == 2, "a step that is done again takes the place of the first"


def recorded_steps(folder: Path, *numbers: int) -> Recording:
    """Steps of two groups."""
    recording = Recording(folder)
    recording.begin(HEADER)
    groups = [group(seed, [Reward(total=1.0, parts={})]) for seed in range(2)]
    for number in numbers:
        recording.write(number, RecordedStep(groups=groups, kept=[True, True]))
    return recording


def test_a_step_that_was_cut_anywhere_is_no_step(tmp_path):
    """As by a copy that broke off: at the end of a line it reads as a smaller step."""
    recording = recorded_steps(tmp_path, 0, 1, 2)
    assert recording.fault() is None
    file = recording.folder / "step_00000001.jsonl"
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    second = whole.index(b"\n", first) + 1
    for length in (0, 1, first - 1, first, first + 1, second - 1, second, second + 1, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert recording.num_steps() == 1, length
        assert str(recording.fault()) == f"{file} is cut: copy it again, or remove it and all later ones"
        with pytest.raises(DataError, match=r"step_00000001.jsonl"):
            recording.read(1)
    file.write_bytes(whole)
    assert recording.fault() is None and len(recording.read(1).groups) == 2


def test_a_step_whose_middle_is_missing_is_named(tmp_path):
    recording = recorded_steps(tmp_path, 0)
    file = recording.folder / "step_00000000.jsonl"
    one, _, last = file.read_text().splitlines()
    file.write_text(f"{one}\n{last}\n")
    with pytest.raises(DataError, match=r"cannot be read \(ValueError: 1 of 2 groups\): record again"):
        recording.read(0)


def test_a_step_that_is_missing_between_others_is_named(tmp_path):
    recording = recorded_steps(tmp_path, 0, 1, 3, 4)
    said = str(recording.fault())
    assert said.startswith(f"{recording.folder / 'step_00000002.jsonl'} is missing, and step_00000003.jsonl is there")
    assert recorded_steps(tmp_path / "none").fault() == "it has no whole step"


def test_a_run_that_goes_on_records_from_its_step_on(tmp_path):
    """The steps behind it were recorded by the start before, and the run may end earlier than that one came."""
    recording = recorded_steps(tmp_path, 0, 1, 2, 3)
    recording.go_on(HEADER, 2)
    assert (recording.num_steps(), recording.fault()) == (2, None)
    recording.go_on(HEADER, 0)
    assert recording.num_steps() == 0


def test_rollouts_that_begin_in_the_middle_are_refused(tmp_path):
    """keep_rollouts that is asked for as a run goes on: nothing could be trained on what it kept."""
    with pytest.raises(DataError, match=r"keep_rollouts: the run has done 2 steps, and .* has the first 0 only"):
        Recording(tmp_path).go_on(HEADER, 2)
    assert not (tmp_path / "recorded").exists()
    recording = recorded_steps(tmp_path, 0, 3)
    with pytest.raises(DataError, match=r"has the first 1 only"):
        recording.go_on(HEADER, 4)
    assert (recording.folder / "step_00000003.jsonl").is_file(), "nothing was removed"
    recording.refuse_gap(1)
    with pytest.raises(DataError, match=r"done 2 steps, and .* has the first 1 only"):
        recording.refuse_gap(2)


def test_what_is_no_recording_says_so(tmp_path):
    with pytest.raises(DataError, match=r"recording.json is not there: name the folder of a run that had rollout_only"):
        Recording(tmp_path).header()
    recording = Recording(tmp_path)
    recording.begin(HEADER)
    for text in ('{"format": 2}', "[]", "", "1"):
        (recording.folder / "recording.json").write_text(text)
        with pytest.raises(DataError, match=r"recording.json cannot be read"):
            recording.header()
    (recording.folder / "recording.json").write_text('{"format": 1, "tokenizer": "ab12"}')
    with pytest.raises(DataError, match=r"its format is 1, this version reads 2: record again"):
        recording.header()
    with pytest.raises(DataError, match=r"step_00000000.jsonl is not there: .* has 0 steps"):
        recording.read(0)


@pytest.mark.parametrize("text", ["", "{}\n", '{"problem": 1}\n', "[]\n", "not json\n"])
def test_a_damaged_step_is_named(tmp_path, text):
    recording = Recording(tmp_path)
    recording.begin(HEADER)
    (recording.folder / "step_00000000.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"step_00000000.jsonl"):
        recording.read(0)


def test_a_damaged_line_of_a_good_step_is_named(tmp_path):
    recording = Recording(tmp_path)
    recording.begin(HEADER)
    recording.write(0, RecordedStep(groups=[group(0, [Reward(total=1.0, parts={})])], kept=[True]))
    file = recording.folder / "step_00000000.jsonl"
    line, last = file.read_text().splitlines()
    content = json.loads(line)
    content["completions"][0]["token_ids"] = "AAA"  # not whole numbers of four bytes
    file.write_text(f"{json.dumps(content)}\n{last}\n")
    with pytest.raises(DataError, match=r"step_00000000.jsonl cannot be read"):
        recording.read(0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": "cd34"}, "tokens of another tokenizer"),
        ({"num_layers": 5}, "a model whose num_layers is 5; that of model.path has 4"),
        ({"num_experts": 16}, "a model whose num_experts is 16"),
        ({"experts_per_token": 4}, "a model whose experts_per_token is 4"),
        ({"architecture": "llama"}, "a model whose architecture is llama"),
        ({"vocab_size": 128}, "a model whose vocab_size is 128"),
        ({"temperature": 0.7}, "sampled at temperature 0.7; rollout.sampling.temperature is 1.0"),
        ({"routes": False}, "came without experts, which rollout.routes asks for: use off"),
        ({"teacher": ""}, "came without a teacher's logprobs, which the algorithm needs"),
        ({"teacher": "/old"}, "of the teacher /old; algorithm.teacher.model is /models/teacher: name that one"),
        (
            {"sparse_layers": (0, 2, 3)},
            "a model whose layers with experts are 0, 2, 3; those of model.path's are 1, 2, 3",
        ),
        ({"max_model_len": 129}, "they may have 129 tokens; rollout.max_model_len is 128: raise it"),
    ],
)
def test_rollouts_of_another_model_are_refused(changes, said):
    (fault,) = dataclasses.replace(HEADER, **changes).differences(HEADER)
    assert said in fault


def test_recordings_that_do_not_say_which_layers_have_experts_are_taken():
    assert dataclasses.replace(HEADER, sparse_layers=()).differences(HEADER) == []


def test_rollouts_with_experts_serve_a_run_without():
    assert HEADER.differences(dataclasses.replace(HEADER, routes=False)) == []


def test_rollouts_with_a_teacher_serve_a_run_without():
    assert HEADER.differences(dataclasses.replace(HEADER, teacher="")) == []


def test_shorter_rollouts_serve_a_run_of_longer_ones():
    assert HEADER.differences(dataclasses.replace(HEADER, max_model_len=4096)) == []


def test_the_tokenizer_is_known_by_its_files(tmp_path):
    from megatron_r1.config.shape import load_shape
    from megatron_r1.recipes.tiny import TINY_V3

    shape = load_shape(TINY_V3)
    found = []
    for number, text in enumerate(("{}", "{}", '{"a": 1}')):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text((TINY_V3 / "config.json").read_text())
        (folder / "tokenizer.json").write_text(text)
        found.append(Header.of(folder, shape, temperature=1.0, max_model_len=64, routes=False).tokenizer)
    assert found[0] == found[1] != found[2]
