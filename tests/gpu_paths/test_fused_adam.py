"""Transformer Engine's FusedAdam goes on after a restart as if there had been none, with moments in fp32 or in bf16
(Megatron's precision-aware optimizer). Its kernel is replaced by the same arithmetic in torch; counting, state and what
Megatron does with them are theirs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ranks import run_launches
from safetensors.torch import load_file

from megatron_r1.recipes.tiny import TINY_V3

pytestmark = [pytest.mark.gpu_paths, pytest.mark.timeout(900)]
JOBS = {1: ["one:save", "one:one"], 2: ["ep2:save", "ep2:ep2", "tp2:ep2"]}
MOMENTS = {"te": torch.float32, "te-bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=list(MOMENTS))
def adam(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(transformer_engine, adam, tmp_path_factory):
    made = tmp_path_factory.mktemp("fused_adam")
    (made / "config.json").write_bytes((TINY_V3 / "config.json").read_bytes())
    run(made, adam, JOBS)
    return made


def run(folder, adam: str, jobs: dict[int, list[str]]) -> None:
    failures = run_launches("fused_adam.py", {ranks: [str(folder), adam, *words] for ranks, words in jobs.items()})
    assert not failures, next(iter(failures.values()))


def found(folder, job: str) -> dict[str, np.ndarray]:
    return dict(np.load(folder / f"{job}.npz"))


@pytest.mark.parametrize("layout", ["one", "ep2"])
def test_the_next_updates_are_those_of_the_run_that_went_on(folder, layout):
    straight, resumed = (found(folder, f"{layout}-{start}") for start in ("save", layout))
    assert straight.keys() == resumed.keys() and len(straight) > 100
    for name in straight:
        np.testing.assert_array_equal(straight[name], resumed[name], err_msg=name)


@pytest.mark.parametrize("layout", ["one", "ep2"])
def test_the_steps_taken_and_the_moments_are_saved(folder, adam, layout):
    saved = folder / f"saved-{layout}"
    assert json.loads((saved / "policy.json").read_text())["adam_steps"] == 2.0
    tensors = {key: value for file in saved.glob("state-*") for key, value in load_file(file).items()}
    kinds = {kind: {t.dtype for key, t in tensors.items() if f"|{kind}|" in key} for kind in ("master", "exp_avg")}
    assert kinds == {"master": {torch.float32}, "exp_avg": {MOMENTS[adam]}}


def test_another_layout_goes_on_from_the_same_weights(folder):
    straight, cut_anew = found(folder, "ep2-save"), found(folder, "tp2-ep2")
    check_same_middle(straight, cut_anew)
    # A step counted from 1 again would be twice as long; another order of sums is a rounding.
    assert share_of_the_way(straight, cut_anew) < 0.1


def test_a_run_may_go_on_with_moments_of_the_other_precision(folder, adam):
    """Of a bf16 model, whose weights are the same before and after; only moments are rounded."""
    if adam != "te-bf16":
        pytest.skip("it is one test for both")
    run(folder, "te-half", {1: ["one:one"]})
    bf16, fp32 = found(folder, "one-save"), found(folder, "one-one")
    check_same_middle(bf16, fp32)
    assert 0 < share_of_the_way(bf16, fp32) < 0.1


def check_same_middle(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name in one:
        if name.startswith("middle "):
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def share_of_the_way(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """How far the weights are apart, as a share of how far they have come since the checkpoint; sums of |.|."""
    names = [name for name in one if " " not in name and not name.endswith("bias")]  # biases take steps of one size
    moved = sum(np.abs(one[name] - one[f"middle {name}"]).sum() for name in names)
    return sum(np.abs(one[name] - other[name]).sum() for name in names) / moved
