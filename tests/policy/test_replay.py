"""Routing replay: layers take the experts that they are told, under every layout, and learn from them.

The routes are random, so that no router would choose them: a token that went elsewhere would show in its logprob by
far. The oracle is transformers with routers that are told the same.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from grpo_oracle import hf_gradients
from oracles import random_sequences, save_model
from ranks import Results, run_launches
from replay_oracle import replay_values

from megatron_r1.config.shape import MoEShape
from megatron_r1.data.packing import RowLayout, pack
from megatron_r1.model.router import route
from megatron_r1.model.routing import ReplayedRouter, RoutedSeqParams
from megatron_r1.types import TrainingSequence

pytestmark = pytest.mark.timeout(1200)
FAST = {
    "deepseek_v3": {
        1: ["one", "one-mtp"],
        2: ["tp2", "ep2", "pp2", "vpp2", "cp2", "tp2ep2"],
        4: ["tp2pp2ep2-mtp"],
    },
    "qwen3_moe": {1: ["one"], 2: ["ep2"]},
}
SLOW = {
    "deepseek_v3": {1: ["one"], 2: ["cp2ep2"], 4: ["cp2tp2", "cp2pp2", "cp2tp2ep2", "cp2pp2ep2", "tp4ep2etp2"]},
    "qwen3_moe": {1: ["one"], 2: ["tp2", "pp2", "cp2"]},
}
LENGTHS = [64, 37, 52, 20, 44, 12, 30, 8]


def cases(*, mtp: bool = True) -> list:
    return [
        pytest.param((speed, model), name, id=f"{model}-{name}", marks=[pytest.mark.slow] if speed == "slow" else [])
        for speed, groups in (("fast", FAST), ("slow", SLOW))
        for model, launches in groups.items()
        for name in (name for names in launches.values() for name in names)
        if mtp or not name.endswith("-mtp")
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    @cache
    def of(group: tuple[str, str]) -> Results:
        speed, name = group
        folder = tmp_path_factory.mktemp("replay")
        model = save_model(name, folder, mtp_layers=int(name == "deepseek_v3"))
        oracle = replay_values(model, random_sequences(LENGTHS), folder)
        layouts = (FAST if speed == "fast" else SLOW)[name]
        launches = {ranks: [str(folder), ",".join(names)] for ranks, names in layouts.items()}
        found = Results(folder, layouts, run_launches("replay.py", launches, timeout_seconds=800))
        found["oracle"] = oracle
        return found

    return of


@pytest.mark.parametrize(("group", "layout"), cases())
def test_logprobs_are_those_of_the_experts_that_are_told(results, group, layout):
    for i, expected in enumerate(results(group)["oracle"]["logprobs"]):
        np.testing.assert_allclose(results(group)[layout][f"logprobs_{i}"], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("group", "layout"), cases(mtp=False))
@pytest.mark.parametrize("how", ["gradient", "recomputed"])
def test_gradients_are_those_of_the_experts_that_are_told(results, group, layout, how):
    """The routers' too: they learn by the weights of the experts that were told."""
    expected = hf_gradients(results(group)["oracle"]["gradients"])
    found = {key.split(":")[1]: value for key, value in results(group)[layout].items() if key.startswith(f"{how}:")}
    assert set(expected) <= set(found) and any("gate.weight" in name for name in expected)
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("how", ["gradient", "recomputed"])
def test_mtp_layers_choose_themselves_in_every_layout(results, how):
    found = results(("fast", "deepseek_v3"))
    one = {key: value for key, value in found["one-mtp"].items() if key.startswith("gradient:")}
    assert "gradient:model.layers.4.mlp.gate.weight" in one
    for key, gradient in one.items():
        scale = max(np.abs(gradient).max(), 1e-12)
        other = found["tp2pp2ep2-mtp"][key.replace("gradient:", f"{how}:")]
        np.testing.assert_allclose(other / scale, gradient / scale, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(("group", "layout"), cases())
def test_shares_of_routes_that_the_trainer_would_not_choose(results, group, layout):
    found, expected = results(group)[layout], results(group)["oracle"]["differ"]
    assert expected.min() > 0.5
    np.testing.assert_allclose(found["differ"], expected, rtol=1e-12)
    np.testing.assert_allclose(found["differ_in_training"], expected, rtol=1e-12)


@pytest.mark.parametrize(("group", "layout"), cases())
def test_routes_of_the_models_own_differ_nowhere_and_change_nothing(results, group, layout):
    """`natural`: what transformers' routers choose."""
    found = results(group)[layout]
    assert found["natural_differ"].tolist() == [0.0] * len(results(group)["oracle"]["differ"])
    assert found["natural_moves"] < 1e-6


@pytest.mark.parametrize(("group", "layout"), cases())
def test_the_reference_policy_chooses_itself(results, group, layout):
    assert results(group)[layout]["reference_as_without_routes"]


def test_routes_lie_at_their_tokens_positions():
    """Two sequences of 3 and 2 tokens, the second without routes; K = 2 experts in one sparse layer."""
    first = TrainingSequence(
        token_ids=np.array([5, 6, 7], np.int32),
        loss_mask=np.array([False, True, True]),
        token_weight=np.ones(3, np.float32),
        routes=np.array([[[0, 3]], [[255, 1]]], np.uint8),
    )
    second = TrainingSequence(
        token_ids=np.array([8, 9], np.int32), loss_mask=np.array([False, True]), token_weight=np.ones(2, np.float32)
    )
    ((row,),) = pack([first, second], RowLayout(tokens_per_microbatch=8, segment_multiple=4))
    assert row.routes is not None and row.routes.dtype == np.int16
    assert row.routes[:, 0].tolist() == [[0, 3], [255, 1], *[[-1, -1]] * 6]
    ((without,),) = pack([second], RowLayout(tokens_per_microbatch=8))
    assert without.routes is None


def test_our_own_router_takes_them_too():
    """DeepSeek-V3's groups, which Megatron cannot say: sigmoid scores of the told experts, normalised and scaled."""
    moe = MoEShape(
        num_experts=4, top_k=2, expert_ffn_size=8, num_shared_experts=0, num_groups=2, topk_groups=1, router="sigmoid",
        normalise_topk=True, routed_scaling=2.0, dense_layers=(),
    )  # fmt: skip
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    told = torch.tensor([[0, 3]])
    weights, experts = route(logits, None, moe, chosen=lambda own: told)
    low, high = 0.5, 1 / (1 + np.exp(-3.0))
    assert experts.tolist() == [[0, 3]]
    assert weights[0].tolist() == pytest.approx([2 * low / (low + high), 2 * high / (low + high)])
    weights[0, 0].backward()
    assert logits.grad is not None and logits.grad[0, [1, 2]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("replay", [False, True])
def test_a_token_without_routes_keeps_the_routers_choice(replay):
    router = ReplayedRouter(0)
    routes = torch.tensor([[[2, 3]], [[-1, -1]], [[1, 0]]], dtype=torch.int16)
    router.begin(torch.nn.Identity(), (), {"packed_seq_params": RoutedSeqParams(routes=routes, replay=replay)})
    own = torch.tensor([[0, 1], [2, 0], [0, 1]])
    assert router.choose(own).tolist() == ([[2, 3], [2, 0], [1, 0]] if replay else own.tolist())
    assert router.counts is not None and router.counts.tolist() == [1.0, 2.0], "[1, 0] and [0, 1] are the same experts"


def test_routes_of_another_number_of_tokens_are_refused(monkeypatch):
    router = ReplayedRouter(0)
    routes = torch.zeros(3, 1, 2, dtype=torch.int16)
    router.begin(torch.nn.Identity(), (), {"packed_seq_params": RoutedSeqParams(routes=routes)})
    monkeypatch.setattr("megatron.core.parallel_state.get_tensor_model_parallel_world_size", lambda: 1)
    with pytest.raises(RuntimeError, match="2 tokens in a layer, routes of 3, 1 ranks"):
        router.choose(torch.zeros(2, 2, dtype=torch.long))
