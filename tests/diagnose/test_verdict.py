"""From differences by token to modules that depart: numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_r1.activations import weights_of
from megatron_r1.config import load_shape
from megatron_r1.diagnose.report import Diagnosis, grouped, table, verdict
from megatron_r1.diagnose.verdict import BOUNDS, Module, TokenDifference, judge, suspects, weights_behind
from megatron_r1.recipes.tiny import TINY_V3
from megatron_r1.weights.table import build_table


def difference(error: list[float], size: list[float], positions: list[int] | None = None) -> TokenDifference:
    places = np.arange(len(error)) if positions is None else np.asarray(positions)
    return TokenDifference(positions=places, error=np.asarray(error, float), size=np.asarray(size, float))


def test_a_small_token_counts_as_the_root_mean_square_of_all() -> None:
    # Sizes 7, 1, 5, 5: their squares' mean is 25, so 1 counts as 5.
    found = difference([0.7, 0.5, 0.0, 1.0], [7, 1, 5, 5])
    np.testing.assert_allclose(found.relative, [0.1, 0.1, 0.0, 0.2])
    assert found.worst == pytest.approx(0.2)


def test_outputs_of_zero_agree_with_zeros_only() -> None:
    assert difference([0, 0], [0, 0]).worst == 0
    assert difference([0, 1e-30], [0, 0]).worst > 1


@pytest.mark.parametrize(("dtype", "below", "above"), [("fp32", 3e-5, 3.1e-5), ("bf16", 0.031, 0.0313)])
def test_the_bound_is_of_the_precision(dtype, below, above) -> None:
    for relative, departs in ((below, False), (above, True), (float("nan"), True), (float("inf"), True)):
        fed = {"model.norm": difference([0.0, relative, 0.0], [1, 1, 1], [3, 8, 9])}
        (module,) = judge(fed, fed, num_layers=1, dtype=dtype, chosen={})
        assert module.departs is departs and module.position == 8 and module.bound == BOUNDS[dtype]


def test_modules_come_in_the_order_in_which_they_run() -> None:
    parts = ["mlp", "mlp.experts", "self_attn", "mlp.gate"]
    names = ["lm_head", "model.norm", *(f"model.layers.{n}.{part}" for n in (10, 2) for part in parts)]
    names += ["model.embed_tokens", "model.layers.2.input", "model.norm.input"]
    fed = {name: difference([0.0], [1.0]) for name in names}
    found = [module.name for module in judge(fed, fed, num_layers=11, dtype="fp32", chosen={})]
    layers = [f"model.layers.{n}.{part}" for n in (2, 10) for part in ("self_attn", "mlp.gate", "mlp.experts", "mlp")]
    assert found == ["model.embed_tokens", *layers, "model.norm", "lm_head"]


def test_other_experts_are_a_share_of_the_tokens() -> None:
    error = [0.0] * 100
    name = "model.layers.0.mlp.experts"
    for others, departs in ((1, False), (2, True)):
        fed = {name: difference([2.0] * others + error[others:], [4.0] * 100)}
        own = {name: difference([1.0] * 30 + error[30:], [4.0] * 100)}
        (module,) = judge(fed, own, num_layers=1, dtype="bf16", chosen={})
        assert (module.difference, module.drift, module.departs) == (others / 100, 0.3, departs)


def test_experts_that_no_agreeing_token_has_are_suspected() -> None:
    chosen = np.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    assert suspects(np.array([True, True, False, False]), chosen) == (1,)
    assert suspects(np.array([False, True, False, False]), chosen) == ()  # 1 and 2 are in agreeing tokens
    assert suspects(np.array([True] * 4), chosen) == ()  # the shared expert may be at fault
    assert suspects(np.array([False] * 4), chosen) == ()


def test_only_tokens_that_were_compared_are_looked_at_for_experts() -> None:
    name, routes = "model.layers.1.mlp", np.array([[0], [1], [5], [1]], dtype=np.int32)
    fed = {name: difference([1.0, 0.0, 0.0], [1.0] * 3, [0, 1, 3])}
    (module,) = judge(fed, fed, num_layers=2, dtype="fp32", chosen={f"{name}.experts": routes})
    assert module.experts == (0,)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.002, 0.009, 0.002, 0.002], [1]),  # above 4 * 0.002, and above a quarter of 0.031
        ([0.002, 0.0075, 0.0, 0.0], []),  # below a quarter of the bound
        ([0.003, 0.009, 0.003, 0.003], []),  # not four times the median
        ([0.002, 0.04, 0.002, 0.002], []),  # departs
        ([0.002, 0.009, 0.002], []),  # too few layers
    ],
)
def test_a_smaller_difference_may_stand_out_among_the_layers(differences, expected) -> None:
    fed = {f"model.layers.{n}.self_attn": difference([each], [1.0]) for n, each in enumerate(differences)}
    fed |= {"model.norm": difference([0.02], [1.0]), "model.layers.0.mlp.experts": difference([0.0], [4.0])}
    found = judge(fed, fed, num_layers=4, dtype="bf16", chosen={})
    names = [f"model.layers.{n}.self_attn" for n in expected]
    assert [module.name for module in found if module.stands_out] == names
    said = verdict(diagnosis(*found))
    assert ("not as in other layers: model.layers.1.self_attn differs by 9.0e-03, usual is 2.0e-03" in said) == bool(
        names
    )


def test_a_layer_whose_tokens_all_have_other_experts_is_not_compared() -> None:
    name = "model.layers.1.mlp"
    (module,) = judge({name: difference([], [])}, {}, num_layers=2, dtype="fp32", chosen={})
    assert module.difference is None and module.drift is None and not module.departs


# ---- the weights of a module


@pytest.fixture(scope="module")
def hf_names() -> list[str]:
    return [name for entry in build_table(load_shape(TINY_V3)) for name in entry.hf]


def module_of(name: str, experts: tuple[int, ...] = ()) -> Module:
    return Module(name=name, difference=1.0, position=0, drift=1.0, bound=0.1, experts=experts)


def test_every_tensor_of_the_decoder_belongs_to_one_module(hf_names) -> None:
    layers = range(load_shape(TINY_V3).num_layers)
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp.gate", "mlp.experts", "mlp")
    modules = [f"model.layers.{layer}.{part}" for layer in layers for part in parts]
    owned = [
        name
        for module in ("model.embed_tokens", *modules, "model.norm", "lm_head")
        for name in weights_of(module, hf_names)
    ]
    decoder = [name for name in hf_names if not name.startswith(f"model.layers.{len(layers)}.")]
    assert sorted(owned) == sorted(decoder)


def test_layers_are_told_apart_by_their_whole_number() -> None:
    names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (1, 11, 21)]
    assert weights_of("model.layers.1.self_attn", names) == names[:1]


def test_a_suspected_expert_brings_its_own_weights_alone(hf_names) -> None:
    module = module_of("model.layers.1.mlp", experts=(2,))
    expected = [f"model.layers.1.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up", "down")]
    assert weights_behind(module, [module], hf_names) == expected


def test_a_norm_inside_the_trainers_module_counts_as_its_weight(hf_names) -> None:
    attention, norm = module_of("model.layers.0.self_attn"), module_of("model.layers.0.input_layernorm")
    assert norm.name + ".weight" in weights_behind(attention, [attention], hf_names)
    assert norm.name + ".weight" not in weights_behind(attention, [norm, attention], hf_names)


def test_a_tied_head_is_the_embedding() -> None:
    head = module_of("lm_head")
    assert weights_behind(head, [head], ["model.embed_tokens.weight"]) == ["model.embed_tokens.weight"]


# ---- words


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.b", "a.1.b", "a.2.b", "a.5.b"], ["a.0-2,5.b"]),
        (["a.0.x.1", "a.1.x.2"], ["a.0.x.1", "a.1.x.2"]),
        (["a.3.up", "a.3.down", "a.4.up", "a.4.down"], ["a.3-4.up", "a.3-4.down"]),
        (["lm_head"], ["lm_head"]),
        ([], []),
    ],
)
def test_names_that_differ_in_one_number_are_joined(names, expected) -> None:
    assert grouped(names) == expected


def diagnosis(*modules: Module, **others) -> Diagnosis:
    known = {"num_tokens": 3, "dtype": "bf16", "logprob_difference": 0.25, "worst_logprob": 0.5, "fields": {}}
    return Diagnosis(modules=modules, **{**known, "hidden": [0.125], **others})


def test_the_verdict_of_two_that_agree_names_the_largest_difference() -> None:
    near = Module(name="model.norm", difference=0.02, position=0, drift=0.3, bound=0.03)
    far = Module(name="model.layers.0.mlp.experts", difference=0.009, position=0, drift=0.3, bound=0.01)
    first, last = verdict(diagnosis(near, far)).splitlines()
    assert "agree in every module: the largest difference is 9.0e-03, of model.layers.0.mlp.experts" in first
    assert last == "  mean |logprob difference| of the 2 tokens is 0.25, the largest 0.5"


def test_the_verdict_names_the_first_that_departs_and_counts_the_rest() -> None:
    modules = [module_of(f"model.layers.0.{part}") for part in ("self_attn", "mlp")]
    found = verdict(diagnosis(*modules, weights=["a.weight"], unlike=["a.weight"])).splitlines()
    assert found[0].startswith("the first module that departs is model.layers.0.self_attn: from the same input")
    assert found[1:4] == [
        "  its weights: a.weight",
        "  not the same in the two folders: a.weight",
        "  2 modules depart: model.layers.0.self_attn, model.layers.0.mlp",
    ]


def test_the_table_of_a_dense_model_has_no_routes() -> None:
    dense = table(diagnosis(module_of("model.layers.0.self_attn"), module_of("model.layers.0.mlp")))
    assert dense.splitlines()[0].split() == ["attention", "mlp", "drift"]
    assert dense.splitlines()[1].split() == ["layer", "0", "1.0e+00", "*", "1.0e+00", "*", "1.2e-01"]
