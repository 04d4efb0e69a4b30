"""Each algorithm's own formulas by hand, its rules, and how one is named."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_r1.algorithms import (
    ALGORITHMS,
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    Algorithm,
    DrGRPO,
    algorithm_named,
    name_of,
)
from megatron_r1.algorithms.base import Setting, Tokens
from megatron_r1.algorithms.checks import algorithm_faults
from megatron_r1.algorithms.clip import Clip
from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.dapo import overlong
from megatron_r1.algorithms.kl import KL
from megatron_r1.bounds import number_faults
from megatron_r1.errors import ConfigError
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup

SETTING = Setting(minibatches=1, max_new_tokens=100, temperature=1.0)


def group(rewards: list[float], lengths: list[int]) -> RolloutGroup:
    return RolloutGroup(
        problem=Problem(id="p", domain="math", messages=()),
        prompt_ids=np.array([1], np.int32),
        completions=tuple(
            Completion(
                token_ids=np.zeros(length, np.int32),
                logprobs=np.zeros(length, np.float32),
                finish_reason="stop",
                weight_version=0,
            )
            for length in lengths
        ),
        rewards=tuple(Reward(total=total, parts={}) for total in rewards),
    )


def tokens(logprobs: torch.Tensor, mean=None, **given: torch.Tensor) -> Tokens:
    zeros = torch.zeros_like(logprobs.detach())
    fields = ("old_logprobs", "behaviour_logprobs", "reference_logprobs", "teacher_logprobs", "advantages")
    return Tokens(
        logprobs=logprobs,
        mask=torch.ones_like(zeros, dtype=torch.bool),
        sequence_mean=mean or (lambda values: values.mean().expand_as(values)),
        sequence_sum=lambda values: values.sum().expand_as(values),
        **{name: given.get(name, zeros) for name in fields},
    )


@pytest.mark.parametrize(("length", "lost"), [(0, 0.0), (80, 0.0), (85, 0.25), (90, 0.5), (100, 1.0), (120, 1.0)])
def test_dapo_punishes_the_last_fifth_of_the_longest_answer(length, lost):
    """Eq. 13 with L_max 100 and a cache of 20 tokens."""
    assert overlong(np.array([length]), 100, 0.2) == pytest.approx([-lost])
    shaped = DAPO(overlong_penalty=2.0).rewards(group([1.0], [length]), 100)
    assert shaped == pytest.approx([1.0 - 2.0 * lost])
    assert DAPO(overlong_share=0.0).rewards(group([1.0], [length]), 100) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("rewards", "lengths", "worth"),
    [
        ([1.0, 0.0], [5, 5], True),
        ([1.0, 1.0], [5, 5], False),
        ([0.0, 0.0], [5, 100], False),  # they differ by their lengths only
        ([math.nan, 1.0], [5, 5], False),
        ([math.nan, 1.0, 0.0], [5, 5, 5], True),
    ],
)
def test_dapo_keeps_groups_whose_verdicts_differ(rewards, lengths, worth):
    assert DAPO().worth_training(group(rewards, lengths)) is worth


def test_gspo_clips_a_sequence_as_one():
    """Log-ratios 0.3 and 0.1: the sequence's is 0.2, and every token has exp(0.2) for its ratio."""
    logprobs = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)
    row = tokens(logprobs, advantages=torch.tensor([2.0, 2.0], dtype=torch.float64))
    loss, metrics = GSPO(clip=Clip(low=0.5, high=0.5)).token_loss(row)
    assert loss.tolist() == pytest.approx([-2 * math.exp(0.2)] * 2)
    (gradient,) = torch.autograd.grad(loss.mean(), logprobs)
    # eq. 5: d/dx of -A exp((x1 + x2) / 2)
    assert gradient.tolist() == pytest.approx([-math.exp(0.2)] * 2)
    assert metrics["clip_fraction"].tolist() == [0.0, 0.0]
    loss, metrics = GSPO(clip=Clip(low=0.5, high=0.1)).token_loss(row)
    assert loss.tolist() == pytest.approx([-2.2] * 2) and metrics["clip_fraction"].tolist() == [1.0, 1.0]


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    """Ratios 2 and 8 at a cap of 5, advantage -1 and 3."""
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - torch.log(torch.tensor([2.0, 8.0], dtype=torch.float64))
    row = tokens(logprobs, old_logprobs=old, advantages=torch.tensor([-1.0, 3.0], dtype=torch.float64))
    loss, metrics = CISPO().token_loss(row)
    assert loss.tolist() == pytest.approx([2.0 * -1.0, -5.0 * 3.0 * -2.0])
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([2.0, -15.0])
    assert metrics["clip_fraction"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("algorithm", "weights"), [(GRPO(), [1 / 4, 1 / 16]), (GSPO(), [1 / 4, 1 / 16]),
                                                    (DAPO(), [0.1, 0.1]), (CISPO(), [0.1, 0.1]),
                                                    (DrGRPO(), [1 / 200, 1 / 200])])  # fmt: skip
def test_token_weights_of_sequences_of_2_and_8_tokens(algorithm, weights):
    assert algorithm.token_weights([2, 8], 100) == pytest.approx(weights)


def test_only_dr_grpo_does_not_divide_by_the_deviation():
    rewards = np.array([3.0, 1.0, 1.0, 3.0])
    for kind in (GRPO, DAPO, GSPO, CISPO):
        assert kind().advantages(rewards) == pytest.approx([1, -1, -1, 1])
    assert DrGRPO().advantages(2 * rewards) == pytest.approx([2, -2, -2, 2])


# ---- KL in the reward


@pytest.mark.parametrize(("estimator", "expected"), [("k1", -0.5 + 1.0), ("k2", 0.125 + 0.5),
                                                     ("k3", math.exp(0.5) - 1.5 + math.exp(-1.0))])  # fmt: skip
def test_a_completions_penalty_is_the_sum_over_its_tokens(estimator, expected):
    """log p_reference - log p of 0.5 and -1."""
    kl = KL(coef=0.1, estimator=estimator, place="reward")
    penalty = kl.penalty(np.array([-1.0, -2.0], np.float32), np.array([-0.5, -3.0], np.float32))
    assert penalty == pytest.approx(0.1 * expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_penalty_is_finite_for_impossible_tokens(estimator):
    kl = KL(coef=1.0, estimator=estimator, place="reward")
    both = kl.penalty(np.array([-np.inf]), np.array([-np.inf]))
    assert both == 0.0
    for policy, reference in ((-np.inf, 0.0), (0.0, -np.inf), (-300.0, -1.0)):
        assert math.isfinite(kl.penalty(np.array([policy]), np.array([reference])))
    assert math.isnan(kl.penalty(np.array([np.nan]), np.array([-1.0]))), "a broken model is found"


def test_what_a_penalty_needs():
    assert not GRPO(kl=KL(coef=0.0)).needs.reference
    needs = GRPO().needs
    assert (needs.reference, needs.old_pass(1), needs.kl_in_reward, needs.teacher) == (True, False, False, None)
    charged = GRPO(kl=KL(place="reward", refresh_steps=7)).needs
    assert (charged.reference, charged.old_pass(1), charged.kl_in_reward) == (True, True, True)
    assert charged.kl is not None and charged.kl.refresh_steps == 7


@pytest.mark.parametrize("kind", [GRPO, DrGRPO, DAPO, GSPO, CISPO])
def test_a_pass_for_old_logprobs_is_made_where_the_ratio_or_the_weight_needs_it(kind):
    assert [kind().needs.old_pass(steps) for steps in (1, 2)] == [False, True]
    weighed = kind(correction=Correction(weight="token")).needs
    assert [weighed.old_pass(steps) for steps in (1, 2)] == [False, True], "one step's forward has them"
    coupled = kind(correction=Correction(ratio_against="rollout")).needs
    assert [coupled.old_pass(steps) for steps in (1, 2)] == [False, False]


# ---- rules


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (GRPO(kl=KL(estimator="k1")), "algorithm.kl.estimator is k1 in the loss; .* use k2 or k3, or place reward"),
        (DAPO(sampling_rounds=0), "algorithm.sampling_rounds is 0; it must be at least 1"),
        (DAPO(overlong_share=1.0), "algorithm.overlong_share is 1.0"),
        (DAPO(overlong_penalty=math.nan), "algorithm.overlong_penalty is nan"),
        (DAPO(clip=Clip(high=math.inf)), "algorithm.clip.high is inf; it must be above 0"),
        (GSPO(kl=KL(coef=-1)), "algorithm.kl.coef is -1"),
        (GSPO(deviation_floor=math.inf), "algorithm.deviation_floor is inf"),
        (
            DrGRPO(correction=Correction(weight="token", high=0.5)),
            "algorithm.correction.high is 0.5; it must be at least 1",
        ),
        (
            GSPO(correction=Correction(weight="token", beyond="mask", low=-0.1)),
            "algorithm.correction.low is -0.1; it must be a share between 0 and 1",
        ),
        (
            GRPO(correction=Correction(beyond="mask")),
            "correction.beyond is mask, and no token has a weight, since weight is auto and sync_every 1: use weight t",
        ),
        (CISPO(correction=Correction(weight="none", high=5.0)), "high is 5.0, .* since weight is none: use weight tok"),
        (DAPO(correction=Correction(ratio_against="rollout", high=5.0)), "high is 5.0, .* ratio_against is rollout: "),
        (GSPO(correction=Correction(weight="token", low=0.9)), "low is 0.9, and only a mask has .*: use beyond mask"),
        *(
            (
                kind(correction=Correction(ratio_against="rollout", weight="token")),
                "algorithm.correction.weight is token with",
            )
            for kind in (GRPO, DrGRPO, DAPO, GSPO, CISPO)
        ),
        (DrGRPO(kl=KL(refresh_steps=-1)), "algorithm.kl.refresh_steps is -1"),
        (CISPO(ratio_cap=0.5), "algorithm.ratio_cap is 0.5; it must be at least 1"),
    ],
)
def test_a_setting_that_cannot_be_is_named(algorithm, words):
    (fault,) = number_faults(algorithm, "algorithm") + algorithm_faults(algorithm, SETTING)
    assert re.search(words, fault), fault


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "on_policy_distill"])
def test_the_defaults_are_sound(name):
    assert number_faults(ALGORITHMS[name]()) + algorithm_faults(ALGORITHMS[name](), SETTING) == []
    assert algorithm_faults(GRPO(kl=KL(estimator="k1", place="reward")), SETTING) == []


def test_stale_samples_have_a_weight_to_bound_without_asking():
    stale = dataclasses.replace(SETTING, sync_every=4)
    assert algorithm_faults(GRPO(correction=Correction(beyond="mask", low=0.2, high=5.0)), stale) == []
    (fault,) = algorithm_faults(GRPO(correction=Correction(weight="none", beyond="mask")), stale)
    assert "since weight is none: use weight token" in fault


# ---- names


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_named_by_the_table(name):
    algorithm = algorithm_named(name)
    assert type(algorithm) is ALGORITHMS[name] and name_of(algorithm) == name


MINE = """
import dataclasses
import numpy as np
from megatron_r1.algorithms import GRPO, Algorithm

@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaveOneOut(GRPO):
    scale: float = 2.0

    def advantages(self, rewards_G):
        assert super().advantages(rewards_G).shape == rewards_G.shape
        others = (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)
        return self.scale * (rewards_G - others)

@dataclasses.dataclass(frozen=True, kw_only=True)
class Bare(GRPO):
    needed: int

class Other: pass

class Undecorated(GRPO):
    scale: float = 0.5

@dataclasses.dataclass(frozen=True, kw_only=True)
class Named(GRPO):
    name: str = "mine"

@dataclasses.dataclass(frozen=True, kw_only=True)
class Incomplete(Algorithm):
    def advantages(self, rewards_G):
        return rewards_G

@dataclasses.dataclass(frozen=True, kw_only=True)
class Refuses(GRPO):
    scale: float = 1.0

    def __post_init__(self):
        if self.scale <= 0:
            raise RuntimeError("scale must be above 0")

@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrong(GRPO):
    METRICS = {"tokens": "no"}

    def advantages(self, rewards_G):
        return rewards_G / 0.0

@dataclasses.dataclass(frozen=True, kw_only=True)
class Raises(GRPO):
    def token_weights(self, lengths, max_new_tokens):
        return lengths[7]
"""


@pytest.mark.parametrize("as_file", [True, False])
def test_a_users_own_algorithm_comes_from_its_module_or_file(tmp_path, monkeypatch, as_file):
    module = f"mine_{as_file}".lower()
    (tmp_path / f"{module}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    where = f"{tmp_path}/{module}.py" if as_file else module
    algorithm = algorithm_named(f"{where}:LeaveOneOut")
    assert isinstance(algorithm, Algorithm)
    assert algorithm.advantages(np.array([1.0, 0.0, 0.0])) == pytest.approx([2.0, -1.0, -1.0])
    assert name_of(algorithm) == f"{where}:LeaveOneOut"
    for name, words in (
        ("Bare", "cannot be made with its defaults: TypeError"),
        ("Other", "is no algorithm"),
        ("No", "has no No"),
        ("Undecorated", r"is no dataclass; write @dataclass\(frozen=True, kw_only=True\) above it"),
        ("Named", "has a field called name"),
        ("Incomplete", "cannot be made with its defaults: TypeError: .*abstract"),
    ):
        with pytest.raises(ConfigError, match=words):
            algorithm_named(f"{where}:{name}")


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("ppo", "algorithm: no algorithm is called 'ppo'; there are grpo, dr_grpo"),
        ("nowhere_at_all:A", "algorithm: nowhere_at_all:A: there is no module nowhere_at_all"),
        ("nowhere.py:A", "nowhere.py does not exist"),
        ("broken.py:A", r"importing it fails at .*broken.py:3: ZeroDivisionError: division by zero"),
        ("torn.py:A", r"importing it fails at .*torn.py:1: SyntaxError"),
        ("lacking.py:A", r"importing it fails at .*lacking.py:1: ModuleNotFoundError: No module named 'nowhere_too'"),
    ],
)
def test_a_name_that_is_none_says_why(tmp_path, monkeypatch, word, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken.py").write_text("a = 1\n\na / 0\n")
    (tmp_path / "torn.py").write_text("def (\n")
    (tmp_path / "lacking.py").write_text("import nowhere_too\n")
    with pytest.raises(ConfigError, match=words):
        algorithm_named(word)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The classes of MINE, in a module that no other test has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine_tried.py").write_text(MINE)
    yield lambda name: algorithm_named(f"mine_tried.py:{name}")
    sys.modules.pop("mine_tried", None)


def test_a_users_functions_are_tried_before_the_run(mine):
    assert algorithm_faults(mine("LeaveOneOut"), SETTING) == []
    metrics, infinite = algorithm_faults(mine("Wrong"), SETTING)
    assert "Wrong.METRICS has tokens, which metrics.jsonl has already" in metrics
    assert "Wrong.advantages gave" in infinite and "it must be 2 finite numbers" in infinite
    (fault,) = algorithm_faults(mine("Raises"), SETTING)
    assert re.search(r"algorithm: Raises fails at .*mine_tried.py:\d+: IndexError", fault)


def test_what_a_users_class_refuses_is_said_without_a_traceback(mine, tmp_path):
    mine("Refuses")
    done = command("tiny", "--algorithm", f"{tmp_path}/mine_tried.py:Refuses", "--algorithm.scale", "0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "RuntimeError: scale must be above 0" in done.stderr and "mine_tried.py:" in done.stderr


@pytest.mark.parametrize("name", ["time", "statistics", "json"])
def test_a_file_with_an_installed_modules_name_is_refused(tmp_path, monkeypatch, name):
    """It would stand for that module in the whole process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / f"{name}.py").write_text("def f(): pass\n")
    with pytest.raises(ConfigError, match=f"{name}.py has the name of the installed module {name}; rename the file"):
        algorithm_named(f"{name}.py:f")
    with pytest.raises(ConfigError, match="sys has no nothing"):
        algorithm_named("sys:nothing")
    assert sys.path[-1] == str(tmp_path)  # last: the workers of this process still import the installed one


def test_the_table_is_built_without_torch():
    code = "import sys, megatron_r1.algorithms; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the command line


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_r1", "run", *words], capture_output=True, text=True, check=False
    )


def test_the_command_line_offers_an_algorithms_own_fields_only():
    from megatron_r1.__main__ import parse

    config = parse(["tiny", "--algorithm", "dapo", "--algorithm.sampling-rounds", "3"])
    assert config.algorithm == DAPO(sampling_rounds=3)
    assert parse(["r1_tiny", "--reasoning_rl.algorithm=cispo"]).reasoning_rl.algorithm == CISPO()
    assert parse(["tiny", "--algorithm.kl.coef", "0.5"]).algorithm == GRPO(kl=KL(coef=0.5))
    done = command("tiny", "--algorithm", "dapo", "--algorithm.kl.coef", "0.5", "--dry-run")
    assert done.returncode == 2 and "--algorithm.kl.coef" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tiny", "--algorithm"], "--algorithm needs the name of an algorithm"),
        (["tiny", "--algorithm", "dapo2"], "no algorithm is called 'dapo2'"),
        (["r1_tiny", "--cold_start.algorithm", "dapo"], "use --reasoning_rl.algorithm or --final_rl.algorithm"),
        (["r1_tiny", "--algorithm", "dapo"], "use --reasoning_rl.algorithm or --final_rl.algorithm"),
        (["distill_32b", "--algorithm", "dapo"], "only stages of GRPO have an algorithm"),
        (["tiny", "--grpo.kl-coef", "0.1"], "--grpo.kl-coef: now algorithm.kl.coef"),
        (
            ["r1_tiny", "--final_rl.algorithm.truncated-importance-cap", "2"],
            "--final_rl.algorithm.truncated-importance-cap: now algorithm.correction: set weight to token and high to",
        ),
        (["tiny", "--teacher.model=x"], "--teacher.model: now --algorithm on_policy_distill"),
    ],
)
def test_a_wrong_choice_is_refused(words, says):
    from megatron_r1.__main__ import parse

    with pytest.raises(ConfigError, match=re.escape(says)):
        parse(words)


def test_run_json_names_the_algorithm():
    from megatron_r1.__main__ import parse
    from megatron_r1.config.same import as_json, same_computation

    grpo, dr_grpo = (parse(["tiny", "--algorithm", name]) for name in ("grpo", "dr_grpo"))
    record = json.loads(json.dumps(as_json(grpo)))
    assert record["algorithm"]["name"] == "grpo" and record["algorithm"]["clip"]["low"] == 0.2
    assert same_computation(record, grpo)
    assert not same_computation(record, dr_grpo)
    assert not same_computation(json.loads(json.dumps(as_json(dr_grpo))), grpo)
