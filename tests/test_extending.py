"""docs/extending.md, run as it is written, from a folder outside the package."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from weight_sources import TensorSource

from megatron_r1.__main__ import parse
from megatron_r1.algorithms import algorithm_named
from megatron_r1.config.custom_reward import reward_faults
from megatron_r1.config.parts import problem_faults
from megatron_r1.config.schema import DataConfig, RewardConfig, RolloutConfig, SamplingConfig
from megatron_r1.config.user_code import code_files
from megatron_r1.data.jsonl import read_problems
from megatron_r1.data.problems import load_problems
from megatron_r1.engines.base import EngineSpec, start_all
from megatron_r1.engines.chosen import engine_kind
from megatron_r1.errors import ConfigError, DataError, EngineError, RewardError
from megatron_r1.rewards.outside import outside_grader
from megatron_r1.rewards.wiring import check_problems, scorer_for
from megatron_r1.rollout.collect import Collected, collect
from megatron_r1.stages.common.sampling import given_problems
from megatron_r1.stages.grpo.faults import validate
from megatron_r1.stages.grpo.usable import advantages_of
from megatron_r1.types import Completion, Problem

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.partition(f"## {title}\n")[2], flags=re.M)[0]


def code_of(title: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", section(title), flags=re.S)
    return code


def command_of(title: str) -> list[str]:
    (line,) = re.findall(r"^    megatron-r1 (.*)$", section(title), flags=re.M)
    return line.split()


@pytest.fixture
def outside(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of a user, whose modules no other test has loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("mine", "faulty", "sums", "broken", "rloo", "recipes", "heights", "in_process", "short"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    outside_grader.cache_clear()
    yield tmp_path
    for name in ("mine", "faulty", "sums", "broken", "rloo", "recipes", "heights", "in_process", "short"):
        sys.modules.pop(name, None)


def dry_run(words: list[str], folder: Path) -> str:
    command = [sys.executable, "-m", "megatron_r1", *words, "--dry-run", "--run-dir", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_algorithm(outside):
    (outside / "rloo.py").write_text(code_of("An algorithm"))
    out = dry_run(command_of("An algorithm"), outside)
    assert "algorithm.scale = 0.5" in out
    algorithm = algorithm_named("rloo.py:RLOO")
    # The others' means are 1, 2 and 1.5.
    assert algorithm.advantages(np.array([2.0, 0.0, 1.0])) == pytest.approx([1.5, -1.5, 0.0])
    broken = advantages_of(algorithm, np.array([2.0, np.nan, 0.0, np.inf]))
    np.testing.assert_array_equal(broken, [2.0, np.nan, -2.0, np.nan])


def completions(*texts: str) -> tuple[Completion, ...]:
    return tuple(
        Completion(
            token_ids=np.arange(len(text), dtype=np.int32),
            logprobs=np.full(len(text), -0.5, np.float32),
            finish_reason="length" if text.endswith("...") else "stop",
            weight_version=0,
            text=text,
        )
        for text in texts
    )


PROBLEM = Problem(id="p", domain="math", messages=({"role": "user", "content": "1+1?"},), answer="2")


def test_a_reward(outside):
    """In real grading workers, found from the folder that the command runs in."""
    (outside / "mine.py").write_text(code_of("A reward"))
    assert "mine.py:brevity=0.5" in dry_run(command_of("A reward"), outside)
    config = RewardConfig(custom=("mine.py:brevity=0.5", "mine.py:unlike_the_others"), num_workers=1)
    group = completions("a" * 10, "a" * 10, "b" * 30, "c...")
    with scorer_for(config, [PROBLEM]) as scorer:
        found = [scorer.submit(PROBLEM, one, group).result(120) for one in group]
    assert [reward.parts["brevity"] for reward in found] == pytest.approx([0.75, 0.75, 0.25, 0.0])
    assert [reward.parts["unlike_the_others"] for reward in found] == [0.0, 0.0, 1.0, 1.0]
    assert [reward.total for reward in found] == pytest.approx([0.375, 0.375, 1.125, 1.0])


FAULTY = """
import numpy as np
from mine import unlike_the_others

def raises(problem, completion):
    return 1 / 0

def says_nothing(problem, completion):
    pass

def far(problem, completion):
    return -17.5 if completion.token_ids.size == 3 and problem.answer == "2" else 0.0

def endless(problem, completion):
    while True:
        pass

def one(problem):
    return 0.0

def accuracy(problem, completion):
    return 0.0

number = 3

class Class:
    def method(self, problem, completion):
        return 1.0

    @staticmethod
    def static(problem, completion):
        return 0.25

def step(problem, completion):
    return 1.0

kl = step

def scaled(problem, completion, scale=0.5):
    return scale

def options(problem, completion, *, scale=0.5, **more):
    return scale + len(more)

def anything(*given):
    return float(len(given))

def for_group(problem, completion, group=()):
    return len(group)

def of_numpy(problem, completion):
    return completion.token_ids.size == np.array(3)
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", r"rewards.custom faulty:raises on problem p at .*faulty.py:6: ZeroDivisionError: division by zero"),
        ("says_nothing", r"faulty:says_nothing on problem p TypeError: it gave None; a reward is a number"),
    ],
)
def test_a_reward_that_fails_says_where(outside, name, says):
    (outside / "mine.py").write_text(code_of("A reward"))
    (outside / "faulty.py").write_text(FAULTY)
    config = RewardConfig(custom=(f"faulty:{name}",), num_workers=1)
    with scorer_for(config, [PROBLEM]) as scorer, pytest.raises(RewardError, match=says):
        scorer.submit(PROBLEM, "abc").result(120)


def test_a_reward_may_be_any_number_and_its_time_is_limited(outside):
    (outside / "mine.py").write_text(code_of("A reward"))
    (outside / "faulty.py").write_text(FAULTY)
    config = RewardConfig(custom=("faulty:far=2", "faulty:endless"), num_workers=1, timeout_seconds=1.0)
    with scorer_for(config, [PROBLEM]) as scorer:
        reward = scorer.submit(PROBLEM, completions("abc")[0]).result(120)
        assert scorer.counts().timeouts == 1
    assert reward.parts["far"] == -17.5 and reward.total == -35.0 and reward.parts["endless"] == 0.0


def test_how_a_reward_may_be_written(outside):
    (outside / "mine.py").write_text(code_of("A reward"))
    (outside / "faulty.py").write_text(FAULTY)
    names = {"scaled": 0.5, "options": 0.5, "anything": 2.0, "for_group": 2.0, "of_numpy": 1.0, "Class.static": 0.25}
    config = RewardConfig(custom=tuple(f"faulty:{name}" for name in names), num_workers=1)
    assert reward_faults(config) == []
    group = completions("abc", "de")
    with scorer_for(config, [PROBLEM]) as scorer:
        parts = scorer.submit(PROBLEM, group[0], group).result(120).parts
    assert {name: parts[name.split(".")[-1]] for name in names} == names


def test_another_content_of_the_users_files_is_another_run(outside):
    (outside / "mine.py").write_text(code_of("A reward"))
    (outside / "rloo.py").write_text(code_of("An algorithm"))
    words = ["tiny", "--rewards.custom", "mine.py:brevity=0.5", "--algorithm", "rloo.py:RLOO"]
    assert code_files(parse(words)) == {"rewards.custom[0]": outside / "mine.py", "algorithm": outside / "rloo.py"}
    assert code_files(parse(["tiny"])) == {}


def test_weights_of_0_are_no_reward(outside):
    (outside / "mine.py").write_text(code_of("A reward"))
    words = ["tiny", "--rewards.accuracy-weight", "0", "--rewards.format-weight", "0", "--rewards.custom"]
    with pytest.raises(ConfigError, match="every reward would be 0"):
        validate(parse([*words, "mine.py:brevity=0"]), folder=False)
    validate(parse([*words, "mine.py:brevity"]), folder=False)


def test_a_grader(outside):
    """One file outside the package, in real grading workers: from a line of problems to shares of the accuracy."""
    (outside / "heights.py").write_text(code_of("A grader"))
    (line,) = re.findall(r"^`(\{.*\})`;", section("A grader"), flags=re.M)
    (outside / "heights.jsonl").write_text(line + "\n")
    assert "heights.py:close" in dry_run(command_of("A grader"), outside)
    (everest,) = read_problems([outside / "heights.jsonl"])
    config = RewardConfig(graders=("heights.py:close",), num_workers=1, format_weight=0.0)
    answers = {"8848": 1.0, "8000": 0.5, "100": 0.0, "high": 0.0, "": 0.0}
    with scorer_for(config, [everest, PROBLEM]) as scorer:
        texts = {f"<think>x</think><answer>{answer}</answer>": score for answer, score in answers.items()}
        found = {text: scorer.submit(everest, text).result(120).total for text in [*texts, *texts]}
        assert scorer.counts().graded == 4, "equal answers are graded once, and none needs no worker"
        assert scorer.submit(PROBLEM, "<think>x</think><answer>4/2</answer>").result(120).parts["accuracy"] == 1.0
        assert scorer.submit_vote(everest, "8848", "8848").result(0).correct
    assert found == texts


GRADERS = """
def whole(response, problem):
    return response == "It is <answer>2</answer>." and problem.metadata["unit"] == "m"

def raises(answer, problem):
    return 1 / 0

def far(answer, problem):
    return 1.5

def one(answer):
    return True
"""


def test_a_grader_may_see_all_that_follows_the_thought(outside):
    (outside / "faulty.py").write_text(GRADERS)
    asked = dataclasses.replace(PROBLEM, grader="faulty:whole", answer=None, metadata={"unit": "m"})
    with scorer_for(RewardConfig(graders=("faulty:whole",), num_workers=1), [asked]) as scorer:
        right, wrong = "<think>x</think>It is <answer>2</answer>.", "<think>x</think><answer>2</answer>"
        assert [scorer.submit(asked, text).result(120).parts["accuracy"] for text in (right, wrong)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", r"grader faulty:raises on problem p at .*faulty.py:6: ZeroDivisionError: division by zero"),
        (
            "far",
            "grader faulty:far on problem p ValueError: it gave 1.5; a grade is True, False or a number",
        ),
    ],
)
def test_a_grader_that_fails_says_where(outside, name, says):
    (outside / "faulty.py").write_text(GRADERS)
    asked = dataclasses.replace(PROBLEM, grader=f"faulty:{name}")
    config = RewardConfig(graders=(f"faulty:{name}",), num_workers=1)
    with scorer_for(config, [asked]) as scorer, pytest.raises(RewardError, match=says):
        scorer.submit(asked, "<answer>2</answer>").result(120)


def test_a_grader_that_cannot_be_used_is_refused_before_the_run(outside):
    (outside / "faulty.py").write_text("raise SystemError('imported')")
    unlisted = dataclasses.replace(PROBLEM, grader="faulty:one")
    with pytest.raises(DataError, match=r"problem p: grader 'faulty:one' is not among rewards.graders \(none\)"):
        check_problems([unlisted], RewardConfig(), reward_models=False)
    (outside / "faulty.py").write_text(GRADERS)
    for path, says in [
        ("faulty:one", "must be a function of (answer, problem)"),
        ("faulty:nothing", "has no nothing"),
        ("faulty", "is no import path"),
    ]:
        (fault,) = reward_faults(RewardConfig(graders=(path,)))
        assert says in fault


@pytest.mark.parametrize("grader", ["code", "instructions", "reasoning_gym"])
def test_a_problem_without_what_its_grader_needs_is_refused(grader):
    problem = dataclasses.replace(PROBLEM, grader=grader)
    with pytest.raises(DataError, match=rf"problem p: grader '{grader}' needs metadata\['"):
        check_problems([problem], RewardConfig(), reward_models=False)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("faulty:one", "must be a function of"),
        ("faulty:number", "must be a function of"),
        ("faulty:nothing", "has no nothing"),
        ("faulty:Class.method", "must be a function of"),
        ("faulty:step", "a reward or a metric is called step already"),
        ("faulty:kl", "a reward or a metric is called kl already"),
        ("faulty", "is no import path"),
        ("faulty:far=much", "'much' is no weight"),
        ("faulty:far=nan", "'nan' is no weight"),
        ("faulty:accuracy", "a reward or a metric is called accuracy already"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused_before_the_run(outside, entry, says):
    (outside / "mine.py").write_text(code_of("A reward"))
    (outside / "faulty.py").write_text(FAULTY)
    (fault,) = reward_faults(RewardConfig(custom=(entry,)))
    assert re.search(says, fault), fault
    assert len(reward_faults(RewardConfig(custom=("faulty:far", "faulty:far=2")))) == 1


def test_problems(outside):
    (outside / "sums.py").write_text(code_of("Problems"))
    assert "data.source = sums.py:problems" in dry_run(command_of("Problems"), outside)
    split = load_problems(DataConfig(source="sums.py:problems", holdout=20, validation=20))
    assert len(split) == 81 and len(split.held_out) == len(split.validation) == 20
    assert split.problem(80).answer == "18" and split.known()[0].id == "1+1"
    assert [one.id for one in given_problems(DataConfig(source="sums:problems"), of_each_task=1)][:2] == ["1+1", "1+2"]


TWICE = "    yield Problem(id='a', domain='math', messages={turns}, answer={answer})\n"
TURNS = "({'role': 'user', 'content': 'q'},)"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (TWICE.format(answer="'1'", turns=TURNS) * 2, "problem id 'a' is given twice"),
        (TWICE.format(answer="3", turns=TURNS), "item 0: answer is 3; expected text"),
        (TWICE.format(answer="'1'", turns="()"), r"item 0: messages is \(\); expected a tuple of turns"),
        (TWICE.format(answer="'1', metadata={'a': {1}}", turns=TURNS), "item 0: metadata is not plain JSON"),
        ("    yield 3\n", "item 0 is a int; expected a Problem"),
        ("    return ()\n", "gave no problems"),
        ("    yield from ()\n    open('/no/such')\n", "broken.py:5: FileNotFoundError"),
    ],
)
def test_problems_that_are_none_are_named(outside, monkeypatch, body, says):
    (outside / "broken.py").write_text(f"from megatron_r1.types import Problem\n\ndef problems():\n{body}")
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(DataError, match=says):
        load_problems(DataConfig(source="broken.py:problems"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"source": "nowhere_here:problems"}, "there is no module nowhere_here"),
        ({"source": "math:pi"}, "math:pi is a float; it must be a function"),
        ({"source": "problems"}, "it must be module:function or file.py:function"),
        ({"source": "math:sin", "tasks": ("chain_sum",)}, "give one of them"),
        ({}, "give one of them"),
    ],
)
def test_a_source_that_is_none_is_refused_before_the_run(data, says):
    (fault,) = problem_faults(DataConfig(**data))
    assert says in fault


def test_a_recipe(outside):
    (outside / "recipes.py").write_text(code_of("A recipe"))
    out = dry_run(command_of("A recipe"), outside)
    assert "algorithm.sampling_rounds = 3" in out and "  steps = 20" in out


def megatron_r1(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_r1", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_conversations(folder: Path, *answers: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": one}]} for one in answers]
    (folder / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_kind_of_stage(outside):
    """It runs, its run.json runs again from another folder, and its file belongs to the run."""
    (outside / "short.py").write_text(code_of("A kind of stage"))
    write_conversations(outside, "a" * 400, "b" * 401, "c")
    done = megatron_r1(outside, *command_of("A kind of stage"))
    assert done.returncode == 0, done.stderr
    run = outside / "runs" / "short"
    assert json.loads((run / "summary.json").read_text()) == {"kept": 2, "left_out": 1}
    assert [row["messages"][-1]["content"] for row in lines_of(run / "kept.jsonl")] == ["a" * 400, "c"]
    written = json.loads((run / "run.json").read_text())
    assert written["kind"] == f"{outside / 'short.py'}:ShortConfig" and set(written["inputs"]) == {"file", "kind"}
    (outside / "elsewhere").mkdir()
    words = ["--config", "../runs/short/run.json", "--file", "../conversations.jsonl", "--characters", "1"]
    done = megatron_r1(outside / "elsewhere", "run", *words, "--run-dir", "again")
    assert done.returncode == 0, done.stderr
    assert json.loads((outside / "elsewhere/again/summary.json").read_text()) == {"kept": 1, "left_out": 2}


PIPELINE = """
from dataclasses import dataclass
from pathlib import Path
from megatron_r1.config.pipeline import PipelineConfig
from short import ShortConfig

@dataclass(frozen=True, slots=True, kw_only=True)
class Twice(PipelineConfig):
    short: ShortConfig
    shorter: ShortConfig

def twice():
    short = ShortConfig(file=Path("conversations.jsonl"), characters=400)
    shorter = ShortConfig(file=Path("@short/kept.jsonl"), characters=1)
    return Twice(name="twice", run_dir=Path("runs/twice"), short=short, shorter=shorter)
"""


def test_a_kind_of_stage_in_a_pipeline_goes_out_of_date_with_its_file(outside):
    (outside / "short.py").write_text(code_of("A kind of stage"))
    (outside / "recipes.py").write_text(PIPELINE)
    write_conversations(outside, "a" * 400, "b" * 401, "c")
    done = megatron_r1(outside, "run", "recipes.py:twice")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines_of(outside / "runs/twice/shorter/kept.jsonl")) == 1
    again = megatron_r1(outside, "run", "recipes.py:twice")
    assert again.stdout.count("up to date") == 2, again.stdout + again.stderr
    (outside / "short.py").write_text(code_of("A kind of stage") + "\n")
    changed = megatron_r1(outside, "run", "recipes.py:twice", "--dry-run")
    assert "up to date" not in changed.stdout and changed.returncode == 0, changed.stdout + changed.stderr


def test_a_configuration_of_no_kind_is_refused(outside):
    code = code_of("A kind of stage").replace("    config=ShortConfig,", "    config=Path,")
    (outside / "short.py").write_text(code)
    done = megatron_r1(outside, "run", "short.py:short", "--dry-run")
    said = f"{outside / 'short.py'}:ShortConfig is of no kind of stage: put a Stage(config=ShortConfig, ...) beside it"
    assert done.returncode == 2 and said in done.stderr, done.stderr


def test_a_configuration_in_a_file(outside):
    (text,) = re.findall(r"```toml\n(.*?)```", section("A configuration in a file"), flags=re.S)
    (outside / "mine.toml").write_text(text)
    pipeline = parse(command_of("A configuration in a file")[1:])
    assert pipeline.run_dir == Path("runs/mine")
    assert (pipeline.grpo.steps, pipeline.grpo.optimizer.lr) == (40, 1e-5)
    assert pipeline.grpo.algorithm == dataclasses.replace(algorithm_named("dapo"), sampling_rounds=3)
    assert pipeline.grpo.rollout.sampling.temperature == 0.9
    assert "steps = 40" in dry_run(command_of("A configuration in a file"), outside)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("nothing", "no recipe is called 'nothing'; there are quickstart, "),
        ("math:pi", "recipe: math:pi is a float; it must be a function that returns one"),
        ("json:JSONDecoder", "recipe: json:JSONDecoder returned a JSONDecoder; expected a stage's configuration"),
        ("struct:pack", "recipe: struct:pack: TypeError"),
        ("nowhere_here:mine", "recipe: nowhere_here:mine: there is no module nowhere_here"),
    ],
)
def test_a_recipe_that_is_none_is_refused(word, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse([word])


def test_an_engine_is_named(outside):
    (outside / "in_process.py").write_text(code_of("An engine"))
    assert "rollout.engine = in_process.py:InProcess" in dry_run(command_of("An engine"), outside)


def check_samples(collected: Collected, prompts: list[list[int]], model: torch.nn.Module, temperature: float) -> None:
    """Every sampled token's logprob is the model's, f32, at that temperature."""
    for prompt, group in zip(prompts, collected.groups, strict=True):
        for one in group:
            ids = [*prompt, *one.token_ids.tolist()]
            with torch.no_grad():
                logprobs_TV = (model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            own = logprobs_TV.gather(-1, torch.tensor(one.token_ids).long()[:, None])[:, 0]
            np.testing.assert_allclose(one.logprobs, own, atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "deepseek_v3"])
def test_an_engine_samples_and_follows_the_trainer(outside, tmp_path, architecture):
    """Collection, a push and a restart, through an engine that this package does not know. Oracle: transformers on the
    folder, or on one whose files hold the pushed tensors."""
    (outside / "in_process.py").write_text(code_of("An engine"))
    model = oracles.save_model(architecture, tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    pushed = {name: tensor * 1.1 for name, tensor in tensors.items()}
    save_file(pushed, tmp_path / "second" / "model.safetensors", metadata={"format": "pt"})
    config = RolloutConfig(
        engine="in_process.py:InProcess", device="cpu", dtype="fp32", max_model_len=32, max_num_seqs=4, max_restarts=1
    )
    kind = engine_kind(config)
    (engine,) = start_all([kind.local(EngineSpec(config=config, model_path=tmp_path / "first", run_dir=tmp_path))])
    sync = kind.weight_sync(
        config, source=TensorSource(pushed), engines=(engine,), model_path=tmp_path / "first", rank=0
    )
    prompts, sampling = [[5, 9, 12], [7, 8]], SamplingConfig(max_new_tokens=6, temperature=0.7, stop_token_ids=(1,))

    def sample(**more) -> Collected:
        return collect([engine], prompts, group_size=2, sampling=sampling, seed=3, **more)

    begun = sample()
    check_samples(begun, prompts, model, 0.7)
    assert {one.weight_version for group in begun.groups for one in group} == {0}
    again = sample()
    assert [one.token_ids.tolist() for group in again.groups for one in group] == [
        one.token_ids.tolist() for group in begun.groups for one in group
    ]

    report = sync.push(1)
    assert (report.version, sync.version) == (1, 1)
    assert report.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float32)
    after = sample()
    check_samples(after, prompts, second, 0.7)
    assert {one.weight_version for group in after.groups for one in group} == {1}

    engine.stop()
    revived = sample(resync=lambda fallen: sync.push(sync.version, engines=[fallen]))
    assert revived.restarts == 1 and engine.starts == 2
    check_samples(revived, prompts, second, 0.7)
    assert {one.weight_version for group in revived.groups for one in group} == {1}
    with pytest.raises(ValueError, match="1 of 1 parameters do not fit"):
        kind.weight_sync(
            config, source=TensorSource({"w": torch.ones(2)}), engines=(engine,), model_path=tmp_path / "first", rank=0
        ).push(2)


def test_a_server_that_is_started_again_between_two_syncs_has_newer_weights_and_says_so(outside, tmp_path):
    """Two servers at version 1; one dies when the trainer has taken two steps more. Oracle: transformers on both."""
    (outside / "in_process.py").write_text(code_of("An engine"))
    old = oracles.save_model("qwen2", tmp_path / "first")
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    later = {name: tensor * 1.1 for name, tensor in tensors.items()}
    save_file(later, tmp_path / "second" / "model.safetensors", metadata={"format": "pt"})
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float32)
    config = RolloutConfig(
        engine="in_process.py:InProcess", device="cpu", dtype="fp32", max_model_len=32, max_num_seqs=1, max_restarts=4
    )
    kind = engine_kind(config)
    engines = start_all([
        kind.local(EngineSpec(config=config, model_path=tmp_path / "first", run_dir=tmp_path, index=index))
        for index in range(2)
    ])  # fmt: skip
    source = TensorSource(tensors)
    sync = kind.weight_sync(config, source=source, engines=engines, model_path=tmp_path / "first", rank=0)
    sync.push(1)
    prompts = [[5, 9, place] for place in range(12)]

    def sample(**more) -> Collected:
        sampling = SamplingConfig(max_new_tokens=6, temperature=0.7, stop_token_ids=(1,))
        return collect(engines, prompts, group_size=2, sampling=sampling, seed=3, **more)

    source.tensors, before = later, set(threading.enumerate())
    engines[0].stop()
    found = sample(resync=lambda fallen: sync.push(3, engines=[fallen]), newest=3)
    assert found.restarts == 1 and sync.version == 1, "the others have not got it"
    found = sample(newest=3)
    versions = [group[0].weight_version for group in found.groups]
    assert set(versions) == {1, 3}
    for prompt, group, version in zip(prompts, found.groups, versions, strict=True):
        check_samples(dataclasses.replace(found, groups=[group]), [prompt], {1: old, 3: new}[version], 0.7)
    with pytest.raises(EngineError, match="the engines serve different weights"):
        sample()
    engines[0].stop()
    with pytest.raises(EngineError, match="serves weight version 2 after its restart, this rollout began with 1"):
        sample(resync=lambda fallen: sync.push(2, engines=[fallen]), newest=3)
    for thread in set(threading.enumerate()) - before:
        thread.join()  # the other server's last answers


@pytest.mark.slow
def test_an_engine_of_ones_own_trains(outside):
    """Two steps of the quickstart, from its launcher to its report, without a vLLM process."""
    (outside / "in_process.py").write_text(code_of("An engine"))
    words = [*command_of("An engine"), "--grpo.steps", "2", "--warm-up.steps", "40", "--run-dir", "run"]
    words += ["--grpo.prompts-per-step", "4", "--grpo.group-size", "4", "--grpo.data.holdout", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_r1", *words], capture_output=True, text=True, check=False, cwd=outside
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (outside / "run" / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and "in-process-0 serves on this process" in done.stdout
    assert not (outside / "run" / "grpo" / "logs" / "vllm-0.log").exists()


@pytest.mark.slow
def test_an_algorithm_of_ones_own_trains(outside):
    """Three steps of the quickstart on every rank, from the run's launcher to its report."""
    (outside / "rloo.py").write_text(code_of("An algorithm"))
    words = [*command_of("An algorithm"), "--grpo.steps", "3", "--warm-up.steps", "40", "--run-dir", "run"]
    words += ["--grpo.rewards.custom", "mine.py:brevity=0.5", "mine.py:unlike_the_others"]
    (outside / "mine.py").write_text(code_of("A reward"))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_r1", *words], capture_output=True, text=True, check=False, cwd=outside
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'"name": "{outside}/rloo.py:RLOO"' in (outside / "run" / "grpo" / "run.json").read_text()
    lines = (outside / "run" / "grpo" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all('"brevity"' in line and '"unlike_the_others"' in line for line in lines)
