"""FP8: what each recipe asks of Megatron, and the numerics of blockwise products against float64."""

from __future__ import annotations

import fp8_emulation as fp8
import pytest
import torch

from megatron_r1.config import ParallelConfig, TrainConfig, load_shape
from megatron_r1.config.schema import FP8Config
from megatron_r1.config.trainer_faults import train_faults
from megatron_r1.recipes.r1_tiny import STUDENT


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(*shape: int, seed: int) -> torch.Tensor:
    """Activations as a transformer has them: a few channels a hundred times the others."""
    values = normal(*shape, seed=seed)
    values[:, 5] *= 100.0
    return values


SHAPES = [(128, 128, 128), (64, 512, 256), (33, 300, 70), (1, 129, 1)]


# ---- the emulation itself, by hand


def test_rounding_by_hand():
    values = torch.tensor([[448.0, 17.0, 1.0625, 2.0**-10, 0.0]])
    rounded, scales = fp8.quantise(values, 1)
    assert scales.unique().tolist() == [1.0]
    # 17 is half-way between 16 and 18, to even; 1.0625 between 1 and 1.125; 2^-10 between 0 and 2^-9.
    assert rounded.tolist() == [[448.0, 16.0, 1.0, 0.0, 0.0]]


def test_a_product_by_hand():
    """Two blocks of one number each: 896 has scale 2 in one, 3 is 448 times 3/448 in the other."""
    left, right = torch.zeros(1, 256), torch.zeros(1, 256)
    left[0, 0], left[0, 200] = 896.0, 3.0
    right[0, 0], right[0, 200] = 0.5, 2.0
    assert fp8.product(left, right).item() == pytest.approx(448.0 + 6.0, rel=1e-6)


# ---- bounds


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("make", [normal, with_outliers])
def test_the_product_stays_within_its_bound(m, k, n, make):
    x, w = make(m, k, seed=1), normal(n, k, seed=2)
    error = (fp8.product(x, w).double() - x.double() @ w.double().T).abs()
    assert (error <= fp8.bound(x, w)).all()
    assert error.max() > 0  # it is rounded at all


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_gradients_stay_within_their_bounds(m, k, n):
    x, w, dy = with_outliers(m, k, seed=3).requires_grad_(), normal(n, k, seed=4).requires_grad_(), normal(m, n, seed=5)
    fp8.Linear.apply(x, w).backward(dy)
    exact_x, exact_w = dy.double() @ w.detach().double(), dy.double().T @ x.detach().double()
    columns, tokens = w.detach().T.contiguous(), x.detach().T.contiguous()
    assert ((x.grad.double() - exact_x).abs() <= fp8.bound(dy, columns)).all()
    assert ((w.grad.double() - exact_w).abs() <= fp8.bound(dy.T.contiguous(), tokens, right_rows=1)).all()


def test_errors_of_many_terms_average_out():
    """The worst case grows with K; the usual error does not: rounding errors of e4m3 are uniform, 2^-4 / sqrt(3) of
    their number at most, in two factors, and independent."""
    x, w = normal(256, 4096, seed=6), normal(256, 4096, seed=7)
    exact = x.double() @ w.double().T
    relative = (fp8.product(x, w).double() - exact).norm() / exact.norm()
    assert relative < 2.0**-4 * (2 / 3) ** 0.5


def test_blocks_keep_what_one_scale_a_tensor_loses():
    """An outlier takes the range of its own block only: the reason for the recipe (paper, section 3.3.2)."""
    x, w = normal(64, 1024, seed=8), normal(64, 1024, seed=9)
    x[0, 0] = 1e6
    exact = x.double() @ w.double().T
    scale = x.abs().max() / fp8.FP8_MAX
    one_scale = ((x / scale).to(fp8.FP8).double() * scale.double()) @ w.double().T
    others = slice(1, None)  # rows without the outlier
    by_tensor = (one_scale[others] - exact[others]).norm() / exact[others].norm()
    by_block = (fp8.product(x, w).double()[others] - exact[others]).norm() / exact[others].norm()
    assert by_tensor > 0.9  # all of them became zero
    assert by_block < 0.06


# ---- the recipes


def shape():
    return load_shape(STUDENT)


def fields(recipe: FP8Config):
    from megatron_r1.model.transformer_config import transformer_config

    train = TrainConfig(dtype="fp8", fp8=recipe)
    return transformer_config(shape(), ParallelConfig(), train, transformer_engine=True)


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "delayed", "mxfp8"])
def test_each_recipe_is_megatrons(recipe):
    found = fields(FP8Config(recipe=recipe, format="hybrid"))
    assert (found.fp8_recipe, found.fp8, found.params_dtype) == (recipe, "hybrid", torch.bfloat16)
    assert not found.fp8_dot_product_attention and not found.fp8_multi_head_attention
    assert found.fp8_amax_history_len == (1024 if recipe == "delayed" else 1)


def test_first_and_last_layers_can_stay_in_bf16():
    found = fields(FP8Config(first_layers_bf16=1, last_layers_bf16=1))
    assert found.first_last_layers_bf16
    assert (found.num_layers_at_start_in_bf16, found.num_layers_at_end_in_bf16) == (1, 1)


def test_the_default_is_deepseeks():
    assert fields(FP8Config()).fp8_recipe == "blockwise" and fields(FP8Config()).fp8 == "e4m3"


@pytest.mark.parametrize(
    ("recipe", "tokens", "said"),
    [
        (FP8Config(), 4100, "train.tokens_per_microbatch is 4100; FP8 needs a multiple of 32 tokens per rank"),
        (FP8Config(recipe="delayed", last_layers_bf16=1), 4096, "keeps no layers in bf16"),
        (FP8Config(first_layers_bf16=99), 4096, "at most the number of layers"),
        (FP8Config(parameters=True), 4096, "train.fp8.parameters is True; Megatron-Core takes the fp32 master weights"),
    ],
)
def test_what_a_recipe_cannot_do_is_refused(recipe, tokens, said):
    from megatron_r1.config import ModelConfig

    train = TrainConfig(dtype="fp8", fp8=recipe, tokens_per_microbatch=tokens)
    faults = train_faults(train, ParallelConfig(), ModelConfig(path=STUDENT), shape())
    assert any(said in fault for fault in faults)


def test_without_transformer_engine_it_is_refused_with_the_reason():
    from megatron_r1.config import ModelConfig
    from megatron_r1.config.packages import has_module

    if has_module("transformer_engine"):
        pytest.skip("Transformer Engine is installed here")
    faults = train_faults(TrainConfig(dtype="fp8"), ParallelConfig(), ModelConfig(path=STUDENT), shape())
    assert len(faults) == 1 and "Transformer Engine is not installed" in faults[0]
