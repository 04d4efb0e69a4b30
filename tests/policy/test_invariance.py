"""Recorded rollouts train alike under every layout, with one, two and four optimizer steps on each.

Losses and gradient norms of every step are held against those of one rank. They include the MTP layers' loss, a KL
penalty against a reference that is renewed on the way, and token weights for the engine's difference; lengths are
uneven, so that ranks have different numbers of tokens.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import save_model
from ranks import Results, run_launches

from megatron_r1.config.shape import load_shape
from megatron_r1.rollout.recording import Header, RecordedStep, Recording
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup

pytestmark = pytest.mark.timeout(1200)
FAST = {1: ["one"], 2: ["dp2", "tp2", "ep2", "pp2", "cp2", "tp2ep2"]}
SLOW = {1: ["one"], 2: ["vpp2", "cp2ep2"], 4: ["tp2pp2ep2", "cp2tp2", "cp2pp2", "tp4ep2etp2", "dp4"]}
STEPS, MINIBATCHES, GROUPS = 3, (1, 2, 4), 4
WITHIN = 1e-5


def cases() -> list:
    return [
        pytest.param(speed, name, minibatches, id=f"{name}-{minibatches}", marks=[pytest.mark.slow] * (speed == "slow"))
        for speed, launches in (("fast", FAST), ("slow", SLOW))
        for name in (name for names in launches.values() for name in names if name != "one")
        for minibatches in MINIBATCHES
    ]


def record_rollouts(model, folder: Path) -> None:
    """Groups of two completions of 1 to 40 tokens, their logprobs those of the model with an engine's noise."""
    rng = np.random.default_rng(5)
    recording = Recording(folder)
    recording.begin(Header.of(folder, load_shape(folder), temperature=1.0, max_model_len=64, routes=False))
    for step in range(STEPS):
        groups = []
        for place in range(GROUPS):
            prompt = rng.integers(0, 101, int(rng.integers(3, 12))).astype(np.int32)
            completions = []
            for length in rng.integers(1, 41, 2):
                ids = rng.integers(0, 101, length).astype(np.int32)
                whole = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))
                with torch.no_grad():
                    scores = torch.log_softmax(model(whole[None]).logits[0, :-1].float(), dim=-1)
                own = scores.gather(1, whole[1:, None]).squeeze(1).numpy()[len(prompt) - 1 :]
                completions.append(
                    Completion(
                        token_ids=ids,
                        logprobs=(own + rng.normal(0, 0.1, length)).astype(np.float32),
                        finish_reason="stop",
                        weight_version=0,
                    )
                )
            groups.append(
                RolloutGroup(
                    problem=Problem(id=f"{step}-{place}", domain="math", messages=()),
                    prompt_ids=prompt,
                    completions=tuple(completions),
                    rewards=tuple(Reward(total=total, parts={"accuracy": total}) for total in (1.0, float(place) / 8)),
                )
            )
        recording.write(step, RecordedStep(groups=groups, kept=[True] * GROUPS))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    @cache
    def of(speed: str) -> Results:
        folder = tmp_path_factory.mktemp("invariance")
        record_rollouts(save_model("deepseek_v3", folder, mtp_layers=1), folder)
        layouts = FAST if speed == "fast" else SLOW
        launches = {ranks: [str(folder), ",".join(names)] for ranks, names in layouts.items()}
        return Results(folder, layouts, run_launches("invariance.py", launches, timeout_seconds=800))

    return of


@pytest.mark.parametrize(("speed", "layout", "minibatches"), cases())
def test_losses_and_gradient_norms_are_those_of_one_rank(results, speed, layout, minibatches):
    one, other = results(speed)["one"], results(speed)[layout]
    for name in ("loss", "grad_norm", "kl", "entropy", "mismatch", "effective_samples", "correction_weight"):
        expected, found = one[f"{minibatches}:{name}"], other[f"{minibatches}:{name}"]
        assert len(expected) == STEPS and np.isfinite(expected).all()
        np.testing.assert_allclose(found, expected, atol=WITHIN, rtol=WITHIN, err_msg=name)


def test_the_numbers_of_the_rollouts_differ(results):
    """So that a step which trained on nothing would show."""
    one = results("fast")["one"]
    norms = {float(norm) for minibatches in MINIBATCHES for norm in one[f"{minibatches}:grad_norm"]}
    assert len(norms) == len(MINIBATCHES) * STEPS
    assert abs(one["1:loss"]).min() > 100 * WITHIN and one["4:kl"][-1] > 100 * WITHIN
