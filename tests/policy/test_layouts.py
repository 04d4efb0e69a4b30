"""One DeepSeek-V3 under every layout: logits and gradients against transformers, and against each other."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from grpo_oracle import hf_gradients, oracle_values
from oracles import random_sequences, save_model
from ranks import Results, run_launches

pytestmark = pytest.mark.timeout(1200)
V3, MTP = "deepseek_v3", "-mtp"
FAST = {V3: {1: ["one"], 2: ["tp2", "ep2", "pp2", "vpp2", "cp2", "tp2ep2"], 4: ["tp2pp2ep2"]}}
"""By architecture and number of ranks; the first layout is what the others are held against."""
SLOW = {
    V3: {1: ["one"], 2: ["cp2ep2"], 4: ["cp2tp2", "cp2pp2", "cp2tp2ep2", "cp2pp2ep2", "tp4ep2etp2", "tp2ep2etp2"]},
    V3 + MTP: {1: ["one-mtp"], 2: ["cp2-mtp", "cp2ep2-mtp"], 4: ["tp2pp2ep2-mtp", "cp2tp2-mtp", "cp2pp2ep2-mtp"]},
    # Two key-value heads: with TP4 two ranks share one.
    **{
        dense: {
            1: ["one"],
            2: ["tp2nosp", "tp2", "pp2", "cp2"],
            4: ["tp2pp2", "cp2tp2dense", "cp2pp2", "tp4", "tp4nosp"],
        }
        for dense in ("qwen2", "qwen3", "llama")
    },
}
LENGTHS = [64, 37, 52, 20, 44, 12, 30, 8]


def cases(*, mtp: bool = False, first: bool = True) -> list:
    """(group, layout): with those that train MTP layers, and the layouts that others are held against, or without."""
    return [
        pytest.param((speed, model), name, id=f"{model}-{name}", marks=[pytest.mark.slow] if speed == "slow" else [])
        for speed, groups in (("fast", FAST), ("slow", SLOW))
        for model, launches in groups.items()
        for number, name in enumerate(name for names in launches.values() for name in names)
        if (mtp or not model.endswith(MTP)) and (first or number)
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every layout of a group computed, and as "oracle" the folder's oracle values; made when first asked for."""

    @cache
    def of(group: tuple[str, str]) -> Results:
        speed, name = group
        folder = tmp_path_factory.mktemp("layouts")
        model = save_model(name.removesuffix(MTP), folder, mtp_layers=int(name.startswith(V3)))
        sequences = random_sequences(LENGTHS)
        oracle = oracle_values(model, sequences, folder)
        layouts = (FAST if speed == "fast" else SLOW)[name]
        launches = {ranks: [str(folder), ",".join(names)] for ranks, names in layouts.items()}
        found = Results(folder, layouts, run_launches("layouts.py", launches, timeout_seconds=800))
        found["oracle"] = oracle
        return found

    return of


@pytest.mark.parametrize(("group", "layout"), cases(mtp=True))
def test_no_rank_fails(results, group, layout):
    assert results(group).failures.get(results(group).ranks[layout]) is None


@pytest.mark.parametrize(("group", "layout"), cases())
def test_packed_logits_equal_transformers(results, group, layout):
    for i, expected in enumerate(results(group)["oracle"]["logits"]):
        np.testing.assert_allclose(results(group)[layout][f"logits_{i}"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("group", "layout"), cases())
def test_unpacked_logits_equal_transformers(results, group, layout):
    np.testing.assert_allclose(
        results(group)[layout]["unpacked_logits"], results(group)["oracle"]["logits"][0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("group", "layout"), cases(mtp=True))
def test_logprobs_equal_transformers(results, group, layout):
    for i, expected in enumerate(results(group)["oracle"]["logprobs"]):
        np.testing.assert_allclose(results(group)[layout][f"logprobs_{i}"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("group", "layout"), cases(mtp=True))
def test_a_step_is_told_the_logprobs_that_it_trains_with(results, group, layout):
    """After it was stopped there, the exported weights are the folder's (the last test), so it had changed nothing."""
    found = results(group)[layout]
    for i in range(len(LENGTHS)):
        np.testing.assert_allclose(found[f"inspected_{i}"], found[f"logprobs_{i}"], atol=1e-6)


@pytest.mark.parametrize(("group", "layout"), cases(mtp=True))
def test_the_mismatch_is_of_all_ranks_tokens(results, group, layout):
    """Held against transformers' logprobs of all sequences at once, in float64."""
    found, oracle = results(group)[layout], results(group)["oracle"]
    stored = np.load(results(group).folder / "sequences.npz")
    own, engine, masks = (
        np.concatenate([values(i) for i in range(len(LENGTHS))])
        for values in (
            lambda i: np.asarray(oracle["logprobs"][i], np.float64),
            lambda i: stored[f"{i}.behaviour_logprobs"].astype(np.float64),
            lambda i: stored[f"{i}.loss_mask"],
        )
    )
    difference = (own - engine)[masks]
    weights = np.exp(difference)
    expected = {
        "mismatch": np.abs(difference).mean(),
        "mismatch_max": np.abs(difference).max(),
        "mismatch_kl_rollout": (weights - 1 - difference).mean(),
        "mismatch_kl_trainer": (weights * difference - weights + 1).mean(),
        "effective_samples": weights.sum() ** 2 / (len(weights) * (weights**2).sum()),
    }
    assert {name: float(found[name]) for name in expected} == pytest.approx(expected, rel=2e-4)
    exact = np.quantile(np.abs(difference), 0.99, method="inverted_cdf")
    assert exact * 0.999 <= found["mismatch_p99"] <= exact * 1.011


@pytest.mark.parametrize(("group", "layout"), cases())
def test_grpo_gradients_equal_transformers_autograd(results, group, layout):
    """Relative to each tensor's largest gradient; every parameter of the decoder has one."""
    check_gradients(results(group), layout, "gradients", "gradient:")


@pytest.mark.parametrize(("group", "layout"), cases())
def test_a_sequences_own_ratio_has_transformers_gradient(results, group, layout):
    """GSPO: the mean over a sequence's tokens is over context-parallel ranks too, its gradient through every token."""
    check_gradients(results(group), layout, "gspo", "gspo:")


def check_gradients(found: dict, layout: str, oracle: str, prefix: str) -> None:
    expected = hf_gradients(found["oracle"][oracle])
    computed = {key.split(":")[1]: value for key, value in found[layout].items() if key.startswith(prefix)}
    assert set(expected) <= set(computed)
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(computed[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("group", "layout"), cases(mtp=True, first=False))
def test_gradients_agree_with_one_rank(results, group, layout):
    name = "one-mtp" if group[1].endswith(MTP) else "one"
    one = {key: value for key, value in results(group)[name].items() if key.startswith("gradient:")}
    assert name == "one" or "gradient:model.layers.4.eh_proj.weight" in one
    for key, gradient in one.items():
        scale = max(np.abs(gradient).max(), 1e-12)
        np.testing.assert_allclose(results(group)[layout][key] / scale, gradient / scale, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(("group", "layout"), cases(mtp=True))
def test_exported_weights_are_the_folders_bit_for_bit(results, group, layout):
    assert results(group)[layout]["export_difference"] == 0.0
