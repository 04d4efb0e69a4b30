"""The tables of names have what is written and nothing else. Whole runs are held against them where they are tested
(written_names.py)."""

import ast
from pathlib import Path

import numpy as np
import pytest
from written_names import names_in, step_names, unknown_names

from megatron_r1.algorithms import ALGORITHMS
from megatron_r1.algorithms.base import RESERVED
from megatron_r1.observe.names import NUMBER, PART, Number
from megatron_r1.pipeline.kinds import KINDS
from megatron_r1.stages.grpo.metrics import step_metrics
from megatron_r1.stages.grpo.mismatch import Mismatch
from megatron_r1.stages.grpo.names import PARTS, STEP_NAMES
from megatron_r1.stages.grpo.sampling import Sampled
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup, StepResult

PACKAGE = Path(__file__).parent.parent.parent / "megatron_r1"


def test_unknown_names_are_found_at_any_depth():
    table = {
        "loss": Number("", ""), "seconds/train": Number("", ""),
        f"pass@{NUMBER}": Number("", ""), f"held_out/{PART}": Number("", ""),
    }  # fmt: skip
    row = {"loss": 1.0, "seconds": {"train": 1.0, "play": 2.0}, "pass@16": 0.5, "pass@x": 0.5, "helpful": 1.0}
    row["held_out"] = {"helpful": 1.0, "grace": 2.0}
    assert list(names_in({"a": 1, "b": {"c": {"d": 2}}})) == ["a", "b/c/d"]
    assert unknown_names(row, table, ["helpful"]) == ["seconds/play", "pass@x", "helpful", "held_out/grace"]


def test_a_step_of_each_algorithm_writes_names_of_its_table_only():
    completion = Completion(
        token_ids=np.array([5, 6], np.int32),
        logprobs=np.array([-1.0, -1.0], np.float32),
        finish_reason="stop",
        weight_version=0,
    )
    parts = {"accuracy": 1.0, "format": 1.0, "language": 0.5, "helpful": 0.25}
    group = RolloutGroup(
        problem=Problem(id="1", domain="math", messages=()),
        prompt_ids=np.array([7], np.int32),
        completions=(completion, completion),
        rewards=(Reward(total=1.0, parts=parts), Reward(total=2.0, parts=parts)),
    )
    for kind in ALGORITHMS.values():
        algorithm = kind()
        result = StepResult(
            loss=1.0,
            grad_norm=1.0,
            learning_rate=1.0,
            metrics={name: 0.5 for name in (*kind.METRICS, "entropy", "tokens")},
            skipped=False,
        )
        row = step_metrics(
            [result],
            Sampled(groups=[group], kept=[group], rounds=1),
            [np.array([-1.0, 1.0])],
            algorithm,
            Mismatch().metrics(),
            step=0,
        )
        assert unknown_names(row, step_names(kind), ["helpful"]) == []
        assert set(kind.METRICS) <= set(row) and not set(kind.METRICS) & set(STEP_NAMES)


def test_names_that_no_metric_may_take_are_those_of_the_table():
    own = {name.partition("/")[0] for name in STEP_NAMES if name not in PARTS}
    assert own == RESERVED


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.config.__module__.split(".")[-2])
def test_every_name_of_a_table_is_in_the_code_that_writes(kind):
    """Each part of a name is a word of the stage's code; parts of rewards and phases come from elsewhere too."""
    folder = PACKAGE / Path(*kind.config.__module__.split(".")[1:-1])
    shared = [PACKAGE / "stages" / "common", PACKAGE / "rewards", PACKAGE / "observe" / "metrics.py"]
    files = [file for place in (folder, *shared) for file in ([place] if place.is_file() else place.glob("*.py"))]
    words = {
        node.value
        for file in files
        if file.name != "names.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    table = {**kind.metrics, **kind.summary}
    parts = {part for name in table for part in name.split("/")} - {PART}
    assert {part for part in parts if part not in words and f"{part.partition('@')[0]}@" not in words} == set()
    assert all(number.unit and number.meaning.endswith(".") for number in table.values())


def test_every_kind_of_stage_says_what_its_summary_holds():
    assert [kind.config.__name__ for kind in KINDS if not kind.summary] == []
