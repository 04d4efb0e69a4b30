"""Every number of every kind of stage, just outside its bounds, is refused by that stage, by its path.

Nothing is listed here: fields and bounds are read from the configurations, so a new field is tested too, and a stage
that forgets a part fails.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import pytest

from megatron_r1 import bounds
from megatron_r1.__main__ import main
from megatron_r1.algorithms import ALGORITHMS
from megatron_r1.bounds import FINITE, Bound, Count, above, at_least, number_faults
from megatron_r1.config.judge import JudgeConfig
from megatron_r1.config.schema import DataConfig, ModelConfig, PreferenceConfig, RolloutConfig, SamplingConfig
from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.kinds import check
from megatron_r1.recipes import RECIPES
from megatron_r1.recipes.tiny import TINY_V3
from megatron_r1.stages.evaluate.config import EvaluateConfig
from megatron_r1.stages.rejection.config import MixSource, RejectionConfig
from megatron_r1.stages.reward_model.config import PairDataConfig, RewardModelConfig
from megatron_r1.stages.sft.config import SFTConfig
from megatron_r1.toy.tiny_world.config import TinyWorldConfig

ROOT = Path("runs/of_these_tests")
FILE = TINY_V3 / "config.json"
"""Stands for a file of data: these tests look at numbers, before anything is read."""
SERVED = RolloutConfig(device="cpu", sync="gloo", max_model_len=96, sampling=SamplingConfig(max_new_tokens=48))
GRPO_STAGE = dataclasses.replace(RECIPES["tiny"](), run_dir=ROOT)
STAGES = {
    **{
        f"grpo with {name}": dataclasses.replace(GRPO_STAGE, algorithm=kind()) for name, kind in ALGORITHMS.items()
    },
    "grpo with a reward model": dataclasses.replace(
        GRPO_STAGE,
        rewards=dataclasses.replace(
            GRPO_STAGE.rewards, preferences=(PreferenceConfig(name="helpful", model=TINY_V3, domains=("general",)),)
        ),
    ),
    "sft": SFTConfig(
        name="sft", run_dir=ROOT, model=ModelConfig(path=TINY_V3), data=SFTDataConfig(files=(FILE,), max_tokens=64),
        device="cpu",
    ),
    "reward model": RewardModelConfig(
        name="judge", run_dir=ROOT, model=ModelConfig(path=TINY_V3), data=PairDataConfig(files=(FILE,), max_tokens=64),
        device="cpu",
    ),
    "rejection": RejectionConfig(
        run_dir=ROOT, model=TINY_V3, data=DataConfig(files=(FILE,)), rollout=SERVED,
        mix=(MixSource(file=FILE, weight=1.0),),
        judge=JudgeConfig(url="http://localhost:1/v1", model="judge"),
    ),
    "evaluation": EvaluateConfig(run_dir=ROOT, model=TINY_V3, data=DataConfig(files=(FILE,)), rollout=SERVED),
    "tiny world": TinyWorldConfig(run_dir=ROOT),
}  # fmt: skip


def outside(value: float, bound: Bound) -> list[float]:
    """Values of the field's type that break the bound, as near to it as there are."""
    whole = isinstance(value, int)
    found: list[float] = [] if whole else [math.nan, math.inf]
    if bound.least > -math.inf:
        found.append(int(bound.least) - 1 if whole else math.nextafter(bound.least, -math.inf))
    if bound.above > -math.inf:
        found.append(int(bound.above) if whole else bound.above)
    if bound.most < math.inf:
        found.append(int(bound.most) + 1 if whole else math.nextafter(bound.most, math.inf))
    if bound.below < math.inf:
        found.append(bound.below)
    return found


def numbers(stage: object) -> list[tuple[str, float, Bound]]:
    return list(bounds._numbers(stage, ""))


CASES = [
    pytest.param(kind, path, bad, id=f"{kind} {path}={bad}")
    for kind, stage in STAGES.items()
    for path, value, bound in numbers(stage)
    for bad in outside(value, bound)
    if not path.startswith("rewards.sandbox.")  # refuses by itself, when it is made
    and (kind in ("grpo with grpo", "grpo with a reward model") or path.startswith("algorithm.") or "grpo" not in kind)
    and (kind != "grpo with a reward model" or "preferences" in path)
]


def replaced(config: object, path: str, value: float):
    head, _, rest = path.partition(".")
    name, _, place = head.partition("[")
    inner = getattr(config, name)
    if place:
        number = int(place.rstrip("]"))
        item = replaced(inner[number], rest, value) if rest else value
        return dataclasses.replace(config, **{name: (*inner[:number], item, *inner[number + 1 :])})  # pyright: ignore
    return dataclasses.replace(config, **{name: replaced(inner, rest, value) if rest else value})  # pyright: ignore


@pytest.mark.parametrize(("kind", "path", "bad"), CASES)
def test_a_number_outside_its_bounds_is_refused(kind, path, bad):
    with pytest.raises(ConfigError) as caught:
        check(replaced(STAGES[kind], path, bad))
    assert any(fault.startswith(f"{path} is {bad}; it must be ") for fault in caught.value.faults), caught.value.faults


def test_numbers_without_a_bound_are_named():
    """A choice (Literal), what refuses by itself, and what another field bounds."""
    free = {path for stage in STAGES.values() for path, value, bound in numbers(stage) if bound is FINITE}
    sandbox = {path for path in free if path.startswith("rewards.sandbox.")}
    assert free - sandbox == {"pass_k[0]", "rollout.sleep_level"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_keep_the_bounds(recipe):
    assert number_faults(RECIPES[recipe]()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rewards.timeout-seconds", "-5"], "rewards.timeout_seconds is -5.0; it must be above 0"),
        (["--rollout.tensor-parallel", "0"], "rollout.tensor_parallel is 0; it must be at least 1"),
        (["--data.holdout-files", "/no/such.jsonl"], "data.holdout_files: /no/such.jsonl does not exist"),
        (["--rollout.devices", "0", "1"], "rollout.devices has 2 entries"),
    ],
)
def test_the_command_line_says_so_without_a_traceback(capsys, tmp_path, words, says):
    (tmp_path / "a.jsonl").write_text("{}\n")
    given = ["--model", str(TINY_V3), "--run-dir", str(tmp_path / "out"), "--data.files", str(tmp_path / "a.jsonl")]
    assert main(["evaluate", *given, *words]) == 2
    assert says in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Part:
    plain: float = 1.0
    count: Count = 1
    maybe: Annotated[float | None, above(1)] = None
    shares: tuple[Annotated[float, Bound("a half", least=0.5, most=0.5)], ...] = (0.5,)
    flag: bool = False
    inner: tuple[Part, ...] = ()
    low: Annotated[float, above(0, 1)] = 1.0
    whole: Annotated[int, at_least(-1)] = -1


@pytest.mark.parametrize(
    ("part", "faults"),
    [
        (Part(), []),
        (Part(maybe=1.5, inner=(Part(maybe=None),)), []),
        (Part(plain=math.inf), ["plain is inf; it must be a finite number"]),
        (Part(maybe=1.0), ["maybe is 1.0; it must be above 1"]),
        (Part(shares=(0.5, 0.25)), ["shares[1] is 0.25; it must be a half"]),
        (Part(inner=(Part(), Part(count=0))), ["inner[1].count is 0; it must be at least 1"]),
        (
            Part(low=0.0, whole=-2),
            ["low is 0.0; it must be above 0 and at most 1", "whole is -2; it must be at least -1"],
        ),
    ],
)
def test_bounds_are_read_from_annotations(part, faults):
    assert number_faults(part) == faults
