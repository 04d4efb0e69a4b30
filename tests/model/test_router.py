"""Our router against transformers' own, with gradients, and when Megatron's is left in place."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_r1.config.shape import MoEShape
from megatron_r1.model.router import megatron_routes_alike, route

SIGMOID = MoEShape(
    num_experts=16, top_k=8, expert_ffn_size=8, num_shared_experts=1, dense_layers=frozenset(), router="sigmoid",
    num_groups=8, topk_groups=4, routed_scaling=2.5, normalise_topk=True,
)  # fmt: skip
SOFTMAX = dataclasses.replace(
    SIGMOID, router="softmax", num_groups=1, topk_groups=1, routed_scaling=1.0, num_shared_experts=0
)


def changed(shape: MoEShape, **fields: object) -> MoEShape:
    return dataclasses.replace(shape, **fields)  # pyright: ignore[reportArgumentType]


CASES = {
    "V3": SIGMOID,
    "k3": changed(SIGMOID, top_k=3),
    "k6 g4 tg2": changed(SIGMOID, top_k=6, num_groups=4, topk_groups=2),
    "k4 g2 tg1": changed(SIGMOID, top_k=4, num_groups=2, topk_groups=1),
    "k1": changed(SIGMOID, top_k=1),
    "unnormalised": changed(SIGMOID, normalise_topk=False),
    "no groups, k1": changed(SIGMOID, top_k=1, num_groups=1, topk_groups=1),
    "softmax": SOFTMAX,
    "softmax, k1": changed(SOFTMAX, top_k=1),
    "softmax, unnormalised": changed(SOFTMAX, normalise_topk=False),
}


def theirs(moe: MoEShape, hidden_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor):
    """transformers' (weights [T, K], experts [T, K])."""
    import transformers as hf
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    common = {
        "hidden_size": hidden_TH.shape[1], "num_experts_per_tok": moe.top_k, "norm_topk_prob": moe.normalise_topk,
    }  # fmt: skip
    if moe.router == "softmax":
        router = Qwen3MoeTopKRouter(hf.Qwen3MoeConfig(num_experts=moe.num_experts, **common))
    else:
        groups = {"n_group": moe.num_groups, "topk_group": moe.topk_groups}
        scale = {"routed_scaling_factor": moe.routed_scaling, "n_routed_experts": moe.num_experts}
        router = DeepseekV3TopkRouter(hf.DeepseekV3Config(**groups, **scale, **common))
        router.e_score_correction_bias.copy_(bias_E)
    router.weight = torch.nn.Parameter(weight_EH)
    _, weights, experts = router(hidden_TH)
    gradient = torch.autograd.grad((weights * value_of(experts)).sum(), router.weight)[0]
    return weights.detach(), experts, gradient


def value_of(experts: torch.Tensor) -> torch.Tensor:
    """A number for each expert, so that the loss does not depend on their order."""
    return (experts + 1).sqrt()


def dense(weights: torch.Tensor, experts: torch.Tensor, number: int) -> torch.Tensor:
    return torch.zeros(len(weights), number).scatter(1, experts, weights)


@pytest.mark.parametrize("name", CASES)
def test_weights_choice_and_gradient_are_transformers(name):
    moe = CASES[name]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 24, generator=generator)
    weight = torch.randn(moe.num_experts, 24, generator=generator) * 0.3
    bias = torch.randn(moe.num_experts, generator=generator) * 0.2
    expected, expected_experts, expected_gradient = theirs(moe, hidden, weight.clone(), bias)
    weight.requires_grad_()
    weights, experts = route(hidden @ weight.T, bias if moe.router == "sigmoid" else None, moe)
    (gradient,) = torch.autograd.grad((weights * value_of(experts)).sum(), weight)
    torch.testing.assert_close(
        dense(weights.detach(), experts, moe.num_experts), dense(expected, expected_experts, moe.num_experts)
    )
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "alike"),
    [("V3", True), ("softmax", True), ("softmax, unnormalised", True)]
    + [(name, False) for name in CASES if name not in ("V3", "softmax", "softmax, unnormalised", "k6 g4 tg2")],
)
def test_megatrons_router_is_left_where_it_computes_the_same(name, alike):
    assert megatron_routes_alike(CASES[name]) == alike


def test_without_groups_megatrons_router_is_left():
    assert megatron_routes_alike(changed(SIGMOID, top_k=3, num_groups=1, topk_groups=1))
    assert megatron_routes_alike(changed(SIGMOID, top_k=3, num_groups=4, topk_groups=4))
    assert not megatron_routes_alike(changed(SIGMOID, top_k=6, num_groups=4, topk_groups=2))
