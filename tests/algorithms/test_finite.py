"""Losses over the whole range of their inputs: finite values and gradients, equal to numpy's in float64.

The oracles below are the formulas of docs/grpo.md written out, with the bounds as they are stated there.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from megatron_r1.algorithms import CISPO, DAPO, GRPO, GSPO, DrGRPO, OnPolicyDistill
from megatron_r1.algorithms import token_losses as losses
from megatron_r1.algorithms.base import Tokens
from megatron_r1.algorithms.clip import Clip
from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.group_advantage import REWARD_BOUND, centred_rewards, group_advantages, usable_rewards
from megatron_r1.algorithms.kl import KL
from megatron_r1.model.policy_model import TokenScores, TokenValues
from megatron_r1.stages.grpo.loss import policy_loss
from megatron_r1.stages.reward_model.loss import bradley_terry, value_loss
from megatron_r1.stages.sft.loss import MTP_LOSS_WEIGHT, mtp_loss, sft_loss

B = losses.LOG_RATIO_BOUND
N = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

usual = st.floats(-30, 0, width=32)
logprob = st.one_of(
    usual, st.floats(-(2.0**127), 0, width=32), st.sampled_from([-np.inf, -0.0, -89.0, -120.0, -9999.0])
)
logprobs = st.lists(logprob, min_size=N, max_size=N)
advantage = st.one_of(st.floats(-4, 4, width=32), st.sampled_from([0.0, 1.0, -1.0]))
advantages = st.lists(advantage, min_size=N, max_size=N)
dual = st.sampled_from([None, 1.5, 3.0])
dtype = st.sampled_from(sorted(DTYPES))
CASES = {
    "grpo": GRPO(kl=KL(coef=0.01)),
    "k2": GRPO(kl=KL(coef=0.01, estimator="k2")),
    "dr_grpo": DrGRPO(),
    "dapo": DAPO(clip=Clip(high=0.28, dual=3.0), overlong_share=0.0),
    "tis": GRPO(kl=KL(coef=0.0), correction=Correction(weight="token")),
    "icepop": DAPO(correction=Correction(weight="token", beyond="mask", high=5.0), overlong_share=0.0),
    "decoupled": GRPO(correction=Correction(weight="token", high=1e9)),
    "coupled": DrGRPO(correction=Correction(ratio_against="rollout")),
    "sequence": GRPO(kl=KL(coef=0.01), correction=Correction(weight="sequence")),
    "sequence mask": DrGRPO(correction=Correction(weight="sequence", beyond="mask")),
    "gspo mask": GSPO(clip=Clip(high=0.28), correction=Correction(weight="geometric", beyond="mask", low=0.9)),
    "gspo coupled": GSPO(clip=Clip(high=0.28), correction=Correction(ratio_against="rollout")),
    "cispo tis": CISPO(correction=Correction(weight="token")),
    "cispo coupled": CISPO(correction=Correction(ratio_against="rollout")),
    "gspo": GSPO(clip=Clip(high=0.28), kl=KL(coef=0.01)),
    "cispo": CISPO(),
}


def tensor(values, name: str = "fp32") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).to(DTYPES[name])


def exact(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().numpy()


# ---- the formulas in float64


def oracle_log_ratio(a: np.ndarray, b: np.ndarray, bound: float = B) -> tuple[np.ndarray, np.ndarray]:
    """Bounded difference, and where it depends on its inputs at all."""
    nothing = np.isneginf(a) & np.isneginf(b)
    with np.errstate(invalid="ignore"):
        return np.clip(np.where(nothing, 0.0, a - b), -bound, bound), ~nothing


def oracle_surrogate(d, depends, A, clip: Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of log-ratios d: value, gradient, and how far the ratio is from where a clip begins (the gradient jumps)."""
    low, high, c = clip.low, clip.high, clip.dual
    r = np.exp(d)
    objective = np.minimum(r * A, np.clip(r, 1 - low, 1 + high) * A)
    free = np.where(A > 0, r < 1 + high, r > 1 - low) & depends
    edges = [1 - low, 1 + high]
    if c is not None:
        objective = np.where(A < 0, np.maximum(objective, c * A), objective)
        free &= (A >= 0) | (r < c)
        edges.append(c)
    return -objective, -A * r * free, np.min([np.abs(r / edge - 1) for edge in edges], axis=0)


def oracle_k3(new, reference) -> tuple[np.ndarray, np.ndarray]:
    d, depends = oracle_log_ratio(reference, new)
    return np.expm1(d) - d, -np.expm1(d) * depends


def close(found: torch.Tensor, expected: np.ndarray, rtol: float, atol: np.ndarray | float = 1e-30) -> None:
    assert torch.isfinite(found).all()
    error = np.abs(exact(found) - expected)
    assert (error <= rtol * np.abs(expected) + atol).all(), (exact(found), expected)


# ---- one token


@given(logprobs, logprobs, advantages, dual, dtype)
def test_surrogate(new, old, A, c, name):
    x, y, A = tensor(new, name).requires_grad_(), tensor(old, name), tensor(A)
    value, binds = losses.clipped_surrogate(losses.log_ratio(x, y), A, Clip(high=0.28, dual=c))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    expected, slope, distance = oracle_surrogate(
        *oracle_log_ratio(exact(x), exact(y)), exact(A), Clip(high=0.28, dual=c)
    )
    close(value, expected, rtol=1e-5)
    clear = distance > 1e-5
    assert torch.isfinite(gradient).all()
    close(gradient[torch.from_numpy(clear)], slope[clear], rtol=1e-5 if name == "fp32" else 2**-8)
    assert (gradient[binds] == 0).all()


@given(logprobs, logprobs, dtype)
def test_k3(new, reference, name):
    x, y = tensor(new, name).requires_grad_(), tensor(reference, name)
    value = losses.kl_estimate(x, y)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    expected, slope = oracle_k3(exact(x), exact(y))
    d = np.abs(oracle_log_ratio(exact(x), exact(y))[0])
    close(value, expected, rtol=1e-5, atol=2e-7 * d + 1e-30)
    close(gradient, slope, rtol=1e-5 if name == "fp32" else 2**-8, atol=2e-7)  # autograd takes 1 from exp(d)
    assert value.max() <= np.exp(B)


def test_the_tokens_of_the_reports():
    """Reference - policy 89, 120 and 29.9; a ratio of exp(120) at advantages 0, 1 and -1."""
    policy = tensor([-89.0, -120.0, -29.9]).requires_grad_()
    value = losses.kl_estimate(policy, torch.zeros(3))
    (gradient,) = torch.autograd.grad(value.sum(), policy)
    assert value.tolist() == pytest.approx([np.exp(20) - 21] * 3, rel=1e-6)
    assert gradient.tolist() == pytest.approx([1 - np.exp(20)] * 3, rel=1e-6), "the token is pulled back"
    policy = torch.zeros(3).requires_grad_()
    for c, worst, slope in ((None, np.exp(20), np.exp(20)), (3.0, 3.0, 0.0)):
        value, binds = losses.clipped_surrogate(
            losses.log_ratio(policy, tensor([-120.0] * 3)), tensor([0.0, 1.0, -1.0]), Clip(dual=c)
        )
        (gradient,) = torch.autograd.grad(value.sum(), policy)
        assert value.tolist() == pytest.approx([0.0, -1.2, worst])
        assert gradient.tolist() == pytest.approx([0.0, 0.0, slope])
        assert binds.tolist() == [False, True, c is not None]
    row = tokens_of(torch.zeros(1), behaviour_logprobs=tensor([-np.inf]))
    assert losses.correction_weight(row, Correction(weight="token"))[0].tolist() == [2.0]


def test_a_nan_is_not_hidden():
    bad = tensor([np.nan]).requires_grad_()
    for value in (
        losses.kl_estimate(bad, torch.zeros(1)),
        losses.clipped_surrogate(losses.log_ratio(bad, torch.zeros(1)), tensor([-1.0]), Clip(dual=3.0))[0],
        losses.weighted_sum(bad, torch.ones(1)),
        losses.reverse_kl_loss(bad, torch.zeros(1))[0],
    ):
        assert torch.isnan(value).all()


def tokens_of(logprobs: torch.Tensor, **given: torch.Tensor) -> Tokens:
    zeros = torch.zeros_like(logprobs.detach())
    fields = ("old_logprobs", "behaviour_logprobs", "reference_logprobs", "teacher_logprobs", "advantages")
    return Tokens(
        logprobs=logprobs,
        mask=zeros == 0,
        sequence_mean=lambda values: values,
        sequence_sum=lambda values: values,
        **{name: given.get(name, zeros) for name in fields},
    )


# ---- below the bounds nothing has changed


@given(st.integers(0, 2**31), st.floats(0.01, 6))
def test_below_the_bounds_every_bit_is_that_of_the_plain_formula(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(64, generator=generator) * spread / 2  # noqa: E731
    new = -draw().abs()
    old, reference, A = new + draw().clamp(-9, 9), new + draw().clamp(-9, 9), draw()

    def plain(x: torch.Tensor) -> torch.Tensor:
        ratio = torch.exp(x - old)
        gap = reference - x
        weight = torch.exp(old - reference).clamp(max=2.0).detach()
        surrogate = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) * weight
        return surrogate + 0.05 * (torch.expm1(gap) - gap)

    def ours(x: torch.Tensor) -> torch.Tensor:
        row = tokens_of(x, old_logprobs=old, advantages=A, reference_logprobs=reference, behaviour_logprobs=reference)
        return losses.clipped_loss(row, Clip(), kl=KL(coef=0.05), correction=Correction(weight="token")).loss

    def plain_distillation(x: torch.Tensor) -> torch.Tensor:
        return x * (x.detach() - reference)

    pairs = (
        (plain, ours),
        (plain_distillation, lambda x: losses.reverse_kl_loss(x, reference)[0]),
        (lambda x: (x * A).sum(), lambda x: losses.weighted_sum(x, A)),
    )
    for formula, function in pairs:
        results = []
        for each in (formula, function):
            x = new.clone().requires_grad_()
            value = each(x)
            results.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


# ---- whole losses, as the stages take them


def scores_of(x: torch.Tensor, mtp: tuple = (), weights: tuple = ()) -> TokenScores:
    return TokenScores(x[None], torch.zeros(1, len(x)), tuple(m[None] for m in mtp), tuple(w[None] for w in weights))


def batch_of(**arrays) -> SimpleNamespace:
    names = ("old_logprobs", "behaviour_logprobs", "reference_logprobs", "teacher_logprobs", "advantages")
    given_ = dict.fromkeys(names, np.zeros(N, np.float32)) | SEQUENCE_FUNCTIONS | arrays
    return SimpleNamespace(
        **{
            name: value if callable(value) else torch.as_tensor(np.asarray(value))[None]
            for name, value in given_.items()
        }
    )


SEQUENCES = (slice(0, 2), slice(2, 6))


def sequence_mean(values: torch.Tensor) -> torch.Tensor:
    means = torch.zeros_like(values)
    for place in SEQUENCES:
        means[0, place] = values[0, place].double().mean().to(values.dtype)
    return means


def sequence_sum(values: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros_like(values)
    for place in SEQUENCES:
        sums[0, place] = values[0, place].double().sum().to(values.dtype)
    return sums


SEQUENCE_FUNCTIONS = {"sequence_mean": sequence_mean, "sequence_sum": sequence_sum}


def oracle_weight(correction: Correction, old, behaviour) -> tuple[np.ndarray, float]:
    """Weights in float64, and how far the nearest of them is from where one is truncated or masked."""
    if correction.weight in ("none", "auto"):  # the rows are not stale
        return np.ones(N), np.inf
    d = oracle_log_ratio(old, behaviour)[0]
    for place in SEQUENCES:
        if correction.weight == "sequence":
            d[place] = np.clip(d[place].sum(), -B, B)
        if correction.weight == "geometric":
            d[place] = d[place].mean()
    w, edges = np.exp(d), [correction.high]
    if correction.beyond == "truncate":
        return np.minimum(w, correction.high), np.inf
    edges.append(correction.low)
    kept = (w >= correction.low) & (w <= correction.high)
    return np.where(kept, w, 0.0), float(np.min([np.abs(w / edge - 1) for edge in edges]))


def oracle_loss(algorithm, new, old, reference, behaviour, A) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value and gradient of each token's loss in float64, and the distance to the nearest jump of the gradient."""
    factor, from_edge = oracle_weight(algorithm.correction, old, behaviour)
    assume(from_edge > 1e-4)
    d, depends = oracle_log_ratio(new, behaviour if algorithm.correction.ratio_against == "rollout" else old)
    if isinstance(algorithm, CISPO):
        r = np.exp(d)
        weight = np.minimum(r, algorithm.ratio_cap) * factor
        return -weight * A * np.maximum(new, losses.LOGPROB_FLOOR), -weight * A, np.full(N, np.inf)
    if isinstance(algorithm, GSPO):
        d = np.concatenate([*(np.full(place.stop - place.start, d[place].mean()) for place in SEQUENCES), [0.0, 0.0]])
    value, slope, distance = oracle_surrogate(d, depends, A, algorithm.clip)
    value, slope = value * factor, slope * factor
    if algorithm.needs.reference:
        kl = algorithm.kl
        estimate, kl_slope = oracle_k3(new, reference)
        if kl.estimator == "k2":
            gap, depends = oracle_log_ratio(reference, new)
            estimate, kl_slope = gap**2 / 2, -gap * depends
        value, slope = value + kl.coef * estimate, slope + kl.coef * kl_slope
    return value, slope, distance


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=60)
@given(
    new=logprobs, old=logprobs, reference=logprobs, behaviour=logprobs,
    rewards=st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), steps=st.sampled_from([1, 2]),
)  # fmt: skip
def test_every_algorithms_loss(name, new, old, reference, behaviour, rewards, steps):
    """Two sequences of 2 and 4 trained tokens, then two tokens of padding: value and gradient of the step's loss."""
    algorithm, lengths = CASES[name], [2, 4]
    weights = algorithm.token_weights(lengths, 16)
    gains = algorithm.advantages(np.array(rewards))[:2]
    w, A = (np.repeat(np.append(values, 0.0), [*lengths, 2]).astype(np.float32) for values in (weights, gains))
    mask = w > 0
    x = tensor(new).requires_grad_()
    fields = {"old_logprobs": old, "reference_logprobs": reference, "behaviour_logprobs": behaviour}
    fields = {name: np.where(mask, np.float32(values), np.float32(0)) for name, values in fields.items()}
    result = policy_loss(algorithm, own_is_old=steps == 1)(
        scores_of(x),
        batch_of(loss_mask=mask, token_weight=w, advantages=A, **fields),  # pyright: ignore
    )
    (gradient,) = torch.autograd.grad(result.loss, x)

    new64 = exact(x)
    old64, reference64, behaviour64 = (values.astype(np.float64) for values in fields.values())
    old64 = new64 if steps == 1 else old64
    value, slope, distance = oracle_loss(algorithm, new64, old64, reference64, behaviour64, A.astype(np.float64))
    terms = np.where(mask, value * w.astype(np.float64), 0.0)
    assert torch.isfinite(result.loss)
    assert abs(float(result.loss) - terms.sum()) <= 1e-5 * np.abs(terms).sum() + 1e-6
    assert torch.isfinite(gradient).all()
    clear = (distance > 1e-5) | ~mask
    close(gradient[torch.from_numpy(clear)], np.where(mask, slope * w, 0.0)[clear], rtol=1e-4, atol=1e-6)
    for metric in algorithm.METRICS:
        assert np.isfinite(float(result.sums[metric]))


@given(logprobs, logprobs, st.lists(st.floats(0, 1, width=32), min_size=N, max_size=N))
def test_distillation(student, teacher, weights):
    w = np.float32(weights)
    x = tensor(student).requires_grad_()
    y = np.where(w > 0, np.float32(teacher), np.float32(0))
    result = policy_loss(OnPolicyDistill(), own_is_old=True)(
        scores_of(x),
        batch_of(loss_mask=w > 0, token_weight=w, teacher_logprobs=y, behaviour_logprobs=y),  # pyright: ignore
    )
    (gradient,) = torch.autograd.grad(result.loss, x)
    gap, _ = oracle_log_ratio(exact(x), y.astype(np.float64), losses.TEACHER_GAP_BOUND)
    terms = np.where(w > 0, w * np.maximum(exact(x), losses.LOGPROB_FLOOR) * gap, 0.0)
    assert abs(float(result.loss) - terms.sum()) <= 1e-5 * np.abs(terms).sum() + 1e-30
    close(gradient, np.where(w > 0, w * gap, 0.0), rtol=1e-6)
    assert np.isfinite(float(result.sums["kl"]))


@given(logprobs, logprobs, st.lists(st.floats(0, 1, width=32), min_size=N, max_size=N))
def test_next_token_loss_with_mtp(own, further, weights):
    w = tensor(weights)
    x, m = tensor(own).requires_grad_(), tensor(further).requires_grad_()
    batch = batch_of(token_weight=w, loss_mask=w > 0)
    result = sft_loss(scores_of(x, (m, m), (w, w)), batch)  # pyright: ignore
    slopes = torch.autograd.grad(result.loss, (x, m))
    floored = [np.maximum(exact(values), losses.LOGPROB_FLOOR) for values in (x, m)]
    terms = -exact(w) * (floored[0] + MTP_LOSS_WEIGHT * floored[1])
    assert abs(float(result.loss) - terms.sum()) <= 1e-5 * np.abs(terms).sum() + 1e-30
    for slope, factor in zip(slopes, (1.0, MTP_LOSS_WEIGHT), strict=True):
        close(slope, -exact(w) * factor, rtol=1e-6, atol=1e-44)
    assert mtp_loss(scores_of(x)) == 0.0


finite = st.one_of(st.floats(-50, 50, width=32), st.floats(-(2.0**127), 2.0**127, width=32))


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=6))
def test_reward_model_loss(pairs):
    chosen, rejected = np.float32(pairs).T
    with np.errstate(over="raise", invalid="raise"):
        loss, gradient = bradley_terry(chosen, rejected)
    difference = torch.tensor(chosen, dtype=torch.float64) - torch.tensor(rejected, dtype=torch.float64)
    difference.requires_grad_()
    expected = -torch.nn.functional.logsigmoid(difference).mean()
    (slope,) = torch.autograd.grad(expected, difference)
    assert np.isfinite(loss) and loss == pytest.approx(float(expected), rel=1e-12, abs=1e-300)
    np.testing.assert_allclose(gradient, slope.numpy(), rtol=1e-10, atol=1e-300)
    values = torch.from_numpy(np.float32(chosen)).requires_grad_()
    w = np.float32(gradient)
    step = value_loss(TokenValues(values[None]), batch_of(loss_mask=w != 0, token_weight=w))  # pyright: ignore
    (found,) = torch.autograd.grad(step.loss, values)
    close(found, w.astype(np.float64), rtol=0.0)


# ---- advantages

reward = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0]),
    st.floats(-10, 10),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([np.nan, np.inf, -np.inf, 1.0 + 1e-7]),
)


def advantages_of(rewards: np.ndarray, kind: str, floor: float) -> np.ndarray:
    return centred_rewards(rewards) if kind == "dr_grpo" else group_advantages(rewards, deviation_floor=floor)


@given(st.lists(reward, min_size=1, max_size=16), st.sampled_from(["grpo", "dr_grpo"]), st.sampled_from([0.0, 1e-4]))
@example([5.676982026691845e16] * 3, "grpo", 0.0)
def test_advantages_of_any_rewards(rewards, kind, floor):
    rewards = np.array(rewards)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = advantages_of(rewards, kind, floor)
    good = np.array([np.isfinite(r) and abs(r) <= REWARD_BOUND for r in rewards])
    if good.sum() < min(2, len(rewards)):
        good[:] = False
    assert (usable_rewards(rewards) == good).all() and (np.isfinite(found) == good).all()
    if not good.any():
        return
    rest = rewards[good]
    # The mean of large equal numbers may be another one.
    centred = rest - np.mean(rest) if np.ptp(rest) else np.zeros_like(rest)
    if kind == "grpo":
        deviation = np.sqrt(np.mean((rest - np.mean(rest)) ** 2))
        centred = np.zeros_like(rest) if deviation < 1e-8 else centred / max(deviation, floor)
        assert np.abs(found[good]).max() <= np.sqrt(len(rest)) * (1 + 1e-9)
    np.testing.assert_allclose(found[good], centred, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found[good], advantages_of(rest, kind, floor))


def test_scores_that_differ_by_rounding_give_hardly_any_advantage():
    scores = np.array([0.5, 0.5, 0.5, 0.5 + 1e-7])
    assert np.abs(group_advantages(scores)).max() == pytest.approx(np.sqrt(3), rel=1e-6)
    assert np.abs(group_advantages(scores, deviation_floor=1e-4)).max() == pytest.approx(0.75e-3, rel=1e-6)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=2, max_size=64))
def test_verdicts_of_rules_keep_their_advantages_to_the_bit(rewards):
    np.testing.assert_array_equal(
        group_advantages(np.array(rewards), deviation_floor=GRPO().deviation_floor),
        group_advantages(np.array(rewards)),
    )
